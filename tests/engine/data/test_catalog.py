"""Image lists: layouts, every kind of bad input, the cache of checked files."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from miniatures import make, open_set, picture
from PIL import Image, ImageFile

from engine.config import Config, DataConfig
from engine.console import printable, say
from engine.data.catalog import BadFile, write_bad_files
from engine.data.image_file import Watch, read_image
from engine.data.loaders.choose import build_loader
from engine.errors import BrokenFile


def test_bad_files_leave_the_list_with_a_reason(folder, tmp_path):
    good = (folder / "train/a b/1.jpg").read_bytes()
    where = folder / "train/a b"
    (where / "empty.jpg").touch()
    (where / "cut.jpg").write_bytes(good[: len(good) * 2 // 3])
    (where / "cut.png").write_bytes((where / "2.png").read_bytes()[:-200])
    (where / "page.jpg").write_text("<html>404</html>")
    (where / "notes.txt").write_text("mine")
    (where / "link.jpg").symlink_to(tmp_path / "gone.jpg")
    (where / "float.tif").write_bytes(encoded(Image.fromarray(np.linspace(-1, 0, 16, dtype=np.float32).reshape(4, 4)), "TIFF"))
    (where / "huge.png").write_bytes(huge("png", 30000))
    (where / "circle.jpg").symlink_to("circle.jpg")
    os.mkfifo(where / "pipe.jpg")
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
        "a b/notes.txt": "not an image file (.txt)",
        "a b/link.jpg": "broken link",
        "a b/float.tif": "floating-point levels from -1 to 0",
        "a b/huge.png": "pixels",
        "a b/circle.jpg": "not a file",
        "a b/pipe.jpg": "not a file",
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
    assert len(lines) == 14 and "train/all bad/line\\nbreak.jpg\tempty file (0 bytes)" in lines


def test_only_bad_files_is_an_error_with_the_first_reason(tmp_path):
    (tmp_path / "a.jpg").touch()
    with pytest.raises(ValueError, match=r"1 training files, none readable \(first: a.jpg: empty file"):
        open_set("folder", tmp_path)


def encoded(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def huge(kind: str, side: int) -> bytes:
    """A small file whose header promises an image of ``side`` x ``side`` pixels."""
    if kind == "png":

        def chunk(name: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    small = encoded(Image.new("RGB", (0x1234, 0x4321 >> 4), "teal"), kind)
    order = ">" if kind == "jpeg" else "<"
    size = (0x4321 >> 4, 0x1234) if kind == "jpeg" else (0x1234, 0x4321 >> 4)
    layout = f"{order}{'ii' if kind == 'bmp' else 'HH'}"
    assert small.count(struct.pack(layout, *size)) >= 1
    return small.replace(struct.pack(layout, *size), struct.pack(layout, side, side))


@pytest.mark.parametrize("side", [15_000, 30_000])  # PIL itself warns of the first and refuses the second
@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "bmp"])
def test_an_image_bomb_is_refused_by_its_header(kind, side, tmp_path, monkeypatch):
    (tmp_path / "bomb.jpg").write_bytes(huge(kind, side))
    picture(tmp_path / "good.jpg")
    load_pixels = ImageFile.ImageFile.load
    monkeypatch.setattr(
        ImageFile.ImageFile, "load", lambda image: load_pixels(image) if image.width < 100 else pytest.fail("decoded a bomb")
    )
    result = open_set("folder", tmp_path, workers=1)
    assert result.train.names == ("good.jpg",)
    assert [b.name for b in result.bad] == ["bomb.jpg"] and "pixels" in result.bad[0].reason


def test_of_an_animation_the_first_frame_is_taken(tmp_path):
    frames = [Image.new("RGB", (24, 16), colour) for colour in ("red", "lime", "blue")]
    for kind in ("gif", "webp", "png"):
        frames[0].save(tmp_path / f"x.{kind}", save_all=True, append_images=frames[1:], lossless=True)
        with Image.open(tmp_path / f"x.{kind}") as image:
            assert image.n_frames == 3
        got, *_ = read_image(tmp_path / f"x.{kind}")
        assert got.mode == "RGB" and got.size == (24, 16) and np.asarray(got).reshape(-1, 3).tolist() == [[255, 0, 0]] * 384


def test_damage_at_any_byte_is_a_reason_or_a_picture(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "x"
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ODD:
            ODD[name](ramp()).save(tmp_path / name)
            whole = np.frombuffer((tmp_path / name).read_bytes(), np.uint8)
            for i in range(30):
                damaged = whole[: rng.integers(1, len(whole))].copy() if i % 3 == 0 else whole.copy()
                damaged[rng.integers(0, len(damaged), 1 + i % 4)] = rng.integers(0, 256)
                path.write_bytes(damaged.tobytes())
                try:
                    image, *_ = read_image(path)
                    assert image.mode == "RGB" and min(image.size) > 0
                except (OSError, ValueError) as error:
                    assert str(error)
                    refused += 1
    assert 50 < refused < 270


NAMES = [
    "a b.png",
    'it\'s "quoted".png',
    "größe 鳥 \U0001f426.png",
    "line\nbreak\ttab.png",
    "back\\slash.png",
    "-rf *.png",
    "\udcff\udcfe.png",  # bytes that are no UTF-8
]


@pytest.fixture
def named(tmp_path: Path) -> Path:
    for i, name in enumerate(NAMES):
        picture(tmp_path / "any name" / name, (40, 30), seed=i)
    return tmp_path / "any name"


def test_any_name_is_listed_cached_and_reported(named, tmp_path, monkeypatch, capfd):
    (named / NAMES[3]).write_bytes(b"")
    first = open_set("folder", named, cache_dir=tmp_path / "cache")
    monkeypatch.setattr(Watch, "judge", lambda self, path: pytest.fail(f"{path} was opened again"))
    again = open_set("folder", named, cache_dir=tmp_path / "cache")
    assert set(first.train.names) == set(NAMES) - {NAMES[3]} and again.train.fingerprint == first.train.fingerprint
    more = tuple(BadFile(name, "why") for name in NAMES)
    write_bad_files(first._replace(bad=first.bad + more), tmp_path / "bad_files.txt")
    lines = [line.split("\t") for line in (tmp_path / "bad_files.txt").read_text(encoding="utf-8").split("\n")[:-1]]
    assert [(len(line), line[1]) for line in lines] == [(2, "empty file (0 bytes)")] + [(2, "why")] * len(NAMES)
    assert lines[0][0] == lines[4][0] == "line\\nbreak\\ttab.png" and lines[5][0] == "back\\\\slash.png"
    say("\n".join(NAMES))
    assert "quoted" in capfd.readouterr().err


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_any_name_is_read_by_every_loader(loader, named):
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    images = open_set("folder", named).train
    assert images.plain.all()  # DALI opens the files itself
    cfg = Config(batch_size=len(NAMES), data=DataConfig(name="folder", loader=loader, image_size=32, workers=1))
    for broken in (False, True):
        made = build_loader(images, cfg, "cpu")
        if not broken:
            (batch,) = made.batches(0, 1)
            assert sorted(batch.index.tolist()) == list(range(len(NAMES)))
            images.path(3).write_bytes(b"broken")
        else:
            with pytest.raises(BrokenFile, match=re.escape(printable(images.names[3]))):
                list(made.batches(0, 1))
        made.close()


def test_a_picture_of_another_size_than_listed_is_a_broken_file(folder):
    train = open_set("folder", folder).train
    picture(train.path(0), (21, 14))
    with pytest.raises(BrokenFile, match="it has 21 x 14 pixels instead of 20 x 14"):
        train.read(0)


def test_links_out_of_the_root_are_followed(folder, tmp_path):
    picture(tmp_path / "elsewhere/far.jpg", (30, 10))
    (folder / "train/a b/near.jpg").symlink_to(tmp_path / "elsewhere/far.jpg")
    (tmp_path / "root").symlink_to(folder)
    train = open_set("folder", tmp_path / "root").train
    i = train.names.index("train/a b/near.jpg")
    assert train.sizes[i].tolist() == [10, 30] and train.read(i).size == (30, 10)


def test_listed_files_that_are_no_files(tmp_path):
    root = make("dogs", tmp_path)
    spoiled = sorted(root.glob("Images/*/*.jpg"))[:3]
    for path in spoiled:
        path.unlink()
    spoiled[0].symlink_to(spoiled[0].name)
    os.mkfifo(spoiled[1])
    spoiled[2].mkdir()
    with pytest.warns(UserWarning, match="official split"):
        bad = open_set("dogs", root).bad
    reasons = {b.name: b.reason for b in bad if b.name.startswith("Images")}
    assert [reasons[p.relative_to(root).as_posix()] for p in spoiled] == [
        "Too many levels of symbolic links",
        "not a regular file",
        "not a regular file",
    ]


def test_a_cache_with_wrong_rows_is_only_slower(folder, tmp_path, monkeypatch):
    open_set("folder", folder, cache_dir=tmp_path)
    (file,) = tmp_path.glob("catalog-*.json")
    content = json.loads(file.read_text().split("\n")[1])
    rows = content["files"]
    good = dict(rows)
    for name, column, value in zip(sorted(rows), (2, 3, 4, 5, 0), ("14", 10**12, 1, 7, None), strict=True):
        rows[name] = [*rows[name][:column], value, *rows[name][column + 1 :]]
    text = json.dumps(content)
    file.write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")
    train = open_set("folder", folder, cache_dir=tmp_path).train
    assert train.sizes.tolist() == [[14, 20]] * 3 and json.loads(file.read_text().split("\n")[1])["files"] == good


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
    got, plain, _ = read_image(tmp_path / name)
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
    got, plain, _ = read_image(path)
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
    real = Watch.judge
    monkeypatch.setattr(Watch, "judge", lambda self, path: opened.append(path.name) or real(self, path))
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
