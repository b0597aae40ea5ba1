"""Patterns of plumage: the marks that fill an outline around zero with half axes a and b."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np


def ellipse(x: float, y: float, a: float, b: float, angle: float = 0.0, start: float = 0.0, stop: float = 2 * np.pi) -> np.ndarray:
    """Outline of an ellipse (or of the sector ``start..stop``) with half axes a and b, turned by ``angle`` radians: [28, 2]."""
    t = np.linspace(start, stop, 28)
    u, v = a * np.cos(t), b * np.sin(t)
    c, s = np.cos(angle), np.sin(angle)
    return np.stack([x + c * u - s * v, y + s * u + c * v], 1)


Mark = tuple[Sequence[Sequence[float]] | np.ndarray, float]
"""Points of a mark on the plumage, and the width of its line; 0 for a filled outline."""


def _bars(a: float, b: float) -> Iterator[Mark]:
    for u in np.arange(-a, a, 0.27):
        yield [(u, -b), (u, b)], 0.135


def _streaks(a: float, b: float) -> Iterator[Mark]:
    for v in np.arange(-b, b, 0.26):
        yield [(-a, v), (a, v)], 0.13


def _slants(a: float, b: float) -> Iterator[Mark]:
    for u in np.arange(-2 * a, 2 * a, 0.36):
        yield [(u - b, -b), (u + b, b)], 0.13


def _chevrons(a: float, b: float) -> Iterator[Mark]:
    for u in np.arange(-a - 0.3, a + 0.4, 0.3):
        yield [(u - 0.3, -b), (u + 0.1, 0.05), (u - 0.3, b)], 0.14


def _spots(a: float, b: float) -> Iterator[Mark]:
    for i, v in enumerate(np.arange(-b, b, 0.21)):
        for u in np.arange(-a, a, 0.28) + (i % 2) * 0.14:
            yield ellipse(u, v, 0.09, 0.09, 0.0), 0


def _blotches(a: float, b: float) -> Iterator[Mark]:
    for i, v in enumerate(np.arange(-b, b + 0.3, 0.42)):
        for u in np.arange(-a, a + 0.3, 0.5) + (i % 2) * 0.25:
            yield ellipse(u, v, 0.19, 0.15, 0.0), 0


def _scales(a: float, b: float) -> Iterator[Mark]:
    for i, v in enumerate(np.arange(-b, b + 0.1, 0.22)):
        for u in np.arange(-a, a + 0.1, 0.34) + (i % 2) * 0.17:
            yield ellipse(u, v, 0.17, 0.15, 0, -1.4, 1.4), 0.08


def _checks(a: float, b: float) -> Iterator[Mark]:
    for i, v in enumerate(np.arange(-b, b + 0.1, 0.22)):
        for u in np.arange(-a, a + 0.44, 0.44) + (i % 2) * 0.22:
            yield [(u, v), (u + 0.22, v), (u + 0.22, v + 0.22), (u, v + 0.22)], 0


def _saddle(a: float, b: float) -> Iterator[Mark]:
    yield [(-2 * a, -2 * b), (2 * a, -2 * b), (2 * a, 0), (-2 * a, 0)], 0


def _pied(a: float, b: float) -> Iterator[Mark]:
    yield [(-2 * a, -2 * b), (0.05 * a, -2 * b), (0.05 * a, 2 * b), (-2 * a, 2 * b)], 0


COATS: dict[str, Callable[[float, float], Iterator[Mark]]] = {
    "streaked": _streaks,
    "barred": _bars,
    "slanted": _slants,
    "chevrons": _chevrons,
    "spotted": _spots,
    "blotched": _blotches,
    "scaled": _scales,
    "checked": _checks,
    "saddled": _saddle,
    "pied": _pied,
}
