"""Settings that were made apart, together: whatever is combined, a run that died at any step continues bit-identically."""

from __future__ import annotations

import copy
import csv
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from small_methods import batch, build_by_name
from torch import Tensor

from engine import run as engine_run
from engine import run_folder
from engine.config import OptimConfig
from engine.train import main
from engine.training import checkpoint, optim
from engine.training.log import RunLog
from engine.training.precision import Precision
from engine.training.step import Step
from ppssl.encoder import Trunk

METHODS = (
    "moco", "lcr", "lcr method.variant=guided", "ppssl", "ppssl method.variant=guided", "ldfs", "simclr", "byol",
)  # fmt: skip
OPTIONS = (
    "optim.name=adamw optim.lr=1e-3", "optim.name=lars optim.lr=0.3", "optim.warmup=0.5", "optim.warmup=1.5", "optim.clip=0.5",
    "optim.decay_norms=false", "optim.layer_decay=0.7", "optim.schedule=constant", "encoder.freeze=[stem]", "encoder.freeze=[bn]",
    "encoder.freeze=[stem,stage1,layer2]", "encoder.freeze=[layer2,bn]", "encoder.head=mlp3_bn", "bn.groups=2", "bn.sync=true",
    "contrast.negatives=batch", "contrast.negatives=both", "contrast.symmetric=true", "contrast.gradient=both",
    "queue.start=empty", "queue.size=auto", "queue.exclude_same_image=true", "ema.schedule=cosine", "ais.target=image",
    "ais.target=relations", "ais.warmup=0.5", "teacher.view=query", "teacher.view=clean", "iadm.cam_temperature=0.1",
    "iadm.image=clean", "iadm.sources=[image,layer1]", "iadm.sources=[layer4]", "method.mask_reach=branch",
    "eval.keep_best=rank1", "eval.keep_best=knn_top1 eval.patience=1", "data.fraction=0.75", "data.classes=[0*]",
)  # fmt: skip
RECIPE = """\
epochs: 2
batch_size: 4
encoder: {arch: resnet18_w8_s16, weights: none, dim: 8}
queue: {size: 16}
ema: {decay: 0.9}
teacher: {model: birds, weights: birds}
data: {name: folder, root: ROOT, image_size: 32, workers: 0, loader: torch, resident: off}
run: {log_every: 1, save_every_steps: 1, keep: 9, device: cpu, loggers: [csv]}
eval: {batch_size: 16}
"""


def draw_combinations(seed: int, count: int) -> list[tuple[str, ...]]:
    """Each method in turn with two to five options; of two values of one key the later counts."""
    rng = random.Random(seed)
    found = []
    for i in range(count):
        drawn = " ".join(["method.name=" + METHODS[i % len(METHODS)], *rng.sample(OPTIONS, rng.randint(2, 5))])
        found.append(tuple({text.partition("=")[0]: text for text in drawn.split()}.values()))
    return found


