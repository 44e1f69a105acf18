"""``parquet:PATH``: tables of encoded images with their labels, in the layouts of the public data set cards."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from toughen import rng
from toughen.data.encoded import Blobs, EncodedRows
from toughen.data.image_set import ImageSet
from toughen.data.mapped import MappedColumn, cached_copy, fits_memory
from toughen.data.settings import DATASETS, DataSettings, Rows, Source
from toughen.errors import InputError

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
TEST_PARTS = ("test", "validation", "valid", "val")

_PART = re.compile(
    r"(?:(?P<folder>.*)/)?(?P<part>(?:partial-)?(?:train|test|validation|valid|val))(?:[-/][^/]*)?\.parquet"
)
_USUAL_FOLDERS = ("", "data", "default")
_BATCH = 256  # rows that are rewritten at a time

Some = TypeVar("Some", ImageSet, EncodedRows)


@dataclass(frozen=True)
class Table:
    """What one file holds.

    Args:
        images: The column of encoded images.
        labels: [N], int64.
        label_column: What its column is called.
        classes: The names of the classes, if the file holds them.
    """

    images: Any
    labels: Tensor
    label_column: str
    classes: tuple[str, ...]


def read_parquet(settings: DataSettings) -> tuple[EncodedRows, EncodedRows]:
    """Read ``PATH/train-*.parquet`` and ``PATH/test-*.parquet``, rows in the order of the files.

    The test part may also be called ``validation``, ``valid`` or ``val``; the files may lie in a sub-folder. The
    columns are ``image`` or ``img`` (encoded bytes, alone or as field ``bytes`` of a struct), and ``label``,
    ``labels`` or ``fine_label`` (integers from 0). Class names are those of the files, or else the numbers.

    Raises:
        InputError: Missing files, columns or values; labels outside the classes.
    """
    assert settings.path is not None  # the settings saw to it
    root = data_folder(settings.path)
    parts = local_parts(root)
    if parts is None:
        raise InputError(f"no file train-*.parquet in the data folder {root}, in data/ or in one other sub-folder")
    return read_tables(*parts)


# -- which files --------------------------------------------------------------------------------------


def data_folder(path: str) -> Path:
    """Return the folder at ``path``.

    Raises:
        InputError: There is none.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise InputError(f"data folder {root} does not exist, or is not a folder")
    return root


def local_parts(root: Path, tests: Sequence[str] = TEST_PARTS) -> tuple[list[Path], list[Path]] | None:
    """Return the training files and the test files below a folder; None if there is no training file.

    Raises:
        InputError: See ``choose_parts``.
    """
    found = [file for depth in ("*", "*/*", "*/*/*") for file in root.glob(f"{depth}.parquet")]
    parts = choose_parts([file.relative_to(root).as_posix() for file in found], where=str(root), tests=tests)
    return None if parts is None else ([root / name for name in parts[0]], [root / name for name in parts[1]])


def choose_parts(
    names: Iterable[str], *, where: str, config: str | None = None, tests: Sequence[str] = TEST_PARTS
) -> tuple[list[str], list[str]] | None:
    """Choose the training files and the test files among ``[CONFIG/]PART-*.parquet`` and ``[CONFIG/]PART/*.parquet``.

    Args:
        names: Paths of files, with slashes.
        where: What they lie in, for errors.
        config: The folder; None is the top, ``data``, ``default`` or the only one with training files.
        tests: What the test part may be called; the first that is there is taken.

    Returns:
        Both lists, sorted; None if there are no training files (in that folder).

    Raises:
        InputError: Several folders have training files; there is no test part, or only a part of the training rows.
    """
    folders: dict[str, dict[str, list[str]]] = {}
    for name in sorted(names):
        if match := _PART.fullmatch(name):
            folders.setdefault(match["folder"] or "", {}).setdefault(match["part"], []).append(name)
    trained = [folder for folder, parts in folders.items() if parts.keys() & {"train", "partial-train"}]
    chosen = [folder for folder in _USUAL_FOLDERS if folder in trained][:1] or trained
    if config is not None:
        chosen = [folder for folder in trained if folder == config]
    if not chosen:
        return None
    if len(chosen) > 1:
        raise InputError(f"{where} has training files in {', '.join(chosen)}; choose one of these folders")
    parts, prefix = folders[chosen[0]], f"{chosen[0]}/".lstrip("/")
    if "train" not in parts:
        raise InputError(f"{where} holds only the first rows of the training part ({prefix}partial-train)")
    test = next((name for name in tests if name in parts), None)
    if test is None:
        wanted = " or ".join(f"{prefix}{name}-*.parquet" for name in tests)
        raise InputError(f"no file {wanted} in the data folder {where}")
    return parts["train"], parts[test]


