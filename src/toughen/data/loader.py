"""Batches of an image set: shuffled and varied for training, in order, or a random few."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from toughen import rng
from toughen.data.augment import Augmentation, CropFlip, ResizedCrop
from toughen.data.image_set import DataSplits, Images, ImageSet, Taken
from toughen.data.stream import PictureReader, Place, StreamedSet, stream
from toughen.errors import InputError
from toughen.types import Batch


@dataclass(frozen=True)
class Shard:
    """One process of several that train together, each on images of its own.

    Attributes:
        rank: Which process, from 0.
        count: How many there are.
    """

    rank: int = 0
    count: int = 1


class TrainLoader(Protocol):
    """Training batches, epoch by epoch.

    A batch depends on seed, epoch and step alone, so a run can resume anywhere. It is smaller only where images that
    cannot be decoded are skipped.

    Attributes:
        steps_per_epoch: Batches in an epoch.
        images_per_epoch: Images in them.
    """

    steps_per_epoch: int
    images_per_epoch: int

    def epoch(self, number: int, *, start_step: int = 0) -> Iterator[Batch]:
        """Iterate over the batches of an epoch.

        Args:
            number: The epoch, from 0.
            start_step: First step; the batches are then the tail of the full epoch, bit for bit.

        Returns:
            ``steps_per_epoch - start_step`` batches; ``index`` holds positions in the image set.

        Raises:
            InputError: ``start_step`` is outside the epoch, or an image cannot be decoded.
        """


def train_loader(
    splits: DataSplits,
    *,
    batch_size: int,
    device: torch.device | str,
    seed: int,
    augment: Sequence[Augmentation] = (),
    extra_fraction: float = 0.0,
    workers: int = 0,
    shard: Shard = Shard(),
) -> TrainLoader:
    """Return the loader that fits how the training images are kept, with the extra images mixed in.

    Args:
        splits: The training images, and the extra ones if there are any.
        batch_size: Images in a batch.
        device: Where the batches are wanted.
        seed: Seed of all streams.
        augment: What varies the images, in order.
        extra_fraction: Share of a batch that comes from ``splits.extra``.
        workers: Processes that decode, for images that are not in memory.
        shard: Which part of every epoch is this process's; ``batch_size`` counts its images alone.

    Raises:
        InputError: ``batch_size`` is below 1 or above the number of images, or holds no image of one kind.
    """
    num_extra = 0 if splits.extra is None else round(batch_size * extra_fraction)
    if splits.extra is not None and not 0 < num_extra < batch_size:
        raise InputError(
            f"data.extra.fraction={extra_fraction:g} of a batch of {batch_size} is {num_extra} extra images;"
            " at least one of each kind is needed"
        )
    num_own, varied = batch_size - num_extra, tuple(augment)
    loader: TrainLoader
    if isinstance(splits.train, StreamedSet):
        loader = StreamLoader(
            splits.train, batch_size=num_own, device=device, seed=seed, augment=varied, workers=workers, shard=shard
        )
    else:
        assert isinstance(splits.train, ImageSet)
        loader = DeviceLoader(splits.train, batch_size=num_own, device=device, seed=seed, augment=varied, shard=shard)
    if splits.extra is None:
        return loader
    return MixedLoader(
        loader,
        splits.extra,
        num_train=len(splits.train),
        num_own=num_own,
        num_extra=num_extra,
        device=device,
        seed=seed,
        augment=varied,
        shard=shard,
    )


class _Order:
    """The order of the training images, and the streams of what is drawn for a batch.

    The order of an epoch comes from the stream ``("shuffle", epoch)``, what varies a batch from
    ``("augment", epoch, step)``, both drawn on the CPU: every device sees the same. The last, partial batch of
    an epoch is dropped. Of several processes each takes its share of one order, and counts steps among all.
    """

    def __init__(
        self, num_images: int, batch_size: int, seed: int, augment: Sequence[Augmentation], shard: Shard
    ) -> None:
        most = num_images // shard.count
        if not 1 <= batch_size <= most:
            raise InputError(f"batch_size is {batch_size}; with {most} images it must be 1..{most}")
        self.num_images, self.batch_size, self.seed, self.augment = num_images, batch_size, seed, tuple(augment)
        self.shard = shard
        self.steps_per_epoch = most // batch_size

    def places(self, epoch: int, start_step: int) -> list[Place]:
        if not 0 <= start_step <= self.steps_per_epoch:
            raise InputError(f"start_step is {start_step}; the epoch has {self.steps_per_epoch} steps")
        order = torch.randperm(self.num_images, generator=rng.generator(self.seed, "shuffle", epoch))
        steps = torch.split(order[self.shard.rank :: self.shard.count], self.batch_size)
        return [Place(step, steps[step]) for step in range(start_step, self.steps_per_epoch)]

    def vary(self, images: Tensor, epoch: int, step: int) -> Tensor:
        """Apply the augmentations to uint8 images [B, C, H, W] and map them to [0, 1]."""
        place = step * self.shard.count + self.shard.rank
        return _varied(images, self.augment, rng.generator(self.seed, "augment", epoch, place))


class DeviceLoader:
    """Training batches from images that stay on the device as uint8, varied there a whole batch at a time.

    Args:
        images: The training set; copied to ``device``.
        batch_size: Images in a batch.
        device: Where the batches are wanted.
        seed: Seed of the streams.
        augment: What varies the images, in order.
        shard: Which part of every epoch is this process's.

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
        augment: Sequence[Augmentation] = (CropFlip(),),
        shard: Shard = Shard(),
    ) -> None:
        self._order = _Order(len(images), batch_size, seed, augment, shard)
        self.steps_per_epoch = self._order.steps_per_epoch
        self.images_per_epoch = self.steps_per_epoch * batch_size
        self._images = images.images.to(device)
        self._labels = images.labels.to(device)

    def epoch(self, number: int, *, start_step: int = 0) -> Iterator[Batch]:
        """See ``TrainLoader.epoch``."""
        places = self._order.places(number, start_step)  # here, so that a wrong step is refused at once
        return (self._batch(number, place.step, place.index.to(self._images.device)) for place in places)

    def _batch(self, epoch: int, step: int, index: Tensor) -> Batch:
        return Batch(self._order.vary(self._images[index], epoch, step), self._labels[index], index)


