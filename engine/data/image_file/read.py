"""One image file as pixels: what is read, what is refused, and why."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 178_956_970
"""PIL's own limit against decompression bombs."""

_ORIENTATION = 0x0112


def read_image(path: Path) -> tuple[Image.Image, bool]:
    """(upright 8-bit RGB image, plain) of one file, fully decoded; ``plain`` as in ImageList.

    16-bit grey is scaled to 8 bits; alpha is dropped; CMYK and palettes are converted; of an animation the first frame.
    Raises OSError or ValueError saying what is wrong with the file.
    """
    if not os.path.getsize(path):
        raise ValueError("empty file (0 bytes)")
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(_too_large(image.width, image.height))
            raw_mode = image.tile[0].args if image.tile else None
            raw_mode = raw_mode[0] if isinstance(raw_mode, tuple) else raw_mode
            jpeg = image.format in ("JPEG", "MPO")
            image.load()
            turn = _orientation(image)
            upright = ImageOps.exif_transpose(image) if turn != 1 else image
            simple_png = image.format == "PNG" and raw_mode == image.mode and turn == 1
            plain = (jpeg and image.mode in ("RGB", "L")) or (simple_png and image.mode in ("RGB", "L", "RGBA", "LA"))
            return _to_rgb(upright), plain
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error
    except Image.UnidentifiedImageError as error:
        raise ValueError("not an image that PIL can identify") from error
    except (SyntaxError, struct.error, EOFError, IndexError, TypeError, KeyError, MemoryError) as error:
        raise ValueError(f"damaged: {error}") from error  # what PIL's parsers raise on broken headers and chunks


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 0xFFFF:
            raise ValueError("32-bit integer pixels are not supported")
        return Image.fromarray((levels >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels are not supported")
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        turn = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a damaged EXIF block in a readable picture: PIL raises a dozen kinds; decoders ignore it
        return 1
    return turn if turn in range(1, 9) else 1


def _too_large(width: int, height: int) -> str:
    return f"header says {width} x {height} pixels, more than {MAX_PIXELS}"
