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


_OTHERS = {
    b"version https://git-lfs": "a Git LFS pointer: run git lfs pull where it came from",
    b"%!PS": "PostScript, which is not opened: drawing it starts a program",
    b"\xc5\xd0\xd3\xc6": "PostScript, which is not opened: drawing it starts a program",
    b"%PDF": "a PDF; export its pages as images",
    b"<svg": "an SVG drawing; export it as PNG",
    b"<?xml": "an XML file; where it is an SVG drawing, export it as PNG",
    b"<!doctype html": "an HTML page: the download failed",
    b"<html": "an HTML page: the download failed",
    b"8BPS": "a Photoshop file; export it as PNG or TIFF",
    b"\x93NUMPY": "a NumPy array; save it as PNG or TIFF",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\x1f\x8b": "a gzip archive; unpack it",
}
READ = "JPEG, PNG, TIFF, WebP, GIF, BMP, PPM, JPEG 2000, AVIF, HEIF"
"""In words."""


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


def what_else(data: bytes) -> str:
    """What a file is, as far as that is seen, that is none of these."""
    head = data[:HEAD].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    found = next((text for magic, text in _OTHERS.items() if head.startswith(magic.lower())), None)
    return f"not an image: {found}" if found else f"not an image in a format that is read ({READ})"
