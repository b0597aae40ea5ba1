"""One image file as pixels: what is read, what is refused, and why."""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import functools
import io
import logging
import os
import re
import stat
import warnings
from pathlib import Path
from typing import NamedTuple

import PIL
from PIL import Image, ImageFile, TiffImagePlugin

from engine.data.image_file import markers
from engine.data.image_file.formats import signature, what_else
from engine.data.image_file.levels import to_rgb

MAX_PIXELS = 178_956_970
"""PIL's own limit against decompression bombs."""
MAX_MEMORY = 1 << 30
"""Bytes that decoding one file may take."""
MAX_RATIO = 1000
"""Of the longer side to the shorter one."""
MAX_SCANS = 100
"""Of a progressive JPEG, each a pass over the whole picture; encoders write about ten."""
_PPM_HEADER = 4096
"""Bytes within which a PPM's header ends; PIL reads it byte by byte."""
_PLAIN_TEXT = 1 << 25
"""Bytes of a PPM whose numbers are written out, each of which PIL parses by itself."""
_SLOW_LEVELS = 1 << 23
"""Of a PPM whose largest level is neither 255 nor 65535, each of which PIL scales by itself."""
_ORIENTATION, _SUBFILE_TYPE, _DNG_VERSION = 0x0112, 254, 50706
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""As PIL's ``exif_transpose``."""
_STORED = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}
"""Bytes that PIL keeps a pixel in; 4 in every other mode."""
_DECODER = {"JPEG": 6, "JPEG2000": 16, "WEBP": 8, "AVIF": 10, "HEIF": 10, "TIFF": 4, "GIF": 4, "PPM": 4}
"""Bytes a pixel that a decoder keeps beside what PIL keeps, at most: coefficients, canvases, frames."""


logging.getLogger("PIL").addHandler(logging.NullHandler())  # it logs what it raises too, which Python would print
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # of oddities; what matters becomes a reason


class Picture(NamedTuple):
    """One decoded file."""

    image: Image.Image
    """Upright 8-bit RGB."""
    plain: bool
    """As in ImageList: every decoder reads this file alike."""
    note: str
    """What was done to its levels that a person should know; nothing for most files."""


def read_image(path: Path | str) -> Picture:
    """One file, fully decoded. Its format is told by its content and is one of formats.py; of an animation the first frame is
    taken; an orientation in EXIF or XMP is applied.

    Integer levels of 16 bits are brought down to 8 by the depth that the file declares or its own largest level needs (8, 10, 12,
    14 or 16 bits); floating-point levels by 255 where they lie in 0 to 1. Alpha that varies is laid on gray 128. Palettes, CMYK
    and the like are converted.
    Raises ValueError saying what is wrong with the content (never transient), OSError with ``errno`` for a file that cannot be
    opened or read, or decoded for lack of memory, now.
    """
    return decode(read_bytes(path))


def read_bytes(path: Path | str) -> bytes:
    """The content of a regular file of a size that an image may have. Raises as ``read_image`` does."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):  # a pipe would block whoever opens it
        raise ValueError("not a regular file")
    if not found.st_size:
        raise ValueError("empty file (0 bytes)")
    if found.st_size > MAX_MEMORY:
        raise ValueError(f"{found.st_size >> 20:,} MiB, more than the {MAX_MEMORY >> 20:,} that one image may take")
    try:
        return Path(path).read_bytes()
    except MemoryError as error:
        raise _no_memory() from error


def decode(data: bytes) -> Picture:
    """The picture of a file's bytes. Raises as ``read_image`` does."""
    kind = signature(data)
    if kind is None:
        raise ValueError(what_else(data))
    if kind == "PPM":
        _check_ppm(data)
    if kind == "HEIF":
        _need_heif()
    marks = markers.examine(data, kind)
    if marks.scans > MAX_SCANS:
        raise ValueError(f"a progressive JPEG with {marks.scans} scans, more than {MAX_SCANS}; save it again")
    try:

        def opened() -> Image.Image:
            return Image.open(io.BytesIO(data), formats=[kind])

        if kind == "TIFF":
            _silence_libtiff()
        with opened() as image:
            raw_mode = _raw_mode(image)
            _check_size(image, kind, marks, raw_mode)
            _check_camera(image)
            pages = image.n_frames if kind == "TIFF" else 1
            image.load()
            turn = _orientation(image)
            rgb, note = to_rgb(image, opened, raw_mode)
            note = ", ".join(filter(None, (note, f"first of {pages} pages" if pages > 1 else "")))
            plain = marks.turn == turn and not note and image.mode in ("RGB", "L", "RGBA", "LA")
            return Picture(rgb if turn == 1 else rgb.transpose(_TURNS[turn]), plain, note)
    except MemoryError as error:
        raise _no_memory() from error
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error
    except Image.UnidentifiedImageError as error:
        raise ValueError(_unidentified(data, kind)) from error
    except OSError as error:
        if error.errno is not None:
            raise
        if "memory" in str(error):
            raise _no_memory() from error
        raise ValueError(_said(error, kind)) from error
    except ValueError:
        raise
    except Exception as error:  # what parsers raise on broken headers and chunks: two dozen kinds
        raise ValueError(f"damaged: {error or type(error).__name__}") from error


def ordinary(data: bytes) -> bool:
    """Whether reading a file takes a bounded time, as with most photographs: it need not be watched."""
    kind = signature(data)
    if kind is None:
        return True
    marks = markers.examine(data, kind)
    return marks.turn is not None and marks.scans * marks.pixels < 1 << 28


