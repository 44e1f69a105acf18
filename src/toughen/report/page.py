"""One page about runs: a file of HTML that needs nothing else, no server, no network, no other file.

Charts are SVG and heat maps are tables, both made here. A charting library would be most of the page's megabytes, and
its figures could neither follow the colours of the reader's screen nor be read aloud. All text goes through Jinja's
escaping.
"""

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import jinja2
from rich.table import Table
from rich.text import Text

from toughen.errors import InputError
from toughen.report.chart import Chart, Line, finite
from toughen.report.comparison import Comparison, compare_runs
from toughen.report.network import Network
from toughen.report.pictures import Example, read_examples
from toughen.report.tables import comparison_tables
from toughen.run_folder import RunFolder
from toughen.statistics import wilson_interval

_FILES = files("toughen.report") / "page"


@dataclass(frozen=True)
class Member:
    """A network of the page: a run or a branch of one, of one seed.

    Attributes:
        name: Its row's, with its seed where the row has several.
        network: What was measured of it.
        run: Its folder.
    """

    name: str
    network: Network
    run: RunFolder

    @property
    def before(self) -> list[dict[str, Any]]:
        """The log of the run that it continues."""
        parent = self.run.parent_run
        return [] if parent is None else parent.log()


@dataclass(frozen=True)
class Heat:
    """A table of shaded numbers.

    Attributes:
        title: What is seen.
        corner: The name of the rows.
        columns: Heads.
        rows: A head and its cells.
    """

    title: str
    corner: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple["Cell", ...]], ...]


@dataclass(frozen=True)
class Cell:
    """A number, its shade in [0, 1], how it is written, and whether it is marked."""

    value: float | None
    shade: float
    text: str
    marked: bool = False


def report_page(
    runs: Sequence[RunFolder],
    *,
    matrices: Sequence[Mapping[str, Any]] = (),
    seeds: Literal["folded", "each"] = "folded",
) -> str:
    """Return a page about runs and their branches, as HTML.

    Runs that can't be compared stand apart, and the page says why.

    Args:
        runs: At least one, evaluated.
        matrices: Of ``toughen transfer --json``.
        seeds: See ``compare_runs``.

    Raises:
        InputError: A run has no evaluation yet, or a file is damaged.
    """
    comparisons, warning = _comparisons(runs, seeds)
    members = [member for comparison in comparisons for member in _members(comparison)]
    script = (_FILES / "page.js").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["percent"] = lambda share: f"{100 * share:.1f}"
    template = environment.from_string((_FILES / "page.html").read_text(encoding="utf-8"))
    try:
        return template.render(
            title=", ".join(dict.fromkeys(_title(run) for run in runs)),
            style=(_FILES / "page.css").read_text(encoding="utf-8"),
            script=script,
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            warning=warning,
            tables=[_plain(table) for comparison in comparisons for table in comparison_tables(comparison).renderables],
            overview=_overview(members),
            accuracies=[_accuracy(member) for member in _ends(members)],
            lacks_training=not all("training" in row for m in members for row in m.run.log() if "validation" in row),
            criticality=[heat for member in members if (heat := _criticality(member)) is not None],
            losses=[_losses(member) for member in members],
            strength=_strength(members),
            transfer=[_transfer(matrix) for matrix in matrices],
            examples=_examples(members),
            flags=_flags(members),
            costs=[_cost(member) for member in members],
            origins=[_origin(run) for run in runs],
            again=" ".join(_quoted(str(run.path)) for run in runs),
        )
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise InputError(
            f"a file of {', '.join(str(run.path) for run in runs)} is not of toughen's form"
            f" ({type(error).__name__}: {error})"
        ) from None


def _comparisons(runs: Sequence[RunFolder], seeds: Literal["folded", "each"]) -> tuple[list[Comparison], str | None]:
    try:
        return [compare_runs(runs, seeds=seeds)], None
    except InputError as error:
        if len(runs) < 2:
            raise
        return [compare_runs([run]) for run in runs], str(error)


def _members(comparison: Comparison) -> Iterator[Member]:
    for row in comparison.rows:
        for network in row.networks:
            name = row.name if len(row.networks) == 1 else f"{row.name}, seed {network.seed}"
            yield Member(name, network, RunFolder(Path(network.path)))


