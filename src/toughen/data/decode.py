"""Encoded pictures to uint8 pixels: one at a time, or all of a set by a pool of threads."""

import io
import struct
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from toughen.errors import InputError

# named, since Pillow also knows formats that it hands to an interpreter (EPS to Ghostscript)
_FORMATS = ("PNG", "JPEG", "BMP", "PPM", "WEBP", "TIFF", "GIF")
_CHUNK = 512  # images per task: a task for each would cost more than decoding a small image

_PILLOWS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    Image.DecompressionBombWarning,
    Image.DecompressionBombError,
)

Pixels = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]  # top, left, height, width, in pixels
OnError = Literal["raise", "skip"]


class Encoded(NamedTuple):
    """A picture before decoding: what to call it in an error, and its file or its bytes."""

    name: str
    content: Path | bytes


class SizesDiffer(InputError):
    """Two pictures differ in size that would have to lie in one tensor."""


class Pictures(Protocol):
    """Encoded pictures by position; they need not be in memory."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int, /) -> Encoded: ...


class Decoded(NamedTuple):
    """Images [N, C, H, W], uint8, the positions that they come from [N], and the names of what was skipped."""

    images: Tensor
    positions: Tensor
    skipped: tuple[str, ...]


@dataclass(frozen=True)
class Decoder:
    """From a picture to pixels.

    Args:
        image_size: Pixels of a side to bring it to (area averages when it shrinks, Lanczos otherwise); None
            leaves it as it is.
        center: Share of the shorter side that is kept, in (0, 1], of a square in the middle; only with ``image_size``.
        channels: 1 or 3; None leaves a grey picture grey and makes any other RGB.
    """

    image_size: int | None = None
    center: float = 1.0
    channels: int | None = None

    def __call__(self, picture: Encoded, *, like: tuple[str, tuple[int, int]] | None = None) -> Pixels:
        """Decode one picture: [H, W, C].

        Args:
            picture: Encoded.
            like: Name, height and width of another one that it must equal in size, seen before it is decoded: a small
                file can hold a huge picture.

        Raises:
            InputError: It is broken, of an unknown format, or too large.
        """
        with _Opened(picture) as image:
            if like is not None:
                check_size(*like, picture.name, (image.height, image.width))
            if self.image_size is None:
                return _array(eight_bits(image, self.channels))
            return _square(image, _middle(image, self.center), self.image_size, self.channels)

    def crop(self, picture: Encoded, box: Box) -> Pixels:
        """Decode the part of a picture inside ``box``, brought to ``image_size``: [S, S, C].

        Raises:
            InputError: As for a whole picture.
        """
        assert self.image_size is not None
        top, left, height, width = box
        with _Opened(picture) as image:
            return _square(image, (left, top, left + width, top + height), self.image_size, self.channels)


def size_of(picture: Encoded) -> tuple[int, int]:
    """Return height and width without decoding.

    Raises:
        InputError: The header cannot be read.
    """
    with _Opened(picture) as image:
        return image.height, image.width


def is_grey(picture: Encoded) -> bool:
    """Return whether the picture says that it has one channel (modes 1, L and 16 bits)."""
    with _Opened(picture) as image:
        return _grey_mode(image)


def decode(pictures: Pictures, decoder: Decoder, *, on_error: OnError = "raise") -> Decoded:
    """Decode all pictures with a pool of threads.

    Args:
        pictures: At least one.
        decoder: With ``channels=None``, one channel results if all pictures are grey, else three.
        on_error: ``"skip"`` leaves out what cannot be decoded.

    Raises:
        InputError: A picture cannot be decoded, all of them cannot, or the sizes differ.
    """
    like = _first_size(pictures) if decoder.image_size is None else None

    def one(position: int) -> Pixels | str:
        picture = pictures[position]
        try:
            return decoder(picture, like=like)
        except SizesDiffer:
            raise
        except InputError:
            if on_error == "raise":
                raise
            return picture.name

    chunks = [range(len(pictures))[start : start + _CHUNK] for start in range(0, len(pictures), _CHUNK)]
    with strict_sizes(), ThreadPoolExecutor() as pool:
        outcomes = [outcome for chunk in pool.map(lambda c: [one(p) for p in c], chunks) for outcome in chunk]
    arrays = {position: outcome for position, outcome in enumerate(outcomes) if not isinstance(outcome, str)}
    skipped = tuple(outcome for outcome in outcomes if isinstance(outcome, str))
    if not arrays:
        raise InputError(f"none of the {len(pictures)} images can be decoded; the first is {skipped[0]}")
    return Decoded(_stack(list(arrays.values())), torch.tensor(list(arrays)), skipped)


def check_size(name: str, size: tuple[int, ...], other: str, other_size: tuple[int, ...]) -> None:
    """Refuse two pictures of different size (height, width) that would have to lie in one tensor.

    Raises:
        SizesDiffer: Names both.
    """
    if other_size != size:
        raise SizesDiffer(
            f"images differ in size: {name} is {size[1]}x{size[0]}, {other} is {other_size[1]}x{other_size[0]};"
            " set data.image_size (or --image-size) to bring all to one size"
        )


def _first_size(pictures: Pictures) -> tuple[str, tuple[int, int]] | None:
    """Return name, height and width of the first picture whose header can be read."""
    for position in range(len(pictures)):
        with suppress(InputError):
            return pictures[position].name, size_of(pictures[position])
    return None


class _Opened:
    """Open a picture, and turn whatever Pillow raises, there or while it decodes, into one line."""

    def __init__(self, picture: Encoded) -> None:
        self.picture = picture

    def __enter__(self) -> Image.Image:
        content = self.picture.content
        try:
            if isinstance(content, Path) and content.is_fifo():
                raise OSError("it is a pipe, no file")  # to open it would wait for ever
            self.image = Image.open(io.BytesIO(content) if isinstance(content, bytes) else content, formats=_FORMATS)
        except Exception as error:
            self._explain(error)
            raise
        return self.image

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.image.close()
        if error is not None:
            self._explain(error)

    def _explain(self, error: BaseException) -> None:
        if isinstance(error, _PILLOWS) and not isinstance(error, InputError):
            raise InputError(
                f"cannot decode the image {self.picture.name}: {error}; remove it, or set data.on_error=skip"
            ) from error


@contextmanager
def strict_sizes() -> Iterator[None]:
    """Inside, a picture of suspicious size is an error, where Pillow would print a warning and go on."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _middle(image: Image.Image, share: float) -> tuple[float, float, float, float]:
    side = share * min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return left, top, left + side, top + side


