from pathlib import Path

import pytest

from public_layouts import (
    CIFAR10_NAMES,
    cifar10_binary,
    hub_cache,
    write_card,
    write_cifar_binary,
    write_class_folders,
    write_levels,
)
from toughen.data import DataSettings, cifar, load
from toughen.data.cifar import CIFAR10, CIFAR10_CLASSES, CIFAR100, CIFAR100_CLASSES, Cifar
from toughen.data.image_set import ImageSet
from toughen.data.settings import Rows
from toughen.errors import InputError

CARD_NAMES = ["cra" if name == "crab" else name for name in CIFAR100_CLASSES]  # the public card's spelling


def read(which: Cifar, root: Path | None) -> tuple[Rows, Rows]:
    return which.read(DataSettings(name=which.name, path=None if root is None else str(root)))


def test_the_classes_are_ten_and_a_hundred_in_the_official_order() -> None:
    assert list(CIFAR10_CLASSES) == CIFAR10_NAMES
    assert len(set(CIFAR100_CLASSES)) == 100
    assert [CIFAR100_CLASSES[label] for label in (0, 26, 39, 99)] == ["apple", "crab", "keyboard", "worm"]


def test_parquet_files_of_the_cards_are_read(tmp_path: Path) -> None:
    write_card(tmp_path / "ten" / "plain_text", 10, names=CIFAR10_NAMES)
    train, test = read(CIFAR10, tmp_path / "ten")
    assert (len(train), len(test), train.classes) == (20, 10, CIFAR10_CLASSES)
    write_card(tmp_path / "hundred" / "cifar100", 100, label="fine_label", names=CARD_NAMES)
    train, test = read(CIFAR100, tmp_path / "hundred")
    assert (len(train), len(test), test.classes) == (200, 100, CIFAR100_CLASSES)


