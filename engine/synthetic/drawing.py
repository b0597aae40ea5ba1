"""How a bird of the synthetic dataset is drawn from the build of its genus and the parts of its species.

Lengths are in units of the figure's scale, x points forward, y points down. Nothing here is random but ``random_pose``.
Images are drawn ``SUPERSAMPLE`` times too large and reduced at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from engine.synthetic.plumage import COATS, ellipse

SIDE = 128
"""Width and height of a finished image, in pixels."""

SUPERSAMPLE = 3

Color = tuple[float, float, float]

# One plumage for all genera and three accents for all parts: color must not tell the species, structure must.
HUES: dict[str, Color] = {"rust": (158, 88, 52), "slate": (84, 104, 132), "olive": (138, 132, 74)}
HEAD_BODY_WING = ("slate", "rust", "slate")
ACCENTS: dict[str, Color] = {"cream": (240, 234, 214), "gold": (232, 178, 60), "ember": (206, 78, 48)}
INK: Color = (30, 28, 30)


def shade(color: Sequence[float], factor: float) -> tuple[int, int, int]:
    """The color times ``factor``, clipped to bytes."""
    return tuple(int(min(255, max(0, c * factor))) for c in color)  # type: ignore[return-value]


def mix(a: Sequence[float], b: Sequence[float], t: float) -> Color:
    """The color ``t`` of the way from ``a`` to ``b``."""
    return tuple(x + (y - x) * t for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


def turned(points: Sequence[Sequence[float]], angle: float, origin: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    """Points turned by ``angle`` radians about zero, then moved to ``origin``."""
    p = np.asarray(points, float)
    c, s = np.cos(angle), np.sin(angle)
    return p @ np.array([[c, s], [-s, c]]) + np.asarray(origin)


class Brush:
    """Draws outlines given in figure units onto one image, under a scale, a turn, a mirror and a shift."""

    def __init__(self, image: Image.Image, scale: float, angle: float, flip: bool, center: tuple[float, float]) -> None:
        self.image = image
        self.pen = ImageDraw.Draw(image)
        self.scale, self.flip, self.center = scale, flip, center
        c, s = np.cos(angle), np.sin(angle)
        self.matrix = np.array([[c, s], [-s, c]]) * scale

    def place(self, points: Sequence[Sequence[float]] | np.ndarray) -> list[tuple[float, float]]:
        p = np.asarray(points, float).reshape(-1, 2)
        p = (p * (-1, 1) if self.flip else p) @ self.matrix + self.center
        return [tuple(q) for q in p.tolist()]

    def polygon(self, points: Sequence[Sequence[float]] | np.ndarray, color: Sequence[float]) -> None:
        self.pen.polygon(self.place(points), fill=shade(color, 1.0))

    def line(self, points: Sequence[Sequence[float]] | np.ndarray, color: Sequence[float], width: float) -> None:
        self.pen.line(self.place(points), fill=shade(color, 1.0), width=max(1, round(width * self.scale)), joint="curve")

    def clipped(self, outline: np.ndarray, paint: Callable[[Brush], None]) -> None:
        """Run ``paint`` so that it only touches the inside of ``outline``."""
        layer = Brush.__new__(Brush)
        layer.__dict__.update(self.__dict__)
        layer.image = self.image.copy()
        layer.pen = ImageDraw.Draw(layer.image)
        paint(layer)
        mask = Image.new("L", self.image.size)
        ImageDraw.Draw(mask).polygon(self.place(outline), fill=255)
        self.image.paste(layer.image, mask=mask)


@dataclass(frozen=True)
class Plan:
    """The build that all species of a genus share. Lengths in figure units, angles in degrees."""

    parts: tuple[str, str]
    """The two parts that tell its four species apart: absent or present each."""
    body: tuple[float, float] = (0.62, 0.36)
    tilt: float = 12.0
    """How far the body's front is raised."""
    head: tuple[float, float, float] = (0.12, -0.2, 0.25)
    """Head center relative to the body's front, and radius."""
    beak: str = "cone"
    beak_length: float = 0.24
    tail: str = "square"
    tail_length: float = 0.5
    tail_angle: float = 0.0
    legs: float = 0.25
    wing: tuple[float, float] = (0.62, 0.26)
    accent: str = "cream"
    coat: str = "barred"
    """Pattern of the body, as broad as blurred views can bear: see :func:`_coat`."""


