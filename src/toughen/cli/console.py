"""Where the command line speaks: results to standard output, everything else to standard error."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout

from rich.console import Console

from toughen import processes
from toughen.errors import one_line

out = Console(width=None if sys.stdout.isatty() else 160)
err = Console(stderr=True)


def note(text: str) -> None:
    """Tell the user something beside the results, in one line."""
    say(f"note: {text}")


def say(text: str) -> None:
    """Write a line to standard error, as it is: the name of a folder may hold what rich takes for markup."""
    err.print(one_line(text), highlight=False, markup=False, soft_wrap=True)


@contextmanager
def first_alone_speaks() -> Iterator[None]:
    """Inside, what the other processes print goes nowhere."""
    with ExitStack() as stack:
        if processes.rank() > 0:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        yield