def test_fine_labels_are_taken_where_there_are_coarse_ones_too(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write_levels(tmp_path / f"{part}.parquet", [0, 1], [77, 26], label="fine_label", more={"coarse_label": [1, 2]})
    assert read(CIFAR100, tmp_path)[0].labels.tolist() == [77, 26]


@pytest.mark.parametrize("inside", ["", "cifar-10-batches-bin"])
def test_the_binary_version_is_read_plane_by_plane(tmp_path: Path, inside: str) -> None:
    cifar10_binary(tmp_path / inside)
    train, test = read(CIFAR10, tmp_path)
    assert isinstance(train, ImageSet)
    assert train.labels.tolist() == [1, 0, 3, 2, 5, 4, 7, 6, 9, 8]
    assert train.images.shape == (10, 3, 32, 32)
    assert train.images[2].flatten(1).unique(dim=1).tolist() == [[30], [1], [0]]
    assert isinstance(test, ImageSet)
    assert test.labels.tolist() != sorted(test.labels.tolist()) == list(range(10))  # mixed, since the file is sorted
    assert (test.images[:, 0, 0, 0] // 10).tolist() == test.labels.tolist()


def test_the_binary_version_of_cifar100_has_a_coarse_label_before_the_fine_one(tmp_path: Path) -> None:
    write_cifar_binary(tmp_path / "cifar-100-binary", {"train.bin": [7, 99], "test.bin": [98, 3]}, coarse=True)
    (tmp_path / "cifar-100-binary" / "fine_label_names.txt").write_text("\n".join(CIFAR100_CLASSES) + "\n")
    train, test = read(CIFAR100, tmp_path)
    assert (train.labels.tolist(), test.labels.tolist()) == ([7, 99], [98, 3])
    assert isinstance(test, ImageSet)
    assert test.images[1].flatten(1).unique(dim=1).tolist() == [[30], [1], [1]]


def test_folders_of_images_are_read_in_the_official_order(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write_class_folders(tmp_path / part, CIFAR10_NAMES, suffix=".png")
    splits = load(DataSettings(name="cifar10", path=str(tmp_path), validation=1))
    assert splits.train.classes == CIFAR10_CLASSES
    images = splits.test
    assert isinstance(images, ImageSet)
    assert (images.images[:, 0, 0, 0] // 20).tolist() == images.labels.tolist()
    assert images.labels[:10].unique().numel() > 3


def test_without_a_path_the_card_is_downloaded_and_its_rows_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        InputError, match=r"data set uoft-cs/cifar10 cannot be downloaded .* local copy: cifar10:FOLDER"
    ):
        read(CIFAR10, None)
    write_card(tmp_path / "card" / "plain_text", 10, names=CIFAR10_NAMES)
    hub_cache(tmp_path / "cache", "uoft-cs/cifar10", tmp_path / "card")
    with pytest.raises(InputError, match="cifar10: found 20 training images; there should be 50,000"):
        read(CIFAR10, None)
    monkeypatch.setattr(cifar, "_COUNTS", (20, 10))
    assert len(read(CIFAR10, None)[0]) == 20


def test_more_rows_than_there_are_is_refused_in_a_local_copy_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_card(tmp_path, 10)
    monkeypatch.setattr(cifar, "_COUNTS", (20, 9))
    with pytest.raises(InputError, match="cifar10: found 10 test images; there should be 9"):
        read(CIFAR10, tmp_path)


# -- bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["airplane", "bird", "automobile", *CIFAR10_NAMES[3:]], "label 1 'bird'; it must be 'automobile'"),
        ([f"animal{label}" for label in range(10)], "label 0 'animal0'; it must be 'airplane'"),
    ],
)
def test_class_names_in_another_order_are_refused(tmp_path: Path, names: list[str], message: str) -> None:
    write_card(tmp_path, 10, names=names)
    with pytest.raises(InputError, match=rf"train-00000-of-00001\.parquet calls {message}"):
        read(CIFAR10, tmp_path)


def test_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    write_card(tmp_path, 9, names=CIFAR10_NAMES[:9])
    with pytest.raises(InputError, match="has 9 classes; there should be 10"):
        read(CIFAR10, tmp_path)


def test_names_of_the_binary_version_in_another_order_are_refused(tmp_path: Path) -> None:
    cifar10_binary(tmp_path)
    (tmp_path / "batches.meta.txt").write_text("\n".join(sorted(CIFAR10_NAMES, reverse=True)))
    with pytest.raises(InputError, match=r"batches\.meta\.txt calls label 0 'truck'; it must be 'airplane'"):
        read(CIFAR10, tmp_path)


@pytest.mark.parametrize("cut", [1, 2 * 3073])
def test_a_binary_file_that_is_cut_off_is_named(tmp_path: Path, cut: int) -> None:
    cifar10_binary(tmp_path)
    file = tmp_path / "data_batch_4.bin"
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(InputError, match=r"data_batch_4\.bin has \d+ bytes, which is not a number of records of 3073"):
        read(CIFAR10, tmp_path)


def test_a_binary_file_that_is_missing_is_named(tmp_path: Path) -> None:
    cifar10_binary(tmp_path)
    (tmp_path / "data_batch_3.bin").unlink()
    with pytest.raises(InputError, match=r"data_batch_3\.bin is missing"):
        read(CIFAR10, tmp_path)


def test_a_label_outside_the_classes_names_the_binary_file(tmp_path: Path) -> None:
    cifar10_binary(tmp_path)
    write_cifar_binary(tmp_path, {"test_batch.bin": [3, 10]})
    with pytest.raises(InputError, match=r"test_batch\.bin: label 10 in row 1 is outside 0\.\.9"):
        read(CIFAR10, tmp_path)


@pytest.mark.parametrize(
    ("which", "pickled"),
    [
        (CIFAR10, "data_batch_1"),
        (CIFAR10, "cifar-10-batches-py/data_batch_1"),
        (CIFAR100, "train"),
        (CIFAR100, "cifar-100-python/train"),
    ],
)
def test_the_pickled_version_is_refused_with_the_reason(tmp_path: Path, which: Cifar, pickled: str) -> None:
    (tmp_path / pickled).parent.mkdir(exist_ok=True)
    (tmp_path / pickled).write_bytes(b"\x80\x04")
    with pytest.raises(
        InputError, match=r"pickles, which can run code when they are read; use .*binary version"
    ) as error:
        read(which, tmp_path)
    assert "\n" not in str(error.value)


def test_an_empty_folder_is_told_what_it_could_hold(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no cifar10 found in .*; it must hold train-\*\.parquet and .* train/CLASS"):
        read(CIFAR10, tmp_path)


def test_folders_of_other_classes_are_refused(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write_class_folders(tmp_path / part, CIFAR10_NAMES, suffix=".png")
    (tmp_path / "test" / "whale").mkdir()
    with pytest.raises(InputError, match="test has the folder whale, which is none of the 10 classes"):
        read(CIFAR10, tmp_path)
    (tmp_path / "train" / "deer").rename(tmp_path / "train" / "elk")
    with pytest.raises(InputError, match=r"train has no folder for 1 of 10 classes; the first is deer"):
        read(CIFAR10, tmp_path)


@pytest.mark.cifar10
def test_cifar10_is_read_from_its_local_files(cifar10_path: Path) -> None:
    splits = load(
        DataSettings(name="cifar10", path=str(cifar10_path), validation=100, train_samples=500, test_samples=200)
    )
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (500, 100, 200)
    assert isinstance(splits.test, ImageSet)
    assert splits.test.images.shape == (200, 3, 32, 32)
    assert splits.test.labels.unique().tolist() == list(range(10))
    assert splits.mean == pytest.approx((0.491, 0.482, 0.447), abs=0.03)
