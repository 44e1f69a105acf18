"""Tables and figures filled in: the paper's value beside ours, and everything that differs, as text and as files."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from toughen.errors import InputError
from toughen.paper.figures import FIGURES, STRENGTHS, Curve, Figure, Point, draw
from toughen.paper.measure import Bench, Measured
from toughen.paper.networks import remarks as remarks_of
from toughen.paper.scales import PAPER_EPOCHS
from toughen.paper.values import PaperRow, Value, paper_rows, table_title
from toughen.run_folder import write_text

Values = Sequence[tuple[float, float, int]]
_HEADINGS = {
    "clean": "clean",
    "pgd10": "PGD-10",
    "autoattack": "AutoAttack",
    "adversarial": "adversarial",
    "adversarial_delta": "points over PGD-AT",
    "blackbox_autoattack": "AutoAttack from elsewhere",
    "blackbox_pgd": "PGD-10 from elsewhere",
    "critical_layers": "chosen layers",
    "critical_layers_top5": "five most critical",
    "trainable_share": "trained, % of parameters",
    "time_s": "selection, s",
    "epoch_time_s": "epoch of PGD-AT, s",
}


_DOUBT = "? doubtful in the paper"
_ANOTHER = "* not what the table's title says"


@dataclass(frozen=True)
class Filled:
    """A row of the paper with what was measured for it.

    Attributes:
        row: The paper's.
        ours: By metric and seed, what was measured.
        missing: Why there is none of a seed, where there is none.
    """

    row: PaperRow
    ours: Mapping[str, Mapping[int, Measured]]
    missing: str = ""

    def each(self, metric: str) -> list[Measured]:
        """What was measured of a metric, seed by seed."""
        return list(self.ours.get(metric, {}).values())


def fill(table: int, bench: Bench, *, seeds: Sequence[int]) -> list[Filled]:
    """Measure every row of a table that can be measured."""
    return [_filled(row, bench, seeds) for row in paper_rows(table)]


def _filled(row: PaperRow, bench: Bench, seeds: Sequence[int]) -> Filled:
    found: dict[str, dict[int, Measured]] = {metric: {} for metric in row.values}
    missing = ""
    for seed in bench.seeds_of(row, seeds):
        try:
            values = bench.values(row, seed)
        except InputError as error:
            missing = missing or str(error)
            continue
        for metric, value in values.items():
            found[metric][seed] = value
    return Filled(row, found, missing)


# -- tables -------------------------------------------------------------------------------------------


def shown(table: int, rows: Sequence[Filled], bench: Bench) -> Table:
    """Return a table for the terminal: paper and ours side by side."""
    metrics = list(dict.fromkeys(metric for filled in rows for metric in filled.row.values))
    said = Table(
        title=f"Table {table}: {table_title(table)}, --scale {bench.scale.name}",
        caption=escape("; ".join(_remarks(rows, bench))),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for heading in ("data", "network", "method"):
        said.add_column(heading)
    for metric in metrics:
        said.add_column(f"{_HEADINGS[metric]}: paper", justify="right")
        said.add_column("ours", justify="right")
    for filled in rows:
        cells = [text for metric in metrics for text in _cells(filled, metric)]
        said.add_row(*map(escape, (filled.row.dataset, filled.row.model, filled.row.label, *cells)))
    return said


def markdown(table: int, rows: Sequence[Filled], bench: Bench) -> str:
    """Return the same table as Markdown."""
    metrics = list(dict.fromkeys(metric for filled in rows for metric in filled.row.values))
    headings = ["data", "network", "method", *(f"{_HEADINGS[m]}: {who}" for m in metrics for who in ("paper", "ours"))]
    lines = [
        f"# Table {table}: {table_title(table)}",
        "",
        *(f"- {remark}" for remark in _remarks(rows, bench)),
        "",
        "| " + " | ".join(headings) + " |",
        "|---" * len(headings) + "|",
    ]
    for filled in rows:
        cells = [text for metric in metrics for text in _cells(filled, metric)]
        lines.append("| " + " | ".join((filled.row.dataset, filled.row.model, filled.row.label, *cells)) + " |")
    return "\n".join(lines) + "\n"


def _remarks(rows: Sequence[Filled], bench: Bench) -> list[str]:
    """Say how to read a table, and in what ours differs from the paper's."""
    numbers = {len(values) for filled in rows for values in filled.ours.values() if values}
    remarks = [
        f"ours: mean (smallest to largest) over {' or '.join(map(str, sorted(numbers)))}"
        f" seed{'s' if numbers != {1} else ''}, {bench.checkpoint} checkpoint"
        if numbers
        else "ours: nothing measured yet",
        *_numbers_of_images(rows),
        *bench.scale.differs,
        *dict.fromkeys(remark for filled in rows for remark in remarks_of(filled.row, bench.scale)),
    ]
    names = dict.fromkeys(bench.scale.data_of(filled.row.dataset)["name"] for filled in rows)
    if copies := [name for name in names if name in bench.paths]:
        remarks.append(f"{', '.join(copies)} from a local copy, which may differ from the published images")
    if bench.clat:
        remarks.append("CLAT with " + ", ".join(f"{key}={value}" for key, value in bench.clat.items()))
    doubts = [(filled.row, filled.row.note) for filled in rows if filled.row.doubtful]
    others = [(filled.row, why) for filled in rows for why in filled.row.another.values()]
    remarks += [f"{said}: {_grouped(found)}" for said, found in ((_DOUBT, doubts), (_ANOTHER, others)) if found]
    if gaps := dict.fromkeys(filled.missing for filled in rows if filled.missing):
        remarks.append(f"not measured: {'; '.join(gaps)}")
    return remarks


