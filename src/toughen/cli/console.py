"""Where the command line speaks: results to standard output, everything else to standard error."""

import sys

from rich.console import Console

out = Console(width=None if sys.stdout.isatty() else 160)
err = Console(stderr=True)


def note(text: str) -> None:
    """Tell the user something beside the results, in one line."""
    err.print(f"note: {text}", highlight=False, soft_wrap=True)
