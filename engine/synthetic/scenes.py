"""What surrounds a bird of the synthetic dataset: places, light, occluders, and members of seven other categories."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from engine.synthetic.drawing import ACCENTS, HUES, INK, SIDE, SUPERSAMPLE, Brush, Color, Pose, ellipse, mix, random_pose, shade

CATEGORIES = ("bird", "dog", "bus", "snake", "crocodile", "car", "flower", "human")
"""In the order of the first eight descriptions of ``ppssl/prompts/birds.yaml``."""

# Narrow, muted palettes: where backgrounds are loud, two views of one image agree on the background and nothing is learnt.
PLACES: dict[str, tuple[Color, Color]] = {
    "forest": ((100, 108, 90), (106, 110, 92)),
    "meadow": ((108, 112, 90), (112, 112, 94)),
    "shore": ((104, 110, 98), (110, 112, 98)),
    "field": ((112, 110, 92), (108, 108, 90)),
}
LIGHTS: dict[str, tuple[float, float]] = {
    "dim": (0.8, 0.88),
    "overcast": (0.88, 1.0),
    "soft": (1.0, 1.1),
    "bright": (1.1, 1.2),
}
"""Range of the exposure that each word stands for."""
OCCLUDERS = ("none", "twigs", "leaves")
_FOLIAGE: tuple[Color, ...] = ((88, 112, 66), (70, 96, 60), (122, 124, 78))
_CLUTTER = (*HUES.values(), *HUES.values(), *_FOLIAGE, *ACCENTS.values())


@dataclass(frozen=True)
class Nuisance:
    """The words a caption may use about an image's surroundings."""

    place: str
    light: str
    occluder: str


def random_nuisance(rng: np.random.Generator) -> Nuisance:
    """Place and light evenly; four images in ten have something in front of the figure."""
    return Nuisance(
        place=tuple(PLACES)[rng.integers(len(PLACES))],
        light=tuple(LIGHTS)[rng.integers(len(LIGHTS))],
        occluder=OCCLUDERS[int(rng.choice(3, p=(0.6, 0.24, 0.16)))],
    )


def _leaf(pen: ImageDraw.ImageDraw, rng: np.random.Generator, size: int, color: Color, small: float, large: float) -> None:
    x, y = rng.uniform(0, size, 2)
    a = rng.uniform(small, large) * size
    outline = ellipse(x, y, a, a * rng.uniform(0.25, 0.6), rng.uniform(0, np.pi))
    pen.polygon([tuple(p) for p in outline.tolist()], fill=shade(color, rng.uniform(0.7, 1.25)))


def _twig(pen: ImageDraw.ImageDraw, rng: np.random.Generator, size: int, width: float) -> None:
    point, heading = rng.uniform(-0.1, 1.1, 2) * size, rng.uniform(0, 2 * np.pi)
    step = rng.uniform(0.1, 0.25) * size
    points = [tuple(point)]
    for turn in rng.normal(0, 0.2, 5):
        heading += turn
        point = point + step * np.array([np.cos(heading), np.sin(heading)])
        points.append(tuple(point))
    pen.line(points, fill=shade((92, 74, 54), rng.uniform(0.6, 1.3)), width=max(1, round(width * size)), joint="curve")


def background(rng: np.random.Generator, place: str, size: int) -> Image.Image:
    """An out-of-focus place with clutter in the birds' own colors, and at times a far member of another category."""
    small = size // 3
    near, far = PLACES[place]
    y = np.linspace(0, 1, small)[:, None, None]
    ground = np.array(far) * (1 - y) + np.array(near) * y + rng.normal(0, 1.5, 3)
    noise = Image.fromarray((rng.random((10, 10)) * 255).astype(np.uint8)).resize((small, small), Image.Resampling.BICUBIC)
    ground = ground + (np.asarray(noise, float)[..., None] - 128) * 0.16
    image = Image.fromarray(np.clip(ground, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(rng.integers(6, 11)):
        _leaf(pen, rng, small, mix(_CLUTTER[rng.integers(len(_CLUTTER))], near, rng.uniform(0.4, 0.8)), 0.03, 0.12)
    for _ in range(rng.integers(1, 4)):
        _twig(pen, rng, small, 0.025)
    if rng.random() < 0.2:
        pose = random_pose(rng, small)
        middle = small * (0.5 + rng.choice((-0.36, 0.36), 2) + rng.normal(0, 0.04, 2))
        pose = replace(pose, scale=pose.scale * 0.4, center=tuple(middle))
        draw_other(image, CATEGORIES[rng.integers(1, len(CATEGORIES))], pose, rng)
    image = image.filter(ImageFilter.GaussianBlur(small * 0.016))
    return image.resize((size, size), Image.Resampling.BICUBIC)


def silhouette(scene: Image.Image, empty: Image.Image) -> Image.Image:
    """Where the figure of ``scene`` covers the ``empty`` one: mode L, ``SIDE`` pixels square, 0 nothing and 255 all of a pixel."""
    covered = ImageChops.difference(scene, empty).convert("L").point(lambda v: 255 if v > 2 else 0)
    return covered.resize((SIDE, SIDE), Image.Resampling.BOX)


def finish(scene: Image.Image, empty: Image.Image, nuisance: Nuisance, rng: np.random.Generator) -> Image.Image:
    """Round the figure by light and shade, put the occluder before it, light the scene and reduce it to ``SIDE``."""
    size = scene.size[0]
    mask = silhouette(scene, empty)
    pen = ImageDraw.Draw(scene)
    if nuisance.occluder == "twigs":
        for _ in range(rng.integers(1, 4)):
            _twig(pen, rng, size, rng.uniform(0.012, 0.022))
    elif nuisance.occluder == "leaves":
        for _ in range(rng.integers(2, 6)):
            _leaf(pen, rng, size, _FOLIAGE[rng.integers(len(_FOLIAGE))], 0.04, 0.09)
    pixels = np.asarray(scene.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32)
    height = np.asarray(mask.filter(ImageFilter.GaussianBlur(SIDE * 0.035)), np.float32) / 255
    relief = (np.roll(height, -3, 0) - np.roll(height, 3, 0)) * (np.asarray(mask, np.float32) / 255)
    angle = rng.uniform(0, 2 * np.pi)
    u = np.linspace(-1, 1, SIDE, dtype=np.float32)
    ramp = 1 + rng.uniform(0, 0.15) * (np.cos(angle) * u[None] + np.sin(angle) * u[:, None])
    pixels = _develop(pixels * (ramp * (1 + 0.38 * relief))[..., None], rng.uniform(*LIGHTS[nuisance.light]), rng)
    pixels += rng.normal(0, 2.5, pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]], np.float32)


