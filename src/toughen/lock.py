"""One writer at a time: a lock that the system takes back when the process that holds it ends, however it ends."""

import os
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from toughen.durable import discard, refusal
from toughen.errors import InputError, Notice

if sys.platform != "win32":
    import fcntl

_PATIENCE = 10.0  # seconds: processes that a killed owner had started may hold its lock until they notice


@contextmanager
def locked(file: Path, *, what: str) -> Iterator[None]:
    """Inside, nobody else is inside with the same file; it tells who is, and is gone afterwards.

    Args:
        file: In a folder that exists.
        what: What is written under this lock, for messages.

    Raises:
        InputError: Another one is inside, here or on another machine, or the file can't be written.
    """
    stream = _acquired(file, what)
    try:
        yield
    finally:
        # while it is still locked: later it could be the file of somebody else
        if _names(file, stream):
            discard(file)
        stream.close()


def _acquired(file: Path, what: str) -> IO[str]:
    end = time.monotonic() + _PATIENCE
    while True:
        stream = _opened(file)
        if _lock(stream, file):
            if _names(file, stream):  # it was not removed between opening and locking
                _sign(stream, file)
                return stream
            stream.close()
            continue
        owner = stream.read().split()
        stream.close()
        if not _ended(owner) or time.monotonic() > end:
            by = f"process {owner[0]} on {owner[1]}" if len(owner) == 2 else "another process"
            raise InputError(f"{what} is being written by {by}; wait until it ends, or stop it")
        time.sleep(0.1)


def _opened(file: Path) -> IO[str]:
    try:
        return open(os.open(file, os.O_RDWR | os.O_CREAT, 0o666), "r+", encoding="utf-8", errors="replace")
    except OSError as error:
        raise refusal(file, error) from None


def _lock(stream: IO[str], file: Path) -> bool:
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        message = f"{file} can't be locked ({error.strerror}); make sure that no other process writes this run"
        warnings.warn(message, Notice, stacklevel=6)
    return True


def _sign(stream: IO[str], file: Path) -> None:
    try:
        stream.truncate(0)
        stream.write(f"{os.getpid()} {socket.gethostname()}\n")
        stream.flush()
    except OSError as error:
        discard(file)
        raise refusal(file, error) from None


def _names(file: Path, stream: IO[str]) -> bool:
    """Whether the path still leads to the file that is open."""
    try:
        return os.path.samestat(os.stat(file), os.fstat(stream.fileno()))
    except OSError:
        return False


def _ended(owner: list[str]) -> bool:
    """Whether the owner was a process of this machine, and is no more."""
    if len(owner) != 2 or owner[1] != socket.gethostname() or not owner[0].isdigit():
        return False
    try:
        os.kill(int(owner[0]), 0)
    except ProcessLookupError:
        return True
    except OSError:  # it is, and belongs to somebody else
        return False
    return False
