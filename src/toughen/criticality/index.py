"""The criticality index (Eq. 3) and the report that holds it. Knows numbers and names, no model and no attack."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from toughen.errors import InputError


@dataclass(frozen=True)
class LayerCriticality:
    """One row of a report.

    Attributes:
        index: Position in order of first execution, from 0.
        name: Qualified name of the layer.
        num_features: N_i of Eq. 2.
        num_parameters: Parameters that the layer owns.
        weakness: Eq. 2, or None where there is no single feature to measure.
        criticality: Eq. 3, or None where it is undefined (the weakness before is 0, or was not measured).
        shape_ratio: N_{i-1} / N_i, the part of the index that the shapes alone decide (with ``predecessor="graph"``, of
            the tensor that enters); None for the first layer.
        num_samples: Images behind the expectation.
        classifier: Whether the layer's output is the logits.
    """

    index: int
    name: str
    num_features: int
    num_parameters: int
    weakness: float | None
    criticality: float | None
    shape_ratio: float | None
    num_samples: int
    classifier: bool = False


@dataclass(frozen=True)
class CriticalityReport:
    """The criticality of every layer, and what was not measured. Printing it shows a table.

    Attributes:
        rows: One per layer, in order of first execution.
        notes: What is odd, a line each: layers never called, called twice, of zero weakness, ...
        settings: What was asked for: attack, norm, predecessor and so on, as plain values.
    """

    rows: tuple[LayerCriticality, ...]
    notes: tuple[str, ...] = ()
    settings: Mapping[str, object] = field(default_factory=dict)

    def ranked(self, *, classifier: bool = False) -> tuple[LayerCriticality, ...]:
        """Return the rows that have an index, most critical first; ties keep the order of execution.

        Args:
            classifier: Whether the classifier takes part. With Eq. 2's 1/N_i it has the largest index in every
                network that we tried, since it has the fewest features; the paper's lists never contain it.
        """
        rows = [r for r in self.rows if r.criticality is not None and (classifier or not r.classifier)]
        return tuple(sorted(rows, key=lambda row: (-(row.criticality or 0.0), row.index)))

    def top(self, k: int, *, classifier: bool = False) -> tuple[LayerCriticality, ...]:
        """Return the ``k`` most critical layers (Proposition 3.2), most critical first.

        Raises:
            InputError: Fewer than ``k`` layers have an index, or ``k`` is below 1.
        """
        return self._checked(k, classifier)[:k]

    def bottom(self, k: int, *, classifier: bool = False) -> tuple[LayerCriticality, ...]:
        """Return the ``k`` least critical layers (Table 20), least critical first. Raises as ``top``."""
        return self._checked(k, classifier)[::-1][:k]

    def _checked(self, k: int, classifier: bool) -> tuple[LayerCriticality, ...]:
        rows = self.ranked(classifier=classifier)
        if not any(row.weakness for row in rows):
            raise InputError(
                "no layer has a criticality: the perturbed images equal the clean ones; is eps or step_size 0, or the"
                " first layer constant?"
            )
        check_k(k, len(rows))
        return rows

    def to_dict(self) -> dict[str, object]:
        """Return the report as plain values."""
        return {"settings": dict(self.settings), "notes": self.notes, "layers": [asdict(row) for row in self.rows]}

    def to_json(self) -> str:
        """Return the report as JSON; ``from_json`` reads it back."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def save(self, path: Path | str) -> None:
        """Write ``to_json`` to a file."""
        Path(path).write_text(self.to_json() + "\n")

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "CriticalityReport":
        """Read what ``to_dict`` returned."""
        return cls(
            rows=tuple(LayerCriticality(**row) for row in content["layers"]),
            notes=tuple(content["notes"]),
            settings=content["settings"],
        )

    @classmethod
    def from_json(cls, text: str) -> "CriticalityReport":
        """Read what ``to_json`` wrote."""
        return cls.from_dict(json.loads(text))

    def table(self, *, title: str = "criticality", selected: Sequence[str] = ()) -> Table:
        """Return the report as a rich table, with ranks, and a mark at the layers in ``selected``."""
        ranks = {row.name: rank for rank, row in enumerate(self.ranked(), start=1)}
        table = Table(title=title, caption=_caption(self.settings))
        for column in ("layer", "name", "features", "weakness", "criticality", "shape ratio", "rank"):
            table.add_column(column, justify="left" if column == "name" else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(
                "cls" if row.classifier else str(row.index),
                escape(row.name) + (" *" if row.name in selected else ""),
                str(row.num_features),
                _number(row.weakness),
                _number(row.criticality),
                _number(row.shape_ratio),
                str(ranks.get(row.name, "-")),
                style="bold" if row.name in selected else None,
            )
        return table

    def __str__(self) -> str:
        text = StringIO()
        # wide enough for any name; and text, also where rich would rather display HTML or colours
        width = 110 + max((len(row.name) for row in self.rows), default=0)
        console = Console(file=text, width=width, force_terminal=False, force_jupyter=False)
        console.print(self.table())
        for note in self.notes:
            console.print(f"note: {note}", soft_wrap=True, markup=False)
        return text.getvalue().rstrip()


def check_k(k: int, num_layers: int) -> None:
    """Refuse to choose ``k`` of ``num_layers`` layers where that can't be done.

    Raises:
        InputError: Says what is allowed.
    """
    if not 1 <= k <= num_layers:
        raise InputError(f"k is {k}; this model has {num_layers} layers to choose from, so k must be 1 to {num_layers}")


def criticality(weakness: float | None, before: float | None) -> float | None:
    """Return C_i = W(F_i) / W(F_{i-1}) (Eq. 3); None where it is undefined (a zero or unmeasured divisor)."""
    if weakness is None or before is None or not before > 0 or not math.isfinite(weakness / before):
        return None
    return weakness / before


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _caption(settings: Mapping[str, object]) -> str | None:
    keys = ("measure", "norm", "predecessor", "attack", "num_samples")
    return ", ".join(f"{key} {settings[key]}" for key in keys if key in settings) or None
