"""How a benchmark ends: what its user did wrong is told in one line, and a stop is no error."""

import argparse
import sys
from collections.abc import Callable

from toughen.engine import Interrupted
from toughen.errors import InputError


def told(main: Callable[[], None]) -> int:
    """Return the exit status of ``main``: 0 done, 2 the user's mistake, 130 stopped by Ctrl-C."""
    try:
        main()
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt):
        print("stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    return 0


def positive(text: str) -> int:
    """Parse the number of something that there must be one of."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too small; it must be at least 1")
    return number
