"""A run that is continued with another length, and which settings may change with it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from made_runs import CLASSES, draw

from engine import run_folder
from engine.config import Config, flatten, from_yaml, keys, to_yaml
from engine.errors import ConfigError
from engine.train import main
from engine.training import checkpoint
from engine.training.resume import refuse_change, refuse_shorter, say_changes
from ppssl.settings import replace_keys

RECIPE = """\
epochs: 2
batch_size: 4
method: {name: moco}
encoder: {arch: resnet18_w8_s16, weights: none, dim: 8}
queue: {size: 8}
data: {name: folder, root: photos, image_size: 32, workers: 0, loader: torch, resident: off}
optim: {schedule: constant}
run: {log_every: 1, keep: 9, device: cpu}
"""
EPOCH = 3  # steps


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve labelled training images and six test images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PPSSL_CACHE", str(tmp_path / "cache"))
    for colour, name in enumerate(CLASSES):
        for number in range(6):
            draw(tmp_path / "photos" / ("train" if number < 4 else "test") / name / f"{number}.png", colour, number)
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    return tmp_path / "photos"


def train(*argv: str) -> int:
    return main(["--cfg", "tiny.yaml", *argv])


def said(capfd: pytest.CaptureFixture) -> str:
    return " ".join(capfd.readouterr().err.split())


def newest(out: str) -> dict:
    return checkpoint.load(checkpoint.list_checkpoints(Path(out) / "checkpoints")[-1])


def assert_same_weights(a: str, b: str) -> None:
    states = [newest(out) for out in (a, b)]
    assert states[0]["step"] == states[1]["step"]
    methods = [state["method"] for state in states]
    assert [name for name in methods[0] if not torch.equal(methods[0][name], methods[1][name])] == []
    momenta = [state["optimizer"]["state"] for state in states]
    assert all(torch.equal(momenta[0][i]["momentum_buffer"], momenta[1][i]["momentum_buffer"]) for i in momenta[0])
    assert torch.equal(states[0]["rng"]["cpu"], states[1]["rng"]["cpu"])


@pytest.mark.parametrize("cut", [EPOCH, 2 * EPOCH], ids=["in the middle", "finished"])
def test_with_a_constant_rate_a_longer_run_is_the_one_that_was_long_from_the_start(
    cut: int, photos: Path, capfd: pytest.CaptureFixture
) -> None:
    assert train("--out", "long", "epochs=4") == 0
    assert train("--out", "grown") == 0
    for path in checkpoint.list_checkpoints(Path("grown/checkpoints")):
        if path.name > f"step_{cut:09d}.pt":
            path.unlink()
    capfd.readouterr()
    assert train("--out", "grown", "epochs=4") == 0
    text = said(capfd)
    assert "epochs: 4 from here on, 2 until" in text and "learning rate" not in text
    assert_same_weights("long", "grown")
    records = run_folder.read_metrics(Path("grown"))
    whole = run_folder.read_metrics(Path("long"))
    assert [r["epoch"] for r in records if r["kind"] == "eval"] == ([0, 2, 4] if cut == 2 * EPOCH else [0, 4])
    lines = [[(r["step"], r["epoch"], r["loss"]) for r in some if r["kind"] == "train"] for some in (records, whole)]
    assert lines[0] == lines[1] and len(lines[0]) == 4 * EPOCH
    assert sum(r["kind"] == "start" for r in records) == 1 and records[-1]["kind"] == "summary" and records[-1]["step"] == 4 * EPOCH
    assert from_yaml(Path("grown/config.yaml")).epochs == 4
    before = list(records)
    assert train("--out", "grown", "epochs=4") == 0  # it is finished again
    assert "was finished before" in said(capfd) and run_folder.read_metrics(Path("grown")) == before


def test_with_a_cosine_the_rate_before_and_after_and_its_formula_are_said(photos: Path, capfd: pytest.CaptureFixture) -> None:
    assert train("--out", "run", "optim.schedule=cosine") == 0
    capfd.readouterr()
    assert train("--out", "run", "optim.schedule=cosine", "epochs=4") == 0
    text = said(capfd)
    rate = 0.03 * (1 + math.cos(math.pi * 6 / 12)) / 2
    assert f"learning rate of step 7: {rate:.6g}, which was to be 0; from here on optim.schedule=cosine, lr * (1 + cos(pi" in text
    assert "/ 2, total_steps 12" in text
    lines = {r["step"]: r["lr"] for r in run_folder.read_metrics(Path("run")) if r["kind"] == "train"}
    assert lines[7] == pytest.approx(rate) and lines[6] == pytest.approx(0.03 * (1 + math.cos(math.pi * 5 / 6)) / 2)
    capfd.readouterr()
    Path("run/checkpoints/step_000000012.pt").unlink()
    assert train("--out", "run", "optim.schedule=constant", "epochs=4", "optim.lr=0.01") == 0
    text = said(capfd)
    assert "optim.schedule: 'constant' from here on, 'cosine' until" in text and "optim.lr: 0.01 from here on" in text
    assert "learning rate of step 10: 0.01, which was to be" in text and "optim.schedule=constant, lr, total" in text


def test_a_warm_up_stays_as_long_as_it_was_in_epochs(photos: Path, capfd: pytest.CaptureFixture) -> None:
    settings = "optim.schedule=cosine", "optim.warmup=1"
    assert train("--out", "run", *settings) == 0
    capfd.readouterr()
    assert train("--out", "run", "epochs=4", *settings) == 0
    rate = 0.03 * (1 + math.cos(math.pi * (6 - 3) / (12 - 3))) / 2
    text = said(capfd)
    assert f"learning rate of step 7: {rate:.6g}, which was to be 0;" in text
    assert (
        "optim.schedule=cosine, lr * (1 + cos(pi * (step - 3) / (total_steps - 3))) / 2, total_steps 12, step counted from 0"
        in text
    )


def test_inside_a_warm_up_its_own_formula_is_said(capfd: pytest.CaptureFixture) -> None:
    then = replace_keys(Config(epochs=10), {"optim.warmup": 2.0, "optim.schedule": "constant"})
    state = {"step": 4, "steps_per_epoch": 3, "next": {"learning rate": 0.025}, "info": {"config": to_yaml(then)}}
    say_changes(state, Path("x.pt"), flatten(replace_keys(then, {"optim.lr": 0.6})), {"learning rate": 0.5}, 30)
    assert "learning rate of step 5: 0.5, which was to be 0.025; from here on" in (text := said(capfd))
    assert "optim.schedule=constant, lr * (step + 1) / 6, total_steps 30" in text and eval("0.6 * (4 + 1) / 6") == 0.5


def test_the_decay_of_the_momentum_network_is_said_too(photos: Path, capfd: pytest.CaptureFixture) -> None:
    assert train("--out", "run", "ema.schedule=cosine", "ema.decay=0.9") == 0
    capfd.readouterr()
    assert train("--out", "run", "ema.schedule=cosine", "ema.decay=0.9", "epochs=4") == 0
    text = said(capfd)
    assert "ema.decay of step 7: 0.95, which was to be 1; from here on ema.schedule=cosine, 1 - (1 - ema.decay) * (1" in text
    assert "learning rate" not in text


def test_fewer_epochs_than_are_done_are_refused_with_the_ways_on(photos: Path, capfd: pytest.CaptureFixture) -> None:
    assert train("--out", "run", "epochs=3") == 0
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    assert train("--out", "run", "epochs=2") == 2
    text = said(capfd)
    assert "epochs: 2, but run/checkpoints/step_000000009.pt has trained 9 steps, into epoch 3" in text
    assert "epochs=3 or more" in text and "encoder.weights=run/weights.safetensors" in text and "--out DIR" in text
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before
    Path("run/checkpoints/step_000000009.pt").unlink()
    assert train("--out", "run", "epochs=2") == 0  # what is left is what two epochs take
    assert "step_000000006.pt at step 6 of 6" in said(capfd)
    assert [r["step"] for r in run_folder.read_metrics(Path("run")) if r["kind"] == "summary"] == [6]


def test_a_step_inside_an_epoch_counts_as_begun() -> None:
    state = {"step": 7, "steps_per_epoch": 3, "epoch": 2}
    refuse_shorter({"epochs": 9}, {"epochs": 3}, state, Path("x.pt"))
    with pytest.raises(ConfigError, match="give epochs=3 or more"):
        refuse_shorter({"epochs": 9}, {"epochs": 2}, state, Path("x.pt"))
    with pytest.raises(ConfigError, match="give epochs=2 or more"):
        refuse_shorter({"epochs": 9}, {"epochs": 1}, {"step": 7, "epoch": 2}, Path("x.pt"))  # of an earlier version


def test_what_changes_what_is_learned_is_refused_with_the_ways_on(photos: Path, capfd: pytest.CaptureFixture) -> None:
    assert train("--out", "run") == 0
    capfd.readouterr()
    assert train("--out", "run", "contrast.temperature=0.1") == 2
    text = said(capfd)
    assert "contrast.temperature: the checkpoint" in text and "changes what is learned" in text
    assert "give contrast.temperature=0.2 to continue it, or --out DIR" in text
    assert "encoder.weights=run/weights.safetensors" in text
    assert train("--out", "next", "contrast.temperature=0.1", "encoder.weights=run/weights.safetensors") == 0  # as it says


def test_nothing_is_said_to_change_where_nothing_is_trained(photos: Path, capfd: pytest.CaptureFixture) -> None:
    assert train("--out", "run") == 0
    capfd.readouterr()
    assert train("--out", "run", "optim.lr=0.5", "amp=bf16") == 0
    text = said(capfd)
    assert "was finished before" in text and "from here on" not in text


def test_another_precision_and_queue_type_continue(photos: Path, capfd: pytest.CaptureFixture) -> None:
    assert train("--out", "run") == 0
    capfd.readouterr()
    assert train("--out", "run", "epochs=3", "amp=bf16", "queue.dtype=bfloat16") == 0
    text = said(capfd)
    assert "amp: 'bf16' from here on, None until" in text and "queue.dtype: 'bfloat16' from here on, 'float32'" in text
    state = newest("run")
    assert state["step"] == 3 * EPOCH and state["method"]["queue.rows"].dtype == torch.bfloat16


def test_warm_ups_that_are_a_fraction_of_the_run_are_said(capfd: pytest.CaptureFixture) -> None:
    def changes(step: int, epochs: int, values: dict) -> str:
        then = replace_keys(Config(epochs=10), values)
        now = flatten(replace_keys(then, {"epochs": epochs}))
        state = {"step": step, "steps_per_epoch": 10, "info": {"config": to_yaml(then)}}
        say_changes(state, Path("x.pt"), now, {}, 10 * epochs)
        return said(capfd)

    text = changes(30, 40, {"ais.warmup": 0.2, "ldfs.warmup": 0.5})
    assert "ais.warmup=0.2 is a fraction of the run: it ends at step 80, not 20; step 30 is done; it is warmed up again" in text
    assert "ldfs" not in text  # ppssl does not read it
    assert "it ends at step 80, not 20; step 90 is done" in changes(90, 40, {"ais.warmup": 0.2})
    assert "again" not in changes(10, 40, {"ais.warmup": 0.2})
    assert "warmup" not in changes(10, 40, {"ais.warmup": 0.0}) and changes(10, 10, {"ais.warmup": 0.2}) == ""
    assert "ldfs.warmup=0.5 is" in changes(30, 40, {"method.name": "ldfs", "ldfs.warmup": 0.5})


def test_a_file_that_was_recorded_by_a_relative_path_is_the_same_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refuse_change({"encoder.weights": "a/w.pth"}, {"encoder.weights": str(tmp_path / "a/w.pth")}, Path("x.pt"))
    with pytest.raises(ConfigError, match=r"encoder\.weights: the checkpoint"):
        refuse_change({"encoder.weights": "b/w.pth"}, {"encoder.weights": str(tmp_path / "a/w.pth")}, Path("x.pt"))
    assert keys()["encoder.weights"].resume == "refused"
