"""Further training images, generated or pseudo-labelled: npz files, which are mapped where possible, or parquet."""

import lzma
import math
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from toughen.data.decode import Decoder, decode, size_of
from toughen.data.encoded import Blobs, Chosen
from toughen.data.image_set import ImageSet
from toughen.data.mapped import cached_copy, fits_memory
from toughen.data.parquet import read_table
from toughen.errors import InputError, first_line

_LONGEST_HEADER = 2**16  # bytes of an array's
_CHUNK = 4096  # images that are copied at a time
_PICKLES = (".pickle", ".pkl", ".pt", ".pth")

# what the readers of a damaged archive raise; a header that asks for too much memory among them
_UNREADABLE = (
    *(OSError, ValueError, EOFError, RuntimeError, MemoryError, OverflowError, TypeError, SyntaxError, KeyError),
    *(struct.error, zlib.error, lzma.LZMAError, zipfile.BadZipFile, zipfile.LargeZipFile),
)

Pixels = npt.NDArray[np.uint8]
Shape = tuple[int, int, int]  # of one image: channels, height, width


@dataclass(frozen=True)
class Part:
    """The images of one file.

    Args:
        path: The file.
        labels: [N], int64.
        chunks: Reads the images in order, [n, H, W, C] at a time.
        mapped: All of them, [N, H, W, C], where the file can be mapped into memory.
    """

    path: Path
    labels: Tensor
    chunks: Callable[[], Iterator[Pixels]]
    mapped: Pixels | None = None


def read_extra(path: str, *, classes: tuple[str, ...], image_shape: Shape) -> ImageSet:
    """Read further training images: an npz file (``image``, uint8 [N, H, W, C], and ``label``), parquet, or a folder.

    A single npz file that is stored without compression (``np.savez``) is mapped: its images take no memory. Other
    images are read into memory, or, if there is too little, written once to the cache folder and mapped from there.

    Args:
        path: A file, or a folder of files of one kind, which are taken together.
        classes: Those of the training images.
        image_shape: Channels, height and width of the training images.

    Raises:
        InputError: Nothing to read, a pickle, missing arrays or columns, labels outside ``-1..len(classes) - 1``, or
            images of another shape.
    """
    parts = [_part(file, image_shape) for file in _files(Path(path).expanduser())]
    for part in parts:
        outside = (part.labels < -1) | (part.labels >= len(classes))
        if outside.any():
            row = int(outside.nonzero()[0])
            raise InputError(
                f"{part.path}: label {int(part.labels[row])} in row {row} is outside -1..{len(classes) - 1}"
                f" ({len(classes)} classes; -1 is an image without a label)"
            )
    images = _tensor(_together(parts, image_shape)).permute(0, 3, 1, 2)
    return ImageSet(images, torch.cat([part.labels for part in parts]), classes, partly_labelled=True)


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise InputError(f"data.extra.path {path} does not exist")
    files = [path] if path.is_file() else sorted(path.glob("*.npz")) or sorted(path.glob("*.parquet"))
    for file in files or sorted(path.iterdir()):
        if file.suffix.lower() in _PICKLES:
            raise InputError(
                f"{file} is a pickle, which can run code when it is read; if you trust it, convert it once:"
                " d = numpy.load(FILE, allow_pickle=True);"
                " numpy.savez('extra.npz', image=d['data'], label=d['extrapolated_targets'])"
            )
    if not files or files[0].suffix not in (".npz", ".parquet"):
        raise InputError(f"data.extra.path {path} must be a file .npz or .parquet, or a folder of such files")
    return files


def _part(file: Path, shape: Shape) -> Part:
    return _npz_part(file, shape) if file.suffix == ".npz" else _parquet_part(file, shape)


# -- npz ----------------------------------------------------------------------------------------------


def _npz_part(file: Path, shape: Shape) -> Part:
    try:
        with zipfile.ZipFile(file) as content:
            names = content.namelist()
            if not {"image.npy", "label.npy"} <= set(names):
                found = ", ".join(name.removesuffix(".npy") for name in names)
                raise InputError(f"{file} holds the arrays {found}; needed are image and label")
            image_shape, start = _header(content, "image.npy")
            member = content.getinfo("image.npy")
            if member.file_size != start + math.prod(image_shape):
                raise InputError(f"{file}: image has {member.file_size - start} bytes, its shape is {image_shape}")
            size, most = content.getinfo("label.npy").file_size, 8 * sum(image_shape[:1]) + _LONGEST_HEADER
            if size > most:  # a small archive can unpack to anything
                raise InputError(f"{file}: label has {size:,} bytes; for {image_shape} images it has at most {most:,}")
        with np.load(file, allow_pickle=False) as arrays:
            labels = arrays["label"]
        stored = member.compress_type == zipfile.ZIP_STORED and len(image_shape) == 4 and math.prod(image_shape) > 0
        mapped = _mapped(file, member, image_shape) if stored else None
    except _UNREADABLE as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read {file} as npz: {first_line(error)}; write it with np.savez") from error
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"{file}: label is {labels.dtype} of shape {labels.shape}; it must be a list of integers")
    if len(labels) and labels.max() > np.iinfo(np.int64).max:  # as int64 it would wrap around to an image without one
        raise InputError(f"{file}: label {labels.max()} is outside the classes")
    if len(image_shape) != 4 or image_shape[0] != len(labels):
        raise InputError(
            f"{file}: image has the shape {image_shape}, label {labels.shape}; needed: [N, H, W, C] and [N]"
        )
    _check_shape(file, (image_shape[3], *image_shape[1:3]), shape)
    return Part(file, torch.from_numpy(labels.astype(np.int64)), lambda: _npz_chunks(file, image_shape), mapped)


