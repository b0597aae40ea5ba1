"""Photographs as small pictures inside the page."""

from __future__ import annotations

import base64
import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from engine.data import ImageList, clean_resize, clean_view

_SIDE = 144
_QUALITY = 78


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
