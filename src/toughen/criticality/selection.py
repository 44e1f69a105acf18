"""Which layers to tune: functions of a criticality report. ``top`` is the paper's; the others are its controls."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from toughen.criticality.index import CriticalityReport, LayerCriticality, check_k
from toughen.errors import InputError, unknown
from toughen.registry import Registry


@runtime_checkable
class SelectionRule(Protocol):
    """Chooses ``k`` layers from a report; needs the report's numbers, its names, or neither."""

    def __call__(
        self, report: CriticalityReport, k: int, *, classifier: bool, generator: torch.Generator
    ) -> tuple[str, ...]:
        """Return qualified names, the first choice first."""
        ...


@dataclass(frozen=True)
class Selection:
    """A choice of layers that was made.

    Attributes:
        epoch: Epochs that were done when it was made.
        layers: Qualified names, the first choice first.
        report: The criticality of all layers at that moment.
    """

    epoch: int
    layers: tuple[str, ...]
    report: CriticalityReport


SELECTORS: Registry[type[SelectionRule]] = Registry("selection rule")


@SELECTORS.register("top")
@dataclass(frozen=True)
class Top:
    """The ``k`` most critical layers (Proposition 3.2)."""

    def __call__(
        self, report: CriticalityReport, k: int, *, classifier: bool, generator: torch.Generator
    ) -> tuple[str, ...]:
        """See ``SelectionRule``."""
        return _names(report.top(k, classifier=classifier))


@SELECTORS.register("bottom")
@dataclass(frozen=True)
class Bottom:
    """The ``k`` least critical layers (Table 20)."""

    def __call__(
        self, report: CriticalityReport, k: int, *, classifier: bool, generator: torch.Generator
    ) -> tuple[str, ...]:
        """See ``SelectionRule``."""
        return _names(report.bottom(k, classifier=classifier))


@SELECTORS.register("random")
@dataclass(frozen=True)
class Random:
    """``k`` layers drawn anew at every selection (Tables 7 and 12)."""

    def __call__(
        self, report: CriticalityReport, k: int, *, classifier: bool, generator: torch.Generator
    ) -> tuple[str, ...]:
        """See ``SelectionRule``."""
        rows = _measured(report, k, classifier=classifier)
        order = torch.randperm(len(rows), generator=generator).tolist()
        return _names([rows[position] for position in order[:k]])


@SELECTORS.register("shape_only")
@dataclass(frozen=True)
class ShapeOnly:
    """The ``k`` layers with the largest N_{i-1} / N_i: what Eq. 2 and 3 would choose without looking at the data."""

    def __call__(
        self, report: CriticalityReport, k: int, *, classifier: bool, generator: torch.Generator
    ) -> tuple[str, ...]:
        """See ``SelectionRule``."""
        rows = _measured(report, k, classifier=classifier)
        return _names(sorted(rows, key=lambda row: (-(row.shape_ratio or 0.0), row.index))[:k])


@SELECTORS.register("fixed")
@dataclass(frozen=True)
class Fixed:
    """The layers that you name, whatever the report says.

    Args:
        layers: Qualified names; their number must be ``k``.
    """

    layers: Sequence[str]

    def __call__(
        self, report: CriticalityReport, k: int, *, classifier: bool, generator: torch.Generator
    ) -> tuple[str, ...]:
        """See ``SelectionRule``.

        Raises:
            InputError: A name is not a layer of the model, or ``k`` is not the number of names.
        """
        known = {row.name for row in report.rows if row.weakness is not None}
        for name in self.layers:
            if name not in known:
                raise unknown("layer", name, known, hint="see `toughen list layers MODEL`")
        if len(self.layers) != k:
            raise InputError(f"k is {k} but {len(self.layers)} layers are named; leave k out or make them agree")
        return tuple(self.layers)


def _measured(report: CriticalityReport, k: int, *, classifier: bool) -> list[LayerCriticality]:
    """The layers that a rule may choose from without asking for their index: a control must not depend on it."""
    rows = [row for row in report.rows if row.num_samples and (classifier or not row.classifier)]
    check_k(k, len(rows))
    return rows


def _names(rows: Sequence[LayerCriticality]) -> tuple[str, ...]:
    return tuple(row.name for row in rows)
