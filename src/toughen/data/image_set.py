"""Images with their labels, and the three parts of a data set."""

import hashlib
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from toughen.errors import InputError

_CHUNK = 4096  # images in float at a time


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images of one size.

    Args:
        images: [N, C, H, W], uint8, N >= 1.
        labels: [N], int64, in ``range(len(classes))``.
        classes: The classes' names, in the order of the labels.

    Raises:
        InputError: No images, another dtype or shape, or a label outside the classes.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise InputError(f"images are {_describe(self.images)}; they must be uint8 of shape [N, C, H, W]")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise InputError(f"labels are {_describe(self.labels)}; they must be int64 of shape [{len(self.images)}]")
        if self.images.numel() == 0:
            raise InputError(f"images have shape {list(self.images.shape)}; at least one image is needed")
        outside = (self.labels < 0) | (self.labels >= len(self.classes))
        if outside.any():
            row = int(outside.nonzero()[0])
            raise InputError(
                f"label {int(self.labels[row])} in row {row} is outside 0..{len(self.classes) - 1}"
                f" ({len(self.classes)} classes)"
            )

    def __len__(self) -> int:
        return len(self.images)

    def digest(self) -> str:
        """Return a checksum (SHA-256) of pixels and labels: equal for equal images, wherever they came from."""
        checksum = hashlib.sha256(str(tuple(self.images.shape)).encode())
        for part in (self.images, self.labels):
            checksum.update(part.cpu().contiguous().numpy().tobytes())
        return checksum.hexdigest()

    def subset(self, index: Tensor | slice) -> "ImageSet":
        """Return the rows at ``index``: a slice, or positions [M], int64, in that order."""
        return ImageSet(self.images[index], self.labels[index], self.classes)

    def resized(self, size: int) -> "ImageSet":
        """Return the images at ``size`` x ``size`` pixels, rounded back to uint8.

        An axis that shrinks is averaged over areas; one that grows is interpolated linearly.
        """
        if self.images.shape[-2:] == (size, size):
            return self
        chunks = [_resize(chunk, size) for chunk in torch.split(self.images, _CHUNK)]
        return ImageSet(torch.cat(chunks), self.labels, self.classes)


@dataclass(frozen=True, eq=False)
class DataSplits:
    """The parts of a data set, which share image size and classes.

    Args:
        name: The data set's name.
        train: What the weights are fitted to.
        validation: What checkpoints and layers are chosen on.
        test: What is reported, and nothing else.

    Attributes:
        mean: Mean of ``train``, one number per channel, in [0, 1].
        std: Standard deviation of ``train``, one number per channel, in [0, 1]; at least 1/255, so
            that a constant channel can be divided by it.
    """

    name: str
    train: ImageSet
    validation: ImageSet
    test: ImageSet
    mean: tuple[float, ...] = field(init=False)
    std: tuple[float, ...] = field(init=False)

    def __post_init__(self) -> None:
        mean, std = _channel_statistics(self.train.images)
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "std", std)


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {list(tensor.shape)}"


def _resize(images: Tensor, size: int) -> Tensor:
    height, width = images.shape[-2:]
    out = F.adaptive_avg_pool2d(images.float(), (min(height, size), min(width, size)))
    if out.shape[-2:] != (size, size):
        out = F.interpolate(out, size=(size, size), mode="bilinear", align_corners=False)
    return out.round().to(torch.uint8)


def _channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Compute mean and standard deviation per channel from the counts of the 256 levels: exact in float64."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    counts = [torch.bincount(channel.reshape(-1), minlength=256) for channel in images.unbind(dim=1)]
    share = torch.stack(counts).double() / (images.numel() // images.shape[1])  # [C, 256]
    mean = share @ levels
    variance = (share * (levels - mean[:, None]).square()).sum(dim=1)
    return tuple(mean.tolist()), tuple(variance.sqrt().clamp(min=1 / 255).tolist())