@dataclass(frozen=True)
class Pose:
    """What changes from one bird of a species to the next."""

    scale: float
    angle: float
    flip: bool
    center: tuple[float, float]
    tint: Color
    light: float
    head: tuple[float, float]
    wing: float
    tail: float


def random_pose(rng: np.random.Generator, size: int) -> Pose:
    """A pose rarely at the center of an image of ``size`` pixels; a beak or tail may reach beyond its border."""
    return Pose(
        scale=rng.uniform(0.38, 0.5) * size,
        angle=np.deg2rad(rng.uniform(-14, 14)),
        flip=bool(rng.random() < 0.5),
        center=tuple(size * (0.5 + rng.uniform(-0.16, 0.16, 2))),
        tint=tuple(rng.normal(0, 4, 3)),
        light=rng.uniform(0.92, 1.08),
        head=tuple(rng.normal(0, 0.025, 2)),
        wing=rng.normal(0, 0.06),
        tail=rng.normal(0, 0.08),
    )


def _coat(brush: Brush, outline: np.ndarray, axis: float, half: tuple[float, float], kind: str, dark: Sequence[float]) -> None:
    """Fill ``outline`` (around zero, half axes ``half``, turned by ``axis``) with a plumage pattern."""
    if kind not in COATS:
        raise ValueError(f"unknown coat {kind!r}")

    def paint(layer: Brush) -> None:
        for points, width in COATS[kind](*half):
            if width:
                layer.line(turned(points, axis), dark, width)
            else:
                layer.polygon(turned(points, axis), dark)

    brush.clipped(outline, paint)


def _beak(kind: str, r: float, n: float) -> np.ndarray:
    """Outline of a beak of length ``n`` on a head of radius ``r`` centered at zero."""
    shapes = {
        "cone": [(r * 0.7, -0.14), (r * 0.9 + n, 0.03), (r * 0.7, 0.15)],
        "thin": [(r * 0.8, -0.05), (r * 0.9 + n, 0.02), (r * 0.8, 0.07)],
        "dagger": [(r * 0.7, -0.11), (r * 0.9 + n, 0.02), (r * 0.7, 0.12)],
        "curved": [(r * 0.8, -0.07), (r + n * 0.6, -0.02), (r * 0.9 + n, 0.22), (r + n * 0.5, 0.08), (r * 0.8, 0.08)],
        "hook": [
            (r * 0.6, -0.17),
            (r + n * 0.55, -0.12),
            (r + n, 0.06),
            (r + n * 0.85, 0.24),
            (r + n * 0.45, 0.1),
            (r * 0.6, 0.16),
        ],
        "flat": [
            (r * 0.7, -0.1),
            (r + n * 0.5, 0.0),
            (r + n, -0.02),
            (r + n * 1.1, 0.06),
            (r + n, 0.12),
            (r * 0.7, 0.14),
        ],
    }
    if kind not in shapes:
        raise ValueError(f"unknown beak {kind!r}; known: {', '.join(shapes)}")
    return np.asarray(shapes[kind])


