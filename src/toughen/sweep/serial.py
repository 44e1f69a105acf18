"""The runs of a sweep one after another in this process: what Ray is not needed for, and what fits into minutes."""

import os
import signal
import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from toughen.engine import Trainer
from toughen.errors import InputError
from toughen.processes import sigterm_interrupts
from toughen.run_folder import RunFolder
from toughen.sweep.grid import Run, Sweep
from toughen.sweep.store import Progress, SweepFolder


def train_serially(sweep: Sweep, folder: SweepFolder, *, say: Callable[[Run, str], None]) -> list[Progress]:
    """Train what is not finished yet, and keep ``sweep.json`` up to date.

    Args:
        sweep: What to train.
        folder: Where.
        say: Told of a run, before it begins, about how long it takes; and why it can't be trained.

    Returns:
        The runs; one that was refused is ``"failed"``, with a message, and the others go on.

    Raises:
        InputError: The folder can't be written to, or holds other runs under these names.
        Interrupted: The process was asked to stop; the run at work has written its checkpoint.
    """
    with folder.held():
        runs = folder.lay_out(sweep)
        left = [one for one in runs if one.state == "waiting"]
        for number, one in enumerate(left, start=1):
            say(one.run, f"next, {number} of {len(left)}: {one.run.name}, {_left_to_do(one, runs)}")
            try:
                begun = one.folder.config_file.is_file()
                Trainer(one.run.recipe, out=one.folder.path, resume=begun).fit()
                one.state = "finished"
            except InputError as error:
                one.state, one.message = "failed", str(error)
                say(one.run, f"{one.run.name} can't be trained: {error}")
            folder.write(sweep, runs)
    return runs


@contextmanager
def stopped_after(minutes: float | None) -> Iterator[None]:
    """Ask the work inside to stop, as SIGTERM does, once the time is over; None never does.

    Raises:
        InputError: There is no time at all.
    """
    if minutes is not None and not minutes > 0:
        raise InputError(f"--minutes is {minutes:g}; it must be above 0")
    with sigterm_interrupts():
        if minutes is None:
            yield
            return
        clock = threading.Timer(60 * minutes, os.kill, (os.getpid(), signal.SIGTERM))
        clock.daemon = True
        clock.start()
        try:
            yield
        finally:
            clock.cancel()


def _left_to_do(one: Progress, runs: Sequence[Progress]) -> str:
    """Say how many epochs a run has yet to train, and how long runs of the same network on the same images took."""
    epochs = one.run.epochs - sum(len(part.log()) for part in _parts(one))
    alike = [other for other in runs if (other.run.recipe.model, other.run.recipe.data) == _kind(one)]
    seconds = [row["seconds"] for other in alike for part in _parts(other) for row in part.log()]
    if not seconds:
        return f"{epochs} epochs"
    return f"{epochs} epochs, about {epochs * statistics.median(seconds) / 60:.1f} minutes"


def _kind(one: Progress) -> tuple[object, object]:
    return one.run.recipe.model, one.run.recipe.data


def _parts(one: Progress) -> list[RunFolder]:
    """The run and its branches, of what there is yet."""
    if not one.folder.config_file.is_file():
        return []
    return [one.folder, *one.folder.branches()]
