"""Weakness (Eq. 2): how far a layer's features move under a perturbation; streamed in float64, mergeable."""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from toughen import processes

WeaknessNorm = Literal["dim", "rms", "none", "relative"]
Expectation = Literal["mean", "rms"]


def weakness(clean: Tensor, adversarial: Tensor, *, norm: WeaknessNorm = "dim") -> Tensor:
    """Measure how far one layer's features move, per sample.

    Eq. 2 before the expectation: ||F_i(x + delta) - F_i(x)||_2 / N_i. The paper takes the supremum over delta for
    each layer; here one delta is given for all layers (section 3.1), so this is a lower bound.

    Args:
        clean: F_i(x), [B, ...], any float type; reduced in float64.
        adversarial: F_i(x + delta), the same shape.
        norm: ``"dim"`` divides by N_i (Eq. 2), ``"rms"`` by sqrt(N_i), ``"none"`` by 1, ``"relative"`` by the length of
            F_i(x).

    Returns:
        [B], float64, non-negative, in feature units (not comparable between layers until divided, Eq. 3).

    Raises:
        ValueError: The shapes differ, or a sample has no features.
    """
    if clean.shape != adversarial.shape or clean[0].numel() == 0:
        raise ValueError(f"features of shapes {tuple(clean.shape)} and {tuple(adversarial.shape)} can't be compared")
    return _length(adversarial.double() - clean) / _size(clean, norm)


def _size(feature: Tensor, norm: WeaknessNorm) -> Tensor | float:
    num_features = feature[0].numel()
    if norm == "relative":
        return _length(feature.double()).clamp_min(1e-300)
    return {"dim": float(num_features), "rms": math.sqrt(num_features), "none": 1.0}[norm]


def _length(difference: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(difference.flatten(1), dim=1)
    return length


class WeaknessSums:
    """Running sums of per-sample values for a fixed list of layers: memory does not grow with images or depth.

    Args:
        names: Qualified names of the layers, in order.
        expectation: ``"mean"`` averages the per-sample values (Eq. 2); ``"rms"`` is the root of their mean square,
            which is the norm over the batch taken as one tensor.
    """

    def __init__(self, names: Iterable[str], *, expectation: Expectation = "mean") -> None:
        self.names = tuple(names)
        self.power = 1 if expectation == "mean" else 2
        self.sums = {name: torch.zeros((), dtype=torch.float64) for name in self.names}
        self.counts = dict.fromkeys(self.names, 0)

    def add(self, name: str, values: Tensor) -> None:
        """Add the per-sample values [B] of one layer; nothing is read back to the host here."""
        self.sums[name] = self.sums[name].to(values.device) + values.double().pow(self.power).sum()
        self.counts[name] += values.numel()

    def merge_processes(self) -> None:
        """Add up the sums of all processes, so that every one of them sees the same numbers."""
        if processes.count() == 1:
            return
        mine = [(float(self.sums[name]), self.counts[name]) for name in self.names]
        everyones = zip(*processes.gathered(mine), strict=True)
        for name, parts in zip(self.names, everyones, strict=True):
            self.sums[name] = torch.tensor(math.fsum(total for total, _ in parts), dtype=torch.float64)
            self.counts[name] = sum(count for _, count in parts)

    def means(self) -> dict[str, float]:
        """Return the expectation for each layer; NaN for one that saw no sample."""
        values = torch.stack([self.sums[name].cpu() for name in self.names])
        counts = torch.tensor([self.counts[name] for name in self.names], dtype=torch.float64)
        return dict(zip(self.names, (values / counts).pow(1 / self.power).tolist(), strict=True))