def _tail(kind: str, n: float) -> np.ndarray:
    """Outline of a tail of length ``n`` that starts at zero and points backwards."""
    shapes = {
        "square": [(0.1, -0.1), (-n, -0.13), (-n, 0.13), (0.1, 0.12)],
        "fork": [(0.1, -0.09), (-n, -0.2), (-n * 0.45, 0.0), (-n, 0.2), (0.1, 0.11)],
        "fan": [
            (0.1, -0.1),
            (-n * 0.85, -0.32),
            (-n, -0.12),
            (-n * 1.04, 0.04),
            (-n * 0.98, 0.2),
            (-n * 0.8, 0.36),
            (0.1, 0.12),
        ],
        "point": [(0.1, -0.12), (-n * 0.6, -0.1), (-n, 0.02), (-n * 0.6, 0.12), (0.1, 0.13)],
    }
    if kind not in shapes:
        raise ValueError(f"unknown tail {kind!r}; known: {', '.join(shapes)}")
    return np.asarray(shapes[kind])


PARTS = (
    "crest",
    "cap",
    "mask",
    "ring",
    "throat",
    "collar",
    "bars",
    "patch",
    "belly",
    "tailtip",
    "tailbars",
    "breastband",
)


def draw_bird(image: Image.Image, plan: Plan, parts: frozenset[str], pose: Pose) -> None:
    """Paint one bird with the given parts onto ``image``."""
    if unknown := parts.difference(PARTS):
        raise ValueError(f"unknown parts {sorted(unknown)}; known: {', '.join(PARTS)}")
    brush = Brush(image, pose.scale, pose.angle, pose.flip, pose.center)
    crown, base, cover = (tuple((c + t) * pose.light for c, t in zip(HUES[hue], pose.tint, strict=True)) for hue in HEAD_BODY_WING)
    accent = shade(ACCENTS[plan.accent], 0.55 + 0.45 * pose.light)
    dark, darker, pale = shade(cover, 0.8), shade(base, 0.5), mix(base, (235, 225, 205), 0.55)
    tilt = -np.deg2rad(plan.tilt)
    a, b = plan.body
    front = turned([(a * 0.72, -b * 0.2)], tilt)[0]
    head = front + np.array(plan.head[:2]) + pose.head
    r = plan.head[2]

    # legs
    for x in (-0.06, 0.12):
        brush.line(
            [(x, b * 0.7), (x + 0.03, b * 0.75 + plan.legs), (x + 0.13, b * 0.75 + plan.legs + 0.02)],
            (96, 74, 52),
            0.04,
        )
    # tail
    axis = tilt + np.deg2rad(plan.tail_angle) + pose.tail
    root = tuple(turned([(-a * 0.86, 0.0)], tilt)[0])
    outline = turned(_tail(plan.tail, plan.tail_length), axis, root)
    brush.polygon(outline, dark)

    brush.clipped(outline, lambda layer: _mark_tail(layer, plan, parts, axis, root, accent))
    # neck, body, underside
    width, reach = b * 0.72, np.hypot(*(head - front * 0.5)) + 1e-6
    normal = np.array([-(head - front * 0.5)[1], (head - front * 0.5)[0]]) / reach
    neck = np.array(
        [front * 0.5 - normal * width, head - normal * r * 0.72, head + normal * r * 0.72, front * 0.5 + normal * width]
    )
    body = turned(ellipse(0, 0, a, b), tilt)
    brush.polygon(body, base)
    brush.polygon(neck, crown)
    brush.polygon(body, pale)
    _coat(brush, body, tilt, (a, b), plan.coat, darker)

    def body_marks(layer: Brush) -> None:
        if "belly" in parts:
            layer.polygon(turned(ellipse(0.0, b * 0.75, a * 0.72, b * 0.6), tilt), accent)
        if "breastband" in parts:
            layer.line(turned([(a * 0.42, -b * 1.2), (a * 0.58, 0), (a * 0.42, b * 1.2)], tilt), accent, 0.16)

    brush.clipped(body, body_marks)
    # wing
    length, breadth = plan.wing
    wing = turned(
        [
            (a * 0.42, -b * 0.15),
            (a * 0.2, -b * 0.15 - breadth * 0.7),
            (-length * 0.5, -breadth * 0.75),
            (-length * 1.15, 0.02),
            (-length * 0.45, breadth * 0.75),
            (a * 0.15, breadth * 0.75),
        ],
        tilt + pose.wing,
    )
    wing = _rounded(wing)
    brush.polygon(wing, dark)

    def wing_marks(layer: Brush) -> None:
        turn = tilt + pose.wing
        for v in (-0.3, 0.05, 0.4):
            layer.line(turned([(-length * 0.25, breadth * v), (-length * 1.1, breadth * v * 0.3)], turn), darker, 0.025)
        if "bars" in parts:
            for u in (0.06, -0.2):
                layer.line(turned([(u + 0.06, -breadth * 1.2), (u - 0.06, breadth * 1.2)], turn), accent, 0.095)
        if "patch" in parts:
            layer.polygon(turned(ellipse(-length * 0.25, 0.03, 0.24, breadth * 0.48), turn), accent)

    brush.clipped(wing, wing_marks)
    # head
    if "crest" in parts:
        spikes = [(-0.75, -0.45), (-1.9, -1.25), (-0.75, -1.0), (-1.0, -2.0), (-0.1, -1.15), (0.1, -1.95), (0.7, -0.6)]
        brush.polygon(np.asarray(spikes) * r + head, accent)
    brush.polygon(_beak(plan.beak, r, plan.beak_length) + head, (58, 52, 50))
    skull = ellipse(*head, r, r * 0.95)
    brush.polygon(skull, shade(crown, 1.06))
    eye = head + (r * 0.35, -r * 0.12)

    brush.clipped(skull, lambda layer: _mark_head(layer, parts, head, r, accent))
    if "throat" in parts:
        brush.polygon(ellipse(head[0] + r * 0.1, head[1] + r * 0.85, r * 0.6, r * 0.55), accent)
    if "collar" in parts:
        mid = front * 0.5 + (head - front * 0.5) * 0.62
        wide = r * 0.86
        brush.line([mid - normal * wide, mid + normal * wide], accent, 0.13)
    if "ring" in parts:
        brush.polygon(ellipse(*eye, 0.155, 0.155), accent)
    brush.polygon(ellipse(*eye, 0.07, 0.07), INK)
    brush.polygon(ellipse(eye[0] + 0.02, eye[1] - 0.025, 0.024, 0.024), (250, 250, 250))


