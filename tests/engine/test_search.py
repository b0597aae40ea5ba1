"""Searching a run's data set with a photograph."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest
import torch
from made_runs import draw, reported_run
from PIL import Image

from engine.data import list_photos
from engine.evaluation import embed_photos, open_source
from engine.pretrained.weights_file import load_weights, save_weights
from engine.search import main, query_features, search, search_data

CPU = torch.device("cpu")


@pytest.fixture
def run(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PPSSL_CACHE", str(tmp_path / "cache"))
    return reported_run(tmp_path / "run", photos)


def test_a_photograph_of_the_set_finds_itself_first(run: Path, photos: Path, tmp_path: Path) -> None:
    wanted = photos / "test/002.Blue_Tit/2.png"
    found = search(run, wanted, 7, torch.device("cpu"))
    assert len(found) == 7 and found[0].path == wanted and found[0].split == "test" and found[0].label == "002.Blue_Tit"
    assert found[0].cosine == pytest.approx(1, abs=1e-4)
    scores = [m.cosine for m in found]
    assert scores == sorted(scores, reverse=True)
    assert {m.split for m in search(run, wanted, 24, torch.device("cpu"))} == {"train", "test"}


def test_labels_of_a_part_of_the_training_photos_are_shown(run: Path, photos: Path) -> None:
    names = sorted(p.relative_to(photos).as_posix() for p in (photos / "train").rglob("*.png"))
    rows = [f"{name},{'kite' if i % 2 else ''}" for i, name in enumerate(names)]
    (photos / "some.csv").write_text("\n".join(["path,label", *rows, ""]))
    source = open_source(run, CPU, overrides=["data.name=list", "data.train=some.csv"])
    found = search_data(source, query_features(source, [photos / names[0]], CPU), len(names), CPU)[0]
    assert {m.name: m.label for m in found} == {name: "kite" if i % 2 else "" for i, name in enumerate(names)}


def test_the_answer_is_a_table_and_a_sheet(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    draw(tmp_path / "[red]seen today[.png", 0, 99)
    assert main([str(run), str(tmp_path / "[red]seen today[.png"), "--top", "4"]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "[red]seen" in told and "001.Red_Kite" in told and "search.png" in told
    with Image.open(run / "search.png") as sheet:
        assert sheet.width > 5 * 160 and sheet.height > 160
    assert main([str(run), str(tmp_path / "[red]seen today[.png"), "--out", str(tmp_path / "there.png")]) == 0
    assert (tmp_path / "there.png").is_file()


def test_a_data_set_that_has_moved_is_named(photos: Path, tmp_path: Path) -> None:
    run = reported_run(tmp_path / "run", tmp_path / "where it was")
    draw(tmp_path / "seen.png", 0, 99)
    assert main([str(run), str(tmp_path / "seen.png")]) == 1
    assert main([str(run), str(tmp_path / "seen.png"), "--root", str(photos)]) == 0


@pytest.fixture(params=[".npz", ".parquet"])
def stored(request: pytest.FixtureRequest, run: Path, tmp_path: Path) -> Path:
    """An embedding of the run's data."""
    if request.param == ".parquet":
        pytest.importorskip("pyarrow")
    source = open_source(run, CPU)
    path = tmp_path / f"e{request.param}"
    embed_photos(source, list_photos(source.run.config.data), path, CPU, half=True)
    return path