# -- what they hold -----------------------------------------------------------------------------------


def read_tables(
    train: Sequence[Path], test: Sequence[Path], *, classes: Sequence[str] = (), synonyms: Sequence[str] = ()
) -> tuple[EncodedRows, EncodedRows]:
    """Read the rows of the training files and of the test files; a large table stays on the disk.

    Args:
        train: Parquet files.
        test: Parquet files.
        classes: The names in the order of the labels, where that is known.
        synonyms: Other names of these classes, which the files may hold instead.

    Raises:
        InputError: A file is broken, or lacks a column or values; labels are outside the classes; a file holds the
            names of the classes in another order; there are no rows.
    """
    files = [*train, *test]
    in_memory = fits_memory(sum(file.stat().st_size for file in files))
    tables = {file: read_table(file, in_memory=in_memory) for file in files}
    names = _class_names(tables, classes, synonyms)
    for file, table in tables.items():
        _check_labels(file, table, len(names))
    train_rows, test_rows = (_rows({file: tables[file] for file in part}, names) for part in (train, test))
    return train_rows, mixed(test_rows)


def read_table(file: Path, *, in_memory: bool) -> Table:
    """Read one file; unless ``in_memory``, its images are mapped from an uncompressed copy.

    Raises:
        InputError: The file is broken, or lacks a column or values.
    """
    try:
        with pq.ParquetFile(file, pre_buffer=False) as content:  # buffered, all of the file stays in memory twice
            schema = content.schema_arrow
            image_column = _column(file, schema, IMAGE_COLUMNS)
            label_column = _column(file, schema, LABEL_COLUMNS)
            labels = content.read([label_column]).column(0)
            if not pa.types.is_integer(labels.type) or labels.null_count:
                raise InputError(f"{file}: the column {label_column} must hold integers and no missing values")
            if in_memory and fits_memory(_unpacked(content)):
                images = _encoded_bytes(content.read([image_column]).column(0), file, image_column)
            else:
                images = _mapped(content, file, image_column)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"cannot read {file} as parquet: {error}") from error
    return Table(
        images, torch.from_numpy(labels.to_numpy().astype("int64")), label_column, _names(schema, label_column)
    )


def mixed(rows: Some) -> Some:
    """Put test rows that come class by class into a fixed random order, so that the first few hold all classes."""
    if len(rows) < 2 or bool((rows.labels[1:] < rows.labels[:-1]).any()):
        return rows
    return rows.subset(torch.randperm(len(rows), generator=rng.generator(0, "split", 0)))


def check_order(found: Sequence[str], classes: Sequence[str], *, where: str) -> None:
    """Refuse class names in another order than the known one; a few other spellings are let pass.

    (The public card of CIFAR-100 calls the crab "cra".)

    Raises:
        InputError: Names the first class that is not in its place.
    """
    strange = [label for label, pair in enumerate(zip(found, classes, strict=False)) if pair[0] != pair[1]]
    moved = [label for label in strange if found[label] in classes]
    if len(found) != len(classes):
        raise InputError(f"{where} has {len(found)} classes; there should be {len(classes)}, from {classes[0]!r} on")
    if moved or len(strange) > len(classes) // 10:
        label = (moved or strange)[0]
        raise InputError(
            f"{where} calls label {label} {found[label]!r}; it must be {classes[label]!r}: re-order the labels"
        )


