"""Attention maps over their images."""

from __future__ import annotations

import numpy as np

from engine.evaluation import MAP_NAMES, overlay
from engine.evaluation.overlays import sheet


def test_an_overlay_is_bright_where_the_map_is_high() -> None:
    picture = np.full((80, 80, 3), 120, np.uint8)
    values = np.zeros((4, 4), np.float32)
    values[0, 0] = 3.0
    over = overlay(picture, values)
    assert over.shape == picture.shape and over.dtype == np.uint8
    assert over[:10, :10].mean() > 150 and over[50:, 50:].mean() < 60
    assert np.array_equal(overlay(picture, np.zeros((4, 4), np.float32)), np.broadcast_to(over[-1, -1], over.shape))


def test_a_sheet_has_a_row_per_image_and_a_column_per_map() -> None:
    pictures = np.full((3, 32, 32, 3), 120, np.uint8)
    maps = {name: np.zeros((3, 4, 4), np.float32) for name in MAP_NAMES}
    one, three = sheet(pictures[:1], maps), sheet(pictures, maps)
    only_cam = sheet(pictures, {"cam": maps["cam"]})
    assert three.dtype == np.uint8 and three.shape[2] == 3 and three.shape[1] == one.shape[1] == 4 * (128 + 8) + 8
    assert only_cam.shape[1] == 2 * (128 + 8) + 8 and only_cam.shape[0] == three.shape[0] > 2 * one.shape[0]
