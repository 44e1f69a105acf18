"""Random boxes inside an image, as torchvision's RandomErasing and RandomResizedCrop draw them, a batch at a time."""

import math

import torch
from torch import Tensor

from toughen.data.augment.augmentation import draw_below
from toughen.rng import rows

_TRIES = 10


def draw_boxes(
    count: int,
    size: tuple[int, int],
    *,
    largest: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    draws: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Draw boxes of random area, shape and place.

    The area is uniform, the ratio log-uniform, and the first of ten such pairs that fits is taken. All ten are
    drawn for every box, so that how many numbers are drawn never depends on their values.

    Args:
        count: How many boxes.
        size: Height and width of the image, in pixels.
        largest: Largest height and width of a box; the smallest is 1.
        scale: Range of the area, as a fraction of the image's, before the sides are rounded to pixels.
        ratio: Range of height over width.
        draws: Generator on the CPU.

    Returns:
        boxes: [count, 4], int64, on the CPU: top, left, height, width. Where none of the ten fits, an empty box.
        fits: [count], bool: whether one of the ten did.
    """
    uniform = rows(torch.rand, (2, count, _TRIES), generator=draws, dim=1, dtype=torch.float64)
    area = size[0] * size[1] * (scale[0] + uniform[0] * (scale[1] - scale[0]))
    log_ratio = math.log(ratio[0]) + uniform[1] * (math.log(ratio[1]) - math.log(ratio[0]))
    sides = torch.stack([area * log_ratio.exp(), area / log_ratio.exp()]).sqrt().round().long()  # [2, count, tries]
    fit = (sides >= 1).all(dim=0) & (sides[0] <= largest[0]) & (sides[1] <= largest[1])
    first = fit.int().argmax(dim=1)
    fits = fit.any(dim=1)
    sides = torch.where(fits, sides[:, torch.arange(count), first], 0)
    corner = draw_below(torch.tensor(size)[:, None] - sides + 1, draws, dim=1)
    return torch.cat([corner, sides]).T, fits
