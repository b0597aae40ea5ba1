"""What a run tells of a network that has collapsed, for every method."""

from __future__ import annotations

from pathlib import Path

import pytest
import small_methods
import torch

from engine import run_folder
from engine.config import OptimConfig, RunConfig
from engine.training import COLLAPSED, Trainer
from engine.training.log import Records, RunLog
from ppssl.encoder import Trunk
from ppssl.method import Method, Output

METHODS = ["byol", "lcr", "ldfs", "moco", "ppssl", "simclr"]
SIDE = 32


def build(name: str) -> Method:
    torch.manual_seed(0)
    if name == "ppssl":
        return small_methods.build_ppssl("resnet18_w8_s16", "published")
    return small_methods.build_by_name(name, Trunk("resnet18_w8_s16"), SIDE)


class Views:
    """Four images and their views, all black or all different."""

    steps_per_epoch = 4

    def __init__(self, black: bool):
        self.black = black

    def batches(self, start_step: int, stop_step: int):
        for step in range(start_step, stop_step):
            batch = small_methods.batch(4, SIDE, seed=step)
            yield batch._replace(x_q=0 * batch.x_q, x_k=0 * batch.x_k) if self.black else batch


@pytest.mark.parametrize("name", METHODS)
def test_all_black_images_are_told_as_a_collapse(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Trainer(
        build(name),
        Views(black=True),
        epochs=1,
        optim=OptimConfig(lr=0.01),
        run=RunConfig(log_every=2),
        out=tmp_path / "run",
        device="cpu",
    )
    assert trainer.fit().collapsed
    lines = [r for r in run_folder.read_metrics(tmp_path / "run") if r["kind"] == "train"]
    assert len(lines) == 2 and all(r["collapsed"] is True and r["spread"] < COLLAPSED for r in lines)
    assert all(r.get("contrast_top1", 0) == 0 for r in lines)
    assert capsys.readouterr().err.count("all images give nearly the same feature") == 1


@pytest.mark.parametrize("name", METHODS)
def test_different_images_are_not(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Trainer(build(name), Views(black=False), epochs=1, optim=OptimConfig(lr=0.01), out=tmp_path / "run", device="cpu")
    assert not trainer.fit().collapsed
    (line,) = [r for r in run_folder.read_metrics(tmp_path / "run") if r["kind"] == "train"]
    assert line["spread"] > 3 * COLLAPSED and "collapsed" not in line
    assert "same feature" not in capsys.readouterr().err


def test_the_end_of_a_collapse_is_told_and_skipped_steps_say_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def output(spread: float, skipped: float) -> Output:
        return Output(torch.ones(()), {}, None, {"spread": torch.tensor(spread), "skipped": torch.tensor(skipped)})

    with RunLog(Records(tmp_path), total_steps=4, start_step=0, description="x") as log:
        for step, (spread, skipped) in enumerate([(0.001, 0), (0.001, 1), (0.5, 1), (0.5, 0)]):
            log.add(output(spread, skipped), images=1)
            log.line(step=step, epoch=0, lr=0.1)
    said = capsys.readouterr().err
    assert said.count("all images give nearly the same") == 1 and said.count("differ again") == 1 and not log.collapsed
    assert [r.get("collapsed", False) for r in run_folder.read_metrics(tmp_path)] == [True, True, True, False]
