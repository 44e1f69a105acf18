"""What a user did wrong, said in one line. Knows nothing of the rest of the package."""

from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin, get_type_hints

_LONGEST = 2000  # letters of a message: what was given may be a whole file


class InputError(ValueError):
    """A mistake in what the user gave: a setting, a file, a name.

    Its message is one line that names what was given, what is allowed and the likely fix.
    The command line prints it without a traceback and exits with status 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class Notice(UserWarning):
    """What a user should know although nothing is wrong; the command line prints it in one line."""


def one_line(text: str) -> str:
    """Return a text as one line of bounded length that a terminal shows as it is.

    Names in it may come from files of anybody's: line ends become spaces, and what a terminal would take for a command
    (escape sequences) is written out.
    """
    line = " ".join(text.splitlines())
    if len(line) > _LONGEST:
        line = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line)


def unknown(what: str, given: str, allowed: Iterable[str], *, hint: str = "") -> InputError:
    """Build the error for a name that is not among the allowed ones, with its nearest match.

    Args:
        what: What was looked up, for example ``"recipe key"``.
        given: The name as the user wrote it.
        allowed: Every name that would have been accepted.
        hint: A closing half sentence, for example where the names are listed.

    Returns:
        The error, to be raised by the caller.
    """
    names = sorted(allowed)
    near = get_close_matches(given, names, n=1, cutoff=0.5)
    guess = f"; did you mean {near[0]!r}?" if near else "."
    listing = ", ".join(names) if len(names) <= 24 else ", ".join(names[:24]) + ", ..."
    return InputError(f"unknown {what} {given!r}{guess} Allowed: {listing or 'none'}{'; ' + hint if hint else ''}")


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its kind if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def check_choices(settings: Any, *, where: str) -> None:
    """Refuse a value that is not among those of its ``Literal`` annotation, for settings made in Python.

    Args:
        settings: A dataclass instance.
        where: What the settings are of, for the message.

    Raises:
        InputError: Names the setting, the value, what is allowed and the nearest match.
    """
    hints = get_type_hints(type(settings))
    for name in (field.name for field in fields(settings)):
        value, hint = getattr(settings, name), hints[name]
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise unknown(f"{where} {name}", str(value), [str(choice) for choice in get_args(hint)])
