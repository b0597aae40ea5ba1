"""Contact sheets: where pictures and captions land, whatever their shape and letters."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from engine.data.contact_sheet import PAPER, Tile, draw, write

RED, BLUE = (200, 0, 0), (0, 0, 200)


def plain(height: int, width: int, color: tuple[int, int, int]) -> np.ndarray:
    return np.broadcast_to(np.uint8(color), (height, width, 3)).copy()


def test_pictures_fill_their_cells_without_a_change_of_shape(tmp_path):
    tiles = [Tile(plain(20, 40, RED)), Tile(plain(300, 150, BLUE)), Tile(None), Tile(plain(5, 5, RED))]
    sheet = draw(tiles, columns=3, side=64)
    pixels = np.asarray(sheet)
    assert sheet.mode == "RGB" and pixels.shape[1] == 3 * (64 + 8) + 8
    red, blue = ((pixels == color).all(2) for color in (RED, BLUE))
    assert red[8:72].sum() == 64 * 32 and blue.sum() == 32 * 64 and red[72:].sum() == 64 * 64
    write(sheet, tmp_path / "deep" / "sheet.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "deep" / "sheet.png")), pixels)


def test_captions_stay_in_their_columns_and_frames_mark():
    tiles = [Tile(plain(32, 32, BLUE), "a very long file name, größer\nπ \x00\udcff 鳥", RED), Tile(plain(32, 32, BLUE))]
    pixels = np.asarray(draw(tiles, columns=2, side=64, title="two lines\nof a title"))
    assert (pixels == RED).all(2).sum() == 70 * 70 - 64 * 64
    below = pixels[-40:]
    assert (below[:, 8:72] != PAPER).any() and (below[:, 76:] == PAPER).all()
    assert (pixels[:40] != PAPER).any()


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match=r"tile 1: expected uint8 \[H, W, 3\], got float64 \[2, 2, 3\]"):
        draw([Tile(None), Tile(np.zeros((2, 2, 3)))], columns=2)
    with pytest.raises(ValueError, match="0 tiles in 4 columns"):
        draw([], columns=4)