class StreamLoader:
    """Training batches from images that worker processes decode ahead of their use.

    Random crops are taken by the workers, from the original picture; what else varies the images is done on the
    device, a whole batch at a time.

    Args:
        images: The training set.
        batch_size: Images in a batch.
        device: Where the batches are wanted.
        seed: Seed of the streams.
        augment: What varies the images, in order.
        workers: Processes that decode; 0 decodes here, without reading ahead.
        shard: Which part of every epoch is this process's.

    Raises:
        InputError: ``batch_size`` is below 1 or above the number of images.
    """

    def __init__(
        self,
        images: StreamedSet,
        *,
        batch_size: int,
        device: torch.device | str,
        seed: int,
        augment: Sequence[Augmentation] = (CropFlip(),),
        workers: int = 0,
        shard: Shard = Shard(),
    ) -> None:
        self._crop = next((member for member in augment if isinstance(member, ResizedCrop)), None)
        if self._crop is not None and not isinstance(images.reader, PictureReader):
            raise InputError(
                "resized_crop is taken from a picture before it is decoded; let a data set of your own crop its images"
            )
        rest = [member for member in augment if member is not self._crop]
        self._order = _Order(len(images), batch_size, seed, rest, shard)
        self.steps_per_epoch = self._order.steps_per_epoch
        self.images_per_epoch = self.steps_per_epoch * batch_size
        self._images = images
        self._device = torch.device(device)
        self._workers = workers

    def epoch(self, number: int, *, start_step: int = 0) -> Iterator[Batch]:
        """See ``TrainLoader.epoch``."""
        taken = stream(
            self._images,
            self._order.places(number, start_step),
            crop=self._crop,
            seed=self._order.seed,
            epoch=number,
            workers=self._workers,
            pin_memory=self._device.type == "cuda",
        )
        return (self._batch(number, step, part) for step, part in taken)

    def _batch(self, epoch: int, step: int, taken: Taken) -> Batch:
        if not len(taken.images):
            raise InputError("none of the images of a batch can be decoded; data.on_error=skip is for a few")
        images, labels, index = (part.to(self._device, non_blocking=True) for part in taken)
        return Batch(self._order.vary(images, epoch, step), labels, index)


