"""The resolver of RUN|WEIGHTS: a run, a weights file, timm's name; overrides and what they may be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from made_runs import exported_run, reported_run

import engine
from engine.evaluation.source import open_source, split_overrides
from engine.pretrained import export

CPU = torch.device("cpu")
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def run(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PPSSL_CACHE", str(tmp_path / "cache"))
    return reported_run(tmp_path / "run", photos, maps=False)


def test_a_run_and_its_weights_file_are_one_network(run: Path, photos: Path, tmp_path: Path) -> None:
    of_run = open_source(run, CPU, overrides=["eval.batch_size=5", "data.image_size=48"])
    assert (of_run.model, of_run.folder, of_run.run.epoch) == ("run", run, 4)
    assert of_run.run.config.eval.batch_size == 5 and of_run.run.config.data.image_size == 48
    of_file = open_source(run / "weights.safetensors", CPU, cfg=str(run / "config.yaml"))
    assert of_file.model == "weights" and of_file.run.network.mask is not None
    assert torch.equal(of_run.run.network.features(X), of_file.run.network.features(X))
    alone = open_source(run / "weights.safetensors", CPU, overrides=["encoder.arch=resnet18_w8_s16", "method.variant=guided"])
    assert torch.equal(of_run.run.network.features(X), alone.run.network.features(X))


def test_other_data_by_a_recipe(run: Path, photos: Path, tmp_path: Path) -> None:
    config = open_source(run, CPU, cfg="cub", overrides=[f"data.root={tmp_path}", "data.crop_banner=false"]).run.config
    assert (config.data.name, config.data.root, config.data.image_size) == ("cub", str(tmp_path), 32)
    assert config.encoder.arch == "resnet18_w8_s16" and config.data.workers == 0
    assert open_source(run, CPU, cfg="cub", overrides=["data.image_size=64"]).run.config.data.image_size == 64


def test_timm_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPSSL_CACHE", str(tmp_path / "cache"))
    found = open_source("timm/mobilenetv3_small_050", CPU, overrides=["encoder.weights=none"])
    assert found.model == "weights" and found.run.config.data.image_size == 224 and not found.run.network.training
    again = open_source("timm/mobilenetv3_small_050", CPU, overrides=["encoder.weights=none", "data.image_size=64"])
    assert again.run.config.data.image_size == 64
    assert torch.equal(found.run.network.features(X), again.run.network.features(X))
    with pytest.raises(ValueError, match="is named already"):
        open_source("timm/mobilenetv3_small_050", CPU, overrides=["encoder.arch=resnet50"])
    with pytest.raises(ValueError, match="has no model"):
        open_source("timm/mobilenet_of_nobody", CPU)


def test_a_model_folder_needs_its_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPSSL_CACHE", str(tmp_path / "cache"))
    folder = export(exported_run(tmp_path / "run", arch="resnet18", method="moco"), "huggingface", tmp_path / "model")
    found = open_source(folder, CPU, overrides=["encoder.arch=resnet18"])
    assert found.model == "weights"
    torch.testing.assert_close(found.run.network.features(X), engine.load(tmp_path / "run").features(X))
    with pytest.raises(ValueError, match=r"model is no run; .*--cfg cub\.yaml, or the architecture"):
        open_source(folder, CPU)


def test_what_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run folder or a weights file"):
        open_source(tmp_path / "absent", CPU)
    with pytest.raises(ValueError, match="evaluated as it was trained"):
        open_source(run, CPU, overrides=["encoder.arch=resnet50"])
    with pytest.raises(ValueError, match=r"--cfg cub.yaml, or the architecture"):
        open_source(run / "weights.safetensors", CPU)


def test_overrides_anywhere_on_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").mkdir()
    line = ["run", "data.root=/x", "a=b", "--out", "e.npz", "--amp=bf16", "amp=fp16"]
    assert split_overrides(line) == (["run", "a=b", "--out", "e.npz", "--amp=bf16"], ["data.root=/x", "amp=fp16"])