def test_an_embedding_gives_the_answers_of_the_data(
    stored: Path, run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    wanted = photos / "test/002.Blue_Tit/2.png"
    line = [str(run), str(wanted), "--in", str(stored), "--top", "5", "--csv", str(tmp_path / "found.csv")]
    assert main(line) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "002.Blue_Tit" in told and "search.png" in told and "test/002.Blue_Tit/2.png" in told
    rows = list(csv.DictReader((tmp_path / "found.csv").open()))
    direct = search(run, wanted, 5, CPU)
    assert [r["path"] for r in rows] == [m.name for m in direct] and [r["rank"] for r in rows] == list("12345")
    assert [float(r["cosine"]) for r in rows] == pytest.approx([m.cosine for m in direct], abs=1e-3)
    assert [(r["split"], r["label"]) for r in rows] == [(m.split, m.label) for m in direct]


def test_several_photographs_and_a_folder(run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    asked = tmp_path / "asked"
    draw(asked / "a/1.png", 0, 50)
    draw(asked / "2.png", 1, 51)
    (asked / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    draw(tmp_path / "3.png", 2, 52)
    line = [str(run), str(asked), str(tmp_path / "3.png"), "--top", "2", "--csv", str(tmp_path / "found.csv")]
    assert main([*line, "--out", str(tmp_path / "sheet.png")]) == 0
    assert "1 file of" in " ".join(capsys.readouterr().err.split())
    rows = list(csv.DictReader((tmp_path / "found.csv").open()))
    assert [Path(r["query"]).name for r in rows[::2]] == ["2.png", "1.png", "3.png"]
    for i, name in enumerate(("2.png", "a/1.png", "../3.png")):
        assert [r["path"] for r in rows[2 * i : 2 * i + 2]] == [m.name for m in search(run, asked / name, 2, CPU)]
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height > 3 * 160


def test_an_embedding_of_other_weights_or_another_input_is_refused(
    stored: Path, run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    image = str(photos / "test/002.Blue_Tit/2.png")
    assert main([str(run), image, "--in", str(stored), "data.image_size=48"]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "image_size 32" in told and "data.image_size=32" in told
    tensors = load_weights(run / "weights.safetensors")
    save_weights(run / "weights.safetensors", tensors | {"conv1.weight": tensors["conv1.weight"] + 0.01}, {})
    assert main([str(run), image, "--in", str(stored)]) == 1
    assert "made by other weights (arch resnet18_w8_s16, epoch 4, step 12)" in " ".join(capsys.readouterr().err.split())
    stored.write_bytes(stored.read_bytes()[:-40])
    assert main([str(run), image, "--in", str(stored)]) == 1 and "is damaged" in capsys.readouterr().err.replace("\n", " ")
    for name, words in (("absent.npz", "is not there"), ("e.csv", "can be searched; make one")):
        (tmp_path / "e.csv").write_text("path,f0\n")
        assert main([str(run), image, "--in", str(tmp_path / name)]) == 1 and words in capsys.readouterr().err.replace("\n", " ")


def test_photos_that_have_moved_are_named(run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.copytree(photos, tmp_path / "copy")
    source = open_source(run, CPU, overrides=[f"data.root={tmp_path / 'copy'}"])
    embed_photos(source, list_photos(source.run.config.data), tmp_path / "e.npz", CPU)
    shutil.rmtree(tmp_path / "copy")
    line = [str(run), str(photos / "test/002.Blue_Tit/2.png"), "--in", str(tmp_path / "e.npz"), "--top", "3"]
    assert main(line) == 0
    assert "3 answers cannot be drawn" in " ".join(capsys.readouterr().err.split())
    assert main([*line, "--root", str(photos)]) == 0 and "cannot be drawn" not in capsys.readouterr().err


def test_what_cannot_be_searched_is_said(run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "note.jpg").write_text("not a picture")
    assert main([str(run), str(tmp_path / "note.jpg")]) == 1
    assert main([str(run), str(tmp_path / "absent.jpg")]) == 1
    assert main([str(tmp_path), str(photos / "test/002.Blue_Tit/2.png")]) == 1
    told = capsys.readouterr().err.replace("\n", "")
    assert "note.jpg cannot be read as an image" in told and "there is no image" in told and "not a run folder" in told
    with pytest.raises(SystemExit) as usage:
        main([str(run), str(tmp_path / "note.jpg"), "--top", "0"])
    assert usage.value.code == 2
