"""What goes wrong with numbers while a network trains: gradients that are not finite, robustness that collapses."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor

from toughen import processes
from toughen.durable import told
from toughen.engine import epoch_sums
from toughen.errors import InputError
from toughen.run_folder import RunFolder
from toughen.types import Batch

LOOK_EVERY = 50  # steps between two looks at what the device has found, for each of which the host has to wait
_CLIFF = 0.2  # a loss of robust accuracy that is named in any case, where it is also half of what there was


class FaultWatch:
    """Ends a run in which updates had to be left out, as ``train.nonfinite`` says.

    Args:
        policy: ``"stop"``; or ``"skip"``, which stops only where every update since the last look was left out.
        run: Where the first such batch is kept.
    """

    def __init__(self, policy: Literal["stop", "skip"], run: RunFolder) -> None:
        self.policy, self.run = policy, run
        self._known = 0
        self._looked_at = 0

    def begin(self, sums: Mapping[str, Tensor], step: int) -> None:
        """Begin an epoch, or go on inside one, with what is known by then."""
        self._known, self._looked_at = epoch_sums.left_out(sums), step

    def look(
        self, sums: Mapping[str, Tensor], *, epoch: int, step: int, replays: int, batch_at: Callable[[int], Batch]
    ) -> None:
        """Look at what the device has found.

        Args:
            sums: Of the epoch so far.
            epoch: Epochs done.
            step: Steps done in this one.
            replays: Updates in a step.
            batch_at: Returns the batch of a step of this epoch.

        Raises:
            InputError: The run must not go on.
        """
        left_out, steps = epoch_sums.left_out(sums), step - self._looked_at
        new, self._known, self._looked_at = left_out - self._known, left_out, step
        if not new or (self.policy == "skip" and new < steps * replays):
            return
        first = epoch_sums.first_left_out(sums)
        file = self.run.path / "faults" / f"epoch_{epoch:04d}_step_{first:06d}.safetensors"
        _keep(batch_at(first), file)
        skipping = "" if self.policy == "skip" else ", or leave such batches out: train.nonfinite=skip"
        before = f", and the checkpoint from before in {self.run.checkpoints}" if self._has_checkpoint() else ""
        raise InputError(
            f"the gradient is not finite in epoch {epoch + 1}, step {first + 1} ({left_out} updates left out so far);"
            f" lower train.lr{skipping}. The batch is kept in {file}{before}"
        )

    def _has_checkpoint(self) -> bool:
        return any(self.run.checkpoints.glob("*"))  # also where it has vanished


def _keep(batch: Batch, file: Path) -> None:
    """Write a batch for inspection, with the rows of all processes."""
    mine = {"x": batch.x, "y": batch.y, "index": batch.index}
    everyones = processes.gathered({name: value.cpu() for name, value in mine.items() if value is not None})
    whole = {name: torch.cat([one[name] for one in everyones]).contiguous() for name in everyones[0]}

    def write() -> None:
        with told(file):
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(save(whole))

    processes.by_first(write)


def check_finite(means: Mapping[str, float], *, epoch: int, run: RunFolder) -> None:
    """Refuse to go on with a loss that is not a number.

    Raises:
        InputError: Names the terms.
    """
    if not all(math.isfinite(value) for value in means.values()):
        terms = ", ".join(f"{name} {value:.3g}" for name, value in means.items())
        raise InputError(
            f"the loss is not finite in epoch {epoch + 1} ({terms}); lower train.lr. "
            f"The checkpoint from before is kept in {run.checkpoints}"
        )


def collapse(log: Sequence[Mapping[str, Any]], row: Mapping[str, Any], *, max_drop: float | None) -> str | None:
    """Say how robust accuracy fell off a cliff since the validation before, or None if it did not.

    That is catastrophic overfitting, as single-step training knows it (Wong et al. 2020).

    Args:
        log: The rows of earlier epochs.
        row: The row of this one.
        max_drop: The fall, in [0, 1], that counts; None counts one by more than 0.2 to less than half.
    """
    measured = [past["validation"]["robust"] for past in (*log, row) if "validation" in past]
    if "validation" not in row or len(measured) < 2:
        return None
    before, now = measured[-2:]
    deep = before - now > max_drop if max_drop is not None else before - now > _CLIFF and now < before / 2
    return f"robust validation accuracy fell from {before:.3f} to {now:.3f}" if deep else None
