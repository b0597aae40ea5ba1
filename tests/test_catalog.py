"""Image lists: layouts, every kind of bad input, the cache of checked files."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from miniatures import picture
from PIL import Image

from engine.data import catalog
from engine.data.catalog import BrokenFile, load, read_image, write_bad_files


def open_set(name: str, root: Path, **options):
    return load(name, root, progress=False, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "my photos"
    names = ("train/a b/1.jpg", "train/a b/2.png", "train/größe/x.jpeg", "test/a b/3.jpg", "test/größe/y.JPG")
    for i, name in enumerate(names):
        picture(root / name, seed=i)
    return root


def test_bad_files_leave_the_list_with_a_reason(folder, tmp_path):
    good = (folder / "train/a b/1.jpg").read_bytes()
    where = folder / "train/a b"
    (where / "empty.jpg").touch()
    (where / "cut.jpg").write_bytes(good[: len(good) * 2 // 3])
    (where / "cut.png").write_bytes((where / "2.png").read_bytes()[:-200])
    (where / "page.jpg").write_text("<html>404</html>")
    (where / "notes.txt").write_text("mine")
    (where / "link.jpg").symlink_to(tmp_path / "gone.jpg")
    (where / "float.tif").write_bytes(encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"))
    (where / "huge.png").write_bytes(huge_png())
    picture(folder / "train/loose.jpg")
    (folder / "train/empty class").mkdir()
    (folder / "train/all bad").mkdir()
    (folder / "train/all bad/line\nbreak.jpg").touch()
    result = open_set("folder", folder)
    assert result.train.names == ("train/a b/1.jpg", "train/a b/2.png", "train/größe/x.jpeg")
    reasons = {b.name.removeprefix("train/"): b.reason for b in result.bad}
    expected = {
        "a b/empty.jpg": "0 bytes",
        "a b/cut.jpg": "truncated",
        "a b/cut.png": "",
        "a b/page.jpg": "not an image",
        "a b/notes.txt": "not the name of an image file (.txt)",
        "a b/link.jpg": "broken link",
        "a b/float.tif": "floating-point",
        "a b/huge.png": "pixels",
        "loose.jpg": "beside the class folders",
        "empty class": "empty class",
        "all bad": "empty class",
        "all bad/line\nbreak.jpg": "0 bytes",
    }
    assert reasons.keys() == expected.keys()
    for name, text in expected.items():
        assert text in reasons[name].lower(), (name, reasons[name])
    write_bad_files(result, tmp_path / "bad_files.txt")
    lines = (tmp_path / "bad_files.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 12 and "train/all bad/line\\nbreak.jpg\tempty file (0 bytes)" in lines


def test_only_bad_files_is_an_error_with_the_first_reason(tmp_path):
    (tmp_path / "a.jpg").touch()
    with pytest.raises(ValueError, match=r"1 training files, none readable \(first: a.jpg: empty file"):
        open_set("folder", tmp_path)


def encoded(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def huge_png() -> bytes:
    """A few bytes whose header promises 400 million pixels."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def ramp() -> np.ndarray:
    """uint8 [16, 32, 3], smooth enough to survive a JPEG."""
    y, x = np.mgrid[:16, :32]
    return np.stack((8 * x, 16 * y, 128 + 0 * x), -1).clip(0, 255).astype(np.uint8)


ODD = {
    "cmyk.jpg": lambda rgb: Image.fromarray(rgb).convert("CMYK"),
    "grey.jpg": lambda rgb: Image.fromarray(rgb).convert("L"),
    "grey.png": lambda rgb: Image.fromarray(rgb).convert("L"),
    "palette.png": lambda rgb: Image.fromarray(rgb).quantize(256),
    "alpha.png": lambda rgb: Image.fromarray(np.dstack((rgb, np.full(rgb.shape[:2], 7, np.uint8)))),
    "sixteen.png": lambda rgb: Image.fromarray(np.asarray(Image.fromarray(rgb).convert("L")).astype(np.uint16) * 257),
    "bilevel.png": lambda rgb: Image.fromarray(rgb).convert("1"),
    "rgb.webp": lambda rgb: Image.fromarray(rgb),
    "rgb.bmp": lambda rgb: Image.fromarray(rgb),
}


