from pathlib import Path
from typing import Literal

import pytest
import torch

from public_layouts import (
    IMAGENETTE_IDS,
    encoded,
    hub_cache,
    imagenette_folders,
    write_card,
    write_class_folders,
    write_levels,
)
from toughen.data import DataSettings, load
from toughen.data.encoded import EncodedRows
from toughen.data.imagenet import IMAGENETS, IMAGENETTE_CLASSES, imagenet_classes
from toughen.errors import InputError

SOURCES = {source.name: source for source in IMAGENETS}
NAMES = list(IMAGENETTE_CLASSES.values())


def read(name: str, root: Path | None) -> tuple[EncodedRows, EncodedRows]:
    return SOURCES[name].read(DataSettings(name=name, path=None if root is None else str(root)))


def levels(rows: EncodedRows) -> list[bytes]:
    return [Path(str(rows.pictures[row].content)).read_bytes() for row in range(len(rows))]


def test_imagenets_classes_are_timms_in_order_and_imagenettes_are_ten_of_them() -> None:
    classes = imagenet_classes()
    assert len(classes) == 1000
    assert list(classes) == sorted(classes)
    assert list(IMAGENETTE_CLASSES) == IMAGENETTE_IDS
    for wnid, name in IMAGENETTE_CLASSES.items():
        assert classes[wnid].split(", ")[0] == name


@pytest.mark.parametrize(
    ("name", "inside"),
    [("imagenette", ""), ("imagenette", "imagenette2"), ("imagenette320", "imagenette2-320"), ("imagenette160", "")],
)
def test_the_tree_of_fast_ai_is_read_with_the_names_of_the_classes(tmp_path: Path, name: str, inside: str) -> None:
    imagenette_folders(tmp_path / inside)
    train, test = read(name, tmp_path)
    assert train.classes == test.classes == tuple(NAMES)
    assert train.labels.tolist() == [label for label in range(10) for _ in range(2)]
    assert levels(test) == [encoded(20 * label, form="jpeg") for label in test.labels.tolist()]
    assert test.labels.tolist() != sorted(test.labels.tolist())


@pytest.mark.parametrize("storage", ["resident", "streamed"])
def test_photographs_are_served_at_the_size_that_was_asked_for(
    tmp_path: Path, storage: Literal["resident", "streamed"]
) -> None:
    imagenette_folders(tmp_path)
    settings = DataSettings(name=f"imagenette160:{tmp_path}", validation=10, image_size=2, storage=storage)
    test = load(settings).test
    taken = test.take(torch.arange(10))
    assert test.shape == (3, 2, 2)
    assert ((taken.images[:, 0, 0, 0].int() - 20 * taken.labels).abs() <= 2).all()  # JPEG rounds


@pytest.mark.parametrize("names", [NAMES, IMAGENETTE_IDS])
def test_parquet_files_may_hold_names_or_wordnet_ids(tmp_path: Path, names: list[str]) -> None:
    write_card(tmp_path, 10, test="validation", image="image", names=names)
    train, test = read("imagenette160", tmp_path)
    assert (len(train), len(test), train.classes) == (20, 10, tuple(NAMES))


def test_the_hubs_conversion_is_read_in_the_size_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for count, config in enumerate(("full_size", "320px", "160px"), start=1):
        for part in ("train", "validation"):
            file = tmp_path / "card" / config / part / "0000.parquet"
            write_levels(file, [0] * 10 * count, list(range(10)) * count, image="image")
    hub_cache(tmp_path / "cache", "frgfm/imagenette", tmp_path / "card", revision="refs/convert/parquet")
    for count, name in enumerate(("imagenette", "imagenette320", "imagenette160"), start=1):
        with pytest.raises(InputError, match=f"{name}: found {10 * count} training images; there should be 9,469"):
            read(name, None)


def test_imagenet_is_read_from_its_thousand_folders_whatever_lies_beside_them(tmp_path: Path) -> None:
    classes = imagenet_classes()
    for part in ("train", "val"):
        write_class_folders(tmp_path / part, list(classes), count=1)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "ILSVRC2012_test_00000001.JPEG").write_bytes(b"x")
    train, test = read("imagenet", tmp_path)
    assert train.labels.tolist() == list(range(1000))
    assert sorted(test.labels.tolist()) == list(range(1000))
    assert (train.classes[0], train.classes[999]) == (classes["n01440764"], classes["n15075141"])


def test_of_imagenets_card_the_validation_part_is_the_test_part(tmp_path: Path) -> None:
    for part, label in (("train", 7), ("validation", 9), ("test", -1)):
        write_levels(tmp_path / "data" / f"{part}-00000-of-00001.parquet", [0, 1], [label, label], image="image")
    train, test = read("imagenet", tmp_path)
    assert (train.labels.tolist(), test.labels.tolist()) == ([7, 7], [9, 9])


# -- bad input ----------------------------------------------------------------------------------------


def test_a_flat_validation_folder_is_to_be_sorted(tmp_path: Path) -> None:
    imagenette_folders(tmp_path)
    (tmp_path / "val").rename(tmp_path / "sorted")
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(encoded(1, form="jpeg"))
    with pytest.raises(InputError, match="val holds images but no class folders; sort them into n01440764, n02102040"):
        read("imagenette", tmp_path)


def test_a_missing_part_a_missing_class_and_an_empty_one_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no imagenette found in .*; it must hold train/n01440764 .* or train-"):
        read("imagenette", tmp_path)
    imagenette_folders(tmp_path)
    (tmp_path / "val").rename(tmp_path / "sorted")
    with pytest.raises(InputError, match="has no folder 'val'"):
        read("imagenette", tmp_path)
    (tmp_path / "sorted").rename(tmp_path / "val")
    (tmp_path / "val" / "n03445777" / "n03445777_0.JPEG").unlink()
    with pytest.raises(InputError, match=r"class folder .*val/n03445777 has no images"):
        read("imagenette", tmp_path)
    (tmp_path / "val" / "n03445777").rmdir()
    with pytest.raises(InputError, match=r"no folder for 1 of 10 classes; the first is n03445777 \(golf ball\)"):
        read("imagenette", tmp_path)


def test_classes_in_another_order_are_refused_by_name_and_by_id(tmp_path: Path) -> None:
    for names in (NAMES, IMAGENETTE_IDS):
        write_card(tmp_path, 10, test="validation", names=[*names[:8], names[9], names[8]])
        with pytest.raises(InputError, match=rf"calls label 8 '{names[9]}'; it must be '{names[8]}'"):
            read("imagenette", tmp_path)


def test_one_pair_of_imagenets_thousand_names_in_the_wrong_order_is_seen(tmp_path: Path) -> None:
    names = list(imagenet_classes().values())
    names[3], names[4] = names[4], names[3]
    for part in ("train", "validation"):
        write_levels(tmp_path / f"{part}.parquet", [0, 1], [1, 0], names=names)
    with pytest.raises(InputError, match="calls label 3 'hammerhead, hammerhead shark'; it must be 'tiger shark"):
        read("imagenet", tmp_path)
