"""Channel normalisation as a layer, so that attacks and budgets live in the pixel units of [0, 1]."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from toughen.errors import InputError


class Normalize(nn.Module):
    """Map images ``x`` to ``(x - mean) / std``, channel by channel.

    The two statistics are buffers: they move with the model and are saved in its checkpoint.

    Args:
        mean: One number per channel, in pixel units of [0, 1].
        std: One number > 0 per channel, in pixel units of [0, 1].

    Raises:
        InputError: No channels, different lengths, or a number that cannot be used.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if not mean or len(mean) != len(std):
            raise InputError(f"mean {tuple(mean)} and std {tuple(std)} must have one number per channel each")
        if not all(math.isfinite(m) and math.isfinite(s) and s > 0 for m, s in zip(mean, std, strict=True)):
            raise InputError(f"mean {tuple(mean)} must be finite, and std {tuple(std)} finite and above 0")
        self.channels = len(mean)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x``: [B, C, H, W], float, in [0, 1].

        Raises:
            InputError: The images have another number of channels (broadcasting would hide it).
        """
        if x.shape[1] != self.channels:
            raise InputError(f"images have {x.shape[1]} channels, the model was built for {self.channels}")
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        """Show the statistics when the model is printed."""
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"
