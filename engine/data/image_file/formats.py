"""The formats that are opened, told by a file's first bytes: never by its name, and none whose decoder starts programs."""

from __future__ import annotations

import re
from pathlib import Path

HEAD = 256
"""First bytes of a file that tell its format."""
_MAGIC = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"\0\0\0\x0cjP  \r\n\x87\n": "JPEG2000",
    b"\xff\x4f\xff\x51": "JPEG2000",
}
_BMP_HEADERS = {12, 40, 52, 56, 64, 108, 124}
"""Their lengths, which follow the two letters that many texts begin with too."""
_BRANDS = {"AVIF": {b"avif", b"avis"}, "HEIF": {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}}
"""Of ISO's container, in the order in which they are looked for: ``mif1`` says only that there is an image."""


def signature(file: Path | str | bytes) -> str | None:
    """The format of an image file, by its first bytes (``file`` as bytes) or by those that lie at a path, whatever its suffix:
    JPEG, PNG, GIF, BMP, WEBP, TIFF, PPM, JPEG2000, AVIF or HEIF; None for anything else.

    Raises OSError where the file cannot be opened or read.
    """
    if not isinstance(file, bytes):
        with open(file, "rb", buffering=0) as opened:
            file = opened.read(HEAD)
    head = file[:HEAD]
    for magic, name in _MAGIC.items():
        if head.startswith(magic):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BMP_HEADERS:
        return "BMP"
    if re.match(rb"P[1-6f]\s+[-#\d]", head):
        return "PPM"
    if head[4:8] == b"ftyp":
        brands = {head[8:12], *(head[i : i + 4] for i in range(16, min(int.from_bytes(head[:4], "big"), HEAD), 4))}
        return next((name for name, known in _BRANDS.items() if brands & known), None)
    return None
