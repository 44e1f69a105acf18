"""Augmented batches: images in [0, 1], and where asked for, from which pixel of the stored image each pixel came."""

from collections.abc import Sequence

import torch
from torch import Tensor

from toughen.data.augment import AUGMENTS, Augmentation, moves_pixels
from toughen.errors import InputError


def varied(
    images: Tensor, augment: Sequence[Augmentation], draws: torch.Generator, *, track_pixels: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Apply the augmentations to a batch.

    Pixels are tracked by numbering them: the bytes of each pixel's number go through the augmentations as further
    channels of its image, with the same draws, and are put together again afterwards.

    Args:
        images: [B, C, H, W], uint8.
        augment: What varies them, in order.
        draws: Generator on the CPU.
        track_pixels: Whether to say where each pixel came from.

    Returns:
        x: [B, C, H, W], float32, in [0, 1].
        source: [B, H, W], int64: row * W + column of the pixel of ``images`` that lies here now, -1 where none does;
            None unless asked for.
    """
    channels = images.shape[1]
    if track_pixels:
        images = torch.cat([images, _numbers(images)], dim=1)
    for member in augment:
        images = member(images, draws)
    return to_unit(images[:, :channels]), _places(images[:, channels:]) if track_pixels else None


def to_unit(images: Tensor) -> Tensor:
    """Map uint8 levels to float32 in [0, 1]."""
    return images.to(torch.float32) / 255


def check_tracks_pixels(augment: Sequence[Augmentation]) -> None:
    """Refuse augmentations after which no pixel is one of the stored image's.

    Raises:
        InputError: Names the augmentation and those that are allowed.
    """
    for member in augment:
        if not moves_pixels(member):
            kind = type(member)
            name = AUGMENTS.name_of(kind) if kind in AUGMENTS.values() else kind.__name__
            allowed = ", ".join(name for name, known in AUGMENTS.items() if moves_pixels(known))
            raise InputError(
                f"augmentation {name} changes or blends pixels, and the method has to know from which pixel of the"
                f" stored image each one came; allowed: {allowed}"
            )


def _numbers(images: Tensor) -> Tensor:
    """Each pixel's number, counted from 1, as four channels of uint8; whatever is filled in with 0 has none."""
    batch, _, height, width = images.shape
    numbers = torch.arange(1, height * width + 1, dtype=torch.int32, device=images.device)
    return numbers.view(torch.uint8).view(height, width, 4).permute(2, 0, 1).expand(batch, -1, -1, -1)


def _places(numbers: Tensor) -> Tensor:
    """The inverse of ``_numbers``, counted from 0: [B, H, W], int64."""
    return numbers.permute(0, 2, 3, 1).contiguous().view(torch.int32).squeeze(-1).long() - 1
