"""Images with their labels, and the three parts of a data set."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from toughen.errors import InputError

_CHUNK = 4096  # images in float at a time


class Taken(NamedTuple):
    """Some images of a set, [M, C, H, W], uint8, with their labels [M] and their positions in the set [M]."""

    images: Tensor
    labels: Tensor
    index: Tensor  # type: ignore[assignment]  # the field's word wins over tuple.index


class Statistics(NamedTuple):
    """One number per channel each, in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Images(Protocol):
    """Labelled images of one size, in memory (``ImageSet``) or decoded when they are taken (``StreamedSet``)."""

    @property
    def labels(self) -> Tensor:
        """[N], int64."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes' names, in the order of the labels."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""

    def __len__(self) -> int: ...

    def subset(self, index: Tensor | slice) -> "Images":
        """Return the rows at ``index``: a slice, or positions [M], int64, in that order."""

    def take(self, index: Tensor) -> Taken:
        """Return the images at positions ``index`` [M]; fewer where some cannot be decoded and are skipped."""

    def statistics(self) -> Statistics:
        """Return mean and standard deviation per channel (of a sample, where all would take too long)."""

    def digest(self) -> str:
        """Return a checksum that tells this set from others."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images of one size.

    Args:
        images: [N, C, H, W], uint8, N >= 1.
        labels: [N], int64, in ``range(len(classes))``.
        classes: The classes' names, in the order of the labels.
        partly_labelled: Whether a label may be -1: an image without one (Carmon et al., 2019).

    Raises:
        InputError: No images, another dtype or shape, or a label outside the classes.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    partly_labelled: bool = False

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise InputError(f"images are {_describe(self.images)}; they must be uint8 of shape [N, C, H, W]")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise InputError(f"labels are {_describe(self.labels)}; they must be int64 of shape [{len(self.images)}]")
        if self.images.numel() == 0:
            raise InputError(f"images have shape {list(self.images.shape)}; at least one image is needed")
        check_labels(self.labels, self.classes, smallest=-1 if self.partly_labelled else 0)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def take(self, index: Tensor) -> Taken:
        """Return the images at positions ``index`` [M], int64, with their labels and positions."""
        return Taken(self.images[index], self.labels[index], index)

    def statistics(self) -> Statistics:
        """Return mean and standard deviation per channel, in [0, 1], over all pixels: exact in float64."""
        return channel_statistics(self.images)

    def digest(self) -> str:
        """Return a checksum (SHA-256) of pixels and labels: equal for equal images, wherever they came from."""
        checksum = hashlib.sha256(str(tuple(self.images.shape)).encode())
        for part in (self.images, self.labels):
            checksum.update(part.cpu().contiguous().numpy().tobytes())
        return checksum.hexdigest()

    def subset(self, index: Tensor | slice) -> "ImageSet":
        """Return the rows at ``index``: a slice, or positions [M], int64, in that order."""
        return replace(self, images=self.images[index], labels=self.labels[index])

    def resized(self, size: int) -> "ImageSet":
        """Return the images at ``size`` x ``size`` pixels, rounded back to uint8.

        An axis that shrinks is averaged over areas; one that grows is interpolated linearly.
        """
        if self.images.shape[-2:] == (size, size):
            return self
        chunks = [_resize(chunk, size) for chunk in torch.split(self.images, _CHUNK)]
        return replace(self, images=torch.cat(chunks))


@dataclass(frozen=True, eq=False)
class DataSplits:
    """The parts of a data set, which share image size and classes.

    Args:
        name: The data set's name.
        train: What the weights are fitted to.
        validation: What checkpoints and layers are chosen on.
        test: What is reported, and nothing else.
        extra: Further training images, mixed into every batch; None is none.
        notes: What a user should know about how the images are kept, and what was skipped; one line each.

    Attributes:
        mean: Mean of ``train``, one number per channel, in [0, 1].
        std: Standard deviation of ``train``, one number per channel, in [0, 1]; at least 1/255, so
            that a constant channel can be divided by it.

    Raises:
        InputError: The parts differ in image shape or classes.
    """

    name: str
    train: Images
    validation: Images
    test: Images
    extra: ImageSet | None = None
    notes: tuple[str, ...] = ()
    mean: tuple[float, ...] = field(init=False)
    std: tuple[float, ...] = field(init=False)

    def __post_init__(self) -> None:
        parts = {"train": self.train, "validation": self.validation, "test": self.test, "extra": self.extra}
        for name, part in parts.items():
            if part is not None and (part.shape, part.classes) != (self.train.shape, self.train.classes):
                raise InputError(
                    f"the {name} images are {_form(part)}, the training images {_form(self.train)};"
                    " bring them to one form"
                )
        mean, std = self.train.statistics()
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "std", std)

    def identity(self) -> dict[str, Any]:
        """Return what tells these images from others without reading them, as plain values."""
        parts = (self.train, self.validation, self.test)
        labels = hashlib.sha256(b"".join(part.labels.numpy().tobytes() for part in parts)).hexdigest()
        counts = [len(part) for part in parts]
        return {"name": self.name, "counts": counts, "shape": list(self.train.shape), "labels_sha256": labels}


def check_labels(labels: Tensor, classes: Sequence[str], *, smallest: int = 0) -> None:
    """Refuse labels outside ``smallest..len(classes) - 1``.

    Raises:
        InputError: Names the first such label and its row.
    """
    outside = (labels < smallest) | (labels >= len(classes))
    if outside.any():
        row = int(outside.nonzero()[0])
        raise InputError(
            f"label {int(labels[row])} in row {row} is outside {smallest}..{len(classes) - 1} ({len(classes)} classes)"
        )


def channel_statistics(images: Tensor) -> Statistics:
    """Compute mean and standard deviation per channel from the counts of the 256 levels: exact in float64."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    counts = [torch.bincount(channel.reshape(-1), minlength=256) for channel in images.unbind(dim=1)]
    share = torch.stack(counts).double() / (images.numel() // images.shape[1])  # [C, 256]
    mean = share @ levels
    variance = (share * (levels - mean[:, None]).square()).sum(dim=1)
    return Statistics(tuple(mean.tolist()), tuple(variance.sqrt().clamp(min=1 / 255).tolist()))


def _form(part: Images) -> str:
    channels, height, width = part.shape
    return f"{width}x{height} with {channels} channels and {len(part.classes)} classes"


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {list(tensor.shape)}"


def _resize(images: Tensor, size: int) -> Tensor:
    height, width = images.shape[-2:]
    out = F.adaptive_avg_pool2d(images.float(), (min(height, size), min(width, size)))
    if out.shape[-2:] != (size, size):
        out = F.interpolate(out, size=(size, size), mode="bilinear", align_corners=False)
    return out.round().to(torch.uint8)
