"""``parquet:PATH`` and ``cifar10``: tables of encoded images, in the layout of the public data set cards."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from toughen.data.decode import Encoded, decode
from toughen.data.image_set import ImageSet
from toughen.data.settings import DATASETS, DataSettings, Source
from toughen.errors import InputError

CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
_CIFAR10_REPOSITORY = "uoft-cs/cifar10"
_CIFAR10_FILES = ("plain_text/train-00000-of-00001.parquet", "plain_text/test-00000-of-00001.parquet")
_IMAGE_COLUMNS = ("img", "image")


@dataclass(frozen=True, eq=False)
class EncodedRows:
    """Rows whose images are decoded when they are asked for.

    Args:
        pictures: The encoded images.
        labels: [N], int64.
        classes: The classes' names; none if the files do not hold them.
    """

    pictures: list[Encoded]
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.pictures)

    def subset(self, index: Tensor | slice) -> ImageSet:
        """Decode the rows at ``index``, in that order."""
        rows = torch.arange(len(self))[index]
        pictures = [self.pictures[row] for row in rows.tolist()]
        return ImageSet(decode(pictures, image_size=None), self.labels[rows], self.classes)


def read_parquet(settings: DataSettings) -> tuple[ImageSet, ImageSet]:
    """Read ``PATH/train-*.parquet`` and ``PATH/test-*.parquet``, rows in the order of the files.

    The columns are ``img`` or ``image`` (encoded bytes, alone or as field ``bytes`` of a struct) and
    ``label`` (integers from 0). Class names are the card's if the files hold them, else the numbers.

    Raises:
        InputError: Missing files or columns, missing values, or images that cannot be decoded.
    """
    assert settings.path is not None  # the settings saw to it
    train, test = (_read_files(files) for files in _local_files(settings.path))
    labels = torch.cat([train.labels, test.labels])
    classes = train.classes or tuple(str(label) for label in range(int(labels.max()) + 1))
    # Decoded together: one grey-or-colour decision, and one size, for both.
    images = decode(train.pictures + test.pictures, image_size=settings.image_size)
    both = ImageSet(images, labels, classes)
    return both.subset(slice(len(train))), both.subset(slice(len(train), None))


def read_cifar10(settings: DataSettings) -> tuple[EncodedRows, EncodedRows]:
    """Read CIFAR-10 (50,000 and 10,000 images of 32x32) from ``path``, or download its public card.

    Decoding all of it takes seconds, and many a run uses a part: only the rows in use are decoded.

    Raises:
        InputError: As for ``read_parquet``; or the download failed.
    """
    files = _download_cifar10() if settings.path is None else _local_files(settings.path)
    train, test = (replace(_read_files(part), classes=CIFAR10_CLASSES) for part in files)
    return train, test


def _local_files(path: str) -> tuple[list[Path], list[Path]]:
    root = Path(path).expanduser()
    files = [sorted(root.glob(f"{part}-*.parquet")) for part in ("train", "test")]
    for part, found in zip(("train", "test"), files, strict=True):
        if not found:
            raise InputError(f"no file {part}-*.parquet in the data folder {root}")
    return files[0], files[1]


def _download_cifar10() -> tuple[list[Path], list[Path]]:
    import huggingface_hub  # slow to import, and only this data set needs it

    try:
        train, test = (
            huggingface_hub.hf_hub_download(_CIFAR10_REPOSITORY, name, repo_type="dataset") for name in _CIFAR10_FILES
        )
    except Exception as error:  # the hub's, the HTTP client's or the disk's: the way out is the same
        raise InputError(
            f"cannot download {_CIFAR10_REPOSITORY} ({type(error).__name__});"
            " pass data.path=FOLDER, a folder with its train-*.parquet and test-*.parquet"
        ) from error
    return [Path(train)], [Path(test)]


def _read_files(files: Sequence[Path]) -> EncodedRows:
    parts = [_read_file(file) for file in files]
    pictures = [picture for part in parts for picture in part.pictures]
    if not pictures:
        raise InputError(f"no rows in {files[0]}")
    return EncodedRows(pictures, torch.cat([part.labels for part in parts]), parts[0].classes)


def _read_file(file: Path) -> EncodedRows:
    try:
        table = pq.read_table(file)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"cannot read {file} as parquet: {error}") from error
    image_column = next((name for name in _IMAGE_COLUMNS if name in table.column_names), None)
    if image_column is None or "label" not in table.column_names:
        raise InputError(
            f"{file} has the columns {', '.join(table.column_names)};"
            f" needed are {' or '.join(_IMAGE_COLUMNS)}, and label"
        )
    labels = table.column("label")
    if not pa.types.is_integer(labels.type) or labels.null_count:
        raise InputError(f"{file}: the column label must hold integers and no missing values")
    content = _encoded_bytes(table.column(image_column), file)
    pictures = [Encoded(f"{file} row {row}", blob) for row, blob in enumerate(content)]
    return EncodedRows(pictures, torch.tensor(labels.to_pylist(), dtype=torch.int64), _card_classes(table.schema))


def _encoded_bytes(column: Any, file: Path) -> list[bytes]:
    if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
        column = pc.struct_field(column, "bytes")
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)) or column.null_count:
        raise InputError(f"{file}: the image column must hold the bytes of image files, none missing")
    content: list[bytes] = column.to_pylist()
    return content


def _card_classes(schema: Any) -> tuple[str, ...]:
    """Return the class names that the ``datasets`` library writes into the schema, or none."""
    card = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    names = card.get("info", {}).get("features", {}).get("label", {}).get("names")
    return tuple(names or ())


DATASETS.register("parquet")(Source(read_parquet, path="required"))
DATASETS.register("cifar10")(Source(read_cifar10, path="optional"))
