"""Training batches of an image set: shuffled and varied."""

import math
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from toughen import rng
from toughen.data.augment import Augmentation, CropFlip, ResizedCrop
from toughen.data.image_set import DataSplits, ImageSet, Taken
from toughen.data.stream import PictureReader, Place, StreamedSet, stream
from toughen.data.varied import check_tracks_pixels, varied
from toughen.errors import InputError, Notice
from toughen.rng import WHOLE, Share
from toughen.types import Batch


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
            ``steps_per_epoch - start_step`` batches; ``index`` holds positions in the image set, ``source`` where
            pixels were moved from if the loader was asked to track them.

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
    share: Share = WHOLE,
    track_pixels: bool = False,
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
        share: Which part of every epoch is this process's; ``batch_size`` counts its images alone.
        track_pixels: Whether batches say from which pixel of the stored image each pixel came (``Batch.source``).

    Raises:
        InputError: ``batch_size`` is below 1 or above the number of images, or holds no image of one kind; pixels can't
            be tracked through these augmentations or these images.
    """
    num_extra = 0 if splits.extra is None else round(batch_size * extra_fraction)
    if splits.extra is not None and not 0 < num_extra < batch_size:
        raise InputError(
            f"data.extra.fraction={extra_fraction:g} of a batch of {batch_size} is {num_extra} extra images;"
            " at least one of each kind is needed"
        )
    dealt, whole = num_extra * share.count, round(batch_size * share.count * extra_fraction)
    if splits.extra is not None and dealt != whole and share.index == 0:
        message = (
            f"data.extra.fraction={extra_fraction:g} is {dealt} extra images in a batch of {share.count} processes, and"
            f" {whole} in one of a single process: not the same training"
        )
        warnings.warn(message, Notice, stacklevel=2)
    num_own, augment = batch_size - num_extra, tuple(augment)
    loader: TrainLoader
    if isinstance(splits.train, StreamedSet):
        loader = StreamLoader(
            splits.train,
            batch_size=num_own,
            device=device,
            seed=seed,
            augment=augment,
            workers=workers,
            share=share,
            track_pixels=track_pixels,
        )
    else:
        assert isinstance(splits.train, ImageSet)
        loader = DeviceLoader(
            splits.train,
            batch_size=num_own,
            device=device,
            seed=seed,
            augment=augment,
            share=share,
            track_pixels=track_pixels,
        )
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
        augment=augment,
        share=share,
    )


class _Order:
    """The order of the training images, and the streams of what is drawn for a batch.

    The order of an epoch comes from the stream ``("shuffle", epoch)``, what varies a batch from
    ``("augment", epoch, step)``, both drawn on the CPU: every device sees the same. The last, partial batch of
    an epoch is dropped. Of several processes each takes its share of one order, and counts steps among all.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        seed: int,
        augment: Sequence[Augmentation],
        share: Share,
        track_pixels: bool,
    ) -> None:
        most = num_images // share.count
        if not 1 <= batch_size <= most:
            raise InputError(f"batch_size is {batch_size}; with {most} images it must be 1..{most}")
        self.num_images, self.batch_size, self.seed, self.augment = num_images, batch_size, seed, tuple(augment)
        if track_pixels:
            check_tracks_pixels(self.augment)
        self.share, self.track_pixels = share, track_pixels
        self.steps_per_epoch = most // batch_size

    def places(self, epoch: int, start_step: int) -> list[Place]:
        if not 0 <= start_step <= self.steps_per_epoch:
            raise InputError(f"start_step is {start_step}; the epoch has {self.steps_per_epoch} steps")
        order = torch.randperm(self.num_images, generator=rng.generator(self.seed, "shuffle", epoch))
        steps = torch.split(order[self.share.index :: self.share.count], self.batch_size)
        return [Place(step, steps[step]) for step in range(start_step, self.steps_per_epoch)]

    def batch(self, taken: Taken, epoch: int, step: int) -> Batch:
        """Apply the augmentations to what was taken for a step, on its device."""
        draws = rng.generator(self.seed, "augment", epoch, step, share=self.share)
        x, source = varied(taken.images, self.augment, draws, track_pixels=self.track_pixels)
        return Batch(x, taken.labels, taken.index, source)