def _square(image: Image.Image, box: tuple[float, float, float, float], size: int, channels: int | None) -> Pixels:
    """Bring the part inside ``box`` (left, top, right, bottom) to size x size pixels."""
    side = min(box[2] - box[0], box[3] - box[1])
    before = image.size
    # JPEG decodes at 1/2, 1/4 or 1/8 for a fraction of the work; twice the wanted size is left to average over
    image.draft(None, (int(before[0] * 2 * size / side) + 1, int(before[1] * 2 * size / side) + 1))
    across, down = image.width / before[0], image.height / before[1]
    box = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
    filtering = Image.Resampling.BOX if size <= side else Image.Resampling.LANCZOS
    return _array(eight_bits(image, channels).resize((size, size), filtering, box=box))


def _array(image: Image.Image) -> Pixels:
    pixels: Pixels = np.asarray(image, dtype=np.uint8)
    return pixels.reshape(*pixels.shape[:2], -1)


def _grey_mode(image: Image.Image) -> bool:
    return image.mode in ("1", "L") or image.mode.startswith("I")


def eight_bits(image: Image.Image, channels: int | None) -> Image.Image:
    """Return the picture in mode L or RGB; ``channels`` as for ``Decoder``.

    Raises:
        ValueError: Its levels are floats, or integers of more than 16 bits: what is white is not known.
    """
    grey = _grey_mode(image)
    if image.mode.startswith("I"):  # 16 bits of grey, which convert("L") would clip instead of scale
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535 or (image.mode == "I" and levels.max() < 256):
            raise ValueError(f"levels {levels.min()} to {levels.max()} of mode I; save it with 8 or 16 bits")
        image = Image.fromarray((levels >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its levels are floats; save it with 8 or 16 bits")
    if image.mode == "P":  # by way of RGBA, or Pillow warns about palettes with transparency
        image = image.convert("RGBA")
    return image.convert("L" if channels == 1 or (channels is None and grey) else "RGB")


def _stack(arrays: Sequence[Pixels]) -> Tensor:
    """Stack [H, W, C] arrays to [N, C, H, W]; grey ones become RGB if any is."""
    height, width = arrays[0].shape[:2]
    channels = max(array.shape[2] for array in arrays)
    out = torch.empty(len(arrays), channels, height, width, dtype=torch.uint8)
    for row, array in zip(out.numpy(), arrays, strict=True):
        row[:] = array.transpose(2, 0, 1)
    return out
