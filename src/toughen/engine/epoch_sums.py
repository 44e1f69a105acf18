"""What an epoch adds up on the device: the loss and its terms over the updates made, and how many were left out."""

from collections.abc import Mapping

import torch
from torch import Tensor

from toughen import processes

_LEFT_OUT, _FIRST = "updates left out", "step of the first one, from 1"


def add(sums: dict[str, Tensor], terms: Mapping[str, Tensor], *, step: int, replays: int) -> None:
    """Add what an update returned; nothing is read back to the host here.

    Args:
        sums: Of the epoch so far; changed.
        terms: From ``Updater.update``, ``spoiled`` among them.
        step: The step that the update belongs to.
        replays: How many updates a step has.
    """
    spoiled = terms["spoiled"]
    before = sums.get(_LEFT_OUT, torch.zeros_like(spoiled))
    found = {n: torch.where(spoiled > 0, 0.0, value / replays) for n, value in terms.items() if n != "spoiled"}
    found |= {_LEFT_OUT: spoiled, _FIRST: torch.where(before == 0, spoiled * (step + 1), 0.0)}
    for name, value in found.items():
        sums[name] = sums[name] + value if name in sums else value


def left_out(sums: Mapping[str, Tensor]) -> int:
    """Return how many updates were left out, because their gradient was not finite."""
    return int(sums[_LEFT_OUT]) if sums else 0


def first_left_out(sums: Mapping[str, Tensor]) -> int:
    """Return the step of the first of them."""
    return int(sums[_FIRST]) - 1


def means(sums: Mapping[str, Tensor], *, steps: int, replays: int) -> dict[str, float]:
    """Return the means of the terms over the updates made, in all processes."""
    made = max(steps - left_out(sums) / replays, 1)
    return {n: processes.mean(float(total)) / made for n, total in sums.items() if n not in (_LEFT_OUT, _FIRST)}


def of_all(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the sums as each process may go on with them when it resumes: the mean of what they have."""
    return {name: torch.full_like(total, processes.mean(float(total))) for name, total in sums.items()}
