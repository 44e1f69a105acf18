"""The words that every other module speaks: threat model, batch, adversarial batch, step output."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from toughen.errors import InputError

Norm = Literal["linf", "l2"]


@dataclass(frozen=True, kw_only=True)
class ThreatModel:
    """The perturbations that an adversary may add: a norm ball of radius ``eps``, inside the image box.

    Args:
        norm: ``"linf"`` (largest change of any pixel) or ``"l2"`` (Euclidean length over the image).
        eps: Radius, in pixel units of ``bounds``; 0 allows no change.
        bounds: Smallest and largest pixel value.

    Raises:
        InputError: Unknown norm, negative or non-finite eps, an l_inf eps beyond the range of pixels, empty bounds.
    """

    norm: Norm = "linf"
    eps: float
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):
            raise InputError(f"unknown norm {self.norm!r}; allowed: linf, l2")
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise InputError(f"eps is {self.eps!r}; it must be a finite number >= 0, in pixel units of [0, 1]")
        if not self.bounds[0] < self.bounds[1]:
            raise InputError(f"bounds are {self.bounds}; the first must be below the second")
        if self.norm == "linf" and self.eps > self.bounds[1] - self.bounds[0]:
            raise InputError(
                f"eps is {self.eps:g}, more than the whole range of {list(self.bounds)}; did you mean {self.eps:g}/255?"
            )


class Batch(NamedTuple):
    """A minibatch.

    Attributes:
        x: [B, C, H, W], float, in [0, 1].
        y: [B], int64; -1 is an image without a label.
        index: [B], int64, place in the data set; None where nobody counts.
        source: [B, H, W], int64: from which pixel (row * W + column) of the stored image each pixel was moved here by
            augmentation, -1 for a pixel that has none; None where nobody asked for it.
        start: [B, C, H, W], where attacks begin to search; None leaves that to the attack.
    """

    x: Tensor
    y: Tensor
    index: Tensor | None = None  # type: ignore[assignment]  # the field's word wins over tuple.index
    source: Tensor | None = None
    start: Tensor | None = None


Batches = Iterable[Batch | tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Features:
    """What a (possibly truncated) forward yields.

    Attributes:
        values: The reduced feature of each requested layer, by qualified name.
        logits: [B, K], or None when the forward stopped early.
    """

    values: Mapping[str, Tensor]
    logits: Tensor | None


class AdversarialBatch(NamedTuple):
    """A clean batch and its perturbed images, detached, of the shape of ``batch.x``.

    Attributes:
        batch: The clean images.
        x_adv: Their perturbed form.
        inner: What an inner method asked for, when an outer one perturbs differently and needs both.
        second: Further images of that shape that the loss needs, for example GradAlign's random point.
        clean: The pass of the clean images, with its gradient, where attack and loss share one.
    """

    batch: Batch
    x_adv: Tensor
    inner: "AdversarialBatch | None" = None
    second: Tensor | None = None
    clean: Features | None = None

    def elsewhere(self) -> "AdversarialBatch":
        """Return the images alone, for a loss at other weights or statistics than those that they were found with."""
        return self._replace(inner=None if self.inner is None else self.inner.elsewhere(), clean=None)


@dataclass(slots=True)
class StepOutput:
    """What one training step computes: the loss to differentiate, and its named parts for the log, detached."""

    loss: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)


def check_images(x: Tensor, bounds: tuple[float, float]) -> None:
    """Refuse images with NaN or infinite pixels, or outside the bounds.

    Raises:
        InputError: Says which, and the likely fix.
    """
    if not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).flatten(1).any(dim=1).nonzero()[0])
        raise InputError(f"image {bad} of a batch has NaN or infinite pixels; clean the data first")
    low, high = float(x.min()), float(x.max())
    if low < bounds[0] - 1e-6 or high > bounds[1] + 1e-6:
        raise InputError(
            f"images range from {low:.4g} to {high:.4g}, outside {list(bounds)}; "
            "normalisation (mean, std) belongs inside the model"
        )
