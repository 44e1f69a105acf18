"""Channel normalisation as a layer, so that attacks and budgets live in the pixel units of [0, 1]."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from toughen.errors import InputError

# the names under which networks and their weights keep the two statistics
STATISTICS = (("mean", "std"), ("mu", "sigma"), ("new_mean", "new_std"))


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


def normalising_part(network: nn.Module, *, channels: int) -> str | None:
    """Name the submodule that visibly normalises images, or return None.

    It has a mean and a standard deviation, of one number or one per channel, under a usual pair of names: as buffers,
    or as plain attributes of a class that has ``Normal`` in its name. Layer and batch norms have neither.

    Args:
        network: Any network.
        channels: Of its images.
    """
    for name, module in network.named_modules():
        for pair in STATISTICS:
            buffers = [dict(module.named_buffers(recurse=False)).get(key) for key in pair]
            attributes = [getattr(module, key, None) for key in pair] if "Normal" in type(module).__name__ else []
            if any(values and all(_numbers(v) in (1, channels) for v in values) for values in (buffers, attributes)):
                return f"{name} ({type(module).__name__})" if name else type(module).__name__
    return None


def _numbers(value: Any) -> int:
    """Count the numbers in a statistic; 0 is something else."""
    if isinstance(value, Tensor):
        return value.numel()
    if isinstance(value, Sequence) and all(isinstance(v, int | float) for v in value):
        return len(value)
    return int(isinstance(value, int | float))