def upright_rgb(image: Image.Image) -> Image.Image:
    """An opened picture as ``read_image`` gives the file's. Raises ValueError where no scale can be told."""
    image.load()
    turn = _orientation(image)
    rgb, _ = to_rgb(image, image.copy, "")
    return rgb if turn == 1 else rgb.transpose(_TURNS[turn])


def _raw_mode(image: Image.Image) -> str:
    """How the file holds its pixels, in PIL's words."""
    args = image.tile[0].args if image.tile else ""
    return str(args[0] if isinstance(args, tuple) and args else args)


def _orientation(image: Image.Image) -> int:
    try:
        turn = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a damaged EXIF block in a readable picture: PIL raises a dozen kinds; decoders ignore it
        return 1
    return turn if turn in range(1, 9) else 1


def _check_size(image: Image.Image, kind: str, marks: markers.Marks, raw_mode: str) -> None:
    """Refuses what would take too much memory, before it does."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"header says {width} x {height} pixels, more than {MAX_PIXELS}")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(f"{width} x {height} pixels, one side more than {MAX_RATIO} times the other")
    decoder = 0 if kind == "JPEG" and marks.scans == 1 and marks.turn else _DECODER.get(kind, 0)
    copies = 0 if image.mode == "RGB" and marks.turn == 1 else 4
    if image.has_transparency_data or ";16" in raw_mode or image.mode in ("I", "F"):
        copies = 12
    needed = width * height * (_STORED.get(image.mode, 4) + decoder + copies)
    if needed > MAX_MEMORY:
        raise ValueError(
            f"{width} x {height} pixels ({kind}, {image.mode}) take {needed >> 20:,} MiB to decode, more than "
            f"{MAX_MEMORY >> 20:,}; make it smaller"
        )


def _check_ppm(data: bytes) -> None:
    """Refuses a header or a body that PIL would spell out for minutes."""
    written_out = data[1:2] in b"123"
    fields = re.sub(rb"#[^\r\n]*", b"", data[:_PPM_HEADER]).split()[: 3 if data[1:2] in b"14" else 4]
    if len(fields) < 3 or (len(fields) < 4 and data[1:2] not in b"14"):
        raise ValueError(f"a PPM whose header does not end within {_PPM_HEADER:,} bytes")
    if written_out and len(data) > _PLAIN_TEXT:
        raise ValueError(
            f"a PPM of {len(data) / 1e6:.0f} MB of written numbers, more than {_PLAIN_TEXT / 1e6:.0f} MB; save it as PNG"
        )
    if data[1:2] in b"56" and fields[3] not in (b"255", b"65535") and len(data) > _SLOW_LEVELS:
        raise ValueError(
            f"a PPM of {len(data) / 1e6:.0f} MB with levels up to {fields[3][:9].decode('ascii', 'replace')}: "
            f"above {_SLOW_LEVELS / 1e6:.0f} MB only 255 and 65535 are read; save it as PNG"
        )


def _check_camera(image: Image.Image) -> None:
    tags = getattr(image, "tag_v2", {})
    if _DNG_VERSION in tags or tags.get(_SUBFILE_TYPE) == 1:
        raise ValueError("a camera's raw file, of which only the preview would be read; export it as JPEG, PNG or TIFF")


def _need_heif() -> None:
    try:
        import pillow_heif  # optional: nothing else needs it
    except ImportError as error:
        remedy = "HEIF is read where the package pillow-heif is installed (pip install pillow-heif); or save it as JPEG"
        raise OSError(errno.ENOTSUP, remedy) from error
    pillow_heif.register_heif_opener()


def _unidentified(data: bytes, kind: str) -> str:
    """Why PIL opens no file of this format."""
    if kind == "JPEG" and (frame := re.search(rb"\xff[\xc0-\xc3\xc5-\xc7\xc9-\xcb\xcd-\xcf]..([^\x08])", data[:65536], re.DOTALL)):
        return f"a JPEG with {frame[1][0]} bits a channel or a damaged header; save it with 8 bits"
    if kind == "TIFF":
        try:
            tags = TiffImagePlugin.ImageFileDirectory_v2(data[:8])
            file = io.BytesIO(data)
            file.seek(tags.next)
            tags.load(file)
            channels, bits = int(tags[277]), tags[258]
            number = {2: "signed", 3: "floating-point"}.get(tags.get(339, (1,))[0], "unsigned")
            return (
                f"a TIFF with {channels} {'channel' if channels == 1 else 'channels'} of {bits[0]} {number} bits "
                f"(photometric {tags.get(262)}), which PIL does not read; save it as gray or RGB with 8 or 16 bits"
            )
        except Exception:  # a header so damaged that it says nothing
            pass
    return f"damaged: begins as {kind}, but its header cannot be read"


def _said(error: OSError, kind: str) -> str:
    """PIL's words, which for some decoders are a number."""
    text = str(error)
    if code := re.fullmatch(r"decoder error (-?\d+)", text):
        return f"damaged or cut off: {ImageFile.ERRORS.get(int(code[1]), 'unknown error')} in the compressed pixels"
    if text == "could not create decoder object":
        return "damaged: the header cannot be decoded"
    return text or f"damaged or cut off: the decoder for {kind} gives up ({type(error).__name__})"


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


def _no_memory() -> OSError:
    return OSError(errno.ENOMEM, "not enough memory to decode it now")
