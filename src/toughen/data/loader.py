"""Batches of an image set: shuffled and augmented on the device, in order, or a random few."""

from collections.abc import Iterator

import torch
from torch import Tensor

from toughen import rng
from toughen.data.augment import crop_flip
from toughen.data.image_set import ImageSet
from toughen.data.settings import Augment
from toughen.errors import InputError
from toughen.types import Batch


class DeviceLoader:
    """Training batches from images that stay on the device as uint8.

    The order of an epoch comes from the stream ``("shuffle", epoch)``, the augmentation of a batch from
    ``("augment", epoch, step)``. So a batch depends on its place alone, and a run can resume anywhere.
    The last, partial batch of an epoch is dropped.

    Args:
        images: The training set; copied to ``device``.
        batch_size: Images in a batch.
        device: Where the batches are wanted.
        seed: Seed of the two streams.
        augment: Random variation of the images.
        pad: Largest shift, in pixels.

    Raises:
        InputError: ``batch_size`` is below 1 or above the number of images.
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        batch_size: int,
        device: torch.device | str,
        seed: int,
        augment: Augment = "crop_flip",
        pad: int = 4,
    ) -> None:
        if not 1 <= batch_size <= len(images):
            raise InputError(f"batch_size is {batch_size}; with {len(images)} images it must be 1..{len(images)}")
        self.batch_size = batch_size
        self.steps_per_epoch = len(images) // batch_size
        self._images = images.images.to(device)
        self._labels = images.labels.to(device)
        self._seed = seed
        self._augment = augment
        self._pad = pad

    def epoch(self, number: int, *, start_step: int = 0) -> Iterator[Batch]:
        """Iterate over the batches of an epoch.

        Args:
            number: The epoch, from 0.
            start_step: First step; the batches are then the tail of the full epoch, bit for bit.

        Returns:
            ``steps_per_epoch - start_step`` batches; ``index`` holds positions in the image set.

        Raises:
            InputError: ``start_step`` is outside the epoch.
        """
        if not 0 <= start_step <= self.steps_per_epoch:
            raise InputError(f"start_step is {start_step}; the epoch has {self.steps_per_epoch} steps")
        # Drawn on the CPU, so that every device sees the same order.
        order = torch.randperm(len(self._images), generator=rng.generator(self._seed, "shuffle", number))
        steps = torch.split(order.to(self._images.device), self.batch_size)
        return (self._batch(number, step, steps[step]) for step in range(start_step, self.steps_per_epoch))

    def _batch(self, epoch: int, step: int, index: Tensor) -> Batch:
        images = self._images[index]
        if self._augment != "none":
            draws = rng.generator(self._seed, "augment", epoch, step, device=images.device)
            images = crop_flip(images, pad=self._pad, flip=self._augment == "crop_flip", generator=draws)
        return Batch(_to_unit(images), self._labels[index], index)


def in_order(images: ImageSet, *, batch_size: int, device: torch.device | str) -> Iterator[Batch]:
    """Iterate over all images as they are, in their order; the last batch may be smaller.

    Raises:
        InputError: ``batch_size`` is below 1.
    """
    return _batches(images, torch.arange(len(images)), batch_size, device)


def probe(
    images: ImageSet, *, count: int, seed: int, position: int, device: torch.device | str, batch_size: int
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
    return list(_batches(images, order[:count], batch_size, device))


def _batches(images: ImageSet, order: Tensor, batch_size: int, device: torch.device | str) -> Iterator[Batch]:
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be at least 1")
    return (
        Batch(_to_unit(images.images[index].to(device)), images.labels[index].to(device), index.to(device))
        for index in torch.split(order, batch_size)
    )


def _to_unit(images: Tensor) -> Tensor:
    """Map uint8 levels to float32 in [0, 1]."""
    return images.to(torch.float32) / 255
