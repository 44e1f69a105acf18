"""The command line: ``toughen VERB``. Parses, calls the package, prints; results to stdout, progress to stderr."""

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from toughen.cli.console import note
from toughen.cli.grammar import make_parser, unrecognized
from toughen.cli.verbs import VERBS
from toughen.engine import Interrupted
from toughen.errors import InputError, Notice


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Where ``torchrun`` started several processes, the first on each machine tells what ended them.

    Returns:
        0 done; 2 the user's mistake, told in one line; 130 stopped by Ctrl-C, with the checkpoint written.
    """
    try:
        options, rest = make_parser(VERBS).parse_known_args(arguments)
        if rest and (options.verb != "train" or any(word.startswith("-") for word in rest)):
            raise unrecognized(rest, options)
        if rest:  # recipe and overrides may stand on both sides of an option
            options.words += rest
        with _notices_told():
            options.run(options)
    except InputError as error:
        _tell(" ".join(str(error).splitlines()))
        return 2
    except BrokenPipeError:  # who read our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes
        return 0
    except OSError as error:  # a full disk, a vanished mount
        print(f"toughen: {error}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt) as stopped:
        _tell(f"stopped. {stopped}".rstrip())
        return 130
    return 0


def _tell(text: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"toughen: {text}", file=sys.stderr)


@contextmanager
def _notices_told() -> Iterator[None]:
    """Inside, what the package wants the user to know is one line on standard error, told once."""
    said: set[str] = set()

    def tell(message: Warning | str, category: type[Warning], *place: Any) -> None:
        if issubclass(category, Notice) and str(message) not in said:
            said.add(str(message))
            note(str(message))
        elif not issubclass(category, Notice):
            shown(message, category, *place)

    with warnings.catch_warnings():
        warnings.simplefilter("always", Notice)
        shown, warnings.showwarning = warnings.showwarning, tell  # type: ignore[assignment]
        yield
