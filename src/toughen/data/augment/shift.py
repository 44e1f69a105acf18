"""Shifted, mirrored and cut content, zeros around it: whole pixels move, none changes its value."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from toughen import rng
from toughen.data.augment.augmentation import AUGMENTS, Augmentation, draw_below
from toughen.errors import InputError


@AUGMENTS.register("crop")
@dataclass(frozen=True)
class Crop(Augmentation):
    """Crop each image at random from its zero-padded self.

    Args:
        pad: Zeros added on each side, in pixels; the image is shifted by up to that many, in both directions.

    Raises:
        InputError: ``pad`` is negative.
    """

    moves_pixels: ClassVar[bool] = True

    pad: int = 4

    def __post_init__(self) -> None:
        _check_pad(self)

    def __call__(self, images: Tensor, draws: torch.Generator) -> Tensor:
        """See ``Augmentation``."""
        rows, cols = _places(images)
        down, right = _shifts(images, self.pad, draws)
        return _take(images, rows + down, cols + right)


@AUGMENTS.register("flip")
@dataclass(frozen=True)
class Flip(Augmentation):
    """Mirror each image, left to right, with probability 1/2."""

    moves_pixels: ClassVar[bool] = True

    def __call__(self, images: Tensor, draws: torch.Generator) -> Tensor:
        """See ``Augmentation``."""
        mirrored = _mirrored(images, draws)[:, :, None, None]
        return torch.where(mirrored, images.flip(-1), images)


@AUGMENTS.register("crop_flip")
@dataclass(frozen=True)
class CropFlip(Augmentation):
    """``Crop``, then ``Flip``, in one pass: the same images, bit for bit.

    Args:
        pad: As for ``Crop``.

    Raises:
        InputError: ``pad`` is negative.
    """

    moves_pixels: ClassVar[bool] = True

    pad: int = 4

    def __post_init__(self) -> None:
        _check_pad(self)

    def __call__(self, images: Tensor, draws: torch.Generator) -> Tensor:
        """See ``Augmentation``."""
        rows, cols = _places(images)
        down, right = _shifts(images, self.pad, draws)
        cols = torch.where(_mirrored(images, draws), cols.flip(0), cols)
        return _take(images, rows + down, cols + right)


@AUGMENTS.register("crop_shift")
@dataclass(frozen=True)
class CropShift(Augmentation):
    """Keep a random window of each image and put it at a random place, zeros around it (Li & Spratling, 2023).

    The window lacks s pixels, uniform on low..high-1, of which a uniform share is cut from the width and the rest
    from the height. Unlike a padded crop, no image keeps its full size unless s is 0, and position and place are
    independent.

    Args:
        low: Fewest pixels cut, at least 0.
        high: One more than the most pixels cut; at most the shorter side of the images.

    Raises:
        InputError: Not 0 <= ``low`` < ``high``.
    """

    moves_pixels: ClassVar[bool] = True

    low: int = 0
    high: int = 11

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high:
            raise InputError(f"crop_shift has low={self.low} and high={self.high}; it needs 0 <= low < high")

    def __call__(self, images: Tensor, draws: torch.Generator) -> Tensor:
        """See ``Augmentation``.

        Raises:
            InputError: ``high`` exceeds a side of the images.
        """
        batch, _, height, width = images.shape
        if self.high > min(height, width):
            raise InputError(
                f"crop_shift cuts up to {self.high - 1} pixels; images of {height}x{width} allow high <= "
                f"{min(height, width)}: lower it, or use crop"
            )
        lost = rng.rows(partial(torch.randint, self.low, self.high), (batch, 1), generator=draws)
        across = draw_below(lost + 1, draws)
        lost = torch.stack([lost - across, across])  # [2, B, 1]: rows, columns
        start, target = draw_below((lost + 1).expand(2, 2, batch, 1), draws, dim=2)  # in the image, in the result
        length = torch.tensor([height, width])[:, None, None] - lost
        down, along = torch.stack([start, target, length], dim=1).to(images.device, non_blocking=True)
        rows, cols = _places(images)
        return _take(images, _window(rows, *down), _window(cols, *along))


def _check_pad(crop: Crop | CropFlip) -> None:
    if crop.pad < 0:
        raise InputError(f"{AUGMENTS.name_of(type(crop))}'s pad is {crop.pad}; it must be at least 0")


def _places(images: Tensor) -> tuple[Tensor, Tensor]:
    """The rows [H] and columns [W] of the images."""
    height, width = images.shape[-2:]
    return torch.arange(height, device=images.device), torch.arange(width, device=images.device)


def _shifts(images: Tensor, pad: int, draws: torch.Generator) -> Tensor:
    """Down and right, [2, B, 1], from -pad to pad."""
    drawn = rng.rows(partial(torch.randint, 2 * pad + 1), (2, len(images), 1), generator=draws, dim=1)
    return (drawn - pad).to(images.device, non_blocking=True)


def _mirrored(images: Tensor, draws: torch.Generator) -> Tensor:
    """Which images are mirrored, [B, 1]."""
    drawn = rng.rows(partial(torch.randint, 2), (len(images), 1), generator=draws)
    return drawn.bool().to(images.device, non_blocking=True)


def _window(places: Tensor, start: Tensor, target: Tensor, length: Tensor) -> Tensor:
    """Where each place takes its pixel from, [B, side]: ``length`` places from ``target`` on; -1 for the others."""
    inside = (places >= target) & (places < target + length)
    return torch.where(inside, places - target + start, -1)


def _take(images: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Put row ``rows[b, i]`` and column ``cols[b, j]`` of image b at its place (i, j); zeros for what lies outside."""
    batch, channels, height, width = images.shape
    # One row and one column of zeros, behind the last, stand for all that lies outside.
    rows = torch.where((rows >= 0) & (rows < height), rows, height)
    cols = torch.where((cols >= 0) & (cols < width), cols, width)
    framed = F.pad(images, (0, 1, 0, 1)).flatten(2)
    source = (rows[:, :, None] * (width + 1) + cols[:, None, :]).view(batch, 1, height * width)
    return framed.gather(2, source.expand(-1, channels, -1)).view(images.shape)
