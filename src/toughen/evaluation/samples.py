"""The samples of an evaluation while it runs: their columns, and how those that are to be attacked form chunks."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from toughen.errors import InputError
from toughen.evaluation.outcomes import EvalResult

CLEAN, STANDS = 0, -1  # codes of ``Samples.fell``; stage i is i + 1


@dataclass
class Samples:
    """The columns of a result while they fill, on the CPU; each [N]. Loss and distance are ``rounded``."""

    index: Tensor
    label: Tensor
    loss: Tensor
    distance: Tensor
    fell: Tensor

    def copy(self) -> "Samples":
        """Return columns of their own, to be filled by one attack."""
        return Samples(self.index, self.label, self.loss.clone(), self.distance.clone(), self.fell.clone())

    @classmethod
    def of(cls, result: EvalResult) -> "Samples":
        """Return the columns of a result that is not complete."""
        codes: dict[str | None, int] = {
            None: STANDS,
            "clean": CLEAN,
            **{stage.name: i + 1 for i, stage in enumerate(result.stages)},
        }
        return cls(
            torch.tensor(result.index),
            torch.tensor(result.label),
            torch.tensor(result.loss, dtype=torch.float64),
            torch.tensor(result.distance, dtype=torch.float64),
            torch.tensor([codes[name] for name in result.fell]),
        )

    def take(self, found: "Found", stage: int) -> None:
        """Enter what a stage found: samples that fell, and worse points of those that stand."""
        where = found.where
        stood = self.fell[where] == STANDS
        broke = found.broke & stood
        worse = broke | (stood & (found.loss > self.loss[where]))
        self.loss[where[worse]] = found.loss[worse]
        self.distance[where[worse]] = found.distance[worse]
        self.fell[where[broke]] = stage + 1


@dataclass(frozen=True)
class Found:
    """What a stage found on a chunk: [B] each, on the CPU. Loss and distance are ``rounded``."""

    where: Tensor
    broke: Tensor
    loss: Tensor
    distance: Tensor


def chunked(
    batches: Iterable[Any], places: Tensor, size: int, *, label: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Iterate over the samples at ``places`` (ascending) in chunks; holds one batch and one chunk at a time.

    Raises:
        InputError: The batches don't hold the same labels, in the order of ``label``, as when they were first seen.
    """
    waiting: list[tuple[Tensor, Tensor, Tensor]] = []
    first = 0
    for x, y, *_ in batches:
        if not torch.equal(y.cpu(), label[first : first + len(y)]):
            raise _other_order(first)
        here = places[(places >= first) & (places < first + len(y))]
        if len(here):
            at = (here - first).to(x.device)
            waiting.append((here, x[at], y[at.to(y.device)]))
        first += len(y)
        while sum(len(here) for here, _, _ in waiting) >= size:
            where, images, labels = (torch.cat(column) for column in zip(*waiting, strict=True))
            yield where[:size], images[:size], labels[:size]
            waiting = [(where[size:], images[size:], labels[size:])] if len(where) > size else []
    if first < len(label):
        raise _other_order(first)
    if waiting:
        where, images, labels = (torch.cat(column) for column in zip(*waiting, strict=True))
        yield where, images, labels


def _other_order(first: int) -> InputError:
    return InputError(
        f"iterated again, the batches don't hold the same samples from sample {first} on: "
        "switch shuffling off, or give a list of batches"
    )


def rounded(values: Tensor) -> Tensor:
    """Return six digits, and no infinity, in float64: what is kept as JSON compares as what never left memory."""
    finite = values.double().clamp(max=torch.finfo(torch.float32).max)
    return torch.tensor([float(f"{value:.6g}") for value in finite.tolist()], dtype=torch.float64)
