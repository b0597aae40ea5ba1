"""Charts as geometry: what the page's template draws as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

WIDTH, HEIGHT = 360, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 24
_MOST = 240
"""Points of a line at most; longer ones become means of as many stretches."""
MAP = 600
"""Side of an embedding map."""
_MARKS = 4

Point = tuple[float, float]


class Tick(NamedTuple):
    at: float
    text: str


class Line(NamedTuple):
    name: str
    path: str
    """SVG path data."""
    end: Point


class Chart(NamedTuple):
    title: str
    says: str
    """The chart in words, for who cannot see it."""
    last: str
    """The final value of the only line, as text; nothing for several."""
    lines: list[Line | None]
    """By run; None for a run without this curve."""
    x_ticks: list[Tick]
    y_ticks: list[Tick]


def line_chart(title: str, runs: Mapping[str, Sequence[Point]], *, x_name: str, percent: bool = False) -> Chart | None:
    """One line per run; None where no run has two finite points. ``percent``: values are shares, shown in % from 0."""
    series = {name: _thinned([p for p in points if math.isfinite(p[1])]) for name, points in runs.items()}
    drawn = {name: points for name, points in series.items() if len(points) > 1}
    if not drawn:
        return None
    scale = 100 if percent else 1
    xs = [x for points in drawn.values() for x, _ in points]
    ys = [scale * y for points in drawn.values() for _, y in points]
    low, high = (min(0.0, *ys) if percent else min(ys)), max(ys)
    y_at = ticks(low, high, 4)
    low, high = min(low, y_at[0]), max(high, y_at[-1])
    left, right = min(xs), max(xs)

    def place(x: float, y: float) -> Point:
        return (
            round(_LEFT + (x - left) / (right - left or 1) * (WIDTH - _LEFT - _RIGHT), 1),
            round(HEIGHT - _BOTTOM - (scale * y - low) / (high - low or 1) * (HEIGHT - _TOP - _BOTTOM), 1),
        )

    lines: list[Line | None] = []
    words = []
    for name, points in series.items():
        if name not in drawn:
            lines.append(None)
            continue
        placed = [place(x, y) for x, y in points]
        lines.append(Line(name, "M" + "L".join(f"{x:g} {y:g}" for x, y in placed), placed[-1]))
        first, last = (_number(points[i][1], percent) for i in (0, -1))
        words.append(f"{name}: {first} at {x_name} {points[0][0]:g}, {last} at {x_name} {points[-1][0]:g}")
    only = next(iter(drawn.values()))
    last = _number(only[-1][1], percent) if len(series) == 1 else ""
    suffix = " %" if percent else ""
    return Chart(
        title,
        f"Line chart of {title} by {x_name}. " + "; ".join(words),
        last,
        lines,
        [Tick(place(x, 0)[0], f"{x:g}") for x in ticks(left, right, min(5, int(right - left)) or 5) if left <= x <= right],
        [Tick(place(left, y / scale)[1], f"{y:g}{suffix}") for y in y_at],
    )


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from at most ``low`` to at least ``high``, about so many."""
    if not high > low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _number(value: float, percent: bool) -> str:
    return f"{100 * value:.1f} %" if percent else f"{value:.3g}"


def _thinned(points: Sequence[Point]) -> list[Point]:
    if len(points) <= _MOST:
        return list(points)
    parts = np.array_split(np.array(points), _MOST)
    return [(float(x), float(y)) for x, y in (part.mean(axis=0) for part in parts)]


class Marks(NamedTuple):
    """The points of one class on the map: one path."""

    name: str
    hue: int
    light: bool
    """Every other class is drawn lighter, so that classes next to each other in hue differ."""
    path: str


def scatter(points: npt.NDArray[np.float64], labels: npt.NDArray[np.int64], names: Sequence[str]) -> list[Marks]:
    """points [P, 2] in [0, 1] as marks by class, in four shapes: hue and shape tell classes apart together."""
    present = np.unique(labels).tolist()
    marks = []
    for number, label in enumerate(present):
        placed = 12 + points[labels == label] * (MAP - 24)
        path = "".join(mark(number, x, MAP - y) for x, y in placed.tolist())
        marks.append(Marks(names[label], round(360 * number / len(present)), number % 2 == 1, path))
    return marks


def mark(number: int, x: float, y: float) -> str:
    """Path data around a point: discs, squares, triangles and diamonds take turns."""
    shape = number % _MARKS
    if shape == 0:
        return f"M{x - 4:.1f} {y:.1f}a4 4 0 1 0 8 0a4 4 0 1 0-8 0z"
    if shape == 1:
        return f"M{x - 3.5:.1f} {y - 3.5:.1f}h7v7h-7z"
    if shape == 2:
        return f"M{x:.1f} {y - 5:.1f}l4.6 8.4h-9.2z"
    return f"M{x:.1f} {y - 5:.1f}l5 5-5 5-5-5z"
