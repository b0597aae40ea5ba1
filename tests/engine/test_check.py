"""The data check: its table, its findings, its contact sheet and its exit codes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from miniatures import make, picture
from PIL import Image

from engine import check
from engine.data import inspection
from engine.data.catalog import load


@pytest.fixture
def cub(tmp_path: Path) -> Path:
    return make("cub", tmp_path / "cub", (40, 30))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPSSL_CACHE", str(tmp_path / "cache"))


def arguments(root: Path, *more: str) -> list[str]:
    return ["--cfg", "cub", f"data.root={root}", "--out", str(root.parent / "sheet.png"), *more]


@pytest.mark.filterwarnings("ignore:.*official split")
def test_equal_files_are_found_across_and_within_splits(cub):
    catalog = load("cub", cub, progress=False)
    assert inspection.duplicates(catalog, progress=False) == [] == inspection.findings(catalog, [])
    train, test = catalog.train, catalog.test
    shutil.copy(train.path(0), test.path(5))
    shutil.copy(train.path(0), train.path(1))
    shutil.copy(test.path(0), test.path(1))
    copies = inspection.duplicates(load("cub", cub, progress=False), progress=False)
    assert [[(c.split, c.name, c.label) for c in group] for group in copies] == [
        [("train", train.names[0], 0), ("train", train.names[1], 0), ("test", test.names[5], 2)],
        [("test", test.names[0], 0), ("test", test.names[1], 0)],
    ]
    text = "\n".join(inspection.in_short(inspection.findings(catalog, copies)))
    assert "in train and in test, so that retrieval and probes look too good: 1" in text
    assert "more than once in one split: 1" in text and "more than one class: 1" in text
    assert f"{train.names[0]} = {train.names[1]} = {test.names[5]}" in text


def test_the_command_prints_a_table_and_writes_a_sheet(cub, capsys):
    (cub / "images/001.Black_footed_Albatross/Black_footed_Albatross_0000.jpg").write_bytes(b"")
    picture(cub / "images/003.Sooty_Albatross/Sooty_Albatross_0003.jpg", (50, 20)).rename(cub / "x.png")
    Image.open(cub / "x.png").convert("CMYK").save(cub / "images/003.Sooty_Albatross/Sooty_Albatross_0003.jpg")
    assert check.main(arguments(cub)) == 0
    printed = capsys.readouterr().err
    rows = {line.split("│")[1].strip(): [c.strip() for c in line.split("│")[2:4]] for line in printed.splitlines() if "│" in line}
    assert rows["images"] == ["5", "6"] and rows["classes"] == ["3 of 3", "3 of 3"]
    assert rows["images per class"] == ["1 to 2, median 2", "2"] and rows["classes of one image"] == ["1", "0"]
    assert rows["height"] == ["30", "20 to 30, median 30"] and rows["width"] == ["40", "40 to 50, median 40"]
    assert rows["decoded by PIL alone"] == ["0", "1"]
    assert "official split of CUB-200-2011 has 5994 training images" in printed
    assert "Black_footed_Albatross_0000.jpg: empty file" in printed
    sheet = Image.open(cub.parent / "sheet.png")
    assert sheet.format == "PNG" and sheet.width == 8 * 120 + 8


def test_long_lists_are_short_on_the_terminal_and_whole_in_a_file(tmp_path, capsys):
    for i in range(600):
        (path := tmp_path / f"photos/copy {i:03d}.png").parent.mkdir(exist_ok=True)
        picture(path, seed=0)
    for i in range(50):
        (tmp_path / f"photos/empty {i:02d}.png").touch()
    assert check.main(["--cfg", "folder", f"data.root={tmp_path / 'photos'}", "--out", str(tmp_path / "sheet.png")]) == 0
    printed = capsys.readouterr().err
    full = tmp_path / "sheet.findings.txt"
    assert f"findings in full: {full}" in printed and len(printed) < 5000
    assert "and 596 more" in printed and "and 40 more" in printed
    lines = full.read_text().splitlines()
    assert sum("empty file" in line for line in lines) == 50
    assert sorted(lines[-1].strip().split(" = ")) == [f"copy {i:03d}.png" for i in range(600)]

    for path in tmp_path.glob("photos/[ce]*"):
        path.unlink()
    picture(tmp_path / "photos/one.png")
    assert check.main(["--cfg", "folder", f"data.root={tmp_path / 'photos'}", "--out", str(tmp_path / "sheet.png")]) == 0
    assert "in full" not in capsys.readouterr().err and full.read_text() == ""  # no list of another day


def test_damaged_files_get_reasons_in_words_and_no_library_prints(tmp_path):
    rng = np.random.default_rng(0)
    pixels = Image.fromarray(rng.integers(0, 255, (60, 80, 3), np.uint8))
    picture(tmp_path / "photos/fine.png")
    for kind, options in (("tif", {"compression": "tiff_lzw"}), ("tiff", {"compression": "tiff_deflate"}), ("webp", {})):
        pixels.save(whole := tmp_path / f"photos/whole.{kind}", **options)
        for n in range(10):
            data = bytearray(whole.read_bytes())
            for at in rng.integers(12, len(data), 20):
                data[at] ^= 0x55
            (tmp_path / f"photos/broken {n}.{kind}").write_bytes(data)
    code = "import sys; from engine import check; sys.exit(check.main(sys.argv[1:]))"  # the C library's stderr, a fresh process's
    arguments = ["--cfg", "folder", f"data.root={tmp_path / 'photos'}", "--out", str(tmp_path / "sheet.png")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    full = (tmp_path / "sheet.findings.txt").read_text()
    assert done.returncode == 0 and full.count("decoding error in the compressed pixels") > 5
    assert re.search(r"error -?\d|could not create", full) is None
    for line in ("Decode", "TIFF", "LZW", "code not yet", "samples per pixel"):
        assert line not in done.stderr


@pytest.mark.filterwarnings("ignore:.*official split")
def test_the_sheet_shows_training_images_left_and_test_images_right(cub):
    catalog = load("cub", cub, progress=False)
    for images, color in ((catalog.train, (200, 0, 0)), (catalog.test, (0, 0, 200))):
        for i in range(len(images)):
            Image.new("RGB", (40, 30), color).save(images.path(i), "PNG")
    pixels = np.asarray(inspection.class_sheet(load("cub", cub, progress=False)))
    red, blue = ((pixels == color).all(2).any(0) for color in ((200, 0, 0), (0, 0, 200)))
    assert np.flatnonzero(red)[[0, -1]].tolist() == [8, 8 + 120 + 111]
    assert np.flatnonzero(blue)[[0, -1]].tolist() == [8 + 480, 8 + 480 + 120 + 111]


def test_photos_without_labels(tmp_path, capsys):
    for i in range(3):
        picture(tmp_path / f"photos/[red] {i}.png", seed=i)
    args = ["--cfg", "folder", f"data.root={tmp_path / 'photos'}", "--out", str(tmp_path / "sheet.png")]
    assert check.main(args) == 0
    assert "no labels" in capsys.readouterr().err and (tmp_path / "sheet.png").is_file()


@pytest.mark.parametrize("train", ["train/1.jpg", None])
def test_a_labelled_test_split_with_training_photos_without_labels_or_none(train, tmp_path, capsys):
    for i, name in enumerate([*([train] if train else []), "test/a/1.jpg", "test/b/2.jpg"]):
        picture(tmp_path / "photos" / name, seed=i)
    assert check.main(["--cfg", "folder", f"data.root={tmp_path / 'photos'}", "--out", str(tmp_path / "sheet.png")]) == 0
    text = capsys.readouterr().err
    assert "test: 2 photos in 2 classes from test/" in text and (tmp_path / "sheet.png").is_file()


def test_labels_of_a_part_of_the_training_photos(tmp_path, capsys):
    root = tmp_path / "photos"
    rows = ["path,label,split"]
    for i, label in enumerate(("kite", "tit", "", "")):
        picture(root / f"{i}.png", seed=i)
        rows.append(f"{i}.png,{label},train")
    shutil.copy(root / "0.png", root / "copy.png")  # of a labelled test photo, and of one without label: no contradiction
    shutil.copy(root / "0.png", root / "again.png")
    (root / "all.csv").write_text("\n".join([*rows, "again.png,,train", "copy.png,kite,test", ""]))
    listed = ["data.name=list", f"data.root={root}", "data.train=all.csv"]
    assert check.main(["--cfg", "folder", *listed, "--out", str(tmp_path / "sheet.png")]) == 0
    text = capsys.readouterr().err
    assert "2 of 2; 3 without label" in text and "train and in test" in text and "more than one class" not in text
    (root / "all.csv").write_text("\n".join([*rows, "copy.png,tit,test", ""]))
    assert check.main(["--cfg", "folder", *listed, "--out", str(tmp_path / "sheet.png")]) == 0
    assert "more than one class: 1" in capsys.readouterr().err  # kite in training, of which not all photos have labels


def test_exit_codes(cub, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    assert check.main(arguments(tmp_path / "empty")) == 1
    assert "unpack CUB_200_2011.tgz" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert check.main([*arguments(cub), "--out", str(tmp_path / "file/sheet.png")]) == 1
    assert "file/sheet.png cannot be written" in capsys.readouterr().err
    for wrong in (["data.rot=1"], ["--image-size"], ["data.image_size=0"]):
        with pytest.raises(SystemExit, match="2"):
            check.main([*arguments(cub), *wrong])
    with pytest.raises(SystemExit, match="0"):
        check.main(["--help"])
    assert "--out SHEET.png" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["check"])
    with pytest.raises(SystemExit, match="2"):
        check.main()


@pytest.mark.parametrize(("old", "new"), [("check", "engine.check"), ("show", "engine.check --views FILE")])
def test_the_former_commands_name_the_new_ones(old: str, new: str) -> None:
    done = subprocess.run([sys.executable, "-m", f"engine.data.{old}", "--cfg", "demo"], capture_output=True, text=True)
    assert done.returncode == 2 and new in done.stderr
