"""Images that are too many for memory: decoded when they are taken, in training by worker processes."""

import hashlib
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from toughen import rng
from toughen.data.augment import ResizedCrop
from toughen.data.decode import Decoder, OnError, Pictures, Pixels, size_of, strict_sizes
from toughen.data.image_set import Statistics, Taken, channel_statistics
from toughen.errors import InputError

_STATISTICS_OVER = 1000  # images; the standard error of a channel's mean is then below 0.01

_STOPS = (signal.SIGINT, signal.SIGTERM)  # the main process's, which finishes its step first
_CHUNK = 1024  # images that are decoded at a time to compute a checksum


class Reader(Protocol):
    """Reads one image of a set; sent to worker processes."""

    @property
    def threads(self) -> int | None:
        """How many threads may read at a time; None is as many as help."""

    def read(self, row: int) -> Pixels:
        """Return [H, W, C], the image as it is evaluated."""

    def read_for_training(self, row: int, crop: ResizedCrop | None, seed: int) -> Pixels:
        """Return [H, W, C], varied at random where that is decided before decoding; ``seed`` fixes all draws."""


@dataclass(frozen=True)
class PictureReader:
    """Reads encoded pictures.

    Args:
        pictures: All of the source's.
        decoder: With ``image_size`` and ``channels``.
    """

    pictures: Pictures
    decoder: Decoder
    threads: int | None = None

    def read(self, row: int) -> Pixels:
        """See ``Reader.read``."""
        return self.decoder(self.pictures[row])

    def read_for_training(self, row: int, crop: ResizedCrop | None, seed: int) -> Pixels:
        """See ``Reader.read_for_training``."""
        picture = self.pictures[row]
        if crop is None:
            return self.decoder(picture)
        height, width = size_of(picture)
        return self.decoder.crop(picture, crop.box(height, width, torch.Generator().manual_seed(seed)))


@dataclass(frozen=True, eq=False)
class StreamedSet:
    """Labelled images that are read when they are taken.

    Args:
        reader: Reads a row of the source.
        rows: [N], int64: which rows of the source these are.
        labels: [N], int64.
        classes: The classes' names, in the order of the labels.
        shape: Channels, height and width of every image.
        on_error: ``"skip"`` leaves out what cannot be decoded; a batch is then smaller.
    """

    reader: Reader
    rows: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    on_error: OnError = "raise"

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, index: Tensor | slice) -> "StreamedSet":
        """Return the rows at ``index``: a slice, or positions [M], int64, in that order."""
        return replace(self, rows=self.rows[index], labels=self.labels[index])

    def take(self, index: Tensor) -> Taken:
        """Decode the images at positions ``index`` [M] with a pool of threads."""

        def read(row: int) -> Pixels | None:
            return _or_skip(self.on_error, lambda: self.reader.read(row))

        with strict_sizes(), ThreadPoolExecutor(self.reader.threads) as pool:
            return self.collect(list(pool.map(read, self.rows[index].tolist())), index)

    def take_for_training(self, index: Tensor, crop: ResizedCrop | None, seed: int, epoch: int) -> Taken:
        """Decode the images at positions ``index`` [M], one after the other; the draws depend on epoch and row."""

        def read(row: int) -> Pixels | None:
            draws = rng.stream_seed(seed, "decode", epoch, row)
            return _or_skip(self.on_error, lambda: self.reader.read_for_training(row, crop, draws))

        return self.collect([read(row) for row in self.rows[index].tolist()], index)

    def collect(self, pixels: Sequence[Pixels | None], index: Tensor) -> Taken:
        """Make a batch of what was read; None was skipped."""
        channels, height, width = self.shape
        kept = torch.tensor([value is not None for value in pixels], dtype=torch.bool)
        out = torch.empty(int(kept.sum()), channels, height, width, dtype=torch.uint8)
        for image, value in zip(out.numpy(), (value for value in pixels if value is not None), strict=True):
            if value.shape != (height, width, channels):
                raise InputError(f"an image has the shape {value.shape}; the others have {(height, width, channels)}")
            image[:] = value.transpose(2, 0, 1)
        return Taken(out, self.labels[index][kept], index[kept])

    def statistics(self) -> Statistics:
        """Return mean and standard deviation per channel, in [0, 1], over 1,000 images (or all of fewer)."""
        order = torch.randperm(len(self), generator=rng.generator(0, "statistics"))
        images = self.take(order[:_STATISTICS_OVER]).images
        if not len(images):
            raise InputError("none of the training images can be decoded; data.on_error=skip is for a few")
        return channel_statistics(images)

    def digest(self) -> str:
        """Return a checksum (SHA-256) of pixels and labels, as ``ImageSet.digest``; it decodes every image."""
        checksum = hashlib.sha256(str((len(self), *self.shape)).encode())
        for index in torch.split(torch.arange(len(self)), _CHUNK):
            checksum.update(self.take(index).images.numpy().tobytes())
        checksum.update(self.labels.numpy().tobytes())
        return checksum.hexdigest()


@dataclass(frozen=True)
class Place:
    """A batch of an epoch: its step and the positions of its images [B], int64."""

    step: int
    index: Tensor


class _BatchReader(Dataset[tuple[int, Taken | str]]):
    """What a worker process does: whole batches, so that one message carries each; a user's mistake as its text."""

    def __init__(self, images: StreamedSet, crop: ResizedCrop | None, seed: int, epoch: int) -> None:
        self.images, self.crop, self.seed, self.epoch = images, crop, seed, epoch

    def __getitem__(self, place: Place) -> tuple[int, Taken | str]:
        with strict_sizes():
            try:
                return place.step, self.images.take_for_training(place.index, self.crop, self.seed, self.epoch)
            except InputError as error:
                return place.step, str(error)


def stream(
    images: StreamedSet,
    places: Sequence[Place],
    *,
    crop: ResizedCrop | None,
    seed: int,
    epoch: int,
    workers: int,
    pin_memory: bool,
) -> Iterator[tuple[int, Taken]]:
    """Read the batches of an epoch ahead of their use, in order.

    Args:
        images: The training set.
        places: The batches, in order.
        crop: A random crop to take before an image is brought to its size, or None.
        seed: Of the draws, together with the epoch and the image.
        epoch: Place in the stream.
        workers: Processes that decode; 0 decodes here, without reading ahead.
        pin_memory: Whether batches lie in memory that a GPU copies from without waiting.

    Yields:
        The step and the images of each batch.

    Raises:
        InputError: An image cannot be decoded, and the set does not skip it.
    """
    loader = DataLoader(
        _BatchReader(images, crop, seed, epoch),
        batch_size=None,
        sampler=places,  # a batch is one item here
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=2 if workers else None,
        worker_init_fn=_worker,
        generator=torch.Generator(),  # its own, so that torch's global state is left alone
    )
    try:
        with _signals_held():  # workers start with them held, and never meet one that was meant for the whole group
            batches = iter(loader)
        for step, taken in batches:
            if isinstance(taken, str):
                raise InputError(taken)
            yield step, taken
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise InputError(
            "a worker process that decodes images was killed (out of memory, or /dev/shm is too small); set"
            " data.workers to less"
        ) from error


def _worker(_: int) -> None:
    for number in _STOPS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _signals_held() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _or_skip(on_error: OnError, read: Callable[[], Pixels]) -> Pixels | None:
    try:
        return read()
    except InputError:
        if on_error == "raise":
            raise
        return None
