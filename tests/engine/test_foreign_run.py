"""A run folder or a bundle that somebody else made: what its config names is read, and written nowhere outside of the folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from made_runs import draw, reported_run

from engine import evaluate, export, replay, search
from engine.config import DataConfig
from engine.report.__main__ import main as report_main
from engine.training import checkpoint


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below ``folder`` with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PPSSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "photo.png", 0, 1)
    return tmp_path


def foreign(here: Path, root: Path) -> Path:
    """A run on the synthetic dataset at ``root``, with a bundle for a replay."""
    data = DataConfig(name="birds", root=str(root), image_size=32, workers=0)
    run = reported_run(here / "run", root, data=data)
    state = {"step": 3, "replay": {"index": torch.arange(4), "terms": {}}, "info": {"config": (run / "config.yaml").read_text()}}
    checkpoint.write(run / "replay/step_000000003.pt", state)
    return run


COMMANDS: dict[str, tuple[Callable[[Path], int], int]] = {
    "evaluate": (lambda run: evaluate.main([str(run)]), 1),
    "search": (lambda run: search.main([str(run), str(run.parent / "photo.png")]), 1),
    "replay": (lambda run: replay.main([str(run / "replay/step_000000003.pt"), "--device", "cpu"]), 1),
    "report": (lambda run: report_main([str(run)]), 0),
    "export": (lambda run: export.main([str(run), "--to", "torch-export"]), 0),
}


@pytest.mark.parametrize("root", ["missing", "of another version"])
@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_draws_or_renames_where_a_foreign_config_says(
    name: str, root: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = here / "somewhere/birds"
    if root != "missing":
        there.mkdir(parents=True)
        (there / "images.txt").write_text("1 a.jpg\n")
        (there / "birds.json").write_text(json.dumps({"version": 0}))
    run = foreign(here, there)
    before = {k: v for k, v in tree(here).items() if not k.startswith("run/")}
    command, code = COMMANDS[name]
    assert command(run) == code
    assert {k: v for k, v in tree(here).items() if not k.startswith(("run/", "cache"))} == before
    if code:
        told = capsys.readouterr().err
        assert "this command only reads" in told and "engine.check --cfg demo" in told


def test_links_in_a_run_folder_lead_nothing_out_of_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, outside = here / "photos", here / "outside"
    for color, name in enumerate(("001.Red_Kite", "002.Blue_Tit")):
        for number in range(3):
            draw(root / f"train/{name}/{number}.png", color, number)
            draw(root / f"test/{name}/{number}.png", color, 10 + number)
    run = reported_run(here / "run", root)
    outside.mkdir()
    for folder in ("features", "export"):
        (run / folder).symlink_to(outside)
    (run / "search.png").symlink_to(outside / "search.png")
    (run / "evaluation.json").symlink_to(outside / "evaluation.json")
    assert search.main([str(run), str(here / "photo.png")]) == 0
    assert evaluate.main([str(run), "--protocol", "retrieval"]) == 0
    assert export.main([str(run), "--to", "torch-export"]) == 1
    told = capsys.readouterr().err
    assert "through a link; remove the link; the features are not kept" in told and "error: " in told
    assert not any(outside.iterdir()) and (run / "search.png").is_file() and not (run / "search.png").is_symlink()


def test_names_of_classes_and_files_cannot_drive_the_terminal(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bad = "\x1b[2J\x1b]0;title\x07\u202egnp"
    for split in ("train", "test"):
        for name in (f"a{bad}", "b"):
            for number in range(2):
                draw(here / f"photos/{split}/{name}/{number}{bad}.png", 0, number)
    run = reported_run(here / "run", here / "photos")
    capfd.readouterr()
    assert search.main([str(run), str(here / "photo.png")]) == 0
    assert search.main([str(run), str(here / f"absent{bad}.png")]) == 1
    assert evaluate.main([str(run), "--protocol", "retrieval"]) == 0
    told = capfd.readouterr()
    assert not {"\x1b", "\x07", "\u202e"} & {*told.err, *told.out} and "x1b" in told.err
