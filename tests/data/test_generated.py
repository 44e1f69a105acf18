import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from public_layouts import as_struct, edm_npz, encoded, write_levels, write_parquet
from toughen.data import DataSettings, ExtraSettings, generated, load
from toughen.data.generated import read_extra
from toughen.data.image_set import ImageSet
from toughen.errors import InputError

CLASSES = ("ant", "bee", "cow")


def read(path: Path, shape: tuple[int, int, int] = (3, 4, 4)) -> ImageSet:
    return read_extra(str(path), classes=CLASSES, image_shape=shape)


def levels(images: ImageSet) -> list[int]:
    assert images.images[:, 1:].sum() == 0  # red alone
    return images.images[:, 0, 2, 1].tolist()


@pytest.mark.parametrize("compressed", [False, True])
def test_an_npz_file_is_read_with_its_unlabelled_images(tmp_path: Path, compressed: bool) -> None:
    edm_npz(tmp_path / "1m.npz", [2, -1, 0, 1], start=50, compressed=compressed)
    extra = read(tmp_path / "1m.npz")
    assert extra.images.shape == (4, 3, 4, 4)
    assert levels(extra) == [50, 51, 52, 53]
    assert (extra.labels.tolist(), extra.classes, extra.partly_labelled) == ([2, -1, 0, 1], CLASSES, True)
    assert levels(extra.subset(torch.tensor([3, 0]))) == [53, 50]


def test_an_uncompressed_npz_file_is_mapped_and_takes_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edm_npz(tmp_path / "1m.npz", [0, 1])
    monkeypatch.setattr(generated, "_npz_chunks", None)  # what would read it
    extra = read(tmp_path / "1m.npz")
    content = (tmp_path / "1m.npz").read_bytes()
    start = content.index(bytes([0, 0, 0] * 16 + [1, 0, 0] * 16))
    with (tmp_path / "1m.npz").open("r+b") as file:
        file.seek(start)
        file.write(bytes([77]))
    assert extra.images[0, 0, 0, 0] == 77


@pytest.mark.parametrize("little_memory", [False, True])
@pytest.mark.parametrize("compressed", [False, True])
def test_parts_in_a_folder_are_taken_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compressed: bool, little_memory: bool
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(generated, "_CHUNK", 2)
    monkeypatch.setattr(generated, "fits_memory", lambda _: not little_memory)
    (tmp_path / "parts").mkdir()
    edm_npz(tmp_path / "parts" / "50m_part1.npz", [0, 1, 2], compressed=compressed)
    edm_npz(tmp_path / "parts" / "50m_part2.npz", [2, 1], start=3, compressed=compressed)
    for _ in range(2):
        extra = read(tmp_path / "parts")
        assert (levels(extra), extra.labels.tolist()) == ([0, 1, 2, 3, 4], [0, 1, 2, 2, 1])
    assert len(list(tmp_path.glob("cache/toughen/*.npy"))) == little_memory


@pytest.mark.parametrize("many", [False, True])
def test_parquet_is_read_as_a_file_or_a_folder(tmp_path: Path, many: bool) -> None:
    write_levels(tmp_path / "a.parquet", [5, 6], [0, -1])
    write_levels(tmp_path / "b.parquet", [7], [2])
    extra = read(tmp_path if many else tmp_path / "a.parquet")
    assert (levels(extra), extra.labels.tolist()) == (([5, 6, 7], [0, -1, 2]) if many else ([5, 6], [0, -1]))


def test_extra_images_of_a_data_set_have_its_classes_and_shape(tmp_path: Path) -> None:
    edm_npz(tmp_path / "extra.npz", [1, -1])
    write_levels(tmp_path / "train.parquet", [0, 1, 2, 3], [0, 1, 0, 1], names=["ant", "bee"])
    write_levels(tmp_path / "test.parquet", [4, 5], [1, 0], names=["ant", "bee"])
    settings = DataSettings(
        name=f"parquet:{tmp_path}", validation=2, extra=ExtraSettings(path=str(tmp_path / "extra.npz"))
    )
    extra = load(settings).extra
    assert extra is not None
    assert (extra.labels.tolist(), extra.classes, extra.shape) == ([1, -1], ("ant", "bee"), (3, 4, 4))


@pytest.mark.parametrize("label", [-2, 3])
@pytest.mark.parametrize("kind", ["npz", "parquet"])
def test_a_label_outside_the_classes_is_named_with_its_file_and_row(tmp_path: Path, label: int, kind: str) -> None:
    file = tmp_path / f"x.{kind}"
    if kind == "npz":
        edm_npz(file, [0, label])
    else:
        write_levels(file, [0, 1], [0, label])
    with pytest.raises(InputError, match=rf"x\.{kind}: label {label} in row 1 is outside -1\.\.2 \(3 classes"):
        read(file)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 4)])
