"""Records: a symptom is said once per run, however often the run is resumed; loggers get the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_methods

from engine import run_folder
from engine.config import OptimConfig, RunConfig
from engine.errors import ConfigError
from engine.training import Trainer
from engine.training.log import wandb_logger
from engine.training.log.records import LOGGERS, PICTURES, Records
from ppssl.encoder import Trunk

SIDE = 32
SETTINGS = {"method.name": "moco", "batch_size": 8, "ema.decay": 0.9, "epochs": 10}


def line(step: int, **values: Any) -> dict[str, Any]:
    return {"kind": "train", "step": step, "epoch": step // 10, "loss": 2.0 - step / 100, "lr": 0.1} | values


def test_a_symptom_is_said_once_and_a_resumed_run_does_not_say_it_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = Records(tmp_path, SETTINGS, loggers=[], steps_per_epoch=10, total_steps=100)
    for step in (10, 20, 30):
        records.write(line(step, lr=0.0))
    said = capsys.readouterr().err.splitlines()
    assert (
        len(said) == 1 and said[0].startswith("warning: step 20: learning rate 0: ") and "What people do: set optim.lr" in said[0]
    )
    assert records.told == 1

    again = Records(tmp_path, SETTINGS, loggers=[], steps_per_epoch=10, total_steps=100)  # another process
    again.rewind(20)
    assert [r["step"] for r in run_folder.read_metrics(tmp_path)] == [10, 20]
    again.write(line(30, lr=0.0))
    assert capsys.readouterr().err == "" and again.told == 1
    again.write(line(40, lr=0.0, spread=0.001))
    assert "warning: step 40: collapsed feature" in capsys.readouterr().err and again.told == 2

    earlier = Records(tmp_path, SETTINGS, loggers=[], steps_per_epoch=10, total_steps=100)
    earlier.rewind(10)  # to before it was said
    earlier.write(line(20, lr=0.0))
    assert "learning rate 0" in capsys.readouterr().err


def test_without_a_folder_symptoms_are_said_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    records = Records(None, SETTINGS, queue=512, steps_per_epoch=10, total_steps=100)
    records.write(line(10))
    records.write(line(20))
    records.picture("views", np.zeros((4, 4, 3), np.uint8), 0)
    assert capsys.readouterr().err.count("queue longer than the run: queue.size=512 takes 64 steps") == 1


class Noted:
    """A logger that remembers."""

    made: list[Noted] = []

    def __init__(self, out: Path, settings: dict[str, Any], resumed: int | None):
        self.opened, self.calls = (out, dict(settings), resumed), []
        Noted.made.append(self)

    def write(self, record: dict[str, Any], names: list[str]) -> None:
        self.calls.append((record["kind"], record["step"], sorted(names)))

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        self.calls.append((name, step, pixels.shape))

    def close(self) -> None:
        self.calls.append("close")

    def finish(self) -> None:
        self.calls.append("finish")


def test_loggers_get_numbers_pictures_and_where_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Noted, "made", [])
    monkeypatch.setitem(LOGGERS, "tensorboard", Noted)
    records = Records(tmp_path, SETTINGS)
    records.rewind(7)
    assert not Noted.made  # a run that writes nothing opens nothing
    records.write(line(10, collapsed=True, note="text"))
    records.write({"kind": "eval", "step": 10, "epoch": 1, "rank1": 0.5, "queries": 9}, ["rank1"])
    records.picture("views", np.zeros((4, 5, 3), np.uint8), 10)
    records.close()
    records.finish()
    (noted,) = Noted.made
    assert noted.opened == (tmp_path, SETTINGS, 7)
    assert noted.calls == [
        ("train", 10, ["collapsed", "loss", "lr"]), ("eval", 10, ["rank1"]), ("views", 10, (4, 5, 3)), "close", "finish",
    ]  # fmt: skip
    assert (
        set(LOGGERS) == {"tensorboard", "csv", "wandb"}
        and set(LOGGERS) > PICTURES
        and not Records(tmp_path, loggers=["csv"]).takes_pictures
    )


def test_a_missing_package_names_the_key_and_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_logger.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^run.loggers: wandb is named .*: pip install wandb, or leave it out"):
        Records(None, loggers=["csv", "wandb"])
    Records(None, loggers=["csv"])


class Views:
    """Batches of a loader of one's own."""

    steps_per_epoch = 4

    def batches(self, start_step: int, stop_step: int):
        for step in range(start_step, stop_step):
            yield small_methods.batch(4, SIDE, seed=step)


@pytest.mark.parametrize("name", ["moco", "simclr", "byol"])
def test_a_trainer_tells_its_records_the_queue_and_the_batch(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A queue that is longer than the run, where there is one."""
    method = small_methods.build_by_name(name, Trunk("resnet18_w8_s16"), SIDE)
    trainer = Trainer(method, Views(), epochs=1, optim=OptimConfig(lr=0.01), run=RunConfig(log_every=1, loggers=()), device="cpu")
    trainer.fit()
    assert trainer.records.settings["batch_size"] == 4
    queue = method.queue.size if name == "moco" else None
    assert trainer.records.queue == queue
    assert capsys.readouterr().err.count("queue longer than the run") == int(name == "moco" and queue / 4 > 2)
