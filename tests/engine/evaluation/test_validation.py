"""A validation part of the training images: what is held out, and what a run makes of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_runs import CLASSES, draw

import engine
from engine import build, run_folder
from engine.config import Config, EvalConfig, from_yaml
from engine.data import catalog
from engine.data.catalog import Catalog
from engine.errors import ConfigError
from engine.evaluate import main as evaluate
from engine.evaluation import hold_out, validation
from engine.export import main as export
from engine.files import read_metadata
from engine.pretrained import best_of, load_weights
from engine.search import main as search
from engine.train import main
from engine.training import Stopped, checkpoint

CPU = torch.device("cpu")
RECIPE = """\
epochs: 4
batch_size: 4
method: {name: moco}
encoder: {arch: resnet18_w8_s16, weights: none, dim: 8}
queue: {size: 8}
data: {name: folder, root: photos, image_size: 32, workers: 0, loader: torch, resident: off}
run: {log_every: 2, keep: 9, device: cpu}
eval: {keep_best: rank1, every: 1}
"""


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six training and two test images in each of three classes, and a class of two training images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PPSSL_CACHE", str(tmp_path / "cache"))
    for colour, name in enumerate(CLASSES):
        for number in range(8):
            draw(tmp_path / "photos" / ("train" if number < 6 else "test") / name / f"{number}.png", colour, number)
    for number in range(2):
        draw(tmp_path / "photos/train/004.Rare" / f"{number}.png", 0, 20 + number)
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    return tmp_path / "photos"


def images(root: Path) -> Catalog:
    return catalog.load("folder", root, progress=False)


def held(root: Path, fraction: float, seed: int = 0, **options) -> Catalog:
    return hold_out(images(root), Config(seed=seed, eval=EvalConfig(validation=fraction)), **options)


def train(*argv: str) -> int:
    return main(["--cfg", "tiny.yaml", *argv])


def said(capfd: pytest.CaptureFixture) -> str:
    return " ".join(capfd.readouterr().err.split())


def values(monkeypatch: pytest.MonkeyPatch, *scripted: float) -> None:
    """What the validation part gives after epochs 1, 2, ...: an evaluation has its own tests."""
    evaluates = validation.Validation.__call__

    def scripted_call(self: validation.Validation, trainer: object) -> float:
        evaluates(self, trainer)
        return scripted[trainer.epoch - 1] if trainer.epoch else 0.0

    monkeypatch.setattr(validation.Validation, "__call__", scripted_call)


def test_what_is_held_out(photos: Path, capfd: pytest.CaptureFixture) -> None:
    whole, parts = images(photos), held(photos, 0.5, tell=True)
    assert set(parts.train.names).isdisjoint(parts.validation.names)
    assert sorted((*parts.train.names, *parts.validation.names)) == sorted(whole.train.names)
    per_class = Counter(parts.validation.classes[label] for label in parts.validation.labels.tolist())
    assert per_class == dict.fromkeys(CLASSES, 3)  # the class of two images stays whole
    assert (
        "9 photos in 3 classes held out of training, 45.0 % of the 20 labelled ones, at least 2 a class, drawn by seed 0; 1 class"
        in (said(capfd))
    )
    assert len(held(photos, 0.01).validation) == 6  # two a class at least
    for part in (parts.train, parts.validation):  # whole rows are taken
        for i, name in enumerate(part.names):
            j = whole.train.names.index(name)
            assert part.labels[i] == whole.train.labels[j] and part.file_sizes[i] == whole.train.file_sizes[j]
            assert np.array_equal(part.sizes[i], whole.train.sizes[j]) and part.plain[i] == whole.train.plain[j]
    assert len({whole.train.fingerprint, parts.train.fingerprint, parts.validation.fingerprint}) == 3
    assert held(photos, 0.5).validation.names == parts.validation.names != held(photos, 0.5, seed=1).validation.names
    assert held(photos, 0.0).validation is None


def test_what_is_drawn_depends_on_the_names_of_a_class_alone(photos: Path) -> None:
    before = set(held(photos, 0.34).validation.names)
    for number in range(6):
        draw(photos / "train/005.New" / f"{number}.png", 1, number)
    after = set(held(photos, 0.34).validation.names)
    assert before < after and all("005.New" in name for name in after - before)


def test_images_beside_the_labelled_ones_stay_in_training(photos: Path, tmp_path: Path) -> None:
    for number in range(3):
        draw(tmp_path / "more" / f"{number}.png", 0, 50 + number)
    found = catalog.load("folder", photos, extra_roots=[str(tmp_path / "more")], progress=False)
    parts = hold_out(found, Config(eval=EvalConfig(validation=0.5)))
    assert len(parts.validation) == 9 and parts.train.labels is None and len(parts.train) == len(found.train) - 9
    assert len(parts.labelled) == 11 and set(parts.labelled.names) < set(parts.train.names)


def test_without_labels_it_is_refused(photos: Path, capfd: pytest.CaptureFixture) -> None:
    flat = images(photos)
    flat = flat._replace(train=replace(flat.train, labels=None, classes=()))
    cfg = Config(eval=EvalConfig(validation=0.1))
    with pytest.raises(ConfigError, match=r"eval\.validation: 0\.1 of .* have no labels; leave both keys out"):
        hold_out(flat, cfg)
    assert hold_out(flat, cfg, needed=False) is flat
    few = images(photos)
    few = few._replace(train=validation.subset(few.train, np.arange(9)))
    with pytest.raises(ConfigError, match="1 class has at least 4 labelled training images"):
        hold_out(few, cfg)
    draw(Path("flat/a.png"), 0, 0)
    assert train("--out", "run", "data.root=flat") == 2 and not Path("run").exists()
    assert "have no labels" in said(capfd)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("eval: {keep_best: rank1, validation: 0}", r"eval\.keep_best: got 'rank1', needs a validation part"),
        ("eval: {keep_best: rank1, every: auto}", r"eval\.every: got 'auto', goes by the clock"),
        ("eval: {patience: 3}", r"eval\.patience: got 3, needs the measure"),
        ("eval: {keep_best: loss}", r"eval\.keep_best: got 'loss'"),
        ("eval: {validation: 0.7}", r"eval\.validation: got 0\.7, must be in \[0, 0\.5\]"),
    ],
)
def test_settings_that_do_not_go_together(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        from_yaml(text)


def test_what_the_measure_implies_is_decided_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    cfg = build.with_validation(from_yaml("eval: {keep_best: mAP}"))
    assert (cfg.eval.validation, cfg.eval.every) == (0.1, 1) and "eval.every: 1" in capsys.readouterr().err
    cfg = build.with_validation(from_yaml("eval: {keep_best: mAP, every: 3, validation: 0.2}"))
    assert (cfg.eval.validation, cfg.eval.every) == (0.2, 3) and capsys.readouterr().err == ""
    assert build.with_validation(Config()).eval == replace(Config().eval, validation=0.0)


@pytest.mark.parametrize("measure", ["rank1", "mAP", "knn_top1", "linear_top1"])
def test_every_measure_is_taken_on_the_held_out_part(measure: str, photos: Path) -> None:
    assert train("--out", "run", f"eval.keep_best={measure}", "epochs=1") == 0
    lines = [r for r in run_folder.read_metrics(Path("run")) if r["kind"] == "validation"]
    assert [(r["epoch"], r["split"], r["images"]) for r in lines] == [(0, "validation", 6), (1, "validation", 6)]
    assert all(0 <= r[measure] <= 1 for r in lines) and "validation" in run_folder.read_data(Path("run"))["lists"]
    about = best_of(Path("run"))
    assert about == {"measure": measure, "step": "3", "epoch": "1", "value": str(lines[1][measure])}


def test_the_best_weights_are_kept_and_taken_by_name(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    values(monkeypatch, 0.2, 0.6, 0.6, 0.1)
    assert train("--out", "run") == 0
    text = said(capfd)
    assert "best by validation rank1: epoch 2, 60.0 %, in best.safetensors; its rank1 on the test split" in text
    out, third = Path("run"), 3  # steps of an epoch: 14 images in batches of 4
    state = checkpoint.load(out / f"checkpoints/step_{2 * third:09d}.pt")["method"]
    best, last = (load_weights(out / f"{name}.safetensors") for name in ("best", "weights"))
    assert torch.equal(best["conv1.weight"], state["encoder_q.trunk.conv1.weight"])
    assert not torch.equal(best["conv1.weight"], last["conv1.weight"])
    assert read_metadata(out / "best.safetensors") == {"measure": "rank1", "step": "6", "epoch": "2", "value": "0.6"}
    assert "Best weights by validation rank-1: epoch 2, 60.0 % on the validation part" in (out / "report.html").read_text()

    assert torch.equal(engine.load(out, best=True).trunk.conv1.weight, best["conv1.weight"])
    assert torch.equal(engine.load(out).trunk.conv1.weight, last["conv1.weight"])
    assert evaluate(["run", "--best", "--protocol", "retrieval"]) == 0
    assert "those with the best validation rank1, of epoch 2, not the last weights, of epoch 4" in said(capfd)
    records = json.loads((out / "evaluation.json").read_text())
    (of_best,) = [r for r in records if r["model"] == "best"]
    tested = [r for r in run_folder.read_metrics(out) if r["kind"] == "eval" and r["epoch"] == 2]
    assert (of_best["epoch"], of_best["step"], of_best["own_data"]) == (2, 6, True)
    assert of_best["rank1"] == tested[0]["rank1"] and of_best["mAP"] == pytest.approx(tested[0]["mAP"])
    assert evaluate(["run", "--split", "validation", "--device", "cpu"]) == 0
    assert "the last weights, of epoch 4; --best takes those" in said(capfd)
    picture = str(photos / "test" / CLASSES[0] / "6.png")
    assert search(["run", picture, "--best", "--device", "cpu"]) == 0
    assert export(["run", "--to", "moco", "--best", "--out", "last"]) == 1  # of a width that moco does not know
    assert export(["run", "--to", "torch-export", "--best", "--out", "best.pt2"]) == 0
    assert json.loads(Path("best.pt2.json").read_text())["training"]["epoch"] == 2


def test_a_run_without_best_weights_says_so(photos: Path, capfd: pytest.CaptureFixture) -> None:
    (photos.parent / "tiny.yaml").write_text(RECIPE.replace("eval: {keep_best: rank1, every: 1}", ""))
    assert train("--out", "run", "epochs=1") == 0
    capfd.readouterr()
    assert evaluate(["run", "--best"]) == 1 and "has no best.safetensors: the run was trained without eval.keep_best" in said(capfd)
    assert evaluate(["run", "--split", "validation"]) == 1 and "held no part of its training images out" in said(capfd)
    assert train("--out", "run", "epochs=2", "eval.keep_best=rank1") == 2
    assert "eval.validation: the checkpoint" in said(capfd)


def test_a_run_that_no_longer_improves_ends_early(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    values(monkeypatch, 0.2, 0.5, 0.5, 0.4, 0.6, 0.6)
    assert train("--out", "run", "epochs=6", "eval.patience=2", "run.log_every=5") == 0
    text = said(capfd)
    assert "ended early at epoch 4 of 6: no better rank1 in 2 evaluations (eval.patience=2), the best was rank1 50.0 %" in text
    records = run_folder.read_metrics(Path("run"))
    assert records[-1]["kind"] == "summary" and records[-1]["ended_early"] and records[-1]["step"] == 12
    assert [r["epoch"] for r in records if r["kind"] == "eval"] == [0, 1, 2, 3, 4]
    assert [r["step"] for r in records if r["kind"] == "train"] == [5, 10, 12]  # the last line is written at the end
    assert "The run ended early" in Path("run/report.html").read_text()
    assert train("--out", "run", "epochs=6", "eval.patience=2") == 0
    assert "ended early at epoch 4 of 6" in (text := said(capfd)) and "was finished before" in text
    assert run_folder.read_metrics(Path("run")) == records
    assert train("--out", "run", "epochs=6", "eval.patience=3") == 0
    after = run_folder.read_metrics(Path("run"))
    assert [r["epoch"] for r in after if r["kind"] == "eval"] == [0, 1, 2, 3, 4, 5, 6]
    assert not after[-1]["ended_early"] and best_of(Path("run"))["epoch"] == "5"


@pytest.mark.parametrize("died", ["before the evaluation", "after it"])
def test_an_interrupted_run_ends_at_the_same_step_with_the_same_best(
    died: str, photos: Path, monkeypatch: pytest.MonkeyPatch, ctrl_c_at_first_save: Callable
) -> None:
    values(monkeypatch, 0.2, 0.5, 0.1, 0.4, 0.6, 0.6)
    settings = "epochs=6", "eval.patience=2", "run.save_every_steps=2"
    assert train("--out", "whole", *settings) == 0
    if died == "after it":
        assert ctrl_c_at_first_save() == []
        assert train("--out", "parts", *settings) == 130
    else:
        with monkeypatch.context() as patch:
            patch.setattr(validation.Validation, "after_epoch", _until(3, validation.Validation.after_epoch))
            assert train("--out", "parts", *settings) == 75
    assert train("--out", "parts", *settings) == 0
    states = [checkpoint.load(checkpoint.list_checkpoints(Path(out) / "checkpoints")[-1]) for out in ("whole", "parts")]
    assert states[0]["step"] == states[1]["step"] == 12 and states[0]["best"] == states[1]["best"]
    assert [n for n, t in states[0]["method"].items() if not torch.equal(t, states[1]["method"][n])] == []
    assert Path("whole/best.safetensors").read_bytes() == Path("parts/best.safetensors").read_bytes()
    lines = [[r["epoch"] for r in run_folder.read_metrics(Path(out)) if r["kind"] == "validation"] for out in ("whole", "parts")]
    assert lines == [[0, 1, 2, 3, 4]] * 2


def _until(epoch: int, hook: Callable) -> Callable:
    """``hook`` of a run that is ended from outside before it is called after ``epoch``."""

    def after_epoch(self: object, trainer: object) -> None:
        if trainer.epoch == epoch:
            raise Stopped(15, None)
        hook(self, trainer)

    return after_epoch
