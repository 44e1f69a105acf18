"""Named streams of randomness: who draws, and when, decides the numbers; nobody shifts anybody else's."""

import hashlib

import torch


def stream_seed(seed: int, stream: str, *position: int) -> int:
    """Derive the seed of one place in one named stream (64 bits of a hash, the same on every machine)."""
    text = "/".join([str(seed), stream, *map(str, position)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) & (2**63 - 1)


def generator(seed: int, stream: str, *position: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh generator for a place in a stream, for example ``generator(0, "attack", rank, step)``.

    Because the position is part of the seed, a resumed run draws what an uninterrupted one would have
    drawn without replaying anything, and a new consumer of randomness changes no existing numbers.
    """
    fresh = torch.Generator(device=device)
    fresh.manual_seed(stream_seed(seed, stream, *position))
    return fresh


def from_global_state(device: torch.device | str) -> torch.Generator:
    """Return a generator seeded by a *copy* of torch's global state, which is read and not advanced."""
    copy = torch.Generator()
    copy.set_state(torch.get_rng_state())
    fresh = torch.Generator(device=device)
    fresh.manual_seed(int(torch.randint(2**62, (), generator=copy)))
    return fresh
