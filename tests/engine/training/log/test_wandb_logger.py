"""Weights & Biases without a network: a run has one id, however often it is resumed, and offline runs can be sent later."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import ConfigError
from engine.training.log.records import Records

LINE = {"kind": "train", "epoch": 0, "loss": 1.0, "lr": 0.1}
SETTINGS = {"optim.lr": 0.1, "eval.protocols": ("retrieval", "knn"), "batch_size": 8}


class FakeRun:
    offline, url = False, "https://wandb.example/run"

    def __init__(self, options: dict[str, Any]):
        self.options, self.logged, self.metrics, self.finished = options, [], [], 0
        self.dir = str(options["dir"] / "wandb/run/files")

    def define_metric(self, name: str, step_metric: str) -> None:
        self.metrics.append((name, step_metric))

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    made: list[FakeRun] = []

    class Error(Exception):
        pass

    def init(**options: Any) -> FakeRun:
        if options["project"] == "refused":
            raise Error("api_key not configured\n(no-tty)")
        made.append(FakeRun(options))
        return made[-1]

    fake = types.SimpleNamespace(init=init, Error=Error, Settings=lambda **kw: kw, Image=lambda pixels: ("image", pixels.shape))
    fake.__spec__ = types.SimpleNamespace(name="wandb")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in ("WANDB_PROJECT", "WANDB_ENTITY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    return made


def test_numbers_pictures_and_the_configuration(runs: list[FakeRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = Records(tmp_path / "mine", SETTINGS, loggers=["wandb"])
    (tmp_path / "mine").mkdir()
    assert not runs
    records.write(LINE | {"step": 10})
    records.picture("views", np.zeros((2, 3, 3), np.uint8), 10)
    records.close()
    records.write({"kind": "eval", "step": 10, "epoch": 1, "rank1": 0.5, "queries": 3}, ["rank1"])
    records.finish()
    (run,) = runs
    assert run.options["project"] == "ppssl" and run.options["name"] == "mine" and run.options["resume"] == "allow"
    assert run.options["config"] == {"optim.lr": 0.1, "eval.protocols": ["retrieval", "knn"], "batch_size": 8}
    assert run.options["settings"]["console"] == "off" and run.metrics == [("*", "step")]
    assert run.logged == [
        {"train/loss": 1.0, "train/lr": 0.1, "epoch": 0, "step": 10},
        {"views": ("image", (2, 3, 3)), "step": 10},
        {"eval/rank1": 0.5, "epoch": 1, "step": 10},
    ]
    assert run.finished == 1 and "wandb: https://wandb.example/run" in capsys.readouterr().err


def test_a_resumed_run_continues_the_id_project_and_name(
    runs: list[FakeRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "birds")
    monkeypatch.setenv("WANDB_ENTITY", "lab")
    Records(tmp_path, SETTINGS, loggers=["wandb"]).write(LINE | {"step": 10})
    monkeypatch.setenv("WANDB_PROJECT", "elsewhere")
    again = Records(tmp_path, SETTINGS, loggers=["wandb"])
    again.rewind(10)
    again.write(LINE | {"step": 20})
    first, second = ({k: r.options[k] for k in ("id", "project", "entity", "name")} for r in runs)
    assert first == second == json.loads((tmp_path / "wandb.json").read_text())
    assert first["project"] == "birds" and first["entity"] == "lab" and len(first["id"]) == 8
    other = tmp_path / "other"
    other.mkdir()
    Records(other, SETTINGS, loggers=["wandb"]).write(LINE | {"step": 10})
    assert runs[2].options["id"] != first["id"]


def test_what_goes_wrong_names_key_and_remedy(runs: list[FakeRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "refused")
    with pytest.raises(
        ConfigError, match=r"run.loggers: .*\(api_key not configured \(no-tty\)\); run 'wandb login', or set WANDB_MODE"
    ):
        Records(tmp_path, SETTINGS, loggers=["wandb"]).write(LINE | {"step": 10})
    assert not (tmp_path / "wandb.json").exists()
    (tmp_path / "wandb.json").write_text("{half")
    with pytest.raises(ConfigError, match="wandb.json cannot be read .*; remove it"):
        Records(tmp_path, SETTINGS, loggers=["wandb"]).write(LINE | {"step": 10})


def test_training_goes_on_where_wandb_has_ended(
    runs: list[FakeRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records = Records(tmp_path, SETTINGS, loggers=["wandb", "csv"])
    records.write(LINE | {"step": 10})

    def gone(values: dict[str, Any]) -> None:
        raise sys.modules["wandb"].Error("the service has ended")

    monkeypatch.setattr(runs[0], "log", gone)
    for step in (20, 30):
        records.write(LINE | {"step": step})
    records.finish()
    assert capsys.readouterr().err.count("the service has ended; nothing more is sent of this run") == 1
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 4 and runs[0].finished == 0


def test_an_offline_run_of_the_package_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_ERROR_REPORTING", "false"), ("WANDB_CONFIG_DIR", str(tmp_path / "c"))):
        monkeypatch.setenv(name, value)
    out = tmp_path / "mine"
    out.mkdir()
    for step in (10, 20):
        records = Records(out, SETTINGS, loggers=["wandb"])
        records.write(LINE | {"step": step})
        records.picture("views", np.zeros((2, 3, 3), np.uint8), step)
        records.finish()
    run_id = json.loads((out / "wandb.json").read_text())["id"]
    folders = list((out / "wandb").glob("offline-run-*"))
    assert folders and all(folder.name.endswith(run_id) for folder in folders)
    assert all(list(folder.glob(f"run-{run_id}*.wandb")) for folder in folders)
    assert "wandb: offline; wandb sync --append" in capfd.readouterr().err
