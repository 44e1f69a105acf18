"""Image files, or their bytes, to one uint8 tensor."""

import io
import struct
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from toughen.errors import InputError

# named, since Pillow also knows formats that it hands to an interpreter (EPS to Ghostscript)
_FORMATS = ("PNG", "JPEG", "BMP", "PPM", "WEBP", "TIFF", "GIF")
_CHUNK = 512  # images per task: a task for each would cost more than decoding a small image

Pixels = npt.NDArray[np.uint8]


class Encoded(NamedTuple):
    """A picture before decoding: what to call it in an error, and its file or its bytes."""

    name: str
    content: Path | bytes


def decode(pictures: Sequence[Encoded], *, image_size: int | None) -> Tensor:
    """Decode pictures with a thread pool.

    Args:
        pictures: At least one.
        image_size: Pixels of a side to which each is resized (area averages when it shrinks, Lanczos
            otherwise); None demands that all have one size.

    Returns:
        [N, C, H, W], uint8. One channel if all pictures are grey (modes 1, L and 16 bits), else RGB.

    Raises:
        InputError: A picture cannot be decoded, or the sizes differ.
    """
    chunks = [pictures[start : start + _CHUNK] for start in range(0, len(pictures), _CHUNK)]
    with ThreadPoolExecutor() as pool:
        decoded = pool.map(lambda chunk: [_decode_one(picture, image_size) for picture in chunk], chunks)
        arrays = [array for chunk in decoded for array in chunk]
    _check_sizes(pictures, arrays)
    if any(array.shape[2] == 3 for array in arrays):
        arrays = [np.broadcast_to(array, (*array.shape[:2], 3)) for array in arrays]
    return _stack(arrays)


def _decode_one(picture: Encoded, image_size: int | None) -> Pixels:
    """Return [H, W, 1] for a grey picture, [H, W, 3] for any other."""
    content = io.BytesIO(picture.content) if isinstance(picture.content, bytes) else picture.content
    try:
        with Image.open(content, formats=_FORMATS) as opened:
            image = _eight_bits(opened)
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise InputError(f"cannot decode the image {picture.name}: {error}") from error
    if image_size is not None and image.size != (image_size, image_size):
        shrinks = image_size <= min(image.size)
        image = image.resize((image_size, image_size), Image.Resampling.BOX if shrinks else Image.Resampling.LANCZOS)
    pixels: Pixels = np.asarray(image, dtype=np.uint8)
    return pixels.reshape(*pixels.shape[:2], -1)


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which convert("L") would clip instead of scale
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("1", "L"):
        return image.convert("L")
    if image.mode == "P":  # by way of RGBA, or Pillow warns about palettes with transparency
        image = image.convert("RGBA")
    return image.convert("RGB")


def _check_sizes(pictures: Iterable[Encoded], arrays: Sequence[Pixels]) -> None:
    height, width = arrays[0].shape[:2]
    first = None
    for picture, array in zip(pictures, arrays, strict=True):
        first = first or picture.name
        if array.shape[:2] != (height, width):
            raise InputError(
                f"images differ in size: {first} is {width}x{height},"
                f" {picture.name} is {array.shape[1]}x{array.shape[0]};"
                " set data.image_size to bring all to one size"
            )


def _stack(arrays: Sequence[Pixels]) -> Tensor:
    height, width, channels = arrays[0].shape
    out = torch.empty(len(arrays), channels, height, width, dtype=torch.uint8)
    np.stack([array.transpose(2, 0, 1) for array in arrays], out=out.numpy())
    return out
