"""Line charts: where lines, ticks and intervals lie. Geometry alone; the page's template draws them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 360.0, 220.0
LEFT, RIGHT, TOP, BOTTOM = 44.0, 352.0, 8.0, 184.0  # the frame; around it stand ticks and the name of the axis


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: In the legend.
        points: (x, y), by x.
        colour: Which of the page's eight.
        style: How it is drawn.
        intervals: (low, high) at each point, or none.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    colour: int = 0
    style: Literal["solid", "dashed"] = "solid"
    intervals: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Tick:
    """A value on an axis, where it lies, and how it is written."""

    place: float
    label: str


@dataclass(frozen=True)
class Chart:
    """Lines over one axis.

    Attributes:
        title: What is seen.
        x_label: The name of the horizontal axis.
        lines: At least one, each with a point.
        percent: Whether y is a share in [0, 1], shown in percent; the axis then goes from 0 to 100.
    """

    title: str
    x_label: str
    lines: tuple[Line, ...]
    percent: bool = False

    @cached_property
    def x_range(self) -> tuple[float, float]:
        """The smallest and largest x."""
        values = [x for line in self.lines for x, _ in line.points]
        low, high = min(values), max(values)
        return (low, high) if low < high else (low - 0.5, high + 0.5)

    @cached_property
    def y_range(self) -> tuple[float, float]:
        """From zero, or below it, to the largest y."""
        if self.percent:
            return 0.0, 1.0
        values = [y for line in self.lines for _, y in line.points]
        low, high = min(0.0, *values), max(values)
        return (low, high) if low < high else (low, low + 1.0)

    def x(self, value: float) -> float:
        """Return where a value lies on the horizontal axis."""
        low, high = self.x_range
        return round(LEFT + (RIGHT - LEFT) * (value - low) / (high - low), 2)

    def y(self, value: float) -> float:
        """Return where a value lies on the vertical axis."""
        low, high = self.y_range
        return round(BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low), 2)

    def path(self, line: Line) -> str:
        """Return the line as an SVG path."""
        return "M" + "L".join(f"{self.x(x)},{self.y(y)}" for x, y in line.points)

    @property
    def x_ticks(self) -> list[Tick]:
        """A few values, whole ones where the axis counts."""
        counts = all(float(x).is_integer() for line in self.lines for x, _ in line.points)
        return [Tick(self.x(value), f"{value:g}") for value in _ticks(self.x_range, whole=counts)]

    @property
    def y_ticks(self) -> list[Tick]:
        """A few values; in percent where y is a share."""
        scale = 100 if self.percent else 1
        return [Tick(self.y(value), f"{scale * value:g}") for value in _ticks(self.y_range)]

    @cached_property
    def stops(self) -> list[float]:
        """Every x that has a value."""
        return sorted({x for line in self.lines for x, _ in line.points})

    def values_at(self, x: float) -> list[float | None]:
        """Return the value of each line there, or None."""
        return [dict(line.points).get(x) for line in self.lines]

    def to_dict(self) -> dict[str, Any]:
        """Return what is drawn, and the frame it is drawn in, as plain values."""
        return {
            "x_label": self.x_label,
            "percent": self.percent,
            "x_range": self.x_range,
            "frame": [LEFT, RIGHT],
            "lines": [{"name": line.name, "colour": line.colour, "points": line.points} for line in self.lines],
        }


def finite(points: Sequence[tuple[float, Any]]) -> tuple[tuple[float, float], ...]:
    """Return the points that can be drawn."""
    return tuple((x, y) for x, y in points if isinstance(y, int | float) and math.isfinite(y))


def _ticks(limits: tuple[float, float], *, whole: bool = False) -> list[float]:
    low, high = limits
    values = MaxNLocator(5, integer=whole, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    slack = 1e-9 * (high - low)
    return [float(value) for value in values if low - slack <= value <= high + slack]