def _develop(pixels: np.ndarray, exposure: float, rng: np.random.Generator) -> np.ndarray:
    """Exposure, contrast, saturation and white balance of one photograph.

    These are the changes that self-supervised views are trained to ignore: strong here, they blind a color histogram and
    give a learner nothing to recognise an image by.
    """
    turn = rng.uniform(-1, 1) * 2 * np.pi * 0.05
    saturation, contrast = rng.uniform(0.6, 1.25), rng.uniform(0.8, 1.2)
    c, s = saturation * np.cos(turn), saturation * np.sin(turn)
    matrix = np.linalg.inv(_TO_YIQ) @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]], np.float32) @ _TO_YIQ
    mean = pixels.mean()
    return ((pixels - mean) * contrast + mean) @ matrix.T * exposure


def _stripes(brush: Brush, outline: np.ndarray, color: Color, at: np.ndarray, width: float) -> None:
    def paint(layer: Brush) -> None:
        for u in at:
            layer.line([(u, -2), (u, 2)], color, width)

    brush.clipped(outline, paint)


def draw_other(image: Image.Image, category: str, pose: Pose, rng: np.random.Generator) -> None:
    """Paint one member of a category that is not a bird, in the birds' own colors, onto ``image``."""
    brush = Brush(image, pose.scale, pose.angle, pose.flip, pose.center)
    colors = (*HUES.values(), *ACCENTS.values())
    coat = shade(mix(colors[rng.integers(len(colors))], pose.tint, 0.0), pose.light)
    dark, glass = shade(coat, 0.62), (186, 208, 216)
    poly = brush.polygon
    if category == "dog":
        brush.line([(-0.72, -0.12), (-0.95, -0.4), (-1.02, -0.7 - rng.uniform(0, 0.2))], coat, 0.12)
        for x in (-0.62, -0.36, 0.24, 0.48):
            poly([(x, 0), (x + 0.16, 0), (x + 0.13, 0.8), (x - 0.02, 0.8)], dark)
        poly(ellipse(-0.06, 0, 0.72, 0.3), coat)
        poly([(0.3, -0.2), (0.6, -0.6), (0.9, -0.3), (0.6, 0.15)], coat)
        poly(ellipse(0.74, -0.48, 0.29, 0.25), coat)
        poly(ellipse(1.0, -0.4, 0.21, 0.13), shade(coat, 0.85))
        poly(ellipse(1.18, -0.44, 0.06, 0.05), INK)
        poly(ellipse(0.56, -0.44, 0.11, 0.27, 0.2), dark)
        poly(ellipse(0.82, -0.56, 0.05, 0.05), INK)
    elif category == "bus":
        hull = np.array([(-1.15, -0.55), (1.08, -0.55), (1.15, -0.4), (1.15, 0.48), (-1.15, 0.48)])
        poly(hull, coat)
        _stripes(
            brush,
            np.array([(-1.15, 0.12), (1.15, 0.12), (1.15, 0.24), (-1.15, 0.24)]),
            (236, 230, 214),
            np.arange(-1.2, 1.3, 0.2),
            0.3,
        )
        for x in np.linspace(-1.05, 0.72, 6):
            poly([(x, -0.4), (x + 0.25, -0.4), (x + 0.25, 0.02), (x, 0.02)], glass)
        for x in (-0.65, 0.65):
            poly(ellipse(x, 0.48, 0.2, 0.2), INK)
            poly(ellipse(x, 0.48, 0.09, 0.09), (150, 150, 150))
    elif category == "snake":
        t = np.linspace(0, 1, 48)
        spine = np.stack([t * 2.2 - 1.15, 0.36 * np.sin(t * rng.uniform(9, 13) + rng.uniform(0, 6)) * (1 - 0.3 * t)], 1)
        brush.line(spine, coat, 0.22)
        for point in spine[3:-3:4]:
            poly(ellipse(*point, 0.07, 0.07), dark)
        x, y = spine[-1]
        poly(ellipse(x + 0.06, y, 0.21, 0.15), coat)
        poly(ellipse(x + 0.12, y - 0.05, 0.04, 0.04), INK)
        brush.line([(x + 0.24, y + 0.02), (x + 0.42, y + 0.05)], (190, 60, 50), 0.03)
    elif category == "crocodile":
        poly([(-0.5, -0.2), (-1.35, 0.1), (-1.4, 0.18), (-0.5, 0.18)], coat)
        for x in (-0.45, 0.3):
            poly([(x, 0.05), (x + 0.18, 0.05), (x + 0.24, 0.44), (x + 0.06, 0.44)], dark)
        poly(ellipse(-0.06, 0, 0.68, 0.25), coat)
        for x in np.linspace(-1.1, 0.5, 10):
            top = -0.2 + max(0.0, -x - 0.5) * 0.35
            poly([(x, top + 0.05), (x + 0.07, top - 0.12), (x + 0.14, top + 0.05)], dark)
        gape = rng.uniform(0.05, 0.2)
        poly([(0.45, -0.2), (0.7, -0.28), (1.35, -0.16 - gape), (1.35, -0.06 - gape), (0.5, 0.05)], coat)
        poly([(0.45, 0.0), (1.3, 0.04), (1.3, 0.13), (0.45, 0.18)], dark)
        for x in np.linspace(0.65, 1.25, 6):
            poly([(x, 0.05), (x + 0.035, -0.07), (x + 0.07, 0.05)], (240, 236, 224))
        poly(ellipse(0.68, -0.22, 0.07, 0.07), (222, 190, 80))
    elif category == "car":
        poly(
            np.array(
                [
                    (-1.1, 0.02),
                    (-0.72, -0.06),
                    (-0.45, -0.42),
                    (0.32, -0.42),
                    (0.68, -0.06),
                    (1.08, 0.04),
                    (1.12, 0.34),
                    (-1.12, 0.34),
                ]
            ),
            coat,
        )
        poly([(-0.38, -0.35), (-0.06, -0.35), (-0.06, -0.06), (-0.58, -0.06)], glass)
        poly([(0.02, -0.35), (0.28, -0.35), (0.54, -0.06), (0.02, -0.06)], glass)
        brush.line([(-0.02, -0.04), (-0.02, 0.3)], dark, 0.03)
        poly(ellipse(1.04, 0.12, 0.07, 0.06), (244, 232, 180))
        for x in (-0.62, 0.62):
            poly(ellipse(x, 0.34, 0.22, 0.22), INK)
            poly(ellipse(x, 0.34, 0.1, 0.1), (160, 160, 160))
    elif category == "flower":
        brush.line([(0, 0.1), (0.06, 0.7), (0.0, 1.25)], (78, 108, 60), 0.08)
        poly(ellipse(0.24, 0.8, 0.26, 0.1, -0.6), (78, 108, 60))
        count = int(rng.integers(5, 9))
        for i in range(count):
            t = 2 * np.pi * i / count
            poly(ellipse(0.42 * np.cos(t), -0.2 + 0.42 * np.sin(t), 0.34, 0.19, t), coat if i % 2 else shade(coat, 0.88))
        poly(ellipse(0, -0.2, 0.21, 0.21), mix(ACCENTS["gold"], dark, 0.3))
    elif category == "human":
        skin, swing = shade((206, 164, 132), rng.uniform(0.55, 1.1)), rng.uniform(0.1, 0.4)
        for side in (-1, 1):
            brush.line([(side * 0.12, 0.4), (side * (0.14 + swing * 0.3), 1.15)], dark, 0.19)
            brush.line([(side * 0.26, -0.42), (side * (0.34 + swing), 0.3)], shade(coat, 0.85), 0.14)
            poly(ellipse(side * (0.34 + swing), 0.32, 0.08, 0.08), skin)
        poly([(-0.32, -0.52), (0.32, -0.52), (0.26, 0.5), (-0.26, 0.5)], coat)
        poly(ellipse(0, -0.82, 0.22, 0.27), skin)
        poly(ellipse(0, -0.92, 0.24, 0.2, 0, np.pi, 2 * np.pi), (70, 52, 40))
    else:
        raise ValueError(f"unknown category {category!r}; known: {', '.join(CATEGORIES[1:])}")


def draw_category(category: str, rng: np.random.Generator, nuisance: Nuisance) -> Image.Image:
    """A whole image of one member of a category that is not a bird."""
    size = SIDE * SUPERSAMPLE
    scene = background(rng, nuisance.place, size)
    empty = scene.copy()
    draw_other(scene, category, random_pose(rng, size), rng)
    return finish(scene, empty, nuisance, rng)
