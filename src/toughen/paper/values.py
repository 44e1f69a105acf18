"""What the paper prints: the rows of its tables, as far as they can be read."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from toughen.errors import InputError

Value = float | list[int] | None


@dataclass(frozen=True)
class PaperRow:
    """One row of a table of the paper.

    Attributes:
        table: Number of the table.
        dataset: As the paper calls it, for example ``"CIFAR-10"``.
        model: As the paper calls it, for example ``"DN121"``.
        method: As the paper calls it, for example ``"PGD-AT+CLAT"``.
        values: By metric: percent, seconds, or numbers of layers; None could not be read.
        doubtful: Metrics of which digits or label could not be read for certain.
        note: What is doubtful about them.
        another: Metrics whose figure is legible, but of another measurement than the table's; which, for each.
        attack: Which one, where a table has several (Table 17).
        attacker: The network that the images were made on (Tables 3, 4).
        epoch: When the layers were chosen, of 100 (Table 13).
        batch_size: Of the selection (Table 10).
    """

    table: int
    dataset: str
    model: str
    method: str
    values: Mapping[str, Value]
    doubtful: tuple[str, ...] = ()
    note: str = ""
    another: Mapping[str, str] = field(default_factory=dict)
    attack: str = ""
    attacker: str = ""
    epoch: int = 0
    batch_size: int = 0

    @property
    def label(self) -> str:
        """The method, with what tells rows of the same method apart."""
        details = (
            self.attack,
            f"made on {self.attacker}" if self.attacker else "",
            f"epoch {self.epoch}" if self.epoch else "",
            f"{self.batch_size} images" if self.batch_size else "",
        )
        return ", ".join([self.method, *filter(None, details)])


@cache
def _tables() -> dict[str, Any]:
    document = json.loads((files("toughen.paper") / "values.json").read_text(encoding="utf-8"))
    tables: dict[str, Any] = document["tables"]
    return tables


def table_title(table: int) -> str:
    """Return what a table is about."""
    return str(_tables()[str(table)]["title"])


def paper_rows(table: int) -> tuple[PaperRow, ...]:
    """Return the rows of a table.

    Raises:
        InputError: The paper has no such table.
    """
    if str(table) not in _tables():
        raise InputError(f"the paper has no Table {table}; it has tables 1 to {len(_tables())}")
    rows = _tables()[str(table)]["rows"]
    return tuple(PaperRow(table, **{**row, "doubtful": tuple(row.get("doubtful", ()))}) for row in rows)


def num_tables() -> int:
    """Return how many tables the paper has."""
    return len(_tables())
