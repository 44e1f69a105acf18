"""Files that are whole at every moment, and tell when they were damaged. Knows nothing of runs, and no torch."""

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from toughen.errors import InputError, first_line

_GONE = "is its disk or mount still there?"
_FIXES = {
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room: the quota is used up",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.EROFS: "mount it for writing",
    errno.EACCES: "see who may write there",
    errno.EPERM: "see who may write there",
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.ENXIO, errno.EIO, errno.ESTALE), _GONE),
    **dict.fromkeys((errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT), _GONE),
}
_SEAL = re.compile(r'(.*?)(?:, )?"([^"]{6})": "([^"]{64})"\}', re.DOTALL)


def refusal(file: Path, error: OSError, *, kept: str = "") -> InputError:
    """Build the error for a file that can't be written: what, why, what is not lost, and the likely fix.

    Args:
        file: Or folder.
        error: What the system said.
        kept: A half sentence about what is there still.
    """
    reason = error.strerror or first_line(error)
    parts = (f"can't write {file}: {reason}", kept, _FIXES.get(error.errno or 0, ""))
    return InputError("; ".join(part for part in parts if part))


@contextmanager
def told(file: Path) -> Iterator[None]:
    """Inside, what keeps ``file`` from being written is an ``InputError``."""
    try:
        yield
    except OSError as error:
        raise refusal(file, error) from None


def write_text(file: Path, text: str) -> None:
    """Write a file so that at every moment either the old or the new content is there, whole, also if power fails.

    Raises:
        InputError: It can't be written; what was there is there still.
    """
    draft = file.with_name(file.name + ".tmp")
    try:
        with draft.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(file)
        sync_folder(file.parent)
    except OSError as error:
        discard(draft)
        raise refusal(file, error, kept="what it held is intact" if file.exists() else "") from None


def discard(file: Path) -> None:
    """Remove a file that nobody needs, where that is possible: on a disk that failed it may not be."""
    try:
        file.unlink(missing_ok=True)
    except OSError:
        return


def sync_folder(folder: Path) -> None:
    """Let the names in a folder survive a loss of power: a rename is on the disk only once its folder is."""
    if os.name != "posix":  # elsewhere folders can't be opened
        return
    place = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(place)
    except OSError as error:
        if error.errno != errno.EINVAL:  # what file systems say that keep no such promise
            raise
    finally:
        os.close(place)


def read_text(file: Path) -> str:
    """Read a file of text.

    Raises:
        InputError: It can't be read, or is damaged.
    """
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is damaged: {error}") from None
    except OSError as error:
        raise InputError(f"can't read {file}: {error.strerror}") from None


# -- JSON objects that carry a checksum of themselves -----------------------------------------------------------------


def sealed(content: Mapping[str, Any], *, indent: int | None = None) -> str:
    """Return a JSON object as text whose last entry is the SHA-256 of all the text before it."""
    text = json.dumps(dict(content), indent=indent).removesuffix("}").rstrip()
    comma = ", " if content else ""
    return f'{text}{comma}"sha256": "{hashlib.sha256(text.encode()).hexdigest()}"}}'


def unsealed(text: str, file: Path) -> dict[str, Any]:
    """Return the JSON object of a text, without its checksum; one that has none, by older versions, is believed.

    Args:
        text: What ``sealed`` returned.
        file: Where it is from, for messages.

    Raises:
        InputError: It is damaged.
    """
    seal = _SEAL.fullmatch(text.strip())
    named = seal is not None and seal[2] == "sha256"
    if seal is not None and (hashlib.sha256(seal[1].encode()).hexdigest() == seal[3]) != named:
        raise InputError(f"{file} is damaged: it is not as it was written (its checksum is of other content)")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is damaged: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise InputError(f"{file} is damaged: it holds no JSON object")
    if named:
        del content["sha256"]
    return content
