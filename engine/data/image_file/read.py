"""One image file as pixels: what is read, what is refused, and why."""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import logging
import os
import re
import struct
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageFile, ImageOps

MAX_PIXELS = 178_956_970
"""PIL's own limit against decompression bombs."""

_ORIENTATION = 0x0112

logging.getLogger("PIL").addHandler(logging.NullHandler())  # it logs what it raises too, which Python would print


def read_image(path: Path) -> tuple[Image.Image, bool]:
    """(upright 8-bit RGB image, plain) of one file, fully decoded; ``plain`` as in ImageList.

    16-bit grey is scaled to 8 bits; alpha is dropped; CMYK and palettes are converted; of an animation the first frame.
    Raises OSError or ValueError saying what is wrong with the file.
    """
    if not os.path.getsize(path):
        raise ValueError("empty file (0 bytes)")
    try:
        with Image.open(path) as image:
            if image.format == "TIFF":
                _silence_libtiff()
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
    except (SyntaxError, struct.error, EOFError, IndexError, TypeError, KeyError, MemoryError, RuntimeError) as error:
        raise ValueError(f"damaged: {error}") from error  # what PIL's parsers raise on broken headers and chunks
    except OSError as error:
        if error.errno is not None:  # the file system's
            raise
        raise OSError(_in_words(str(error))) from error


def _in_words(reason: str) -> str:
    """PIL's own reason, or what it means where PIL gives a number or speaks of its insides."""
    if code := re.fullmatch(r"decoder error (-?\d+)", reason):
        return f"damaged: {ImageFile.ERRORS.get(int(code[1]), 'unknown error')} in the compressed pixels"
    return {"could not create decoder object": "damaged: the header cannot be decoded"}.get(reason, reason)


@functools.cache
def _silence_libtiff() -> None:
    """Takes away the handlers by which libtiff tells stderr what it dislikes about a file, without the file's name: what matters
    becomes the decoder's error. They are the process's, so that threads and stderr itself are left alone."""
    wheels = (Path(PIL.__file__).parent / ".dylibs", Path(PIL.__file__).parents[1] / "pillow.libs")
    bundled = (str(path) for folder in wheels for path in folder.glob("libtiff*"))
    name = next(bundled, None) or ctypes.util.find_library("tiff")
    try:
        library = ctypes.CDLL(name) if name else None
        for setter in (library.TIFFSetErrorHandler, library.TIFFSetWarningHandler) if library else ():
            setter.argtypes, setter.restype = [ctypes.c_void_p], ctypes.c_void_p
            setter(None)
    except (OSError, AttributeError):  # another build of PIL: its messages stay
        return


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
