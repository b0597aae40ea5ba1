"""Searching a run's data set with a photograph."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from made_runs import draw, reported_run
from PIL import Image

from engine.search import main, search


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
