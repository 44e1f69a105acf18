"""One attempt at a run of a sweep: ``toughen train`` in a process of its own, begun or resumed.

Sent to Ray's processes as it is, so it must know nothing but Python: they need not import torch only to wait.
"""

import fcntl
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import BinaryIO, Literal

_LOOK_EVERY = 0.2  # seconds
_PATIENCE = 600.0  # seconds that an orphan of a killed sweep has to end: it stops after its step, or its epoch's end
_GRACE = 120.0  # seconds that a run has for its checkpoint once it is asked to stop; an epoch's end may take long


@dataclass(frozen=True)
class Attempt:
    """What a machine is given to do. All files are absolute.

    Attributes:
        begin: Words behind ``python`` that begin the run.
        resume: Words that go on with it.
        begun: The file that is there once there is something to go on with.
        finished: The file that is there once the run is complete.
        output: The file that takes what the run prints.
        owner: The file in which a run at work says which process it is, and where.
        directory: Where the sweep was started, and relative paths begin.
        environment: Variables to set.
    """

    begin: tuple[str, ...]
    resume: tuple[str, ...]
    begun: str
    finished: str
    output: str
    owner: str
    directory: str
    environment: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: ``"died"`` may be tried again, ``"refused"`` would end the same way."""

    how: Literal["finished", "refused", "stopped", "died"]
    message: str = ""


def make(attempt: Attempt) -> Outcome:
    """Train a run to its end, or until this process is asked to stop by a ``KeyboardInterrupt``.

    The run's process holds the lock of its log for as long as it lives, also where this one is killed: a run is never
    at work twice. And it stops as soon as this process is gone, with its checkpoint written.
    """
    for place in (attempt.directory, os.path.dirname(attempt.output)):
        if not os.path.isdir(place):
            return Outcome("refused", f"a machine sees no {place}; all need one file system, under the same paths")
    try:
        with open(attempt.output, "ab") as output:
            end = time.monotonic() + _PATIENCE
            while not locked(output.fileno()):  # an orphan of a killed sweep, which is about to stop
                if time.monotonic() > end:
                    return Outcome("refused", f"{_owner(attempt)} has not let go of it; stop that, and sweep again")
                time.sleep(_LOOK_EVERY)
            if os.path.exists(attempt.finished):
                return Outcome("finished")
            return _run(attempt, output)
    except KeyboardInterrupt:
        return Outcome("stopped")


def locked(file: int) -> bool:
    """Take the lock of an open file, unless another process has it; where the file system knows no locks, go on."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _owner(attempt: Attempt) -> str:
    """Say who is at work on a run."""
    try:
        with open(attempt.owner, encoding="utf-8") as file:
            process, machine = file.read().split()
    except (OSError, ValueError):  # it has ended, and left another process that it had begun
        return f"a process that writes {attempt.output}"
    return f"process {process} on {machine}"


def _run(attempt: Attempt, output: BinaryIO) -> Outcome:
    began = output.tell()
    words = attempt.resume if os.path.exists(attempt.begun) else attempt.begin
    process = subprocess.Popen(  # noqa: S603
        [sys.executable, *words],
        cwd=attempt.directory,
        env={**os.environ, **dict(attempt.environment)},
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
    )
    try:
        while process.poll() is None:
            time.sleep(_LOOK_EVERY)
    except KeyboardInterrupt:
        _stop(process)
        return Outcome("finished" if os.path.exists(attempt.finished) else "stopped")
    finally:
        _stop(process)
    return _outcome(process.returncode, attempt, since=began)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask for the checkpoint by closing the pipe; what does not end is killed, and loses an epoch at most."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _outcome(status: int, attempt: Attempt, *, since: int) -> Outcome:
    if os.path.exists(attempt.finished):
        return Outcome("finished")
    with open(attempt.output, "rb") as output:
        output.seek(since)
        lines = [line.strip() for line in output.read().decode(errors="replace").splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    if status == 2:
        return Outcome("refused", last.removeprefix("toughen: "))
    if status < 0:
        return Outcome("died", f"killed by {signal.Signals(-status).name}")
    return Outcome("died", f"exit status {status}: {last}".removesuffix(": "))
