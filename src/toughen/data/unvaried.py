"""Batches of images as they are: in order, or a random few."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from toughen import rng
from toughen.data.image_set import Images
from toughen.data.varied import to_unit
from toughen.errors import InputError
from toughen.types import Batch


@dataclass(frozen=True)
class InOrder:
    """All images as they are, in their order, as often as it is iterated; the last batch may be smaller.

    Args:
        images: What to show.
        batch_size: Images in a batch.
        device: Where the batches are wanted.

    Raises:
        InputError: ``batch_size`` is below 1.
    """

    images: Images
    batch_size: int
    device: torch.device | str

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"batch_size is {self.batch_size}; it must be at least 1")

    def __iter__(self) -> Iterator[Batch]:
        return _batches(self.images, torch.arange(len(self.images)), self.batch_size, self.device)


def in_order(images: Images, *, batch_size: int, device: torch.device | str) -> InOrder:
    """Return the batches of all images, see ``InOrder``."""
    return InOrder(images, batch_size, device)


def probe(
    images: Images, *, count: int, seed: int, position: int, device: torch.device | str, batch_size: int
) -> list[Batch]:
    """Draw images at random, without repetition and as they are, to measure a model on.

    Args:
        images: What to draw from.
        count: How many images.
        seed: Seed of the stream ``"probe"``.
        position: Place in the stream, for example the epoch: other places, other images.
        device: Where the batches are wanted.
        batch_size: Images in a batch; the last one may be smaller.

    Returns:
        The batches; ``index`` holds positions in ``images``.

    Raises:
        InputError: ``count`` is below 1 or above the number of images, or ``batch_size`` below 1.
    """
    if not 1 <= count <= len(images):
        raise InputError(f"count is {count}; with {len(images)} images it must be 1..{len(images)}")
    order = torch.randperm(len(images), generator=rng.generator(seed, "probe", position))
    found: list[Batch] = []
    missing = count
    while missing and len(order):  # images that cannot be decoded are made up for by the next ones
        batches = list(_batches(images, order[:missing], batch_size, device))
        order = order[missing:]
        missing -= sum(len(batch.y) for batch in batches)
        found += batches
    return found


def _batches(images: Images, order: Tensor, batch_size: int, device: torch.device | str) -> Iterator[Batch]:
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be at least 1")
    taken = (images.take(index) for index in torch.split(order, batch_size))
    return (
        Batch(to_unit(part.images.to(device)), part.labels.to(device), part.index.to(device))
        for part in taken
        if len(part.index)  # nothing is left of a batch whose images were all skipped
    )
