import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from public_layouts import as_struct, encoded, write_card, write_levels, write_parquet
from toughen.data import DataSettings, load, mapped, parquet
from toughen.data.encoded import EncodedRows
from toughen.data.parquet import read_parquet
from toughen.errors import InputError


def write_both(root: Path, **options: Any) -> None:
    """Two training files of three rows and a test file of two; the red level is 10 x the row."""
    write_levels(root / "train-0.parquet", [0, 10, 20], [0, 1, 2], **options)
    write_levels(root / "train-1.parquet", [30, 40, 50], [0, 1, 2], **options)
    write_levels(root / "test-0.parquet", [60, 70], [1, 0], **options)


def read(root: Path) -> Any:
    return load(DataSettings(name="parquet", path=str(root), validation=1))


def rows(root: Path) -> tuple[EncodedRows, EncodedRows]:
    return read_parquet(DataSettings(name="parquet", path=str(root)))


def test_all_files_of_a_part_are_read_and_keep_their_labels(tmp_path: Path) -> None:
    write_both(tmp_path)
    splits = read(tmp_path)
    train = splits.train.images[:, 0, 0, 0].tolist() + splits.validation.images[:, 0, 0, 0].tolist()
    assert sorted(train) == [0, 10, 20, 30, 40, 50]
    assert splits.test.images[:, 0, 0, 0].tolist() == [60, 70]
    assert [level // 10 % 3 for level in train[:5]] == splits.train.labels.tolist()


@pytest.mark.parametrize(("image", "label"), [("img", "label"), ("image", "labels"), ("img", "fine_label")])
def test_columns_are_read_under_each_of_their_names(tmp_path: Path, image: str, label: str) -> None:
    write_both(tmp_path, image=image, label=label)
    assert rows(tmp_path)[0].labels.tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train-00000-of-00001.parquet", "validation-00000-of-00001.parquet"),
        ("train.parquet", "val.parquet"),
        ("data/train-0.parquet", "data/test-0.parquet"),
        ("plain_text/train-0.parquet", "plain_text/valid-0.parquet"),
        ("default/train/0000.parquet", "default/test/0000.parquet"),
        ("train/0000.parquet", "validation/0000.parquet"),
    ],
)
def test_the_usual_places_and_names_of_the_files_are_found(tmp_path: Path, train: str, test: str) -> None:
    write_levels(tmp_path / train, [1, 2], [0, 1])
    write_levels(tmp_path / test, [3], [0])
    train_rows, test_rows = rows(tmp_path)
    assert (len(train_rows), len(test_rows)) == (2, 1)


def test_the_test_part_comes_before_the_validation_part(tmp_path: Path) -> None:
    write_both(tmp_path)
    write_levels(tmp_path / "validation-0.parquet", [1], [2])
    assert rows(tmp_path)[1].labels.tolist() == [1, 0]


def test_of_several_folders_with_data_one_must_be_chosen(tmp_path: Path) -> None:
    for config in ("160px", "320px"):
        write_both(tmp_path / config)
    with pytest.raises(InputError, match="has training files in 160px, 320px; choose one of these folders"):
        rows(tmp_path)
    assert len(rows(tmp_path / "160px")[0]) == 6