class DeviceLoader:
    """Training batches from images that stay on the device as uint8, varied there a whole batch at a time.

    Args:
        images: The training set; copied to ``device``.
        batch_size: Images in a batch.
        device: Where the batches are wanted.
        seed: Seed of the streams.
        augment: What varies the images, in order.
        share: Which part of every epoch is this process's.
        track_pixels: Whether batches say where each pixel came from.

    Raises:
        InputError: ``batch_size`` is below 1 or above the number of images, or pixels can't be tracked.
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        batch_size: int,
        device: torch.device | str,
        seed: int,
        augment: Sequence[Augmentation] = (CropFlip(),),
        share: Share = WHOLE,
        track_pixels: bool = False,
    ) -> None:
        self._order = _Order(len(images), batch_size, seed, augment, share, track_pixels)
        self.steps_per_epoch = self._order.steps_per_epoch
        self.images_per_epoch = self.steps_per_epoch * batch_size
        self._images = images.images.to(device)
        self._labels = images.labels.to(device)

    def epoch(self, number: int, *, start_step: int = 0) -> Iterator[Batch]:
        """See ``TrainLoader.epoch``."""
        places = self._order.places(number, start_step)  # here, so that a wrong step is refused at once
        return (self._order.batch(self._taken(place.index), number, place.step) for place in places)

    def _taken(self, index: Tensor) -> Taken:
        index = index.to(self._images.device)
        return Taken(self._images[index], self._labels[index], index)


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
        share: Which part of every epoch is this process's.
        track_pixels: Whether batches say where each pixel came from.

    Raises:
        InputError: ``batch_size`` is below 1 or above the number of images, or pixels can't be tracked.
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
        share: Share = WHOLE,
        track_pixels: bool = False,
    ) -> None:
        if track_pixels:
            _check_same_pixels(images)
            check_tracks_pixels(augment)  # the crop of the workers among them
        self._crop = next((member for member in augment if isinstance(member, ResizedCrop)), None)
        if self._crop is not None and not isinstance(images.reader, PictureReader):
            raise InputError(
                "resized_crop is taken from a picture before it is decoded; let a data set of your own crop its images"
            )
        rest = [member for member in augment if member is not self._crop]
        self._order = _Order(len(images), batch_size, seed, rest, share, track_pixels)
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
        return self._order.batch(Taken(*(part.to(self._device, non_blocking=True) for part in taken)), epoch, step)


class MixedLoader:
    """Training batches of which a part comes from a second set, drawn with repetition (Wang et al., 2023).

    The first images of a batch are the training set's, without repetition; an epoch has as many batches as if the
    training set filled them alone, so it shows only a part of it. The second set stays in the memory of the host, and
    its images come back so rarely that their pixels are not tracked: their ``source`` is -1.

    Args:
        loader: Serves the first part.
        extra: The second set; a label may be -1.
        num_train: Images in the training set; positions of the second set count on from there.
        num_own: Images of the training set in a batch.
        num_extra: Images of the second set in a batch.
        device: Where the batches are wanted.
        seed: Seed of the streams.
        augment: What varies the images of the second part, in order.
        share: Which process this is, of several that draw images of their own.
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
        share: Share = WHOLE,
    ) -> None:
        self._share = share
        self._loader, self._extra = loader, extra
        self._num_train, self._num_extra = num_train, num_extra
        self._device, self._seed, self._augment = torch.device(device), seed, tuple(augment)
        whole = num_own + num_extra
        self.steps_per_epoch = min(math.ceil(num_train / (whole * share.count)), loader.steps_per_epoch)
        self.images_per_epoch = self.steps_per_epoch * whole

    def epoch(self, number: int, *, start_step: int = 0) -> Iterator[Batch]:
        """See ``TrainLoader.epoch``."""
        steps = range(start_step, self.steps_per_epoch)
        first = self._loader.epoch(number, start_step=start_step)
        return (self._mixed(batch, number, step) for step, batch in zip(steps, first, strict=False))

    def _mixed(self, first: Batch, epoch: int, step: int) -> Batch:
        draws = rng.generator(self._seed, "extra", epoch, step, share=self._share)
        drawn = rng.rows(partial(torch.randint, len(self._extra)), (self._num_extra,), generator=draws)
        taken = self._extra.take(drawn)
        images, labels, index = (part.to(self._device, non_blocking=True) for part in taken)
        x, _ = varied(images, self._augment, draws)
        source = first.source
        if source is not None:
            source = torch.cat([source, source.new_full((len(x), *source.shape[1:]), -1)])
        assert first.index is not None
        index = torch.cat([first.index, index + self._num_train])
        return Batch(torch.cat([first.x, x]), torch.cat([first.y, labels]), index, source)


def _check_same_pixels(images: StreamedSet) -> None:
    """Refuse images that may be others in each epoch before any augmentation of ours."""
    if not isinstance(images.reader, PictureReader):
        raise InputError(
            "pixels can't be tracked through a data set of your own that is read anew in each epoch, since it may vary"
            " its images; give it without random transforms and with storage='resident', and vary by data.augment"
        )
