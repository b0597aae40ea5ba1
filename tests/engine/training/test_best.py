"""The best evaluation of a run: which it is, when the run ends, and that the file on the disk is of it after any restart."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from engine.pretrained import best_of, load_weights, save_weights
from engine.run_folder import RunFolder
from engine.training.best import Best, Mark


def kept(out: Path, step: int, fill: float) -> Path:
    path = RunFolder(out).best
    about = {"measure": "rank1", "step": str(step), "epoch": str(step), "value": "0.5"}
    save_weights(path, {"w": torch.full((3,), fill)}, about)
    return path


def test_the_first_of_equals_is_the_best_and_patience_counts_what_follows() -> None:
    best = Best("rank1", patience=3)
    seen = [best.see(10 * epoch, epoch, value) for epoch, value in enumerate((0.2, 0.5, 0.5, math.nan, 0.4), 1)]
    assert seen == [True, True, False, False, False]
    assert best.mark == Mark(20, 2, 0.5) and best.since == 3 and best.ended
    assert best.metadata(20) == {"measure": "rank1", "step": "20", "epoch": "2", "value": "0.5"} and best.metadata(50) is None
    assert best.see(60, 6, 0.6) and not best.ended
    endless = Best("rank1")
    assert sum(endless.see(n, n, 0.0) for n in range(50)) == 1 and endless.since == 49
    assert not endless.ended and not Best().ended
    assert not Best("mAP").see(1, 1, math.nan)


def test_a_state_goes_on_exactly_and_another_patience_counts_from_there(capsys: pytest.CaptureFixture[str]) -> None:
    first = Best("rank1", patience=2)
    for step, value in ((1, 0.5), (2, 0.4), (3, 0.3)):
        first.see(step, step, value)
    again = Best("rank1", patience=2)
    again.load_state_dict(first.state_dict())
    assert (again.mark, again.since, again.ended) == (first.mark, 2, True)
    patient = Best("rank1", patience=3)
    patient.load_state_dict(first.state_dict())
    assert not patient.ended and not patient.see(4, 4, 0.5) and patient.ended
    capsys.readouterr()
    other = Best("mAP", patience=2)
    other.load_state_dict(first.state_dict())
    assert other.mark is None and "mAP from here on, rank1 until now" in capsys.readouterr().err
    finished = Best("mAP")
    finished.load_state_dict(first.state_dict(), finished=True)
    assert finished.measure is None and capsys.readouterr().err == ""
    fresh = Best("rank1")
    fresh.load_state_dict({})  # of a checkpoint of an earlier version
    assert fresh.mark is None


def settled(out: Path, mark: Mark | None, step: int, source: Path | None = None) -> Best:
    best = Best("rank1")
    best.mark = mark
    best.settle(out, step, source or out / "checkpoints" / "x.pt", lambda: {"w": torch.full((3,), 7.0)})
    return best


def test_values_of_other_validation_images_are_not_compared(capsys: pytest.CaptureFixture) -> None:
    first = Best("rank1", patience=2)
    assert first.see(1, 1, 0.8, "these") and not first.see(2, 2, 0.7, "these")
    again = Best("rank1", patience=2)
    again.load_state_dict(first.state_dict())
    assert again.see(3, 3, 0.5, "others") and again.since == 0 and "are not those of before" in capsys.readouterr().err
    assert not again.see(4, 4, 0.4, "others") and capsys.readouterr().err == ""


def test_the_file_follows_what_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = kept(tmp_path, 20, 1.0)
    settled(tmp_path, Mark(20, 2, 0.5), 30)  # nothing to do
    assert load_weights(path)["w"][0] == 1 and capsys.readouterr().err == ""

    settled(tmp_path, Mark(30, 3, 0.6), 30)  # it died between the checkpoint and the file: the weights are those of now
    assert load_weights(path)["w"][0] == 7 and best_of(tmp_path)["step"] == "30"

    gone = settled(tmp_path, Mark(10, 1, 0.4), 20)  # set back before the best of then, whose file was replaced
    said = " ".join(capsys.readouterr().err.split())
    assert gone.mark is None and not path.exists() and (tmp_path / "best.later").is_file()
    assert "set aside" in said and "rank1 40.0 % at epoch 1) are not there any more" in said

    kept(tmp_path, 40, 2.0)
    settled(tmp_path, None, 0)
    assert not path.exists()

    kept(tmp_path / "from", 20, 3.0)  # a checkpoint of another folder brings its best weights along
    (tmp_path / "new").mkdir()
    settled(tmp_path / "new", Mark(20, 2, 0.5), 30, tmp_path / "from/checkpoints/step_000000030.pt")
    assert load_weights(RunFolder(tmp_path / "new").best)["w"][0] == 3 and best_of(tmp_path / "new")["measure"] == "rank1"


def test_a_damaged_file_is_replaced(tmp_path: Path) -> None:
    RunFolder(tmp_path).best.write_bytes(b"nothing")
    assert best_of(tmp_path) is None
    settled(tmp_path, Mark(30, 3, 0.6), 30)
    assert best_of(tmp_path)["epoch"] == "3"
