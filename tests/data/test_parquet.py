import io
import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from toughen.data import DataSettings, load
from toughen.errors import InputError


def encoded(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (level, 0, 0)).save(buffer, format="png")
    return buffer.getvalue()


def as_struct(images: list[bytes]) -> Any:
    return pa.array([{"bytes": image, "path": None} for image in images])


def write(file: Path, images: Any, labels: Any, *, column: str = "img", names: list[str] | None = None) -> None:
    table = pa.table({column: images, "label": labels})
    if names:
        card = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(card)})
    pq.write_table(table, file)


def write_both(root: Path, *, column: str = "img", names: list[str] | None = None) -> None:
    """Two training files of three rows and a test file of two; the red level is 10 x the row."""
    for part, start, labels in (("train-0", 0, [0, 1, 2]), ("train-1", 3, [0, 1, 2]), ("test-0", 6, [0, 1])):
        images = as_struct([encoded(10 * (start + row)) for row in range(len(labels))])
        write(root / f"{part}.parquet", images, labels, column=column, names=names)


def read(root: Path, *, name: str = "parquet") -> Any:
    return load(DataSettings(name=name, path=str(root), validation=1))


@pytest.mark.parametrize("column", ["img", "image"])
def test_all_files_of_a_part_are_read_with_either_name_of_the_image_column(tmp_path: Path, column: str) -> None:
    write_both(tmp_path, column=column)
    splits = read(tmp_path)
    train = splits.train.images[:, 0, 0, 0].tolist() + splits.validation.images[:, 0, 0, 0].tolist()
    assert sorted(train) == [0, 10, 20, 30, 40, 50]
    assert splits.test.images[:, 0, 0, 0].tolist() == [60, 70]
    assert [level // 10 % 3 for level in train[:5]] == splits.train.labels.tolist()


def test_plain_bytes_are_read_like_a_struct_with_bytes(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write(tmp_path / f"{part}-0.parquet", pa.array([encoded(5), encoded(6)]), [0, 1])
    assert read(tmp_path).test.images[:, 0, 0, 0].tolist() == [5, 6]


def test_class_names_are_the_cards_or_else_the_numbers(tmp_path: Path) -> None:
    write_both(tmp_path)
    assert read(tmp_path).train.classes == ("0", "1", "2")
    write_both(tmp_path, names=["ant", "bee", "cow"])
    assert read(tmp_path).train.classes == ("ant", "bee", "cow")


def test_cifar10_has_its_ten_names_whatever_the_file_holds(tmp_path: Path) -> None:
    write_both(tmp_path)
    classes = read(tmp_path, name="cifar10").train.classes
    assert len(classes) == 10
    assert (classes[0], classes[3], classes[9]) == ("airplane", "cat", "truck")


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    write_both(tmp_path)
    (tmp_path / "test-0.parquet").unlink()
    with pytest.raises(InputError, match=r"no file test-\*\.parquet in the data folder"):
        read(tmp_path)


def test_a_file_that_is_not_parquet_is_named(tmp_path: Path) -> None:
    write_both(tmp_path)
    (tmp_path / "test-0.parquet").write_bytes(b"text")
    with pytest.raises(InputError, match=r"cannot read .*test-0\.parquet as parquet"):
        read(tmp_path)


def test_missing_columns_are_named_beside_those_found(tmp_path: Path) -> None:
    write_both(tmp_path, column="photo")
    with pytest.raises(InputError, match="has the columns photo, label; needed are img or image, and label"):
        read(tmp_path)


@pytest.mark.parametrize("labels", [["a", "b"], [0.0, 1.0], [0, None]])
def test_labels_must_be_integers_without_gaps(tmp_path: Path, labels: list[Any]) -> None:
    write_both(tmp_path)
    write(tmp_path / "test-0.parquet", as_struct([encoded(1)] * 2), labels)
    with pytest.raises(InputError, match=r"test-0\.parquet: the column label must hold integers"):
        read(tmp_path)


@pytest.mark.parametrize("images", [pa.array(["x", "y"]), pa.array([b"x", None])])
def test_images_must_be_bytes_without_gaps(tmp_path: Path, images: Any) -> None:
    write_both(tmp_path)
    write(tmp_path / "test-0.parquet", images, [0, 1])
    with pytest.raises(InputError, match=r"test-0\.parquet: the image column must hold the bytes"):
        read(tmp_path)


def test_a_row_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    write_both(tmp_path)
    write(tmp_path / "test-0.parquet", as_struct([encoded(1), b"junk"]), [0, 1])
    with pytest.raises(InputError, match=r"cannot decode the image .*test-0\.parquet row 1"):
        read(tmp_path)


def test_a_part_without_rows_is_named(tmp_path: Path) -> None:
    write_both(tmp_path)
    write(tmp_path / "test-0.parquet", pa.array([], pa.binary()), pa.array([], pa.int64()))
    with pytest.raises(InputError, match=r"no rows in .*test-0\.parquet"):
        read(tmp_path)


def test_a_failed_download_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(InputError, match=r"uoft-cs/cifar10 \(ConnectionError\); pass data\.path=FOLDER"):
        load(DataSettings(name="cifar10"))


def test_the_download_asks_for_the_two_files_of_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_both(tmp_path)
    asked: list[tuple[str, str, str]] = []

    def download(repository: str, name: str, *, repo_type: str) -> str:
        asked.append((repository, name, repo_type))
        return str(tmp_path / ("train-0.parquet" if "train" in name else "test-0.parquet"))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    splits = load(DataSettings(name="cifar10", validation=1))
    assert asked == [
        ("uoft-cs/cifar10", "plain_text/train-00000-of-00001.parquet", "dataset"),
        ("uoft-cs/cifar10", "plain_text/test-00000-of-00001.parquet", "dataset"),
    ]
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (2, 1, 2)


def test_of_cifar10_only_the_rows_in_use_are_decoded(tmp_path: Path) -> None:
    write_both(tmp_path)
    write(tmp_path / "test-0.parquet", as_struct([encoded(1), b"junk"]), [0, 1])
    settings = DataSettings(name="cifar10", path=str(tmp_path), validation=1, test_samples=1)
    splits = load(settings)
    assert splits.test.images[:, 0, 0, 0].tolist() == [1]
    levels = splits.train.images[:, 0, 0, 0].tolist()
    assert [level // 10 % 3 for level in levels] == splits.train.labels.tolist()


@pytest.mark.cifar10
def test_cifar10_is_read_from_its_local_files(cifar10_path: Path) -> None:
    splits = load(
        DataSettings(name="cifar10", path=str(cifar10_path), validation=100, train_samples=500, test_samples=200)
    )
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (500, 100, 200)
    assert splits.test.images.shape == (200, 3, 32, 32)
    assert splits.test.labels.unique().tolist() == list(range(10))
    assert splits.mean == pytest.approx((0.491, 0.482, 0.447), abs=0.03)