def _grouped(notes: Sequence[tuple[PaperRow, str]]) -> str:
    """Each note once, with the rows that it is about."""
    found: dict[str, list[str]] = {}
    for row, note in notes:
        found.setdefault(note, []).append(f"{row.dataset} {row.model} {row.label}")
    return "; ".join(f"{note} ({', '.join(dict.fromkeys(names))})" for note, names in found.items())


def _numbers_of_images(rows: Sequence[Filled]) -> list[str]:
    counts: dict[int, list[str]] = {}
    for filled in rows:
        for metric in filled.ours:
            counts.setdefault(max((one.n for one in filled.each(metric)), default=0), []).append(_HEADINGS[metric])
    return [f"{', '.join(dict.fromkeys(names))} on {n} test images" for n, names in counts.items() if n]


def _cells(filled: Filled, metric: str) -> tuple[str, str]:
    if metric not in filled.row.values:
        return "", ""
    marks = ("?" if metric in filled.row.doubtful else "") + ("*" if metric in filled.row.another else "")
    printed = filled.row.values[metric]
    return (f"{_text(printed)}{marks}" if printed is not None else "?"), _ours(filled.each(metric))


def _ours(found: Sequence[Measured]) -> str:
    if not found:
        return "-"
    values = [one.value for one in found]
    numbers = [value for value in values if isinstance(value, float)]
    if len(numbers) < len(values):
        return "; ".join(dict.fromkeys(map(_text, values)))
    mean = statistics.fmean(numbers)
    return _text(mean) if len(numbers) == 1 else f"{_text(mean)} ({_text(min(numbers))} to {_text(max(numbers))})"


def _text(value: Value) -> str:
    return str(value) if isinstance(value, list) else f"{value:.2f}"


def write_table(table: int, rows: Sequence[Filled], bench: Bench, *, seeds: Sequence[int]) -> Path:
    """Write a table as ``tables/table-N.md``, and with a value for each seed as ``tables/table-N.json``."""
    folder = bench.out / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    content = [
        {
            "dataset": filled.row.dataset,
            "model": filled.row.model,
            "method": filled.row.label,
            "paper": dict(filled.row.values),
            "doubtful": list(filled.row.doubtful),
            "another": dict(filled.row.another),
            "ours": {m: {str(seed): one.value for seed, one in found.items()} for m, found in filled.ours.items()},
            "n": {metric: found[0].n for metric in filled.ours if (found := filled.each(metric)) and found[0].n},
            "missing": filled.missing,
        }
        for filled in rows
    ]
    document = {
        "table": table,
        "title": table_title(table),
        **bench.circumstances(seeds),
        "remarks": _remarks(rows, bench),
        "rows": content,
    }
    write_text(folder / f"table-{table}.json", json.dumps(document, indent=1) + "\n")
    write_text(folder / f"table-{table}.md", markdown(table, rows, bench))
    return folder / f"table-{table}.md"


# -- figures ------------------------------------------------------------------------------------------


def draw_figure(number: int, bench: Bench, *, seeds: Sequence[int]) -> tuple[Path, list[str]]:
    """Draw a figure to ``figures/figure-N.png``, with its points in ``figures/figure-N.json``.

    Returns:
        The picture, and why curves, or some of their seeds, are missing.
    """
    figure, missing = FIGURES[number], []
    points: dict[str, dict[str, list[Point]]] = {metric: {} for metric in figure.metrics}
    for curve in figure.curves:
        for metric in figure.metrics:
            found: dict[int, Values] = {}
            for seed in seeds:
                try:
                    found[seed] = _values(figure, curve, metric, bench, seed)
                except InputError as error:
                    missing.append(f"{curve.label}: {error}")
            if found:
                points[metric].setdefault(curve.label, []).extend(_over_seeds(found))
    folder = bench.out / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        metric: {label: [point._asdict() for point in found] for label, found in curves.items()}
        for metric, curves in points.items()
    }
    document = {"figure": number, "title": figure.title, **bench.circumstances(seeds), "points": content}
    write_text(folder / f"figure-{number}.json", json.dumps(document, indent=1) + "\n")
    draw(figure, points, folder / f"figure-{number}.png")
    return folder / f"figure-{number}.png", list(dict.fromkeys(missing))


def _values(figure: Figure, curve: Curve, metric: str, bench: Bench, seed: int) -> Values:
    """The points of one seed: x, the accuracy in percent, and of how many images it is."""
    if figure.kind == "epochs":
        run = bench.run(curve.network, seed)
        # a branch begins where its run stopped
        logs = [*(bench.trunk(curve.network, seed).log() if run.parent_run else ()), *run.log()]
        key, factor = ("clean" if metric == "clean" else "robust"), PAPER_EPOCHS / bench.scale.num_epochs
        seen = [(row["epoch"], row["validation"]) for row in logs if "validation" in row]
        return [(factor * epoch, 100 * found[key], found["n"]) for epoch, found in seen]
    if figure.kind == "layers":
        name = "clean" if metric == "clean" else "pgd-10"
        return [(curve.x, *bench.accuracy((curve.network,), name, seed, samples=None))]
    eps, samples = float(bench.scale.threat["eps"]), bench.scale.samples
    names = {factor * eps: f"pgd-10:eps={factor * eps:g}" if factor else "clean" for factor in STRENGTHS}
    return [(x, *bench.accuracy((curve.network,), name, seed, samples=samples)) for x, name in names.items()]


def _over_seeds(found: Mapping[int, Values]) -> list[Point]:
    """Mean and range over the seeds, point by point."""
    return [
        Point(at[0][0], statistics.fmean(ys := [y for _, y, _ in at]), min(ys), max(ys), at[0][2], list(found))
        for at in zip(*found.values(), strict=True)
    ]
