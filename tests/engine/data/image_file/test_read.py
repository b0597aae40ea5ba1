"""What is refused before it is decoded, and what a failure says about the file."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import odd_files
import pytest
from odd_files import chunk, encoded, picture
from PIL import Image, ImageFile

from engine.data.image_file import read_image
from engine.data.image_file.read import MAX_MEMORY


def png(width: int, height: int) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def jpeg2000(side: int) -> bytes:
    data = bytearray(encoded(Image.new("RGB", (64, 64)), "JPEG2000", no_jp2=True))
    at = data.find(b"\xff\x51") + 6
    data[at : at + 8] = data[at + 16 : at + 24] = struct.pack(">II", side, side)
    return bytes(data)


def progressive(scans: int) -> bytes:
    data = encoded(picture(), "JPEG", progressive=True)
    last = data.rfind(b"\xff\xda")
    return data[:-2] + data[last:-2] * scans + data[-2:]


BOMBS = {
    "a strip of one pixel": (png(1, 170_000_000), "more than 1000 times the other"),
    "a progressive JPEG": (progressive(3000), "3010 scans, more than 100"),
    "JPEG 2000": (jpeg2000(12_000), "MiB to decode, more than 1,024"),
    "a comment in a PPM": (b"P6\n#" + b"x" * (1 << 26) + b"\n1 1 255\n123", "header does not end"),
    "a number in a PPM": (b"P6\n" + b"1" * (1 << 20) + b" 1 255\n123", "header does not end"),
    "comments in a PPM": (b"P6\n" + b"#\n" * (1 << 20) + b"1 1 255\n123", "header does not end"),
    "written numbers": (b"P3\n4000 4000\n255\n" + b"1 " * (1 << 25), "written numbers"),
    "levels of its own": (b"P5\n4000 4000\n4095\n" + bytes(32_000_000), "only 255 and 65535"),
    "alpha": (png(11_000, 11_000).replace(b"\x08\x02\0\0\0", b"\x08\x06\0\0\0"), "MiB to decode, more than 1,024"),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_what_would_take_too_much_is_refused_before_it_is_decoded(name, tmp_path, monkeypatch):
    data, reason = BOMBS[name]
    if name == "alpha":  # the checksum of the changed header
        data = data[:29] + struct.pack(">I", zlib.crc32(data[12:29])) + data[33:]
    (tmp_path / "x").write_bytes(data)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=reason):
        read_image(tmp_path / "x")


def test_photographs_of_large_cameras_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: (_ for _ in ()).throw(EOFError("would be decoded")))
    base = encoded(picture(), "JPEG")
    frame = base.find(b"\xff\xc0")
    (tmp_path / "x").write_bytes(base[: frame + 5] + struct.pack(">HH", 10_652, 14_204) + base[frame + 9 :])
    with pytest.raises(ValueError, match="would be decoded"):
        read_image(tmp_path / "x")


def test_a_file_larger_than_any_image_is_not_read(tmp_path):
    with (tmp_path / "x").open("wb") as file:
        file.truncate(MAX_MEMORY + 1)
    with pytest.raises(ValueError, match="1,024 MiB, more than the 1,024"):
        read_image(tmp_path / "x")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.jpg")
    with pytest.raises(ValueError, match="not a regular file"):
        read_image(tmp_path / "x.jpg")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (odd_files.encoded(picture(), "EPS"), "PostScript.*starts a program"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>404</html>", "HTML page: the download failed"),
        (b"PK\x03\x04", "zip archive"),
        (b"hello", "not an image in a format that is read"),
        (b"\xff\xd8\xff", "damaged: begins as JPEG"),
        (b"II*\0\xff\xff\xff\xff", "damaged: begins as TIFF"),
    ],
)
def test_the_reason_says_what_the_file_is(data, reason, tmp_path):
    (tmp_path / "x.jpg").write_bytes(data)
    with pytest.raises(ValueError, match=reason):
        read_image(tmp_path / "x.jpg")


def test_no_format_that_starts_a_program_is_opened_whatever_the_name(tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *a, **k: pytest.fail("Ghostscript"))
    for suffix in ("jpg", "eps", "png"):
        (tmp_path / f"x.{suffix}").write_bytes(encoded(picture(), "EPS"))
        with pytest.raises(ValueError, match="PostScript"):
            read_image(tmp_path / f"x.{suffix}")


def test_a_raw_file_of_a_camera_is_not_taken_for_its_preview(tmp_path):
    small = np.zeros((4, 4, 3), "u1")
    (tmp_path / "x.nef").write_bytes(odd_files.tiff(small, 2, more={254: [1]}))
    with pytest.raises(ValueError, match="raw file"):
        read_image(tmp_path / "x.nef")


def test_heif_names_the_package_that_reads_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    (tmp_path / "x.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    with pytest.raises(OSError, match="pip install pillow-heif") as raised:
        read_image(tmp_path / "x.heic")
    assert raised.value.errno == errno.ENOTSUP  # a package can be installed: no verdict on the file


@pytest.mark.parametrize("error", [MemoryError(), OSError("out of memory error when reading image file")])
def test_memory_that_is_short_is_no_verdict_on_the_file(error, tmp_path, monkeypatch):
    picture().save(tmp_path / "x.png")
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: (_ for _ in ()).throw(error))
    with pytest.raises(OSError, match="not enough memory") as raised:
        read_image(tmp_path / "x.png")
    assert raised.value.errno == errno.ENOMEM


@pytest.mark.parametrize(
    "error", [AssertionError(), RecursionError("deep"), zlib.error("z"), AttributeError("a"), OverflowError("o")]
)
def test_whatever_a_parser_raises_is_a_reason(error, tmp_path, monkeypatch):
    picture().save(tmp_path / "x.png")
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: (_ for _ in ()).throw(error))
    with pytest.raises(ValueError, match=f"damaged: ({error}|AssertionError)"):
        read_image(Path(tmp_path / "x.png"))


def test_a_warning_of_pil_does_not_reach_the_terminal(tmp_path):
    data = encoded(picture(), "PNG")
    (tmp_path / "x.png").write_bytes(data[:33] + chunk(b"acTL", bytes(8)) + data[33:])  # an animation without frames
    program = f"from engine.data.image_file import read_image; read_image({str(tmp_path / 'x.png')!r})"
    done = subprocess.run(
        [sys.executable, "-W", "default::UserWarning", "-c", program], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "APNG" not in done.stderr
