"""Image lists: layouts, every kind of bad input, the cache of checked files."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.data import catalog
from engine.data.catalog import BrokenFile, LayoutNotSupported, load, read_image, write_bad_files


def picture(path: Path, size: tuple[int, int] = (20, 14), seed: int = 0, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def open_set(name: str, root: Path, **options):
    return load(name, root, progress=False, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "my photos"
    names = ("train/a b/1.jpg", "train/a b/2.png", "train/größe/x.jpeg", "test/a b/3.jpg", "test/größe/y.JPG")
    for i, name in enumerate(names):
        picture(root / name, seed=i)
    return root


@pytest.fixture
def cub(tmp_path: Path) -> Path:
    root = tmp_path / "cub"
    names = ["001.Auk/Auk 1.jpg", "001.Auk/Auk_2.jpg", "002.Bee_eater/b1.jpg", "002.Bee_eater/b2.jpg"]
    for i, name in enumerate(names):
        picture(root / "images" / name, seed=i)
    (root / "images.txt").write_text("".join(f"{i} {n}\n" for i, n in enumerate(names, 1)))
    (root / "image_class_labels.txt").write_text("1 1\n2 1\n3 2\n4 2\n")
    (root / "train_test_split.txt").write_text("1 1\n2 0\n3 1\n4 0\n")
    (root / "classes.txt").write_text("1 001.Auk\n2 002.Bee_eater\n")
    return root


def test_folder_with_classes(folder):
    train, test, bad = open_set("folder", folder)
    assert train.names == ("train/a b/1.jpg", "train/a b/2.png", "train/größe/x.jpeg")
    assert train.classes == test.classes == ("a b", "größe")
    assert train.labels.dtype == np.int64 and train.labels.tolist() == [0, 0, 1] and test.labels.tolist() == [0, 1]
    assert train.sizes.dtype == np.int32 and train.sizes.tolist() == [[14, 20]] * 3
    assert train.path(2) == folder / "train/größe/x.jpeg" and train.path(2).is_file() and len(train) == 3
    assert train.plain.all() and bad == ()


def test_val_is_the_test_split_where_there_is_no_test(folder):
    (folder / "test").rename(folder / "val")
    assert open_set("folder", folder).test.names == ("val/a b/3.jpg", "val/größe/y.JPG")


@pytest.mark.parametrize("below", ["", "train"])
def test_flat_folder_has_no_labels(tmp_path, below):
    for name in ("b.jpg", "a.png", ".hidden.jpg"):
        picture(tmp_path / below / name)
    if not below:
        picture(tmp_path / "deep/er/c.jpg")
    train, test, _ = open_set("folder", tmp_path)
    prefix = f"{below}/" if below else ""
    assert train.names == (f"{prefix}a.png", f"{prefix}b.jpg", *(() if below else ("deep/er/c.jpg",)))
    assert train.labels is None and train.classes == () and test is None


def test_a_linked_folder_is_read_once_and_a_circle_ends(folder, tmp_path):
    picture(tmp_path / "elsewhere/z.jpg")
    (folder / "train/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/round").symlink_to(tmp_path / "elsewhere")
    train = open_set("folder", folder).train
    assert [n for n in train.names if "linked" in n] == ["train/linked/z.jpg"]


def test_cub(cub, recwarn):
    train, test, bad = open_set("birds", cub)
    assert train.names == ("images/001.Auk/Auk 1.jpg", "images/002.Bee_eater/b1.jpg")
    assert test.names == ("images/001.Auk/Auk_2.jpg", "images/002.Bee_eater/b2.jpg")
    assert train.labels.tolist() == test.labels.tolist() == [0, 1] and train.classes == ("001.Auk", "002.Bee_eater")
    assert bad == () and not recwarn.list
    (cub / "classes.txt").unlink()
    assert open_set("birds", cub).train.classes == ("001.Auk", "002.Bee_eater")


def test_other_counts_than_cubs_are_a_warning(cub):
    with pytest.warns(UserWarning, match="5994.*found.*2"):
        open_set("cub", cub)


def test_the_folder_inside_the_archive_is_found(cub, tmp_path):
    cub.rename(tmp_path / "CUB_200_2011")
    assert len(open_set("birds", tmp_path).train) == 2


@pytest.mark.parametrize(
    ("file", "old", "new", "error", "match"),
    [
        ("images.txt", "b1.jpg", "gone.jpg", FileNotFoundError, r"images.txt names 002.Bee_eater/gone.jpg.*1 of 4"),
        (
            "images.txt",
            "002.Bee_eater/b1.jpg",
            "../../b1.jpg",
            ValueError,
            r"'../../b1.jpg' leads out of the data folder",
        ),
        (
            "images.txt",
            "002.Bee_eater/b1.jpg",
            "/etc/b1.jpg",
            ValueError,
            r"'/etc/b1.jpg' leads out of the data folder",
        ),
        ("images.txt", "3 002.Bee_eater/b1.jpg", "3", ValueError, r"images.txt:3: '3' is not '<id> <value>'"),
        ("images.txt", "3 ", "2 ", ValueError, r"images.txt:3: id 2 appears twice"),
        (
            "image_class_labels.txt",
            "3 2\n",
            "",
            ValueError,
            r"class_labels.txt: no line for image 3 \(002.Bee_eater/b1",
        ),
        ("image_class_labels.txt", "3 2", "3 two", ValueError, r"image 3 has class 'two'"),
        ("train_test_split.txt", "3 1\n", "", ValueError, r"train_test_split.txt: no line for image 3"),
        ("train_test_split.txt", "3 1", "3 2", ValueError, r"image 3 has '2'; expected 1 \(train\) or 0 \(test\)"),
    ],
)
def test_a_wrong_list_is_named(cub, file, old, new, error, match):
    text = (cub / file).read_text()
    assert old in text
    (cub / file).write_text(text.replace(old, new, 1))
    with pytest.raises(error, match=match):
        open_set("birds", cub)


def test_missing_folders_and_wrong_layouts(cub, folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="data.root=.*nowhere is not a folder.*CUB_200_2011.tgz"):
        open_set("cub", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="data.root is not set.*train/<class>"):
        open_set("folder", None)
    with pytest.raises(ValueError, match="has no images.txt, image_class_labels.txt, train_test_split.txt, images/"):
        open_set("cub", folder)
    (cub / "train_test_split.txt").unlink()
    with pytest.raises(ValueError, match="has no train_test_split.txt; data.name=birds expects"):
        open_set("birds", cub)
    with pytest.raises(ValueError, match="data.name=cubs: unknown; known are birds, cub, cars"):
        open_set("cubs", tmp_path)
    (folder / "train").rename(folder / "training")
    with pytest.raises(ValueError, match="has test/ but no train/"):
        open_set("folder", folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no training files.*expected your own photos"):
        open_set("folder", tmp_path / "empty")


@pytest.mark.parametrize("name", ["cars", "aircraft", "nabirds", "flowers", "butterfly", "dogs"])
def test_a_known_set_without_reader_says_what_to_do(name, tmp_path):
    with pytest.raises(LayoutNotSupported, match=f"data.name={name}: its reader is not part.*train/<class>"):
        open_set(name, tmp_path)
    with pytest.raises(FileNotFoundError, match="not part of this version.*train/<class>"):
        open_set(name, tmp_path / "nowhere")


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


def test_an_empty_class_of_cub_is_named(cub):
    with (cub / "classes.txt").open("a") as file:
        file.write("3 003.Cuckoo\n")
    (cub / "images/001.Auk/Auk 1.jpg").write_bytes(b"")
    result = open_set("birds", cub)
    assert result.train.classes == ("001.Auk", "002.Bee_eater", "003.Cuckoo") and result.train.labels.tolist() == [1]
    assert [b.name for b in result.bad] == [
        "images/001.Auk/Auk 1.jpg",
        "train: class 001.Auk",
        "train: class 003.Cuckoo",
        "test: class 003.Cuckoo",
    ]


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