def test_plain_bytes_are_read_like_a_struct_with_bytes(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write_parquet(tmp_path / f"{part}-0.parquet", pa.array([encoded(5), encoded(6)]), [1, 0])
    assert read(tmp_path).test.images[:, 0, 0, 0].tolist() == [5, 6]


def test_test_rows_that_come_class_by_class_are_mixed_always_alike(tmp_path: Path) -> None:
    write_both(tmp_path)
    labels = [0] * 20 + [1] * 20
    write_levels(tmp_path / "test-0.parquet", list(range(40)), labels)
    test = read(tmp_path).test
    assert test.labels[:10].unique().tolist() == [0, 1]
    assert [labels[level] for level in test.images[:, 0, 0, 0].tolist()] == test.labels.tolist()
    assert torch.equal(test.images, read(tmp_path).test.images)


def test_class_names_are_the_cards_or_else_the_numbers(tmp_path: Path) -> None:
    write_both(tmp_path)
    assert rows(tmp_path)[0].classes == ("0", "1", "2")
    write_both(tmp_path, names=["ant", "bee", "cow"])
    assert rows(tmp_path)[0].classes == rows(tmp_path)[1].classes == ("ant", "bee", "cow")


def test_files_that_name_the_classes_differently_are_refused(tmp_path: Path) -> None:
    write_both(tmp_path, names=["ant", "bee", "cow"])
    write_levels(tmp_path / "train-1.parquet", [0], [0], names=["bee", "ant", "cow"])
    with pytest.raises(InputError, match=r"train-0\.parquet and .*train-1\.parquet name the classes differently"):
        rows(tmp_path)


# -- large tables -------------------------------------------------------------------------------------


@pytest.fixture
def little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No table fits into memory; the cache folder of the user."""
    monkeypatch.setattr(parquet, "fits_memory", lambda num_bytes: num_bytes < 100)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "toughen"


def contents(of: tuple[EncodedRows, EncodedRows]) -> list[tuple[str, Any]]:
    return [tuple(part.pictures[row]) for part in of for row in range(len(part))]


def test_a_table_that_does_not_fit_into_memory_is_mapped_and_equal(
    tmp_path: Path, little_memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_card(tmp_path / "data", 5, shards=2)
    mapped_rows = rows(tmp_path / "data")
    assert len(list(little_memory.iterdir())) == 3
    assert pickle.loads(pickle.dumps(mapped_rows[0].pictures))[3] == mapped_rows[0].pictures[3]
    monkeypatch.undo()
    resident_rows = rows(tmp_path / "data")
    assert contents(mapped_rows) == contents(resident_rows)
    assert torch.equal(mapped_rows[0].labels, resident_rows[0].labels)


def test_worker_processes_are_sent_the_place_of_a_mapped_table_and_not_its_bytes(
    tmp_path: Path, little_memory: Path
) -> None:
    noise = torch.randint(256, (4000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for part in ("train", "test"):
        write_parquet(tmp_path / f"{part}.parquet", as_struct([bytes(noise.tolist())] * 50), [0, 1] * 25)
    assert len(pickle.dumps(rows(tmp_path)[0].pictures)) < 2000


def test_the_copy_is_used_again_until_the_file_changes(tmp_path: Path, little_memory: Path) -> None:
    write_both(tmp_path)
    rows(tmp_path)
    before = {file: file.stat().st_mtime_ns for file in little_memory.iterdir()}
    rows(tmp_path)
    assert {file: file.stat().st_mtime_ns for file in little_memory.iterdir()} == before
    write_levels(tmp_path / "test-0.parquet", [99, 98, 97], [2, 1, 0])
    assert rows(tmp_path)[1].pictures[0].content == encoded(99)
    assert len(list(little_memory.iterdir())) == len(before) + 1


def test_a_copy_that_cannot_be_finished_leaves_nothing_behind(tmp_path: Path, little_memory: Path) -> None:
    write_both(tmp_path)
    write_parquet(tmp_path / "train-0.parquet", as_struct([encoded(1)] * 3 + [None]), [0, 1, 2, 0])
    with pytest.raises(InputError, match=r"train-0\.parquet: the column img must hold the bytes"):
        rows(tmp_path)
    assert list(little_memory.iterdir()) == []


def test_a_copy_without_room_says_where_else_it_could_go(
    tmp_path: Path, little_memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_both(tmp_path)
    full = type("Usage", (), {"free": 10})
    monkeypatch.setattr(mapped.shutil, "disk_usage", lambda _: full)
    with pytest.raises(InputError, match=r"is too large for memory, and .*; set XDG_CACHE_HOME to a folder"):
        rows(tmp_path)


# -- bad input ----------------------------------------------------------------------------------------


def test_missing_parts_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data folder .*nowhere does not exist, or is not a folder"):
        rows(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no file train-\*\.parquet in the data folder"):
        rows(tmp_path)
    write_both(tmp_path)
    (tmp_path / "test-0.parquet").unlink()
    with pytest.raises(InputError, match=r"no file test-\*\.parquet or validation-\*\.parquet or .* in the data"):
        rows(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 300])
def test_a_file_that_is_not_parquet_or_cut_off_is_named(tmp_path: Path, keep: int) -> None:
    write_both(tmp_path)
    file = tmp_path / "test-0.parquet"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"cannot read .*test-0\.parquet as parquet"):
        rows(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": "photo"}, "columns photo, label; exactly one of image, img is needed"),
        ({"label": "coarse_label"}, "columns img, coarse_label; exactly one of label, labels, fine_label is needed"),
        (
            {"more": {"labels": [0, 1]}},
            "columns img, label, labels; exactly one of label, labels, fine_label is needed",
        ),
    ],
)
def test_a_missing_or_ambiguous_column_is_named_beside_those_found(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    write_both(tmp_path)
    write_levels(tmp_path / "test-0.parquet", [1, 2], [1, 0], **options)
    with pytest.raises(InputError, match=rf"test-0\.parquet has the {message}"):
        rows(tmp_path)


@pytest.mark.parametrize("labels", [["a", "b"], [0.0, 1.0], [0, None]])
def test_labels_must_be_integers_without_gaps(tmp_path: Path, labels: list[Any]) -> None:
    write_both(tmp_path)
    write_parquet(tmp_path / "test-0.parquet", as_struct([encoded(1)] * 2), labels)
    with pytest.raises(InputError, match=r"test-0\.parquet: the column label must hold integers"):
        rows(tmp_path)


@pytest.mark.parametrize(("label", "names"), [(3, ["ant", "bee", "cow"]), (-1, None), (10**12, None)])
def test_a_label_outside_the_classes_is_named_with_its_row(tmp_path: Path, label: int, names: list[str] | None) -> None:
    write_both(tmp_path, names=names)
    write_levels(tmp_path / "test-0.parquet", [1, 2], [0, label], names=names)
    with pytest.raises(
        InputError, match=rf"test-0\.parquet: label {label} in row 1 of the column label is outside 0\."
    ):
        rows(tmp_path)


@pytest.mark.parametrize("images", [pa.array(["x", "y"]), pa.array([b"x", None]), as_struct([b"x", None])])
def test_images_must_be_bytes_without_gaps(tmp_path: Path, images: Any) -> None:
    write_both(tmp_path)
    write_parquet(tmp_path / "test-0.parquet", images, [1, 0])
    with pytest.raises(InputError, match=r"test-0\.parquet: the column img must hold the bytes"):
        rows(tmp_path)


def test_a_row_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    write_both(tmp_path)
    write_parquet(tmp_path / "test-0.parquet", as_struct([encoded(1), b"junk"]), [1, 0])
    with pytest.raises(InputError, match=r"cannot decode the image .*test-0\.parquet row 1"):
        read(tmp_path)


def test_a_part_without_rows_is_named(tmp_path: Path) -> None:
    write_both(tmp_path)
    write_parquet(tmp_path / "test-0.parquet", pa.array([], pa.binary()), pa.array([], pa.int64()))
    with pytest.raises(InputError, match=r"no rows in .*test-0\.parquet"):
        rows(tmp_path)


def test_metadata_that_make_no_sense_are_passed_over(tmp_path: Path) -> None:
    write_both(tmp_path)
    for junk in ("", "{", '{"info": 3}', '{"info": {"features": [1]}}'):
        table = pq.read_table(tmp_path / "train-0.parquet").replace_schema_metadata({"huggingface": junk})
        pq.write_table(table, tmp_path / "train-0.parquet")
        assert rows(tmp_path)[0].classes == ("0", "1", "2")