def _ends(members: Sequence[Member]) -> list[Member]:
    """Without runs whose branches tell their story too."""
    continued = {member.run.parent_run for member in members}
    return [m for m in members if RunFolder(m.run.path.resolve()) not in continued] or list(members)


def _title(run: RunFolder) -> str:
    return run.path.resolve().name


def _plain(table: Any) -> dict[str, Any]:
    """A table of the terminal as plain text."""
    assert isinstance(table, Table)
    columns = [[_text(cell) for cell in column.cells] for column in table.columns]
    return {
        "title": _text(table.title),
        "heads": [_text(column.header) for column in table.columns],
        "words": [column.justify == "left" for column in table.columns],
        "rows": list(zip(*columns, strict=True)),
        "caption": _text(table.caption),
    }


def _text(shown: Any) -> str:
    return shown.plain if isinstance(shown, Text) else Text.from_markup(str(shown or "")).plain


# -- charts -----------------------------------------------------------------------------------------------------------


def _overview(members: Sequence[Member]) -> Chart | None:
    lines = [
        Line(member.name, points, number)
        for number, member in enumerate(_ends(members))
        if (points := _measured([*member.before, *member.run.log()], "validation", "robust"))
    ]
    return Chart("robust validation accuracy", "epoch", tuple(lines), percent=True) if lines else None


def _accuracy(member: Member) -> Chart:
    log = [*member.before, *member.run.log()]
    lines = [
        Line(f"{kind}, {part}", points, colour, style)
        for colour, kind in enumerate(("clean", "robust"))
        for part, style in _STYLES.items()
        if (points := _measured(log, part, kind))
    ]
    return Chart(member.name, "epoch", tuple(lines), percent=True)


_STYLES: dict[str, Literal["solid", "dashed"]] = {"validation": "solid", "training": "dashed"}


def _measured(log: Sequence[Mapping[str, Any]], part: str, kind: str) -> tuple[tuple[float, float], ...]:
    return finite([(row["epoch"], row[part][kind]) for row in log if part in row])


def _losses(member: Member) -> Chart:
    log = member.run.log()
    names = dict.fromkeys(name for row in log for name in row["losses"])
    if len(names) == 2:  # the sum of one term is that term
        names.pop("loss", None)
    lines = [
        Line(name, points, number)
        for number, name in enumerate(names)
        if (points := finite([(row["epoch"], row["losses"].get(name)) for row in log]))
    ]
    return Chart(member.name, "epoch", tuple(lines))


def _strength(members: Sequence[Member]) -> list[Chart]:
    """A chart for each attack and setting that was varied, a line for each network, with its intervals."""
    curves: dict[tuple[str, str], dict[str, list[tuple[float, float, int]]]] = {}
    for member in members:
        for name, result in member.run.strengths("last").items():
            base, _, setting = name.rpartition(":")
            key, equals, value = setting.partition("=")
            if base and equals and (number := _number(value)) is not None:
                points = curves.setdefault((base, key), {}).setdefault(member.name, [])
                points.append((number, sum(result["correct"]) / result["n"], result["n"]))
    return [
        Chart(base, key, tuple(_curve(name, points, i) for i, (name, points) in enumerate(lines.items())), percent=True)
        for (base, key), lines in curves.items()
    ]


def _curve(name: str, points: list[tuple[float, float, int]], colour: int) -> Line:
    points = sorted(points)
    intervals = [wilson_interval(round(accuracy * n), n) for _, accuracy, n in points]
    limits = tuple((interval.low, interval.high) for interval in intervals)
    return Line(name, tuple((value, accuracy) for value, accuracy, _ in points), colour, "solid", limits)


def _number(value: str) -> float | None:
    try:
        return float(Fraction(value))
    except (ValueError, ZeroDivisionError, OverflowError):
        return None


# -- tables of shaded numbers -----------------------------------------------------------------------------------------


