"""The format of a file by its content."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from engine.data.image_file import signature

FORMATS = ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF"]


def encoded(kind: str, mode: str = "RGB", **options) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (16, 16), 1).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", FORMATS)
def test_a_format_is_told_by_its_bytes_whatever_the_name(kind, tmp_path):
    path = tmp_path / "no suffix"
    path.write_bytes(encoded(kind))
    assert signature(path) == signature(str(path)) == signature(path.read_bytes()) == kind


def test_variants_of_a_format():
    assert signature(encoded("TIFF", big_tiff=True)) == "TIFF"
    assert signature(encoded("JPEG2000", no_jp2=True)) == "JPEG2000"
    assert signature(encoded("PPM", "L")) == signature(b"P2\n# a comment\n1 1 255 7") == "PPM"
    box = b"\0\0\0\x18ftypmif1\0\0\0\0mif1"
    assert signature(box + b"heic") == signature(box[:8] + b"heic" + box[12:]) == "HEIF"
    assert signature(box + b"avif") == "AVIF"


@pytest.mark.parametrize(
    "head",
    [b"", b"\xff", b"%!PS-Adobe-3.0 EPSF-3.0", b"\xc5\xd0\xd3\xc6", b"<svg>", b"<html>", b"BMW and others", b"P5 is a file", b"MZ",
     b"RIFF\0\0\0\0WAVE", b"\0\0\0\x18ftypisom\0\0\0\0mp42", b"version https://git-lfs.github.com/spec/v1"],
)  # fmt: skip
def test_anything_else_is_no_image(head):
    assert signature(head) is None
