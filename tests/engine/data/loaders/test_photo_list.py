"""Photos that are listed without being opened: order, labels, splits, identity; and what a path is read as."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from made_runs import CLASSES, draw
from miniatures import make
from PIL import Image

from engine.config import DataConfig
from engine.data import list_photos, photo_settings, readable_photos
from engine.data.catalog import load
from engine.data.image_file import Watch


def test_the_photos_of_a_training_list_in_its_order(photos: Path) -> None:
    found, usual = list_photos(DataConfig(name="folder", root=str(photos))), load("folder", photos, progress=False)
    assert found.names == (*usual.train.names, *usual.test.names) and found.splits == (("train", 12), ("test", 12))
    labels = [usual.train.classes[i] for part in (usual.train, usual.test) for i in part.labels]
    assert list(found.labels) == labels and found.split_of() == ["train"] * 12 + ["test"] * 12
    assert found.batches(5) == [range(0, 5), range(5, 10), range(10, 12), range(12, 17), range(17, 22), range(22, 24)]
    with Watch() as watch:
        assert found.read(13, watch).tobytes() == usual.test.read(1).tobytes()


def test_the_banner_of_aircraft_is_cut(tmp_path: Path) -> None:
    make("aircraft", tmp_path / "aircraft", (30, 40))
    cut, whole = (list_photos(DataConfig(name="aircraft", root=str(tmp_path / "aircraft"), crop_banner=c)) for c in (True, False))
    with Watch() as watch:
        assert (cut.read(0, watch).size, whole.read(0, watch).size) == ((30, 20), (30, 40))
    assert cut.identity != whole.identity


def test_some_classes_and_photos_without_a_label(photos: Path, tmp_path: Path) -> None:
    some = list_photos(DataConfig(name="folder", root=str(photos), classes=("*Tit",)))
    assert set(some.labels) == {"002.Blue_Tit"} and some.splits == (("train", 4), ("test", 4))
    more = DataConfig(name="folder", root=str(photos / "test"), train=".", extra_roots=(str(photos / "train" / CLASSES[0]),))
    found = list_photos(more)
    assert len(found) == 16 and found.labels.count("") == 4
    with Watch() as watch:
        assert found.read(found.labels.index(""), watch).size == (48, 40)


def test_the_identity_is_that_of_the_files(tmp_path: Path) -> None:
    for i in range(3):
        draw(tmp_path / f"photos/{i}.png", 0, i)
    data = DataConfig(name="folder", root=str(tmp_path / "photos"))
    first = list_photos(data).identity
    (tmp_path / "photos").rename(tmp_path / "moved")
    moved = DataConfig(name="folder", root=str(tmp_path / "moved"))
    assert list_photos(moved).identity == first
    stat = (tmp_path / "moved/1.png").stat()
    os.utime(tmp_path / "moved/1.png", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    changed = list_photos(moved).identity
    assert changed != first
    (tmp_path / "moved/2.png").unlink()
    assert list_photos(moved).identity not in (first, changed)


def test_odd_files_are_read_once_a_process_with_limits_could(tmp_path: Path) -> None:
    Image.new("RGB", (20, 10), (200, 10, 30)).save(tmp_path / "a.webp")
    (tmp_path / "b.webp").write_bytes((tmp_path / "a.webp").read_bytes()[:30])
    found = list_photos(DataConfig(name="folder", root=str(tmp_path)))
    with Watch() as watch:
        assert found.read(0, watch).size == (20, 10)
        with pytest.raises(ValueError, match=r"."):
            found.read(1, watch)
    good, bad = readable_photos(tmp_path)
    assert [p.name for p in good] == ["a.webp"] and [b.name for b in bad] == ["b.webp"]


def test_what_a_path_is_read_as(photos: Path, tmp_path: Path) -> None:
    for name in ("kite", "tit"):
        draw(tmp_path / "set/images" / name / "1.png", 0, 1)
    draw(tmp_path / "one/kite/1.png", 0, 1)
    whole = photo_settings(tmp_path / "set")
    assert DataConfig(**whole) == DataConfig(name="folder", root=str(tmp_path / "set"))
    assert photo_settings(tmp_path / "set", labelled=True)["train"] == "images"
    assert photo_settings(tmp_path / "one", labelled=True)["train"] == "."
    assert photo_settings(photos / "test", labelled=True)["train"] == "."
    (tmp_path / "list.csv").write_text("path,label\nset/images/kite/1.png,kite\n")
    listed = list_photos(DataConfig(**photo_settings(tmp_path / "list.csv")))
    assert listed.names == ("set/images/kite/1.png",) and listed.labels == ("kite",)
    with pytest.raises(ValueError, match="holds splits and not classes"):
        photo_settings(photos, labelled=True)
    with pytest.raises(ValueError, match="has no labels"):
        photo_settings(photos / "test" / CLASSES[0], labelled=True)
    with pytest.raises(FileNotFoundError, match="is not there"):
        photo_settings(tmp_path / "absent")


def test_no_photos(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no photo")
    with pytest.raises(ValueError, match="no photos"):
        list_photos(DataConfig(name="folder", root=str(tmp_path)))
