"""Tables and figures filled in: the paper's value beside ours, and everything that differs, as text and as files."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from toughen.errors import InputError
from toughen.paper.figures import FIGURES, STRENGTHS, Curve, Figure, Points, draw
from toughen.paper.measure import Bench, Measured
from toughen.paper.scales import PAPER_EPOCHS
from toughen.paper.values import PaperRow, Value, paper_rows, table_title
from toughen.run_folder import write_text

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


@dataclass(frozen=True)
class Filled:
    """A row of the paper with what was measured for it.

    Attributes:
        row: The paper's.
        ours: By metric, what was measured for each seed.
        missing: Why there is none, where there is none.
    """

    row: PaperRow
    ours: Mapping[str, Sequence[Measured]]
    missing: str = ""


def fill(table: int, bench: Bench, *, seeds: Iterable[int]) -> list[Filled]:
    """Measure every row of a table that can be measured."""
    return [_filled(row, bench, list(seeds)) for row in paper_rows(table)]


def _filled(row: PaperRow, bench: Bench, seeds: Sequence[int]) -> Filled:
    found: dict[str, list[Measured]] = {metric: [] for metric in row.values}
    missing = ""
    for seed in seeds:
        try:
            values = bench.values(row, seed)
        except InputError as error:
            missing = missing or str(error)
            continue
        for metric, value in values.items():
            found[metric].append(value)
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
    ]
    if bench.clat:
        remarks.append("CLAT with " + ", ".join(f"{key}={value}" for key, value in bench.clat.items()))
    notes: dict[str, list[str]] = {}
    for filled in rows:
        if filled.row.doubtful:
            notes.setdefault(filled.row.note, []).append(f"{filled.row.model} {filled.row.method}")
    if notes:
        whose = "; ".join(f"{note} ({', '.join(dict.fromkeys(names))})" for note, names in notes.items())
        remarks.append(f"? doubtful in the paper: {whose}")
    if gaps := dict.fromkeys(filled.missing for filled in rows if filled.missing):
        remarks.append(f"not measured: {'; '.join(gaps)}")
    return remarks


def _numbers_of_images(rows: Sequence[Filled]) -> list[str]:
    counts: dict[int, list[str]] = {}
    for filled in rows:
        for metric, found in filled.ours.items():
            counts.setdefault(max((one.n for one in found), default=0), []).append(_HEADINGS[metric])
    return [f"{', '.join(dict.fromkeys(names))} on {n} test images" for n, names in counts.items() if n]


def _cells(filled: Filled, metric: str) -> tuple[str, str]:
    if metric not in filled.row.values:
        return "", ""
    doubt = "?" if metric in filled.row.doubtful else ""
    printed = filled.row.values[metric]
    return (f"{_text(printed)}{doubt}" if printed is not None else "?"), _ours(filled.ours[metric])


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


def write_table(table: int, rows: Sequence[Filled], bench: Bench) -> Path:
    """Write a table as ``tables/table-N.md``, and with a value per seed as ``tables/table-N.json``."""
    folder = bench.out / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    content = [
        {
            "dataset": filled.row.dataset,
            "model": filled.row.model,
            "method": filled.row.label,
            "paper": dict(filled.row.values),
            "doubtful": list(filled.row.doubtful),
            "ours": {metric: [one.value for one in found] for metric, found in filled.ours.items()},
            "n": {metric: found[0].n for metric, found in filled.ours.items() if found and found[0].n},
            "missing": filled.missing,
        }
        for filled in rows
    ]
    document = {"table": table, "title": table_title(table), **bench.circumstances(), "rows": content}
    write_text(folder / f"table-{table}.json", json.dumps(document, indent=1) + "\n")
    write_text(folder / f"table-{table}.md", markdown(table, rows, bench))
    return folder / f"table-{table}.md"


# -- figures ------------------------------------------------------------------------------------------


def draw_figure(number: int, bench: Bench, *, seeds: Iterable[int]) -> tuple[Path, list[str]]:
    """Draw a figure to ``figures/figure-N.png``, with its points in ``figures/figure-N.json``.

    Returns:
        The picture, and why curves are missing.
    """
    figure, missing = FIGURES[number], []
    points: dict[str, dict[str, list[tuple[float, float]]]] = {metric: {} for metric in figure.metrics}
    for curve in figure.curves:
        for metric in figure.metrics:
            try:
                found = _mean([_points(figure, curve, metric, bench, seed) for seed in seeds])
            except InputError as error:
                missing.append(f"{curve.label}: {error}")
                continue
            points[metric].setdefault(curve.label, []).extend(found)
    folder = bench.out / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    document = {"figure": number, "title": figure.title, **bench.circumstances(), "points": points}
    write_text(folder / f"figure-{number}.json", json.dumps(document, indent=1) + "\n")
    draw(figure, points, folder / f"figure-{number}.png")
    return folder / f"figure-{number}.png", list(dict.fromkeys(missing))


def _points(figure: Figure, curve: Curve, metric: str, bench: Bench, seed: int) -> Points:
    if figure.kind == "epochs":
        run = bench.run(curve.network, seed)
        # a branch begins where its run stopped
        logs = [*(bench.trunk(curve.network, seed).log() if run.parent_run else ()), *run.log()]
        key, factor = ("clean" if metric == "clean" else "robust"), PAPER_EPOCHS / bench.scale.num_epochs
        return [(factor * row["epoch"], 100 * row["validation"][key]) for row in logs if "validation" in row]
    if figure.kind == "layers":
        name = "clean" if metric == "clean" else "pgd-10"
        return [(curve.x, bench.accuracy((curve.network,), name, seed, samples=None)[0])]
    eps, samples = float(bench.scale.threat["eps"]), bench.scale.samples
    names = {factor * eps: f"pgd-10:eps={factor * eps:g}" if factor else "clean" for factor in STRENGTHS}
    return [(x, bench.accuracy((curve.network,), name, seed, samples=samples)[0]) for x, name in names.items()]


def _mean(curves: Sequence[Points]) -> Points:
    """The mean over seeds, point by point."""
    return [(found[0][0], statistics.fmean(y for _, y in found)) for found in zip(*curves, strict=True)]