def _header(content: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], int]:
    """Return the shape of an array of bytes, and how many bytes lie before it in its member of the archive."""
    with content.open(name) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
        if dtype.hasobject:
            raise InputError(f"{content.filename}: {name} holds Python objects, which can run code; save it as uint8")
        if dtype != np.uint8 or fortran:
            raise InputError(f"{content.filename}: image is {dtype}; it must be uint8, levels 0 to 255, in C order")
        return shape, stream.tell()


def _mapped(file: Path, member: zipfile.ZipInfo, shape: tuple[int, ...]) -> Pixels:
    with file.open("rb") as stream, zipfile.ZipFile(file) as content:
        stream.seek(member.header_offset + 26)  # a member starts with 30 bytes, its name and an extra field
        name_length, extra_length = struct.unpack("<HH", stream.read(4))
        start = member.header_offset + 30 + name_length + extra_length + _header(content, member.filename)[1]
    return np.memmap(file, np.uint8, mode="r", offset=start, shape=shape)


def _npz_chunks(file: Path, shape: tuple[int, ...]) -> Iterator[Pixels]:
    size = math.prod(shape[1:])
    try:
        with zipfile.ZipFile(file) as content, content.open("image.npy") as stream:
            stream.read(_header(content, "image.npy")[1])
            for start in range(0, shape[0], _CHUNK):
                count = min(_CHUNK, shape[0] - start)
                yield np.frombuffer(stream.read(count * size), np.uint8).reshape(count, *shape[1:])
    except _UNREADABLE as error:
        raise InputError(f"cannot read {file} as npz: {first_line(error)}; get it again") from error


# -- parquet ------------------------------------------------------------------------------------------


def _parquet_part(file: Path, shape: Shape) -> Part:
    table = read_table(file, in_memory=fits_memory(file.stat().st_size))
    pictures = Blobs([(str(file), table.images)])
    decoder = Decoder(channels=shape[0])

    def chunks() -> Iterator[Pixels]:
        for rows in torch.split(torch.arange(len(pictures)), _CHUNK):
            height, width = size_of(pictures[int(rows[0])])  # seen before all of them are decoded
            _check_shape(file, (shape[0], height, width), shape)
            images = decode(Chosen(pictures, rows), decoder).images
            _check_shape(file, tuple(images.shape[1:]), shape)
            yield images.permute(0, 2, 3, 1).numpy()

    return Part(file, table.labels, chunks)


# -- all parts ----------------------------------------------------------------------------------------


def _together(parts: Sequence[Part], shape: Shape) -> Pixels:
    """Return the images of all parts, [N, H, W, C]: mapped, in memory, or written to a file and mapped."""
    if len(parts) == 1 and parts[0].mapped is not None:
        return parts[0].mapped
    channels, height, width = shape
    whole = (sum(len(part.labels) for part in parts), height, width, channels)
    if fits_memory(math.prod(whole)):
        images = np.empty(whole, np.uint8)
        _fill(images, parts)
        return images

    def write(path: Path) -> None:
        _fill(np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=whole), parts)

    copy = cached_copy([part.path for part in parts], f".{channels}x{height}x{width}.npy", math.prod(whole), write)
    return np.lib.format.open_memmap(copy, mode="r")


def _fill(images: Any, parts: Sequence[Part]) -> None:
    start = 0
    for part in parts:
        for chunk in part.chunks():
            images[start : start + len(chunk)] = chunk
            start += len(chunk)


def _tensor(images: Pixels) -> Tensor:
    with warnings.catch_warnings():  # a mapped file is read-only, and nothing writes into an image set
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(images)


def _check_shape(file: Path, found: tuple[int, ...], wanted: Shape) -> None:
    if found != wanted:
        forms = [f"{width}x{height} with {channels} channels" for channels, height, width in (found, wanted)]
        raise InputError(f"{file}: its images are {forms[0]}, the training images {forms[1]}; bring both to one shape")
