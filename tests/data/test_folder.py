from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from toughen.data import DataSettings, DataSplits, load
from toughen.errors import InputError


def picture(path: Path, value: int, *, mode: str = "L", size: tuple[int, int] = (4, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).convert(mode).save(path)


def fill(root: Path, count: int, *, start: int = 0, classes: tuple[str, ...] = ("cat", "dog")) -> None:
    """Write constant images whose grey level numbers them."""
    for label, name in enumerate(classes):
        for position in range(count):
            picture(root / name / f"{position:02}.png", start + label * count + position)


def levels(splits: DataSplits) -> dict[str, list[int]]:
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    return {name: part.images[:, 0, 0, 0].tolist() for name, part in parts.items()}


def read(root: Path, *, image_size: int | None = None) -> DataSplits:
    return load(DataSettings(name=f"folder:{root}", validation=1, image_size=image_size))


def test_without_a_test_folder_a_fifth_of_each_class_is_held_out(tmp_path: Path) -> None:
    fill(tmp_path, 11)
    splits = read(tmp_path)
    assert splits.test.labels.bincount().tolist() == [2, 2]
    assert splits.train.classes == ("cat", "dog")
    found = levels(splits)
    assert sorted(found["train"] + found["validation"] + found["test"]) == list(range(22))
    assert [level // 11 for level in found["test"]] == splits.test.labels.tolist()
    assert levels(read(tmp_path)) == found


def test_the_first_test_rows_hold_more_than_one_class(tmp_path: Path) -> None:
    fill(tmp_path, 60)
    assert read(tmp_path).test.labels[:10].unique().tolist() == [0, 1]


@pytest.mark.parametrize("test_name", ["test", "val", "valid", "validation"])
def test_a_test_folder_is_read_under_each_of_its_names(tmp_path: Path, test_name: str) -> None:
    fill(tmp_path / "train", 3)
    fill(tmp_path / test_name, 2, start=100)
    found = levels(read(tmp_path))
    assert sorted(found["test"]) == [100, 101, 102, 103]
    assert sorted(found["train"] + found["validation"]) == list(range(6))


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    fill(tmp_path, 3, classes=("plane", "train"))
    assert read(tmp_path).test.classes == ("plane", "train")


@pytest.mark.parametrize(("modes", "channels"), [(("L", "1"), 1), (("L", "RGB"), 3), (("P", "RGBA"), 3)])
def test_one_channel_is_kept_only_if_all_images_are_grey(tmp_path: Path, modes: tuple[str, str], channels: int) -> None:
    for position, name in enumerate(("cat", "dog", "cat", "dog")):
        picture(tmp_path / name / f"{position}.png", 255, mode=modes[position % 2])
    splits = read(tmp_path)
    assert splits.train.images.shape[1:] == (channels, 4, 4)
    assert (splits.train.images == 255).all()


def test_16_bit_images_are_scaled_not_clipped(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    for path in tmp_path.glob("*/*.png"):
        Image.fromarray(np.full((4, 4), 0x8000, dtype=np.uint16)).save(path)
    splits = read(tmp_path)
    assert splits.train.images.shape[1] == 1
    assert splits.train.images.unique().tolist() == [0x80]


def test_transparent_palettes_are_decoded_without_a_warning(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    paletted = Image.new("P", (4, 4), 1)
    paletted.putpalette([0, 0, 0, 10, 20, 30])
    paletted.save(tmp_path / "cat" / "00.png", transparency=b"\x80\xff")
    splits = read(tmp_path)
    everything = torch.cat([splits.train.images, splits.validation.images, splits.test.images])
    assert [10, 20, 30] in everything[:, :, 0, 0].tolist()


def test_images_of_different_sizes_need_an_image_size(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    picture(tmp_path / "dog" / "01.png", 7, size=(5, 6))
    with pytest.raises(InputError, match=r"\.png is \dx\d, .*\.png is \dx\d; set data\.image_size"):
        read(tmp_path)
    assert read(tmp_path, image_size=2).train.images.shape[1:] == (1, 2, 2)


def test_shrinking_on_load_averages_areas(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    for path in tmp_path.glob("*/*.png"):
        Image.fromarray(np.array([[0, 20], [40, 60]], dtype=np.uint8)).save(path)
    assert read(tmp_path, image_size=1).train.images.tolist()[0] == [[[30]]]


def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    whole = (tmp_path / "cat" / "00.png").read_bytes()
    for broken in (b"not a picture", whole[:-30]):
        (tmp_path / "dog" / "01.png").write_bytes(broken)
        with pytest.raises(InputError, match=r"cannot decode the image .*dog/01\.png"):
            read(tmp_path)


def test_files_that_are_no_images_and_hidden_folders_are_passed_over(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    (tmp_path / "cat" / "notes.txt").write_text("x")
    (tmp_path / ".cache").mkdir()
    assert len(read(tmp_path).test) == 2


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data folder .*nowhere does not exist.*data\.path=FOLDER, or folder:FOLDER"):
        read(tmp_path / "nowhere")


def test_an_empty_folder_and_a_single_class_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="at least 2 classes; found: none; if it is the folder of one class, give the one above it"
    ):
        read(tmp_path)
    fill(tmp_path, 2, classes=("cat",))
    with pytest.raises(InputError, match="at least 2 classes; found: cat"):
        read(tmp_path)


def test_a_class_folder_without_images_is_named(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    (tmp_path / "eel").mkdir()
    with pytest.raises(InputError, match=r"class folder .*eel has no images"):
        read(tmp_path)


def test_a_class_with_one_image_cannot_be_held_out_from(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    with pytest.raises(InputError, match=r"class folder .*cat has 1 image; at least 2"):
        read(tmp_path)


def test_a_train_folder_without_a_test_folder_is_refused(tmp_path: Path) -> None:
    fill(tmp_path / "train", 2)
    with pytest.raises(InputError, match="has a folder 'train' but none called test, val"):
        read(tmp_path)


def test_classes_that_differ_between_train_and_test_are_named(tmp_path: Path) -> None:
    fill(tmp_path / "train", 2)
    fill(tmp_path / "test", 2, classes=("cat", "dog", "eel"))
    with pytest.raises(InputError, match=r"classes differ: .*test has the class 'eel', .*train has not"):
        read(tmp_path)


def test_a_format_that_would_start_an_interpreter_is_not_opened(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 2 2\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "dog" / "01.png").write_bytes(postscript)
    with pytest.raises(InputError, match=r"cannot decode the image .*dog/01\.png: cannot identify"):
        read(tmp_path)
