"""Blanked boxes: a square of fixed size, or a box of random area and shape."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from toughen.data.augment.augmentation import AUGMENTS, Augmentation, check_ranges, draw_below
from toughen.data.augment.boxes import draw_boxes
from toughen.errors import InputError
from toughen.rng import rows


@AUGMENTS.register("cutout")
@dataclass(frozen=True)
class Cutout(Augmentation):
    """Fill a square with 0 (black), its centre anywhere in the image (DeVries & Taylor, 2017).

    What lies beyond the border is cut off, so less than the whole square may be filled. The authors fill after the
    images are normalised, where 0 is the mean colour; here images are normalised inside the model.

    Args:
        size: Pixels of a side. 16 is the authors' choice for CIFAR-10.

    Raises:
        InputError: ``size`` is below 1.
    """

    moves_pixels: ClassVar[bool] = True

    size: int = 16

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InputError(f"cutout's size is {self.size}; it must be at least 1")

    def __call__(self, images: Tensor, draws: torch.Generator) -> Tensor:
        """See ``Augmentation``."""
        limits = torch.tensor(images.shape[-2:]).expand(len(images), 2)
        corner = draw_below(limits, draws) - self.size // 2
        return _blank(images, torch.cat([corner, torch.full_like(corner, self.size)], dim=1))


@AUGMENTS.register("erase")
@dataclass(frozen=True)
class Erase(Augmentation):
    """Fill a box of random area and shape with 0 (black) (Zhong et al., 2020).

    The distribution is that of torchvision's ``RandomErasing``: the box is smaller than the image in both
    directions, lies inside it, and an image for which none of ten draws fits stays as it is.

    Args:
        p: Probability that an image is erased at all, in [0, 1].
        scale: Range of the area, as a fraction of the image's, in (0, 1].
        ratio: Range of height over width, drawn log-uniformly.

    Raises:
        InputError: A setting is outside its range.
    """

    moves_pixels: ClassVar[bool] = True

    p: float = 0.5
    scale: tuple[float, float] = (0.02, 0.33)
    ratio: tuple[float, float] = (0.3, 3.3)

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise InputError(f"erase's p is {self.p}; a probability lies in [0, 1]")
        check_ranges(self, ["scale"], largest=1)
        check_ranges(self, ["ratio"])

    def __call__(self, images: Tensor, draws: torch.Generator) -> Tensor:
        """See ``Augmentation``."""
        batch, _, height, width = images.shape
        chosen = rows(torch.rand, (batch,), generator=draws) < self.p
        largest = (height - 1, width - 1)
        boxes, _ = draw_boxes(batch, (height, width), largest=largest, scale=self.scale, ratio=self.ratio, draws=draws)
        return _blank(images, boxes * chosen[:, None])


def _blank(images: Tensor, boxes: Tensor) -> Tensor:
    """Fill box b of image b with 0; ``boxes`` [B, 4] (top, left, height, width) may reach beyond the image."""
    height, width = images.shape[-2:]
    top, left, tall, wide = boxes.to(images.device, non_blocking=True).T[:, :, None]  # [B, 1] each
    rows = torch.arange(height, device=images.device)
    cols = torch.arange(width, device=images.device)
    in_rows, in_cols = (rows >= top) & (rows < top + tall), (cols >= left) & (cols < left + wide)
    return images.masked_fill((in_rows[:, :, None] & in_cols[:, None, :])[:, None], 0)