def _criticality(member: Member) -> Heat | None:
    """The criticality of each layer at each selection; shades are of its logarithm."""
    reports = member.run.reports()
    if not reports:
        return None
    values = {
        epoch: {row["name"]: row["criticality"] for row in report["layers"] if not row["classifier"]}
        for epoch, report in reports.items()
    }
    layers = [row for row in next(iter(reports.values()))["layers"] if not row["classifier"]]
    positive = [v for found in values.values() for v in found.values() if v is not None and v > 0 and math.isfinite(v)]
    low, high = (math.log(min(positive)), math.log(max(positive))) if positive else (0.0, 0.0)

    def cell(epoch: int, name: str) -> Cell:
        value, marked = values[epoch].get(name), name in reports[epoch]["selected"]
        if value is None or not value > 0 or not math.isfinite(value):
            return Cell(value, 0.0, "-" if value is None else f"{value:.3g}", marked)
        return Cell(value, (math.log(value) - low) / ((high - low) or 1.0), f"{value:.3g}", marked)

    rows = tuple(
        (f"{row['index']}  {row['name']}", tuple(cell(epoch, row["name"]) for epoch in reports)) for row in layers
    )
    return Heat(member.name, "layer", tuple(f"after {epoch}" for epoch in reports), rows)


def _transfer(matrix: Mapping[str, Any]) -> Heat:
    rows = tuple(
        (name, tuple(Cell(value, value, f"{100 * value:.1f}", i == j) for j, value in enumerate(values)))
        for i, (name, values) in enumerate(zip(matrix["names"], matrix["accuracy"], strict=True))
    )
    return Heat(f"{matrix['attack']}, n = {matrix['n']}", "made on", tuple(matrix["names"]), rows)


# -- what is told in words and pictures -------------------------------------------------------------------------------


def _examples(members: Sequence[Member]) -> list[tuple[str, str, list[Example]]]:
    shown = [(member.name, member.run.examples("last")) for member in members]
    return [(name, *read_examples(file)) for name, file in shown if file.is_file()]


def _flags(members: Sequence[Member]) -> dict[str, Any]:
    """What the sanity checks saw, and of which networks they saw nothing."""
    seen = [
        (member.name, attack, flag["check"], f"{flag['seen']}; {flag['advice']}")
        for member in members
        for attack, result in member.network.last.items()
        for flag in result.get("flags", ())
    ]
    alike: dict[tuple[str, str, str], list[str]] = {}
    for name, attack, flag, detail in seen:  # the flags of one evaluation stand in each of its attacks
        alike.setdefault((name, flag, detail), []).append(attack)
    clean = [member.name for member in members if member.name not in {name for name, *_ in seen}]
    return {"seen": [(name, flag, detail, attacks) for (name, flag, detail), attacks in alike.items()], "none": clean}


def _cost(member: Member) -> dict[str, Any]:
    log, facts = member.run.log(), member.run.provenance()
    return {
        "name": member.name,
        "trained": f"{100 * member.network.trained:.1f} %",
        "epochs": str(len(log)),
        "seconds": f"{member.network.seconds:.2f}",
        "minutes": f"{sum(row['seconds'] for row in log) / 60:.1f}",
        "speed": f"{sorted(row['images_per_second'] for row in log)[len(log) // 2]:.0f}",
        "flops": f"{member.network.flops:.2f}",
        "device": ", ".join(
            [str(facts.get("device", "unknown")), f"{facts.get('processes', 1)} x {facts.get('precision', 'unknown')}"]
        ),
    }


def _origin(run: RunFolder) -> dict[str, Any]:
    facts = run.provenance()
    return {
        "name": _title(run),
        "command": str(facts.get("command", "unknown")),
        "config": run.config_file.read_text(encoding="utf-8"),
        "again": f"toughen train {_quoted(str(run.config_file))} --out NEW_FOLDER",
        "facts": {
            "seed": facts.get("seed"),
            "commit": facts.get("commit"),
            "started": facts.get("started"),
            "device": facts.get("device"),
            "threads": facts.get("threads"),
            "processes": facts.get("processes"),
            "precision": facts.get("precision"),
            "versions": ", ".join(f"{name} {version}" for name, version in (facts.get("versions") or {}).items()),
        },
    }


def _quoted(word: str) -> str:
    return word if re.fullmatch(r"[\w./+=:@-]+", word) else json.dumps(word)
