"""The geometry of a threat model: where a search starts, which way it steps, how it comes back into the ball.

All functions are batched, know no model, and take one radius per sample.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from toughen import rng
from toughen.types import Norm


class Ball(Protocol):
    """A norm ball around 0. ``radius``: [B, 1, ...], broadcastable to ``delta``: [B, ...]."""

    def sample(self, like: Tensor, radius: Tensor, generator: torch.Generator) -> Tensor:
        """Draw one point per sample, uniformly in the ball."""
        ...

    def ascend(self, gradient: Tensor) -> Tensor:
        """Return the step of length 1 (in this norm) along which a linear function grows fastest."""
        ...

    def project(self, delta: Tensor, radius: Tensor) -> Tensor:
        """Return the nearest point of the ball."""
        ...


def gaussian_start(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return x + 0.001 * N(0, 1), not clamped: where TRADES and its descendants begin their search."""
    return x + 0.001 * _normal(x, generator)


class _LInf:
    def sample(self, like: Tensor, radius: Tensor, generator: torch.Generator) -> Tensor:
        return _drawn(like, lambda empty: empty.uniform_(-1.0, 1.0, generator=generator), generator) * radius

    def ascend(self, gradient: Tensor) -> Tensor:
        return gradient.sign()

    def project(self, delta: Tensor, radius: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(delta, -radius), radius)


class _L2:
    def sample(self, like: Tensor, radius: Tensor, generator: torch.Generator) -> Tensor:
        direction = _normal(like, generator)
        length = rng.rows(torch.rand, radius.shape, generator=generator, device=like.device, dtype=like.dtype)
        num_pixels = like[0].numel()
        return self.ascend(direction) * radius * length ** (1.0 / num_pixels)

    def ascend(self, gradient: Tensor) -> Tensor:
        # scaled first: a confident model's gradients are tiny, and their squares underflow; a zero gradient stays zero
        largest = gradient.abs().flatten(1).amax(dim=1).clamp_min(torch.finfo(gradient.dtype).tiny)
        scaled = gradient / largest.view(-1, *[1] * (gradient.dim() - 1))
        return scaled / _length(scaled).clamp_min(1e-12)

    def project(self, delta: Tensor, radius: Tensor) -> Tensor:
        return delta * (radius / _length(delta).clamp_min(1e-12)).clamp_max(1.0)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return _drawn(like, lambda empty: empty.normal_(generator=generator), generator)


def _drawn(like: Tensor, fill: Callable[[Tensor], Tensor], generator: torch.Generator) -> Tensor:
    """Numbers for the rows of ``like``, in its memory format, in whose order they are drawn."""
    channels_last = like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last)

    def draw(shape: Sequence[int], **_: object) -> Tensor:
        empty = torch.empty(*shape, device=like.device, dtype=like.dtype)
        return fill(empty.to(memory_format=torch.channels_last) if channels_last else empty)

    return rng.rows(draw, like.shape, generator=generator)


def _length(delta: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(delta.flatten(1), dim=1)
    return length.view(-1, *[1] * (delta.dim() - 1))


BALLS: dict[Norm, Ball] = {"linf": _LInf(), "l2": _L2()}