@pytest.mark.parametrize("name", ODD)
def test_every_kind_becomes_8_bit_rgb(name, tmp_path):
    source = ODD[name](ramp())
    source.save(tmp_path / name)
    got, plain = read_image(tmp_path / name)
    assert got.mode == "RGB" and got.size == (32, 16)
    assert plain == name.startswith(("grey", "alpha"))
    if name == "bilevel.png":
        expected = np.asarray(source.convert("RGB"))
    elif name.startswith(("grey", "sixteen")):
        expected = np.asarray(Image.fromarray(ramp()).convert("L").convert("RGB"))
    else:
        expected = ramp()
    difference = np.abs(np.asarray(got, int) - expected).mean()
    assert difference < (0.01 if name in ("grey.png", "alpha.png", "sixteen.png", "bilevel.png", "rgb.bmp") else 8)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_exif_rotation_is_applied_once(turn, kind, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = turn
    path = picture(tmp_path / f"train/a/x.{kind}", (24, 16), exif=exif)
    got, plain = read_image(path)
    with Image.open(path) as raw:
        upright = {1: raw, 2: raw.transpose(0), 3: raw.transpose(3), 4: raw.transpose(1)}
        upright |= {5: raw.transpose(5), 6: raw.transpose(4), 7: raw.transpose(6), 8: raw.transpose(2)}
        np.testing.assert_array_equal(np.asarray(got), np.asarray(upright[turn]))
    assert open_set("folder", tmp_path).train.sizes.tolist() == [[16, 24] if turn < 5 else [24, 16]]
    assert plain == (kind == "jpg" or turn == 1)


def test_the_cache_opens_a_file_again_only_when_it_changed(folder, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    (folder / "train/a b/empty.jpg").touch()
    first = open_set("folder", folder, cache_dir=cache)
    opened: list[str] = []
    real = catalog.read_image
    monkeypatch.setattr(catalog, "read_image", lambda path: opened.append(path.name) or real(path))
    again = open_set("folder", folder, cache_dir=cache)
    assert not opened and again.bad == first.bad and again.train.fingerprint == first.train.fingerprint
    np.testing.assert_array_equal(again.train.sizes, first.train.sizes)

    picture(folder / "train/größe/x.jpeg", (30, 10), seed=9)
    changed = open_set("folder", folder, cache_dir=cache)
    assert opened == ["x.jpeg"] and changed.train.sizes[2].tolist() == [10, 30]
    assert changed.train.fingerprint != first.train.fingerprint
    assert changed.test.fingerprint == first.test.fingerprint

    os.utime(folder / "test/a b/3.jpg", ns=(1, 1))
    touched = open_set("folder", folder, cache_dir=cache)
    assert opened == ["x.jpeg", "3.jpg"] and touched.test.fingerprint != first.test.fingerprint
    (file,) = cache.iterdir()  # no temporary file left
    for damage in ("{", "[]", json.dumps({"version": 0, "files": {"train/a b/1.jpg": [1]}})):
        file.write_text(damage)
        opened.clear()
        assert len(open_set("folder", folder, cache_dir=cache).train) == 3 and len(opened) == 6


def test_a_cache_folder_that_cannot_be_written_is_a_warning(folder, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.warns(UserWarning, match="could not be kept in .*cache"):
        assert len(open_set("folder", folder, cache_dir=tmp_path / "cache").train) == 3


def test_nothing_is_written_without_a_cache_folder(folder, tmp_path):
    before = sorted(p for p in tmp_path.rglob("*"))
    open_set("folder", folder)
    assert sorted(p for p in tmp_path.rglob("*")) == before


def test_a_file_that_breaks_later_is_named(folder):
    train = open_set("folder", folder).train
    train.path(1).write_bytes(b"gone bad")
    with pytest.raises(BrokenFile, match="a b/2.png: unreadable now .*restore or remove"):
        train.read(1)
    train.path(1).unlink()
    with pytest.raises(BrokenFile, match="a b/2.png"):
        train.read(1)
    assert train.read(0).size == (20, 14)
