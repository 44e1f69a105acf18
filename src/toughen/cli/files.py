"""The files that a verb is asked to write: refused before the work when they could not be written after it."""

import os
from collections.abc import Callable
from pathlib import Path

from toughen.errors import InputError
from toughen.run_folder import write_text


def check_output(file: str | None, *suffixes: str) -> None:
    """Refuse a file that could not be written, before the work that would fill it."""
    if file is None:
        return
    path = Path(file)
    if not path.parent.is_dir():
        raise InputError(f"can't write {file}: there is no folder {path.parent}")
    if suffixes and path.suffix not in suffixes:
        raise InputError(f"can't write {file}: its name must end in {', '.join(suffixes)}")


def check_folder(folder: str) -> None:
    """Make a folder where there is none, and refuse one that could not be written into, before the work."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"can't write into {folder}: a file is in its place; give a folder with --out") from None
    except OSError as error:
        raise InputError(f"can't write into {folder}: {error.strerror}; choose another --out") from None
    if not os.access(path, os.W_OK):
        raise InputError(f"can't write into {folder}: it is read-only; choose another --out")


def write(file: str, text: str) -> None:
    """Write a text file."""
    write_text(Path(file), text + "\n")


def write_plot(file: str, plot: Callable[[Path], None]) -> None:
    """Let ``plot`` draw into a file."""
    try:
        plot(Path(file))
    except (OSError, ValueError) as error:
        raise InputError(f"can't write plot {file}: {error}") from None
