"""What an augmentation is, where they are registered, and what their settings and draws have in common."""

import math
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from toughen.errors import InputError
from toughen.registry import Registry
from toughen.rng import rows


@runtime_checkable
class Augmentation(Protocol):
    """Varies a batch of images at random; a frozen dataclass whose fields are its settings.

    All numbers are drawn on the CPU, so that every device sees the same, and move to the images as small tensors.
    No augmentation loops over images or makes the device wait for the host. One that only moves whole pixels, all
    channels alike and however many there are, and fills with 0, may say so: ``moves_pixels = True`` on its class.
    """

    def __call__(self, images: Tensor, draws: torch.Generator) -> Tensor:
        """Return the images, varied.

        Args:
            images: [B, C, H, W], uint8, on any device.
            draws: Generator on the CPU; it alone decides what is done.

        Returns:
            [B, C, H, W], uint8, on the images' device; the given tensor keeps its values.
        """
        ...


AUGMENTS: Registry[type[Augmentation]] = Registry("augmentation")


def moves_pixels(augmentation: Augmentation | type[Augmentation]) -> bool:
    """Return whether each pixel of a result is one of the image's, with its value, or 0; only if its class says so."""
    return bool(getattr(augmentation, "moves_pixels", False))


def draw_below(limits: Tensor, draws: torch.Generator, *, dim: int = 0) -> Tensor:
    """Draw one integer per entry, uniform on 0..limit-1; ``limits`` is integer and at least 1."""
    return (rows(torch.rand, limits.shape, generator=draws, dim=dim, dtype=torch.float64) * limits).long()


def check_ranges(augmentation: Augmentation, ranges: Iterable[str], *, largest: float = float("inf")) -> None:
    """Refuse a pair of settings that is no range of positive numbers.

    Raises:
        InputError: Not 0 < low <= high <= ``largest``.
    """
    for name in ranges:
        given: Any = getattr(augmentation, name)
        if len(given) != 2 or not 0 < given[0] <= given[1] <= largest or not math.isfinite(given[1]):
            bound = "" if largest == float("inf") else f" <= {largest:g}"
            of = AUGMENTS.name_of(type(augmentation))
            raise InputError(f"{of}'s {name} is {given}; it must be a pair (low, high) with 0 < low <= high{bound}")