def differing(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two checkpoints differ, their configs (which name the run folder) aside."""
    if isinstance(a, Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        return [place for key in a if key != "info" for place in differing(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        return [place for i in range(len(a)) for place in differing(a[i], b[i], f"{where}/{i}")]
    return [] if a == b else [where]


def rows(out: Path) -> list[dict[str, str]]:
    """The lines of training of metrics.csv, without what the clock says."""
    with (out / "metrics.csv").open(newline="") as file:
        return [
            {name: value for name, value in row.items() if name not in ("seconds", "images_per_s", "data_wait")}
            for row in csv.DictReader(file)
            if row["kind"] == "train"
        ]


@pytest.mark.parametrize("settings", draw_combinations(seed=0, count=16), ids=" ".join)
def test_a_run_that_died_at_a_step_ends_as_the_one_that_did_not(
    settings: tuple[str, ...], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PPSSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(engine_run, "write_report", lambda folder, device: None)
    recipe, whole, parts = tmp_path / "tiny.yaml", tmp_path / "whole", tmp_path / "parts"
    recipe.write_text(RECIPE.replace("ROOT", str(photos)))
    arguments = ["--cfg", str(recipe), *settings]
    assert main([*arguments, "--out", str(whole)]) == 0
    shutil.copytree(whole, parts)
    saved = checkpoint.list_checkpoints(parts / "checkpoints")
    for path in saved[random.Random(" ".join(settings)).randrange(1, len(saved)) :]:
        path.unlink()
    assert main([*arguments, "--out", str(parts)]) == 0
    (first, second) = (checkpoint.load(checkpoint.list_checkpoints(out / "checkpoints")[-1]) for out in (whole, parts))
    assert first["step"] == len(saved) and differing(first, second) == []
    assert rows(whole) == rows(parts) and len(rows(whole)) == len(saved)
    for name in ("weights.safetensors", "best.safetensors"):
        assert (whole / name).is_file() == (parts / name).is_file()
        assert not (whole / name).is_file() or (whole / name).read_bytes() == (parts / name).read_bytes()


def test_a_signal_in_the_last_step_does_not_cost_the_last_evaluation(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PPSSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(engine_run, "write_report", lambda folder, device: None)
    (tmp_path / "tiny.yaml").write_text(RECIPE.replace("ROOT", str(photos)))
    add = RunLog.add

    def add_then_ctrl_c(self: RunLog, output: Any, *, images: int) -> None:
        add(self, output, images=images)
        seen.append(output)
        if len(seen) == self.total_steps:
            signal.raise_signal(signal.SIGINT)

    seen: list[Any] = []
    monkeypatch.setattr(RunLog, "add", add_then_ctrl_c)
    settings = "method.name=moco", "eval.keep_best=rank1"
    assert main(["--cfg", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "run"), *settings]) == 0
    evaluated = [r["epoch"] for r in run_folder.read_metrics(tmp_path / "run") if r["kind"] == "validation"]
    assert evaluated == [0, 1, 2]


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_scaled_losses_continue_bit_identically_past_an_overflow(name: str) -> None:
    """fp16's scaler on a CPU: the scale, its growth tracker and the optimizer's own state are part of a checkpoint."""
    config = OptimConfig(name=name, lr=1e-3, decay_norms=False, layer_decay=0.5, clip=0.5)  # type: ignore[arg-type]

    def new() -> Step:
        torch.manual_seed(0)
        trunk = Trunk("resnet18_w8_s16")
        trunk.freeze(("stem", "layer2"))
        method = build_by_name("moco", trunk, side=32).train()
        scaled = Precision(torch.device("cpu"), None, True, "float32, scaled as fp16 is")
        return Step(method, optim.build(method, config), lr=lambda s: 1e-3, decay=0.9, precision=scaled, total_steps=6, clip=0.5)

    def advance(step: Step, numbers: range) -> Step:
        for number in numbers:
            made = batch(side=32, seed=number)
            if number == 2:
                made.x_q.fill_(float("inf"))
            assert float(step(made).stats["skipped"]) == (number == 2)
        return step

    def state(step: Step) -> dict[str, Any]:
        return copy.deepcopy(step.state_dict() | {"method": step.method.state_dict()})

    whole, begun = advance(new(), range(6)), state(advance(new(), range(3)))
    continued = new()
    continued.method.load_state_dict(begun["method"])
    continued.load_state_dict(begun)
    assert begun["scaler"]["scale"] == 2.0**15 and differing(state(whole), state(advance(continued, range(3, 6)))) == []


def test_a_larger_patience_and_more_epochs_continue_the_run_that_had_both_from_the_start(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PPSSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(engine_run, "write_report", lambda folder, device: None)
    (tmp_path / "tiny.yaml").write_text(RECIPE.replace("ROOT", str(photos)))
    same = "optim.name=adamw", "optim.lr=1e-4", "optim.schedule=constant", "optim.warmup=1", "optim.layer_decay=0.5"
    same += "encoder.freeze=[stem,bn]", "contrast.symmetric=true", "eval.keep_best=rank1", "method.name=moco"

    def train(out: str, *settings: str) -> dict[str, Any]:
        assert main(["--cfg", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / out), *same, *settings]) == 0
        return checkpoint.load(checkpoint.list_checkpoints(tmp_path / out / "checkpoints")[-1])

    long = train("long", "epochs=6")
    early = train("grown", "epochs=4", "eval.patience=1")
    assert early["step"] < 4 * early["steps_per_epoch"] and early["best"]["since"] == 1
    assert train("grown", "epochs=4", "eval.patience=9")["epoch"] == 4
    grown = train("grown", "epochs=6", "eval.patience=9")
    assert differing(long, grown) == []
    assert rows(tmp_path / "long") == rows(tmp_path / "grown")
    assert (tmp_path / "long/best.safetensors").read_bytes() == (tmp_path / "grown/best.safetensors").read_bytes()
