"""Photographs as small pictures inside the page: thumbnails, and images under a map of where the network looks."""

from __future__ import annotations

import base64
import functools
import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from engine.data import ImageList, clean_resize, clean_view

_SIDE = 144
_QUALITY = 78
_HEAT = 0.62
"""Share of the map's colour in an overlay."""


class Thumbnails:
    """Thumbnails of an image list as ``data:`` addresses, each made once. They show what the network sees: the center square."""

    def __init__(self, images: ImageList):
        self.images = images
        self.made: dict[tuple[int, int], str] = {}

    def __call__(self, i: int, side: int = _SIDE) -> str:
        """Raises ``BrokenFile`` naming a file that no longer opens."""
        if (i, side) not in self.made:
            image = self.images.read(i)
            side_there = max(1, min(side, min(image.size) * side // clean_resize(side)))  # small photos are not enlarged
            view = clean_view(image, clean_resize(side_there), side_there, Image.Resampling.LANCZOS)
            self.made[i, side] = address(np.asarray(view))
        return self.made[i, side]


def address(pixels: npt.NDArray[np.uint8]) -> str:
    """uint8 [H, W, 3] as the ``data:`` address of a WebP picture."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "WEBP", quality=_QUALITY, method=4)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()


def tiny(image: Image.Image) -> npt.NDArray[np.float32]:
    """The whole picture as 24 x 24 grey values of mean 0 and variance 1, so that the mean product of two is their correlation."""
    grey = np.asarray(image.convert("L").resize((24, 24), Image.Resampling.BOX), np.float32)
    return (grey - grey.mean()) / max(float(grey.std()), 1e-6)


def overlay(picture: npt.NDArray[np.uint8], values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """The picture [S, S, 3], half grey, under the map [h, w]: dark is 0, bright yellow the map's own maximum."""
    top = float(values.max())
    scaled = Image.fromarray(values / top if top > 0 else np.zeros_like(values))
    heat = np.asarray(scaled.resize(picture.shape[1::-1], Image.Resampling.BILINEAR)).clip(0, 1)
    colour = _colours()[(heat * 255).round().astype(np.int64)]
    faded = 0.5 * picture + 0.5 * picture.mean(axis=2, keepdims=True)
    return ((1 - _HEAT) * faded + _HEAT * colour).round().astype(np.uint8)


@functools.cache
def _colours() -> npt.NDArray[np.float64]:
    """[256, 3] in 0..255: a scale whose brightness rises evenly, so that it reads without seeing its hues."""
    import matplotlib

    return matplotlib.colormaps["inferno"](np.arange(256))[:, :3] * 255
