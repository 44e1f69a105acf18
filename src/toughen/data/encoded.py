"""Labelled pictures that are decoded when they are asked for: in files, or in the columns of a table."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from toughen.data.decode import Encoded, Pictures


class Files:
    """Image files below a folder. A million names take some MB, and worker processes share them.

    Args:
        root: The folder.
        names: Paths relative to it.
    """

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self._root = root
        self._names = pa.array(names, type=pa.large_string())

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, position: int, /) -> Encoded:
        path = self._root / self._names[position].as_py()
        return Encoded(str(path), path)


class Blobs:
    """The bytes of image files, in columns that stay in Arrow's memory (or in a mapped file).

    Args:
        columns: The name of each file and its column of bytes (``pyarrow.ChunkedArray``), in order.
    """

    def __init__(self, columns: Sequence[tuple[str, Any]]) -> None:
        self._columns = tuple(columns)
        self._starts = [0, *accumulate(len(column) for _, column in columns)]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, position: int, /) -> Encoded:
        part = bisect_right(self._starts, position) - 1
        name, column = self._columns[part]
        row = position - self._starts[part]
        return Encoded(f"{name} row {row}", column[row].as_py())


@dataclass(frozen=True)
class Chosen:
    """Some pictures of many.

    Args:
        pictures: The many.
        positions: [M], int64.
    """

    pictures: Pictures
    positions: Tensor

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, position: int, /) -> Encoded:
        return self.pictures[int(self.positions[position])]


@dataclass(frozen=True, eq=False)
class EncodedRows:
    """Pictures with their labels.

    Args:
        pictures: N of them.
        labels: [N], int64, in ``range(len(classes))``.
        classes: The classes' names, in the order of the labels.
    """

    pictures: Pictures
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.pictures)

    def subset(self, index: Tensor | slice) -> "EncodedRows":
        """Return the rows at ``index``: a slice, or positions [M], int64, in that order."""
        positions = torch.arange(len(self))[index]
        return EncodedRows(Chosen(self.pictures, positions), self.labels[positions], self.classes)
