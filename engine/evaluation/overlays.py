"""Attention maps over the images that they are of, as pictures."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from engine.data import contact_sheet

MAP_NAMES = {"mask": "mask A", "feature": "feature map", "cam": "CAM"}
"""What the maps are called under a picture."""
_HEAT = 0.62
"""Share of the map's color in an overlay."""


def overlay(picture: npt.NDArray[np.uint8], values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """The picture [S, S, 3], half gray, under the map [h, w]: dark is 0, bright yellow the map's own maximum."""
    top = float(values.max())
    scaled = Image.fromarray(values / top if top > 0 else np.zeros_like(values))
    heat = np.asarray(scaled.resize(picture.shape[1::-1], Image.Resampling.BILINEAR)).clip(0, 1)
    color = _colors()[(heat * 255).round().astype(np.int64)]
    faded = 0.5 * picture + 0.5 * picture.mean(axis=2, keepdims=True)
    return ((1 - _HEAT) * faded + _HEAT * color).round().astype(np.uint8)


def sheet(pictures: Sequence[npt.NDArray[np.uint8]], maps: Mapping[str, npt.NDArray[np.float32]]) -> npt.NDArray[np.uint8]:
    """RGB [H, W, 3]: a row per image [S, S, 3], itself and under each of the ``maps`` [N, h, w] by name: mask, feature map, CAM."""
    kinds = sorted(maps, reverse=True)
    tiles = []
    for i, picture in enumerate(pictures):
        tiles.append(contact_sheet.Tile(picture, "image"))
        tiles += [contact_sheet.Tile(overlay(picture, maps[kind][i]), MAP_NAMES.get(kind, kind)) for kind in kinds]
    return np.asarray(contact_sheet.draw(tiles, columns=1 + len(kinds), side=128))


@functools.cache
def _colors() -> npt.NDArray[np.float64]:
    """[256, 3] in 0..255: a scale whose brightness rises evenly, so that it reads without seeing its hues."""
    import matplotlib  # slow to import

    return matplotlib.colormaps["inferno"](np.arange(256))[:, :3] * 255
