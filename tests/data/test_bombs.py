"""Small files that would take all memory, or wait for ever."""

import io
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from toughen.data import DataSettings, load
from toughen.data.generated import read_extra
from toughen.errors import InputError

SHAPE = (3, 2, 2)


def png(width: int, height: int) -> bytes:
    """A picture that says it has so many pixels, and holds none."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b""))]
    parts = [
        struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in (*chunks, (b"IEND", b""))
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def pictures(folder: Path) -> Path:
    for name in ("train/a/0", "train/a/1", "train/b/0", "train/b/1", "test/a/0", "test/b/0"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / f"{name}.png")
    return folder


@pytest.mark.parametrize("skip", ["raise", "skip"])
def test_a_huge_picture_among_small_ones_is_refused_before_it_is_decoded(tmp_path: Path, skip: str) -> None:
    (pictures(tmp_path) / "train/a/1.png").write_bytes(png(9000, 9000))  # decoded, it would be cut off
    settings = DataSettings(name="folder", path=str(tmp_path), validation=1, on_error=skip)
    with pytest.raises(
        InputError, match=r"images differ in size: .* 4x4.* 9000x9000|images differ in size: .*9000x9000.* 4x4"
    ):
        load(settings)


def test_a_picture_beyond_what_pillow_takes_for_sane_is_refused(tmp_path: Path) -> None:
    (pictures(tmp_path) / "train/a/1.png").write_bytes(png(60_000, 60_000))
    with pytest.raises(InputError, match=r"cannot decode the image .*1\.png: Image size .* exceeds limit"):
        load(DataSettings(name="folder", path=str(tmp_path), validation=1, image_size=8))


def test_a_pipe_among_the_pictures_is_refused(tmp_path: Path) -> None:
    (pictures(tmp_path) / "train/a/1.png").unlink()
    os.mkfifo(tmp_path / "train/a/1.png")
    with pytest.raises(InputError, match=r"1\.png: it is a pipe, no file"):
        load(DataSettings(name="folder", path=str(tmp_path), validation=1))


def array(values: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, values)
    return out.getvalue()


def header(shape: tuple[int, ...], dtype: str = "|u1") -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": dtype, "fortran_order": False, "shape": shape})
    return out.getvalue()


IMAGES, LABELS = array(np.zeros((2, 2, 2, 3), np.uint8)), array(np.zeros(2, np.int64))


@pytest.mark.parametrize(
    ("image", "label", "message"),
    [
        (IMAGES, LABELS + bytes(10**7), r"label has 10,000,144 bytes; for \(2, 2, 2, 3\) images"),
        (IMAGES, header((10**15,), "<i8"), r"cannot read .* as npz"),
        (IMAGES, header((-1,), "<i8"), r"cannot read .* as npz|needed: \[N, H, W, C\]"),
        (header((10**9, 2, 2, 3)), LABELS, r"image has 0 bytes, its shape is \(1000000000, 2, 2, 3\)"),
        (header(()) + b"x", LABELS, r"image has the shape \(\)"),
        (header((0, 2, 2, 3)), array(np.zeros(0, np.int64)), "at least one image is needed"),
    ],
)
def test_an_archive_whose_arrays_are_not_what_they_say_is_refused(tmp_path, image, label, message) -> None:
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / "extra.npz", "w", compression) as archive:
            archive.writestr("image.npy", image)
            archive.writestr("label.npy", label)
        with pytest.raises(InputError, match=message):
            read_extra(str(tmp_path / "extra.npz"), classes=("a",), image_shape=SHAPE)


def test_an_archive_that_is_shorter_than_its_directory_says_is_refused(tmp_path: Path) -> None:
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("label.npy", LABELS)
        archive.writestr("image.npy", IMAGES)
    content = whole.getvalue()
    for cut in (len(LABELS) + 60, len(content) - 300):  # what lies in the middle is gone, the directory is there
        (tmp_path / "extra.npz").write_bytes(content[:cut] + content[cut + 20 :])
        with pytest.raises(InputError, match=r"cannot read .* as npz"):
            read_extra(str(tmp_path / "extra.npz"), classes=("a",), image_shape=SHAPE)
