"""Shears and rotations about the middle, each image by its own angle: nearest pixels, zeros from outside.

Images are [B, C, H, W], uint8; angles are [B], in radians, on the CPU. The signs are torchvision's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def shear(images: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """Shear by the angle ``across`` along the rows and ``down`` along the columns; one of the two must be 0."""
    one = torch.ones_like(across)
    return _sample(images, [[one, across.tan()], [down.tan(), one]])


def rotate(images: Tensor, angle: Tensor) -> Tensor:
    """Rotate by ``angle``, counter-clockwise."""
    return _sample(images, [[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])


def _sample(images: Tensor, rows: list[list[Tensor]]) -> Tensor:
    """Take each pixel from where the matrix with these ``rows`` sends its place (x, y), seen from the middle."""
    height, width = images.shape[-2:]
    device = images.device
    matrix = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=1).float()  # [B, 2, 2]
    to_grid = matrix.transpose(1, 2) / torch.tensor([width / 2, height / 2])  # grid_sample's borders are -1 and 1
    x = torch.arange(width, device=device) - (width - 1) / 2
    y = torch.arange(height, device=device) - (height - 1) / 2
    places = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1)  # [H, W, 2]
    grid = places.view(-1, 2) @ to_grid.to(device, non_blocking=True)
    sampled = F.grid_sample(
        images.float(), grid.view(-1, height, width, 2), mode="nearest", padding_mode="zeros", align_corners=False
    )
    return sampled.to(images.dtype)
