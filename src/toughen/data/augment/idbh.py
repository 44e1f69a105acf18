"""IDBH (Li & Spratling, 2023): augmentations chosen for adversarial training, on CIFAR-10 and on SVHN.

Names and numbers: the authors' repository TreeLLi/DA-Alone-Improves-AT, ``src/data/idbh.py``. They work on PIL images;
here the operations are torchvision's for tensors, whose values differ from those by at most a few levels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from toughen.data.augment.augmentation import AUGMENTS, Augmentation
from toughen.data.augment.erasing import Erase
from toughen.data.augment.shift import CropShift, Flip
from toughen.errors import InputError, check_choices
from toughen.rng import rows

_Operation = Literal["saturation", "brightness", "contrast", "sharpness", "autocontrast", "equalize", "shear", "rotate"]


class _Choice(NamedTuple):
    """An operation, how often it is chosen, and the range of its strength."""

    name: _Operation
    p: float
    low: float = 0.0
    high: float = 0.0


_CHOICES: dict[str, tuple[_Choice, ...]] = {
    "colour": (
        _Choice("saturation", 0.125, 0.1, 1.9),
        _Choice("brightness", 0.125, 0.5, 1.9),
        _Choice("contrast", 0.125, 0.5, 1.9),
        _Choice("sharpness", 0.125, 0.1, 1.9),
        _Choice("autocontrast", 0.125),
        _Choice("equalize", 0.125),
        _Choice("shear", 0.125, 0.05, 0.15),
        _Choice("rotate", 0.125, 1, 11),
    ),
    "shape": (
        _Choice("saturation", 0.08, 0.1, 1.9),
        _Choice("brightness", 0.08, 0.5, 1.9),
        _Choice("contrast", 0.04, 0.5, 1.9),
        _Choice("sharpness", 0.08, 0.1, 1.9),
        _Choice("autocontrast", 0.04),
        _Choice("equalize", 0.08),
        _Choice("shear", 0.3, 0.05, 0.35),
        _Choice("rotate", 0.3, 1, 31),
    ),
}


@AUGMENTS.register("colour_shape")
@dataclass(frozen=True)
class ColourShape(Augmentation):
    """Apply one of eight operations to each image, at a random strength.

    Saturation, brightness, contrast and sharpness (the strength is a factor), autocontrast, equalize, shear (in
    radians, along rows or columns, in either direction), rotation (whole degrees, in either direction). Shear and
    rotation take the nearest pixel, and 0 (black) from outside.

    Args:
        bias: ``"colour"``: all eight equally often; shears of 0.05 to 0.15, rotations of 1 to 10 degrees.
            ``"shape"``: shear and rotation with probability 0.3 each; up to 0.35, and up to 30 degrees.

    Raises:
        InputError: Unknown bias.
    """

    bias: Literal["colour", "shape"] = "colour"

    def __post_init__(self) -> None:
        check_choices(self, where="colour_shape")

    def __call__(self, images: Tensor, draws: torch.Generator) -> Tensor:
        """See ``Augmentation``.

        Raises:
            InputError: The images have neither 1 nor 3 channels.
        """
        batch, channels = images.shape[:2]
        if channels not in (1, 3):
            raise InputError(f"colour_shape was given images of {channels} channels; it needs grey (1) or RGB (3)")
        choices = _CHOICES[self.bias]
        bounds = torch.tensor([choice.p for choice in choices], dtype=torch.float64).cumsum(0)[:-1]
        which = torch.bucketize(rows(torch.rand, (batch,), generator=draws, dtype=torch.float64), bounds, right=True)
        strength = rows(torch.rand, (batch,), generator=draws, dtype=torch.float64)
        sign = 1 - 2 * rows(partial(torch.randint, 2), (batch,), generator=draws)
        along_rows = rows(partial(torch.randint, 2), (batch,), generator=draws)
        # Decided on the host: images of one operation become neighbours, and the device waits for nothing.
        order = which.argsort(stable=True)
        sizes = which.bincount(minlength=len(choices)).tolist()
        groups = torch.split(images[order.to(images.device, non_blocking=True)], sizes)
        drawn = torch.split(torch.stack([strength, sign, along_rows], dim=1)[order], sizes)
        done = [
            _apply(choice, group, *numbers.unbind(1)) if len(group) else group
            for choice, group, numbers in zip(choices, groups, drawn, strict=True)
        ]
        return torch.cat(done)[order.argsort().to(images.device, non_blocking=True)]


class _IDBH(Augmentation):
    """Mirror, cut and shift, change colour or shape, erase; for images of 1 or 3 channels."""

    _parts: ClassVar[Sequence[Augmentation]]

    def __call__(self, images: Tensor, draws: torch.Generator) -> Tensor:
        """See ``Augmentation``."""
        for part in self._parts:
            images = part(images, draws)
        return images


@AUGMENTS.register("idbh_weak")
@dataclass(frozen=True)
class IDBHWeak(_IDBH):
    """``Flip``, ``CropShift``, ``ColourShape``, and ``Erase`` on half of the images, of at least 11 pixels a side."""

    _parts = (Flip(), CropShift(), ColourShape(), Erase(p=0.5))


@AUGMENTS.register("idbh_strong")
@dataclass(frozen=True)
class IDBHStrong(_IDBH):
    """``IDBHWeak`` with ``Erase`` on every image."""

    _parts = (Flip(), CropShift(), ColourShape(), Erase(p=1))


@AUGMENTS.register("idbh_svhn")
@dataclass(frozen=True)
class IDBHSVHN(_IDBH):
    """The authors' choice for SVHN: smaller cuts, more and stronger changes of shape, larger erased boxes."""

    _parts = (Flip(), CropShift(0, 9), ColourShape("shape"), Erase(p=1, scale=(0.02, 0.5)))


def _apply(choice: _Choice, images: Tensor, strength: Tensor, sign: Tensor, along_rows: Tensor) -> Tensor:
    """Apply one operation; ``strength`` in [0, 1), ``sign`` -1 or 1 and ``along_rows`` 0 or 1 are [B], on the CPU."""
    # Here, because torchvision takes seconds to import and no other augmentation needs it.
    from toughen.data.augment import affine, colour

    strength = choice.low + strength * (choice.high - choice.low)
    match choice.name:
        case "saturation":
            return colour.saturation(images, strength)
        case "brightness":
            return colour.brightness(images, strength)
        case "contrast":
            return colour.contrast(images, strength)
        case "sharpness":
            return colour.sharpness(images, strength)
        case "autocontrast":
            return colour.autocontrast(images)
        case "equalize":
            return colour.equalize(images)
        case "shear":
            angle = strength * sign
            return affine.shear(images, angle * along_rows, angle * (1 - along_rows))
        case "rotate":
            return affine.rotate(images, (strength.floor() * sign).deg2rad())
