"""Random shifts and mirror images of a whole batch, drawn where the images live."""

import torch
import torch.nn.functional as F
from torch import Tensor


def crop_flip(images: Tensor, *, pad: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Crop each image at random from its zero-padded self, and mirror half of them.

    There is no loop over samples and no synchronisation with the host.

    Args:
        images: [B, C, H, W], uint8 or float.
        pad: Zeros added on each side, in pixels; an image is shifted by up to that many.
        flip: Mirror each image, left to right, with probability 1/2.
        generator: Draws the shifts and the mirroring; on the images' device.

    Returns:
        [B, C, H, W], of the images' dtype.
    """
    batch, _, height, width = images.shape
    device = images.device
    shift = torch.randint(2 * pad + 1, (2, batch, 1), generator=generator, device=device)
    rows = torch.arange(height, device=device).expand(batch, height)
    cols = torch.arange(width, device=device).expand(batch, width)
    if flip:
        mirrored = torch.randint(2, (batch, 1), generator=generator, device=device).bool()
        cols = torch.where(mirrored, width - 1 - cols, cols)
    rows, cols = (rows + shift[0])[:, :, None], (cols + shift[1])[:, None, :]  # [B, H, 1], [B, 1, W]
    padded = F.pad(images, (pad, pad, pad, pad)).permute(0, 2, 3, 1)
    sample = torch.arange(batch, device=device)[:, None, None]
    return padded[sample, rows, cols].permute(0, 3, 1, 2).contiguous()
