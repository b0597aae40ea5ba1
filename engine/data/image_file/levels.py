"""From what a file holds to 8-bit RGB: 16-bit and floating-point levels, alpha, other color models."""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image

BACKGROUND = 128
"""Gray level on which transparent pictures are laid: black and white drawings are both seen on it."""
_DEPTHS = (8, 10, 12, 14, 16)
"""Bits that cameras and scanners give."""
_DARK, _FLAT = 16, 4
"""Of 256 levels: below the first everywhere is nearly black, a spread below the second is one color."""


def to_rgb(image: Image.Image, again: Callable[[], Image.Image], raw_mode: str) -> tuple[Image.Image, str]:
    """(8-bit RGB, what was done to the levels) of a picture as PIL decodes it; nothing is said of the usual conversions.

    again: opens the same file once more. raw_mode: how the file holds its pixels, in PIL's words.
    Raises ValueError where no scale can be told.
    """
    note, mode = "", image.mode
    if ";16" in raw_mode and mode in ("RGB", "RGBA"):
        image, note = _color16(image, again, raw_mode)
    elif mode == "I" or mode.startswith("I;16"):
        levels, note = _scaled(np.asarray(image), _declared(image, raw_mode))
        image = Image.fromarray(~levels if _white_is_zero(image) else levels)
    elif mode == "F":
        levels, note = _floats(np.asarray(image))
        image = Image.fromarray(levels)
    if image.has_transparency_data:
        image, laid = _laid_out(image)
        note = ", ".join(filter(None, (note, laid)))
    return (image if image.mode == "RGB" else image.convert("RGB")), note


def _declared(image: Image.Image, raw_mode: str) -> int:
    """The largest level that a file says its pixels may have; 0 where it says nothing."""
    if image.format == "JPEG2000" or (image.format == "PPM" and ";16" not in raw_mode):
        return 0xFFFF  # PIL has scaled them by what the file says
    if image.format != "TIFF":
        return 0
    tags = image.tag_v2
    bits = tags.get(258, (16,))[0]
    largest = tags.get(281, (0,))
    return (1 << bits) - 1 if bits < 16 else int(largest[0] if isinstance(largest, tuple) else largest)


def _white_is_zero(image: Image.Image) -> bool:
    """What PIL heeds with 8 bits only."""
    return image.format == "TIFF" and image.tag_v2.get(262) == 0


def _scaled(levels: npt.NDArray, declared: int = 0) -> tuple[npt.NDArray[np.uint8], str]:
    """Integer levels as 8 bits: of a file with 16 bits a pixel that holds 12-bit values the upper 8 of these 12."""
    low, high = int(levels.min()), int(levels.max())
    if low < 0 or high > 0xFFFF:
        raise ValueError(f"32-bit or signed levels from {low} to {high}: no scale can be told; save it with 8 or 16 bits, unsigned")
    top = max(high, declared if declared <= 0xFFFF else 0)
    depth = next(bits for bits in _DEPTHS if top < 1 << bits)
    note = "" if depth == 16 else f"{depth}-bit levels in 16 bits"
    return (levels.astype(np.uint16) >> (depth - 8)).astype(np.uint8), note


def _floats(levels: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.uint8], str]:
    low, high = float(levels.min()), float(levels.max())
    if not np.isfinite([low, high]).all():
        raise ValueError("floating-point levels that are infinite or no number")
    if low >= 0 and high <= 1:
        return np.rint(levels * 255).astype(np.uint8), "floating-point levels from 0 to 1"
    if low < 0 or not 16 <= high <= 0xFFFF:
        raise ValueError(
            f"floating-point levels from {low:.4g} to {high:.4g}: no scale can be told; save it with levels from 0 to 1"
        )
    scaled, note = _scaled(np.rint(levels).astype(np.uint16))
    return scaled, f"floating-point levels, {note.partition('-bit')[0] or 16} bits"


def _color16(image: Image.Image, again: Callable[[], Image.Image], raw_mode: str) -> tuple[Image.Image, str]:
    """16-bit color. PIL keeps the upper byte, so that the file is decoded once more for the lower one where that holds the
    picture."""
    upper = np.asarray(image)
    if raw_mode.startswith("RGBa"):
        raise ValueError("16-bit color that is multiplied with its alpha: no scale can be told; save it with plain alpha")
    if upper[..., :3].max() >= 1 << _DEPTHS[-2] - 8:
        return image, ""
    order = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}[raw_mode[-1]]
    swapped = raw_mode[:-1] + order
    with again() as second:
        if raw_mode == "LA;16B":  # which has no other order: its four bytes are read as they are
            second._mode = swapped = "RGBA"
        second.tile = [
            tile._replace(args=(swapped, *tile.args[1:]) if isinstance(tile.args, tuple) else swapped) for tile in second.tile
        ]
        lower = np.asarray(second)
    if raw_mode == "LA;16B":
        lower = lower[..., (1, 1, 1, 3)]
    colors, note = _scaled(upper[..., :3].astype(np.uint16) << 8 | lower[..., :3])
    return Image.fromarray(np.concatenate((colors, upper[..., 3:]), -1)), note


def _laid_out(image: Image.Image) -> tuple[Image.Image, str]:
    """A picture with alpha on a gray ground; alpha that is the same everywhere holds nothing and is dropped."""
    full = image if image.mode == "RGBA" else image.convert("RGBA")
    low, high = full.getchannel("A").getextrema()
    if low == high:
        return full, ""
    ground = Image.new("RGBA", full.size, (BACKGROUND, BACKGROUND, BACKGROUND, 255))
    return Image.alpha_composite(ground, full), f"alpha laid on gray {BACKGROUND}"


def emptiness(image: Image.Image) -> str:
    """What an RGB picture with nothing to see is, nearly black or of one color; nothing for any other."""
    sample = image.resize((32, 32), Image.Resampling.NEAREST) if max(image.size) > 256 else image
    if not _empty(sample):
        return ""
    return _empty(image)


def _empty(image: Image.Image) -> str:
    spans = image.getextrema()
    if max(high for _, high in spans) < _DARK:
        return "nearly black"
    return "of one color" if max(high - low for low, high in spans) < _FLAT else ""