def _mark_tail(
    layer: Brush, plan: Plan, parts: frozenset[str], axis: float, root: tuple[float, float], accent: Sequence[float]
) -> None:
    n = plan.tail_length
    if "tailtip" in parts:
        layer.polygon(turned([(-n * 0.66, -0.5), (-n * 1.2, -0.5), (-n * 1.2, 0.5), (-n * 0.66, 0.5)], axis, root), accent)
    if "tailbars" in parts:
        for u in np.arange(0.22, n * 1.1, 0.2):
            layer.polygon(turned([(-u, -0.5), (-u - 0.1, -0.5), (-u - 0.1, 0.5), (-u, 0.5)], axis, root), accent)


def _mark_head(layer: Brush, parts: frozenset[str], head: np.ndarray, r: float, accent: Sequence[float]) -> None:
    if "cap" in parts:
        layer.polygon(np.array([(-1.2, -0.28), (1.2, -0.28), (1.2, -1.2), (-1.2, -1.2)]) * r + head, accent)
    if "mask" in parts:
        layer.polygon(np.array([(-1.2, -0.34), (1.2, -0.34), (1.2, 0.22), (-1.2, 0.34)]) * r + head, INK)
    if "throat" in parts:
        layer.polygon(np.array([(-0.5, 0.3), (1.2, 0.2), (1.2, 1.2), (-0.5, 1.2)]) * r + head, accent)


def _rounded(points: np.ndarray) -> np.ndarray:
    """Two rounds of corner cutting (Chaikin): a smooth outline from a few corners."""
    for _ in range(2):
        after = np.roll(points, -1, 0)
        points = np.stack([0.75 * points + 0.25 * after, 0.25 * points + 0.75 * after], 1).reshape(-1, 2)
    return points
