"""Colour operations with a factor per image, as torchvision's functions of the same names do them for one factor.

Images are [B, C, H, W], uint8, C = 1 or 3; factors are [B], on the CPU, not negative, and 1 leaves an image as it is.
"""

import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as tv


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Mix each image with its grey self; grey images stay as they are."""
    if images.shape[1] == 1:
        return images
    return _mix(images, tv.rgb_to_grayscale(images), factor)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Mix each image with black."""
    return (images * _per_image(factor, images)).clamp_(0, 255).to(images.dtype)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Mix each image with the mean of its grey self."""
    return _mix(images, tv.rgb_to_grayscale(images).float().mean(dim=(1, 2, 3), keepdim=True), factor)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Mix each image, but for its outermost pixels, with its smoothed self."""
    if min(images.shape[-2:]) < 3:
        return images
    inner = images[..., 1:-1, 1:-1].float()
    # Weights 1 around a 5, over 13: sums of levels are exact, so no rounding differs between devices.
    smooth = (F.avg_pool2d(images.float(), 3, stride=1, divisor_override=1) + 4 * inner).div_(13).round_()
    mixed = images.clone()
    mixed[..., 1:-1, 1:-1] = _mix(images[..., 1:-1, 1:-1], smooth, factor)
    return mixed


def autocontrast(images: Tensor) -> Tensor:
    """Stretch the levels of each channel to 0..255."""
    stretched: Tensor = tv.autocontrast(images)
    return stretched


def equalize(images: Tensor) -> Tensor:
    """Make the levels of each channel about equally frequent."""
    equalized: Tensor = tv.equalize(images)
    return equalized


def _mix(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    mixed = images * _per_image(factor, images) + other * _per_image(1 - factor, images)
    return mixed.clamp_(0, 255).to(images.dtype)


def _per_image(factor: Tensor, images: Tensor) -> Tensor:
    return factor.float().to(images.device, non_blocking=True)[:, None, None, None]
