"""A random part of each image at the size of the whole."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from toughen.data.augment.augmentation import AUGMENTS, Augmentation, check_ranges
from toughen.data.augment.boxes import draw_boxes


@AUGMENTS.register("resized_crop")
@dataclass(frozen=True)
class ResizedCrop(Augmentation):
    """Crop a box of random area and shape and stretch it to the image's size (Szegedy et al., 2015).

    The distribution is that of torchvision's ``RandomResizedCrop``. Where images are decoded when they are needed,
    the decoder crops from the original picture (``box``); a batch is cropped by bilinear interpolation.

    Args:
        scale: Range of the area, as a fraction of the image's, in (0, 1].
        ratio: Range of width over height, drawn log-uniformly.

    Raises:
        InputError: A range is empty or holds numbers that make no box.

    Example:
        >>> ResizedCrop(scale=(1, 1), ratio=(1, 1)).box(24, 24, torch.Generator())
        (0, 0, 24, 24)
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        check_ranges(self, ["scale"], largest=1)
        check_ranges(self, ["ratio"])

    def box(self, height: int, width: int, draws: torch.Generator) -> tuple[int, int, int, int]:
        """Draw one box: top, left, height, width, in pixels, inside an image of ``height`` x ``width``."""
        top, left, tall, wide = self.boxes(1, height, width, draws)[0].tolist()
        return top, left, tall, wide

    def boxes(self, count: int, height: int, width: int, draws: torch.Generator) -> Tensor:
        """Draw a box per image, for images of one size.

        Where none of ten draws fits, the box is the largest in the middle whose ratio is allowed.

        Returns:
            [count, 4], int64, on the CPU: top, left, height, width.
        """
        boxes, fits = draw_boxes(
            count,
            (height, width),
            largest=(height, width),
            scale=self.scale,
            ratio=(1 / self.ratio[1], 1 / self.ratio[0]),
            draws=draws,
        )
        return torch.where(fits[:, None], boxes, torch.tensor(self._middle(height, width)))

    def __call__(self, images: Tensor, draws: torch.Generator) -> Tensor:
        """See ``Augmentation``."""
        batch, _, height, width = images.shape
        boxes = self.boxes(batch, height, width, draws).float().to(images.device, non_blocking=True)
        top, left, tall, wide = boxes.T[:, :, None]  # [B, 1] each
        y = _source(top, tall, height)[:, :, None].expand(-1, -1, width)
        x = _source(left, wide, width)[:, None, :].expand(-1, height, -1)
        grid = torch.stack([x, y], dim=-1)  # [B, H, W, 2]
        return F.grid_sample(images.float(), grid, mode="bilinear", align_corners=False).round_().to(images.dtype)

    def _middle(self, height: int, width: int) -> tuple[int, int, int, int]:
        low, high = self.ratio
        tall = min(height, max(1, round(width / low)))
        wide = min(width, max(1, round(height * high)))
        return (height - tall) // 2, (width - wide) // 2, tall, wide


def _source(start: Tensor, length: Tensor, side: int) -> Tensor:
    """Where the pixels of one side come from, [B, side], in grid_sample's units: -1 and 1 are the image's borders.

    Kept inside the box, so that the neighbours outside do not bleed into its border.
    """
    place = start + (torch.arange(side, device=start.device) + 0.5) * length / side - 0.5
    inside = torch.minimum(torch.maximum(place, start), start + length - 1)
    return (2 * inside + 1) / side - 1
