"""The figures of a run as PNG files: criticality of each layer over time, accuracies over epochs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from toughen.run_folder import RunFolder


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
            axes.plot(epochs, values, style, color=f"C{number}", label=f"{name}, {kind}")
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
    axes.set_yticks(range(len(layers)), [f"{name}  {index}" for index, name in enumerate(layers)], fontsize=8)
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
    left.set_yticks(range(len(rows)), [f"{row['name']}  {row['index']}" for row in rows], fontsize=8)
    left.invert_yaxis()
    figure.savefig(file, dpi=120)


def _bars(axes: Axes, rows: list[dict[str, Any]], key: str, title: str) -> None:
    axes.barh(range(len(rows)), [row[key] or 0.0 for row in rows])
    axes.set_title(title, fontsize=10)
    axes.grid(axis="x", alpha=0.3)


def _values(report: Mapping[str, Any]) -> dict[str, float | None]:
    return {row["name"]: row["criticality"] for row in report["layers"]}