def check_counts(rows: tuple[Rows, Rows], expected: tuple[int, int], *, name: str, exactly: bool) -> None:
    """Refuse other numbers of training and test rows than the published ones; fewer are let pass unless ``exactly``.

    Raises:
        InputError: Names the numbers.
    """
    for part, found, wanted in zip(("training", "test"), map(len, rows), expected, strict=True):
        if found > wanted or (exactly and found != wanted):
            raise InputError(f"{name}: found {found:,} {part} images; there should be {wanted:,}: get the files again")


def _column(file: Path, schema: Any, allowed: Sequence[str]) -> str:
    found = [name for name in allowed if name in schema.names]
    if len(found) != 1:
        raise InputError(
            f"{file} has the columns {', '.join(schema.names)}; exactly one of {', '.join(allowed)} is needed"
        )
    return found[0]


def _encoded_bytes(column: Any, file: Path, name: str) -> Any:
    if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
        column = pc.struct_field(column, "bytes")
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)) or column.null_count:
        raise InputError(f"{file}: the column {name} must hold the bytes of image files, none missing")
    return column


def _mapped(content: Any, file: Path, name: str) -> MappedColumn:
    def write(path: Path) -> None:
        with pa.ipc.new_file(path, pa.schema([("image", pa.large_binary())])) as sink:
            for batch in content.iter_batches(_BATCH, columns=[name]):
                images = _encoded_bytes(batch.column(0), file, name).cast(pa.large_binary())
                sink.write(pa.record_batch([images], names=["image"]))

    return MappedColumn(cached_copy([file], ".arrow", max(file.stat().st_size, _unpacked(content)), write))


def _unpacked(content: Any) -> int:
    """Return the bytes that the file says it unpacks to, which its size does not tell."""
    return sum(content.metadata.row_group(number).total_byte_size for number in range(content.num_row_groups))


def _names(schema: Any, label_column: str) -> tuple[str, ...]:
    """Return the class names that the ``datasets`` library writes into the schema, or none."""
    try:
        card = json.loads((schema.metadata or {}).get(b"huggingface", b""))
        return tuple(str(name) for name in card["info"]["features"][label_column]["names"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ()


def _class_names(tables: dict[Path, Table], classes: Sequence[str], synonyms: Sequence[str]) -> tuple[str, ...]:
    named = {file: table.classes for file, table in tables.items() if table.classes}
    if classes:
        for file, names in named.items():
            check_order(names, synonyms if names[0] in synonyms else classes, where=str(file))
        return tuple(classes)
    if not named:
        highest = max((int(table.labels.max()) for table in tables.values() if len(table.labels)), default=0)
        return tuple(str(label) for label in range(min(highest, sum(len(t.labels) for t in tables.values())) + 1))
    first = next(iter(named))
    for file, names in named.items():
        if names != named[first]:
            raise InputError(f"{first} and {file} name the classes differently; bring them to one order")
    return named[first]


def _check_labels(file: Path, table: Table, num_classes: int) -> None:
    outside = (table.labels < 0) | (table.labels >= num_classes)
    if outside.any():
        row = int(outside.nonzero()[0])
        label = int(table.labels[row])
        cure = "remove the part that has no labels" if label == -1 else "correct or remove the row"
        raise InputError(
            f"{file}: label {label} in row {row} of the column {table.label_column} is outside 0..{num_classes - 1}"
            f" ({num_classes} classes); {cure}"
        )


def _rows(tables: dict[Path, Table], classes: tuple[str, ...]) -> EncodedRows:
    labels = torch.cat([table.labels for table in tables.values()])
    if not len(labels):
        raise InputError(f"no rows in {next(iter(tables))}")
    return EncodedRows(Blobs([(str(file), table.images) for file, table in tables.items()]), labels, classes)


DATASETS.register("parquet")(Source(read_parquet, path="required"))
