"""Named streams of randomness: who draws, and when, decides the numbers; nobody shifts anybody else's."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """One part of a batch whose rows are dealt out in turn: rows index, index + count, index + 2 count, ...

    Attributes:
        index: Which part, from 0.
        count: How many there are.
    """

    index: int = 0
    count: int = 1

    def part(self, index: int, count: int) -> "Share":
        """Return a part of this part, dealt out in turn once more."""
        return Share(self.index + self.count * index, self.count * count)


WHOLE = Share()


class SharedGenerator(torch.Generator):
    """A generator that belongs to the rows of a part of a batch, see ``rows``."""

    share: Share = WHOLE


def stream_seed(seed: int, stream: str, *position: int) -> int:
    """Derive the seed of one place in one named stream (64 bits of a hash, the same on every machine)."""
    text = "/".join([str(seed), stream, *map(str, position)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) & (2**63 - 1)


def generator(
    seed: int, stream: str, *position: int, device: torch.device | str = "cpu", share: Share = WHOLE
) -> torch.Generator:
    """Return a fresh generator for a place in a stream, for example ``generator(0, "attack", step)``.

    Because the position is part of the seed, a resumed run draws what an uninterrupted one would have
    drawn without replaying anything, and a new consumer of randomness changes no existing numbers.

    Args:
        seed: Of all streams.
        stream: Its name.
        position: The place in it.
        device: Where the numbers are wanted.
        share: For which rows of a batch; ``rows`` draws for them what it draws for them in the whole batch.
    """
    fresh = SharedGenerator(device=device)
    fresh.share = share
    fresh.manual_seed(stream_seed(seed, stream, *position))
    return fresh


def rows(
    draw: Callable[..., Tensor], shape: Sequence[int], *, generator: torch.Generator, dim: int = 0, **options: Any
) -> Tensor:
    """Draw numbers for the rows of a batch: the same for a row, whether its batch is in one piece or dealt out.

    So several processes, or one that takes a batch in parts, train as one that takes it whole.

    Args:
        draw: Draws, for example ``torch.rand``; given a shape, ``generator`` and ``options``.
        shape: Of what is wanted; ``shape[dim]`` counts the rows at hand.
        generator: Made by ``generator``; one without a share draws for these rows alone.
        dim: The dimension of the rows.
        options: Handed to ``draw``.
    """
    share = getattr(generator, "share", WHOLE)
    whole = [*shape]
    whole[dim] *= share.count
    drawn = draw(whole, generator=generator, **options)
    if share.count == 1:
        return drawn
    return drawn[(slice(None),) * dim + (slice(share.index, None, share.count),)].contiguous()


def from_global_state(device: torch.device | str) -> torch.Generator:
    """Return a generator seeded by a *copy* of torch's global state, which is read and not advanced."""
    copy = torch.Generator()
    copy.set_state(torch.get_rng_state())
    fresh = torch.Generator(device=device)
    fresh.manual_seed(int(torch.randint(2**62, (), generator=copy)))
    return fresh
