"""Feature extraction and ``python -m engine.evaluate``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from engine import build
from engine.checkpoint import save_weights
from engine.config import Config, from_yaml, to_yaml
from engine.data.catalog import BrokenFile, load
from engine.evaluate import evaluate, main
from engine.protocols.features import extract

CPU = torch.device("cpu")


class Mean(nn.Module):
    """Stand-in network: the mean colour of each half of the image, and the autocast type that it was run under."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.BatchNorm2d(3)
        self.modes: list[tuple[bool, bool]] = []
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.modes.append((self.training, self.inner.training))
        self.sizes.append(tuple(images.shape))
        half = images.shape[3] // 2
        return torch.cat([images[..., :half].mean((2, 3)), images[..., half:].mean((2, 3))], 1)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A labelled folder: three colours, of which one class has a single test image."""
    root = tmp_path / "photos"
    generator = np.random.default_rng(0)
    for split, counts in (("train", (2, 2, 2)), ("test", (3, 4, 1))):
        for label, count in enumerate(counts):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 40, (48, 60, 3)) + 200 * np.eye(3)[label]
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


def small_config(root: Path) -> Config:
    data = f"data: {{name: folder, root: '{root}', image_size: 32, workers: 0}}\n"
    network = "method: {name: moco}\nencoder: {arch: resnet18_w8, weights: none, dim: 8}\n"
    return from_yaml(data + network + "eval: {batch_size: 3}\nbatch_size: 2\nqueue: {size: 4, dtype: float32}")


def test_evaluate_a_network(photos: Path):
    images = load("folder", photos, progress=False).test
    network = Mean().train()
    network.inner.eval()
    result = evaluate(network, images, small_config(photos), CPU)
    assert (result["rank1"], result["rank5"], result["mAP"]) == (1.0, 1.0, 1.0)
    assert (result["queries"], result["excluded"], result["images"], result["classes"]) == (7, 1, 8, 3)
    assert result["feature"] == "l2(gap(F)), 6-d" and "leave-one-out" in result["protocol"]
    assert json.loads(json.dumps(result)) == result
    # File order at eval.batch_size, in eval mode, and every module left as it was found.
    assert network.sizes == [(3, 3, 32, 32), (3, 3, 32, 32), (2, 3, 32, 32)]
    assert set(network.modes) == {(False, False)}
    assert network.training and not network.inner.training


def test_extract_restores_modes_when_a_file_breaks(photos: Path):
    images = load("folder", photos, progress=False).test
    images.path(4).write_bytes(b"broken")
    network = Mean().train()
    with pytest.raises(BrokenFile, match="class1"):
        extract(network, images, small_config(photos), CPU)
    assert network.training and network.inner.training


def test_evaluate_without_labels(tmp_path: Path, photos: Path):
    flat = load("folder", photos / "test" / "class0", progress=False).train
    assert flat.labels is None
    with pytest.raises(ValueError, match="no labels"):
        evaluate(Mean(), flat, small_config(photos), CPU)


@pytest.fixture
def run(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder as training leaves it, with random weights."""
    monkeypatch.setenv("PPSSL_CACHE", str(tmp_path / "cache"))
    cfg = small_config(photos)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(cfg))
    network = build.method(cfg, None).network
    save_weights(folder / "weights.safetensors", network.weights(), {"step": "12", "epoch": "3"})
    return folder


def test_command_prints_and_writes(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert main([str(run)]) == 0
    written = json.loads((run / "retrieval.json").read_text())
    assert (written["epoch"], written["step"], written["split"], written["data"]) == (3, 12, "test", "folder")
    shown = capsys.readouterr().err
    for word in ("leave-one-out", "l2(gap(F))", "test", f"{100 * written['rank1']:.2f} %", "1 alone", "retrieval.json"):
        assert word in shown
    assert main([str(run), "--out", str(tmp_path / "mine.json")]) == 0
    again = json.loads((tmp_path / "mine.json").read_text())
    assert {**again, "seconds": 0} == {**written, "seconds": 0}


def test_command_says_what_is_missing(run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(tmp_path / "nothing")]) == 1
    assert "not a run folder" in capsys.readouterr().err

    cfg = from_yaml(run / "config.yaml")
    flat = replace(cfg, data=replace(cfg.data, root=str(photos / "test" / "class1")))
    (run / "config.yaml").write_text(to_yaml(flat))
    assert main([str(run)]) == 1
    assert "no labelled test split" in capsys.readouterr().err

    (run / "weights.safetensors").unlink()
    assert main([str(run)]) == 1
    assert "weights.safetensors" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
