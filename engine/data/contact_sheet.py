"""Contact sheets: RGB arrays with captions, drawn as a grid into one picture file."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, ImageOps

from engine.files import write_atomically

PAPER, INK, FAINT = (250, 250, 248), (32, 34, 38), (214, 214, 210)
_GAP, _TEXT = 8, 12
_LINE = _TEXT + 4


class Tile(NamedTuple):
    """One cell of a sheet."""

    pixels: npt.NDArray[np.uint8] | None
    """[H, W, 3] RGB of any size, or None for an empty cell."""
    caption: str = ""
    """Lines below the picture; what is wider than the cell is cut."""
    frame: tuple[int, int, int] | None = None
    """RGB of a frame around the picture, to mark it."""


def draw(tiles: Sequence[Tile], *, columns: int, side: int = 128, title: str = "") -> Image.Image:
    """The sheet as an RGB image: rows of ``columns`` cells of ``side`` pixels, pictures scaled to fit without a change of shape.

    Raises ValueError for pixels that are not uint8 [H, W, 3], and where there is nothing to draw.
    """
    if not tiles or columns < 1:
        raise ValueError(f"a sheet needs a tile and a column, got {len(tiles)} tiles in {columns} columns")
    for number, tile in enumerate(tiles):
        if tile.pixels is not None and (tile.pixels.dtype != np.uint8 or tile.pixels.ndim != 3 or tile.pixels.shape[2] != 3):
            raise ValueError(f"tile {number}: expected uint8 [H, W, 3], got {tile.pixels.dtype} {list(tile.pixels.shape)}")
    columns = min(columns, len(tiles))
    lines = max(len(_lines(tile.caption)) for tile in tiles)
    cell = side + lines * _LINE + _GAP
    head = _LINE * len(_lines(title)) + _GAP if title else 0
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * (side + _GAP) + _GAP, head + rows * cell + _GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    for i, line in enumerate(_lines(title)):
        pen.text((_GAP, _GAP + i * _LINE), _cut(line, sheet.width - 2 * _GAP), INK, _font())
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        left, top = _GAP + column * (side + _GAP), head + _GAP + row * cell
        if tile.pixels is None:
            pen.rectangle((left, top, left + side - 1, top + side - 1), outline=FAINT)
        else:
            picture = ImageOps.contain(Image.fromarray(tile.pixels), (side, side), Image.Resampling.LANCZOS)
            x, y = left + (side - picture.width) // 2, top + (side - picture.height) // 2
            sheet.paste(picture, (x, y))
            if tile.frame is not None:
                pen.rectangle((x - 3, y - 3, x + picture.width + 2, y + picture.height + 2), outline=tile.frame, width=3)
        for i, line in enumerate(_lines(tile.caption)):
            pen.text((left, top + side + 2 + i * _LINE), _cut(line, side), INK, _font())
    return sheet


def write(sheet: Image.Image, path: Path) -> None:
    """Saves a sheet as PNG, whole or not at all. Raises OSError where it cannot be written."""
    write_atomically(Path(path), lambda temporary: sheet.save(temporary, "PNG"))


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    """DejaVu Sans as matplotlib ships it: Pillow's own font has Latin letters only."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), _TEXT)


def _lines(text: str) -> list[str]:
    """Lines of a caption; what cannot be shown (a file name may hold anything) becomes a box."""
    shown = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
    return shown.split("\n") if text else []


def _cut(line: str, width: int) -> str:
    """``line`` or as much of its start as ``width`` pixels hold, with an ellipsis."""
    if _font().getlength(line) <= width:
        return line
    while line and _font().getlength(line + "…") > width:
        line = line[:-1]
    return line + "…"
