"""The figures of a run as PNG files: criticality of each layer over time, accuracies over epochs."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from toughen.errors import one_line
from toughen.run_folder import RunFolder
from toughen.statistics import wilson_interval


def plot_training(run: RunFolder, file: Path) -> None:
    """Draw clean and robust validation accuracy over epochs, of a run and of its branches."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    before = [row for row in run.log() if "validation" in row]
    curves = {run.path.name: before}
    for branch in run.branches():
        # a branch starts where the run ended
        curves[branch.path.name] = before[-1:] + [row for row in branch.log() if "validation" in row]
    for number, (name, rows) in enumerate(curves.items()):
        epochs = [row["epoch"] for row in rows]
        for kind, style in (("clean", "--"), ("robust", "-")):
            values = [100 * row["validation"][kind] for row in rows]
            axes.plot(epochs, values, style, color=f"C{number}", label=_literal(f"{name}, {kind}"))
    axes.set(xlabel="epoch", ylabel="validation accuracy (%); robust: training attack")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(file, dpi=120)


def plot_criticality(run: RunFolder, file: Path) -> None:
    """Draw the criticality of each layer at each selection of a run that made some, the selected layers marked."""
    reports = run.reports()
    layers = [row["name"] for row in next(iter(reports.values()))["layers"] if not row["classifier"]]
    figure = Figure(figsize=(9, 1.5 + 0.28 * len(layers)), layout="constrained")
    axes = figure.subplots()
    grid = [[_values(report).get(name) or float("nan") for report in reports.values()] for name in layers]
    image = axes.imshow(grid, aspect="auto", cmap="viridis")
    for column, report in enumerate(reports.values()):
        for name in report["selected"]:
            if name in layers:
                axes.plot(column, layers.index(name), marker="o", color="red", markersize=9, fillstyle="none")
    axes.set_xticks(range(len(reports)), [str(epoch) for epoch in reports])
    axes.set_yticks(range(len(layers)), [_literal(f"{name}  {index}") for index, name in enumerate(layers)], fontsize=8)
    axes.set(xlabel="epochs done at the selection", title="criticality index (Eq. 3); red: selected")
    figure.colorbar(image, ax=axes)
    figure.savefig(file, dpi=120)


def plot_report(report: Mapping[str, Any], file: Path) -> None:
    """Draw the criticality of each layer of one report as bars, beside what the shapes alone would give."""
    rows = [row for row in report["layers"] if not row["classifier"]]
    figure = Figure(figsize=(9, 1.5 + 0.28 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _bars(left, rows, "criticality", "criticality index (Eq. 3)")
    _bars(right, rows, "shape_ratio", "shapes alone: N(i-1) / N(i)")
    left.set_yticks(range(len(rows)), [_literal(f"{row['name']}  {row['index']}") for row in rows], fontsize=8)
    left.invert_yaxis()
    figure.savefig(file, dpi=120)


def plot_strength(points: Mapping[str, tuple[float, int]], key: str, file: Path) -> None:
    """Draw accuracy over the strength of an attack, with 95 % intervals (Figure 4).

    Args:
        points: Accuracy and number of samples by the attack's name, as in ``pgd-20:eps=4/255``; one curve for each name
            without the setting. A name without settings (clean images) is a level line.
        key: The setting that varies.
        file: Where to.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    curves: dict[str, list[tuple[float, float, float, float]]] = {}
    for name, (accuracy, n) in points.items():
        base, found, value = name.rpartition(f":{key}=")
        interval = wilson_interval(round(accuracy * n), n)
        if found:
            below, above = accuracy - interval.low, interval.high - accuracy
            row = (float(Fraction(value)), 100 * accuracy, 100 * below, 100 * above)
            curves.setdefault(base, []).append(row)
        else:
            axes.axhline(100 * accuracy, linestyle="--", color="grey", label=_literal(name))
    for base, rows in curves.items():
        values, accuracies, *errors = zip(*sorted(rows), strict=True)
        axes.errorbar(values, accuracies, yerr=errors, marker="o", capsize=3, label=_literal(base))
    axes.set(xlabel=_literal(key), ylabel="accuracy (%), with 95 % intervals", ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)


def plot_transfer(matrices: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw transfer matrices side by side: rows attack, columns are attacked (Tables 3 and 4)."""
    labels = [_literal(name) for name in matrices[0]["names"]]
    size = 2.5 + 0.9 * len(labels)
    figure = Figure(figsize=(size * len(matrices), size), layout="constrained")
    for axes, matrix in zip(figure.subplots(1, len(matrices), squeeze=False)[0], matrices, strict=True):
        image = axes.imshow(100 * np.array(matrix["accuracy"]), vmin=0, vmax=100, cmap="viridis")
        for i, row in enumerate(matrix["accuracy"]):
            for j, value in enumerate(row):
                color = "black" if value > 0.5 else "white"
                axes.text(j, i, f"{100 * value:.1f}", ha="center", va="center", color=color)
        axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
        axes.set_yticks(range(len(labels)), labels)
        axes.set(
            xlabel="shown to", ylabel="made on", title=f"{_literal(matrix['attack'])}: accuracy (%), n = {matrix['n']}"
        )
        figure.colorbar(image, ax=axes, shrink=0.8)
    figure.savefig(file, dpi=120)


def _literal(name: str) -> str:
    """Return a label that shows a name as it is: between dollars, matplotlib would read a formula."""
    return one_line(name).replace("$", r"\$")


def _bars(axes: Axes, rows: list[dict[str, Any]], key: str, title: str) -> None:
    axes.barh(range(len(rows)), [row[key] or 0.0 for row in rows])
    axes.set_title(title, fontsize=10)
    axes.grid(axis="x", alpha=0.3)


def _values(report: Mapping[str, Any]) -> dict[str, float | None]:
    return {row["name"]: row["criticality"] for row in report["layers"]}