class MixedLoader:
    """Training batches of which a part comes from a second set, drawn with repetition (Wang et al., 2023).

    The first images of a batch are the training set's, without repetition; an epoch has as many batches as if the
    training set filled them alone, so it shows only a part of it. The second set stays in the memory of the host.

    Args:
        loader: Serves the first part.
        extra: The second set; a label may be -1.
        num_train: Images in the training set; positions of the second set count on from there.
        num_own: Images of the training set in a batch.
        num_extra: Images of the second set in a batch.
        device: Where the batches are wanted.
        seed: Seed of the streams.
        augment: What varies the images of the second part, in order.
        shard: Which process this is, of several that draw images of their own.
    """

    def __init__(
        self,
        loader: TrainLoader,
        extra: ImageSet,
        *,
        num_train: int,
        num_own: int,
        num_extra: int,
        device: torch.device | str,
        seed: int,
        augment: Sequence[Augmentation],
        shard: Shard = Shard(),
    ) -> None:
        self._shard = shard
        self._loader, self._extra = loader, extra
        self._num_train, self._num_extra = num_train, num_extra
        self._device, self._seed, self._augment = torch.device(device), seed, tuple(augment)
        whole = num_own + num_extra
        self.steps_per_epoch = min(math.ceil(num_train / (whole * shard.count)), loader.steps_per_epoch)
        self.images_per_epoch = self.steps_per_epoch * whole

    def epoch(self, number: int, *, start_step: int = 0) -> Iterator[Batch]:
        """See ``TrainLoader.epoch``."""
        steps = range(start_step, self.steps_per_epoch)
        first = self._loader.epoch(number, start_step=start_step)
        return (self._mixed(batch, number, step) for step, batch in zip(steps, first, strict=False))

    def _mixed(self, first: Batch, epoch: int, step: int) -> Batch:
        draws = rng.generator(self._seed, "extra", epoch, step * self._shard.count + self._shard.rank)
        taken = self._extra.take(torch.randint(len(self._extra), (self._num_extra,), generator=draws))
        images, labels, index = (part.to(self._device, non_blocking=True) for part in taken)
        x = _varied(images, self._augment, draws)
        assert first.index is not None
        return Batch(
            torch.cat([first.x, x]), torch.cat([first.y, labels]), torch.cat([first.index, index + self._num_train])
        )


def in_order(images: Images, *, batch_size: int, device: torch.device | str) -> Iterator[Batch]:
    """Iterate over all images as they are, in their order; the last batch may be smaller.

    Raises:
        InputError: ``batch_size`` is below 1.
    """
    return _batches(images, torch.arange(len(images)), batch_size, device)


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
        Batch(_to_unit(part.images.to(device)), part.labels.to(device), part.index.to(device))
        for part in taken
        if len(part.index)  # nothing is left of a batch whose images were all skipped
    )


def _varied(images: Tensor, augment: Sequence[Augmentation], draws: torch.Generator) -> Tensor:
    for member in augment:
        images = member(images, draws)
    return _to_unit(images)


def _to_unit(images: Tensor) -> Tensor:
    """Map uint8 levels to float32 in [0, 1]."""
    return images.to(torch.float32) / 255