def test_images_of_another_shape_than_the_training_images_are_refused(
    tmp_path: Path, shape: tuple[int, int, int]
) -> None:
    edm_npz(tmp_path / "x.npz", [0, 1])
    wanted = f"{shape[1]}x{shape[1]} with {shape[0]} channels"
    with pytest.raises(InputError, match=rf"x\.npz: its images are 4x4 with 3 channels, the training images {wanted}"):
        read(tmp_path / "x.npz", shape)


def test_parquet_images_of_another_size_are_refused(tmp_path: Path) -> None:
    write_levels(tmp_path / "x.parquet", [0, 1], [0, 1], size=5)
    with pytest.raises(InputError, match=r"x\.parquet: its images are 5x5 with 3 channels, the training images 4x4"):
        read(tmp_path / "x.parquet")


IMAGES = np.zeros((2, 4, 4, 3), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"data": IMAGES, "label": [0, 1]}, "holds the arrays data, label; needed are image and label"),
        ({"image": IMAGES / 255, "label": [0, 1]}, "image is float64; it must be uint8"),
        ({"image": IMAGES.astype(object), "label": [0, 1]}, "holds Python objects, which can run code"),
        ({"image": IMAGES, "label": np.array([0, 1], object)}, "Object arrays cannot be loaded"),
        ({"image": IMAGES, "label": [0.0, 1.0]}, "label is float64 of shape .* must be a list of integers"),
        ({"image": IMAGES, "label": np.eye(2, dtype=int)}, r"label is int64 of shape \(2, 2\)"),
        ({"image": IMAGES, "label": [0, 1, 2]}, r"image has the shape \(2, 4, 4, 3\), label \(3,\)"),
        ({"image": IMAGES[0], "label": [0, 1]}, r"image has the shape \(4, 4, 3\), label \(2,\)"),
    ],
)
def test_an_npz_file_with_other_arrays_is_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(InputError, match=message) as error:
        read(tmp_path / "x.npz")
    assert "x.npz" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_npz_file_that_is_cut_off_or_no_archive_is_named(tmp_path: Path) -> None:
    edm_npz(tmp_path / "x.npz", [0, 1])
    content = (tmp_path / "x.npz").read_bytes()
    for broken in (content[:-20], b"text", b""):
        (tmp_path / "x.npz").write_bytes(broken)
        with pytest.raises(InputError, match=r"cannot read .*x\.npz as npz"):
            read(tmp_path / "x.npz")


def test_an_npz_file_that_promises_more_images_than_it_has_is_not_mapped(tmp_path: Path) -> None:
    edm_npz(tmp_path / "x.npz", [0] * 2)
    with zipfile.ZipFile(tmp_path / "x.npz") as source:
        content = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as sink:
        sink.writestr("image.npy", content["image.npy"].replace(b"(2, 4", b"(9, 4"))
        sink.writestr("label.npy", content["label.npy"])
    with pytest.raises(InputError, match=r"x\.npz: image has 96 bytes, its shape is \(9, 4, 4, 3\)"):
        read(tmp_path / "x.npz")


def test_a_compressed_npz_file_that_is_damaged_inside_is_named(tmp_path: Path) -> None:
    edm_npz(tmp_path / "x.npz", [0, 1] * 500, compressed=True)
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[400:420] = bytes(20)
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"cannot read .*x\.npz as npz"):
        read(tmp_path / "x.npz")


@pytest.mark.parametrize("folder", [False, True])
def test_pseudo_labels_in_a_pickle_are_refused_with_a_way_to_convert_them(tmp_path: Path, folder: bool) -> None:
    file = tmp_path / "ti_500K_pseudo_labeled.pickle"
    file.write_bytes(pickle.dumps({"data": IMAGES, "extrapolated_targets": [0, 1]}))
    with pytest.raises(InputError, match="is a pickle, which can run code") as error:
        read(tmp_path if folder else file)
    assert "\n" not in str(error.value)


def test_the_printed_conversion_of_a_pickle_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.pickle").write_bytes(pickle.dumps({"data": IMAGES, "extrapolated_targets": np.array([2, 1])}))
    with pytest.raises(InputError) as error:
        read(Path("x.pickle"))
    exec(str(error.value).partition("convert it once: ")[2].replace("FILE", "'x.pickle'"), {"numpy": np})
    assert read(Path("extra.npz")).labels.tolist() == [2, 1]


def test_nothing_to_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.extra\.path .*nowhere does not exist"):
        read(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"must be a file \.npz or \.parquet, or a folder of such files"):
        read(tmp_path)
    write_parquet(tmp_path / "x.parquet", as_struct([encoded(1), b"junk"]), [0, 1])
    with pytest.raises(InputError, match=r"cannot decode the image .*x\.parquet row 1"):
        read(tmp_path)
