"""The paper's figures with curves: which networks they show, and how they are drawn from what was measured."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from toughen.paper.networks import LAYERS, Network, with_layers

Kind = Literal["epochs", "layers", "strength"]
# multiples of the eps that the networks were trained with
STRENGTHS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)


@dataclass(frozen=True)
class Curve:
    """One network of a figure.

    Attributes:
        label: In the legend.
        network: Which.
        x: Where on the axis its accuracy stands, for a figure over numbers of layers.
    """

    label: str
    network: Network
    x: int = 0


@dataclass(frozen=True)
class Figure:
    """A figure of the paper.

    Attributes:
        title: What it shows.
        kind: Accuracy over epochs, over the number of critical layers, or over eps.
        metrics: ``"clean"`` and ``"pgd10"``; a panel for each.
        curves: Its networks.
    """

    title: str
    kind: Kind
    metrics: tuple[str, ...]
    curves: tuple[Curve, ...]


def _with_and_without(models: Iterable[str]) -> tuple[Curve, ...]:
    return tuple(
        Curve(f"{model} {label}", Network("CIFAR-10", model, going_on=going_on))
        for model in models
        for label, going_on in (("PGD-AT", "base"), ("+ CLAT", "clat"))
    )


def _over_layers() -> tuple[Curve, ...]:
    networks = {model: Network("CIFAR-10", model) for model in _MAIN}
    return tuple(
        curve
        for model, network in networks.items()
        for curve in (Curve(model, network, 0), *(Curve(model, with_layers(network, k), k) for k in LAYERS))
    )


_WIDE = Network("CIFAR-10", "WRN34-10")
_MAIN = ("DN121", "RN50", "RN18")
FIGURES: Mapping[int, Figure] = {
    2: Figure(
        "CLAT from different epochs on, WRN34-10",
        "epochs",
        ("clean", "pgd10"),
        tuple(
            Curve(label, Network(_WIDE.dataset, _WIDE.model, going_on=going_on, start=start))
            for label, going_on, start in (
                ("CLAT for 100 epochs", "clat", 0),
                ("CLAT for 50 epochs", "clat", 50),
                ("CLAT for 30 epochs", "clat", 70),
                ("CLAT for 10 epochs", "clat", 90),
                ("PGD-AT for 100 epochs", "base", 50),
            )
        ),
    ),
    3: Figure("number of critical layers, PGD-10", "layers", ("pgd10",), _over_layers()),
    4: Figure("accuracy over the attack's eps, PGD-10", "strength", ("pgd10",), _with_and_without(_MAIN)),
    5: Figure("accuracy over the whole training", "epochs", ("clean", "pgd10"), _with_and_without(_MAIN)),
    6: Figure(
        "a tenth of the learning rate from epoch 70 on, WRN34-10",
        "epochs",
        ("pgd10",),
        tuple(
            Curve(label, Network(_WIDE.dataset, _WIDE.model, going_on=going_on, start=70))
            for label, going_on in (
                ("PGD-AT", "base"),
                ("PGD-AT, rate x 0.1", "base-slow"),
                ("CLAT, rate x 0.1", "clat-slow"),
            )
        ),
    ),
    7: Figure("number of critical layers, clean accuracy", "layers", ("clean",), _over_layers()),
}


class Point(NamedTuple):
    """A point of a curve.

    Attributes:
        x: Epoch, number of layers, or eps.
        mean: Accuracy over the seeds, in percent.
        low: Of the seed that has the smallest.
        high: Of the seed that has the largest.
        n: Images behind each accuracy.
        seeds: Which.
    """

    x: float
    mean: float
    low: float
    high: float
    n: int
    seeds: list[int]


def draw(figure: Figure, points: Mapping[str, Mapping[str, Sequence[Point]]], file: Path) -> None:
    """Draw a figure: the mean over the seeds, and a band from the smallest to the largest.

    Args:
        figure: Which.
        points: By metric and label of the curve.
        file: A ``.png``, ``.pdf`` or ``.svg``.
    """
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(5.5 * len(figure.metrics), 4), layout="constrained")
    axes: Any = canvas.subplots(1, len(figure.metrics), squeeze=False)[0]
    axis = {"epochs": "epoch", "layers": "critical layers (0: PGD-AT goes on)", "strength": "eps"}[figure.kind]
    for panel, metric in zip(axes, figure.metrics, strict=True):
        for label, found in points[metric].items():
            xs = [point.x for point in found]
            marker = "" if figure.kind == "epochs" else "o"
            [line] = panel.plot(xs, [point.mean for point in found], label=label, marker=marker, linewidth=1.5)
            low, high = [point.low for point in found], [point.high for point in found]
            panel.fill_between(xs, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        panel.set(xlabel=axis, ylabel=f"{'clean' if metric == 'clean' else 'PGD-10'} accuracy (%)")
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    if any(points[figure.metrics[0]]):
        axes[0].legend(frameon=False, fontsize="small")
    seeds = {seed for curves in points.values() for found in curves.values() for point in found for seed in point.seeds}
    images = {point.n for curves in points.values() for found in curves.values() for point in found}
    behind = f"{len(seeds)} seed{'s' * (len(seeds) != 1)}, n = {' or '.join(map(str, sorted(images)))}"
    canvas.suptitle(f"{figure.title}\n{behind}" if seeds else figure.title, fontsize="medium")
    canvas.savefig(file, dpi=150)
