"""Extraction in file order, and what keeps the features of a run: the right key, no half or damaged file taken for a whole one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from engine.config import Config, from_yaml
from engine.data.catalog import ImageList, load
from engine.errors import BrokenFile
from engine.evaluation import features
from engine.evaluation.features import extract, key, of_run
from engine.pretrained.run import Run

CPU = torch.device("cpu")


class Mean(nn.Module):
    """Stand-in network: the mean colour of each half of the image, scaled; notes modes and sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.BatchNorm2d(3)
        self.scale = nn.Parameter(torch.ones(()))
        self.modes: list[tuple[bool, bool]] = []
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.modes.append((self.training, self.inner.training))
        self.sizes.append(tuple(images.shape))
        half = images.shape[3] // 2
        return self.scale * torch.cat([images[..., :half].mean((2, 3)), images[..., half:].mean((2, 3))], 1)


@pytest.fixture
def images(tmp_path: Path) -> ImageList:
    generator = np.random.default_rng(0)
    for i in range(8):
        folder = tmp_path / "photos" / "train" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (48, 60, 3)).astype(np.uint8)).save(folder / f"{i}.png")
    return load("folder", tmp_path / "photos", progress=False).train


@pytest.fixture
def cfg() -> Config:
    return from_yaml("data: {name: folder, image_size: 32, workers: 0}\nmethod: {name: moco}\neval: {batch_size: 3}")


def test_extract_in_file_order_in_eval_mode_and_as_it_was_afterwards(images: ImageList, cfg: Config):
    network = Mean().train()
    network.inner.eval()
    rows = extract(network, images, cfg, CPU)
    assert network.sizes == [(3, 3, 32, 32), (3, 3, 32, 32), (2, 3, 32, 32)] and set(network.modes) == {(False, False)}
    assert network.training and not network.inner.training
    one_by_one = extract(network, images, replace(cfg, eval=replace(cfg.eval, batch_size=1)), CPU)
    assert rows.shape == (8, 6) and rows.dtype == torch.float32 and torch.allclose(rows, one_by_one, atol=1e-6)


def test_extract_restores_modes_when_a_file_breaks(images: ImageList, cfg: Config):
    images.path(4).write_bytes(b"broken")
    network = Mean().train()
    with pytest.raises(BrokenFile, match="class1"):
        extract(network, images, cfg, CPU)
    assert network.training and network.inner.training


def kept(run: Run, images: ImageList, folder: Path) -> tuple[Tensor, bool]:
    """The features, and whether the network was asked for them."""
    before = len(run.network.sizes)
    return of_run(run, images, "train", folder, CPU), len(run.network.sizes) > before


def test_features_are_made_once_and_again_when_anything_changes(images: ImageList, cfg: Config, tmp_path: Path):
    run = Run(cfg, Mean().eval(), 0, 0)
    first, made = kept(run, images, tmp_path)
    assert made and (tmp_path / "features" / "train.safetensors").is_file()
    again, made = kept(run, images, tmp_path)
    assert not made and torch.equal(first, again)

    def changed(run: Run, images: ImageList = images) -> bool:
        return kept(run, images, tmp_path)[1] and not kept(run, images, tmp_path)[1]

    assert changed(run._replace(config=replace(cfg, eval=replace(cfg.eval, batch_size=4))))
    assert changed(run._replace(config=replace(cfg, data=replace(cfg.data, image_size=16))))
    assert changed(run._replace(config=replace(cfg, method=replace(cfg.method, minmax="image"))))
    assert changed(run, replace(images, fingerprint="another"))
    run.network.scale.data += 1
    assert changed(run)
    assert not changed(run._replace(config=replace(cfg, data=replace(cfg.data, root="elsewhere", workers=1), seed=7)))


def test_the_key_knows_the_precision(images: ImageList, cfg: Config, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(features.precision, "cpu_has_bf16", lambda: True)
    assert key(Mean(), images, cfg, CPU) != key(Mean(), images, replace(cfg, amp="bf16"), CPU)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_file_is_made_anew(
    damage: str, images: ImageList, cfg: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = Run(cfg, Mean().eval(), 0, 0)
    first, _ = kept(run, images, tmp_path)
    path = tmp_path / "features" / "train.safetensors"
    content = path.read_bytes()
    flipped = content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]
    path.write_bytes({"cut": content[:-40], "flipped": flipped, "empty": b""}[damage])
    again, made = kept(run, images, tmp_path)
    assert made and torch.equal(first, again) and "regenerated" in " ".join(capsys.readouterr().err.split())
    third, made = kept(run, images, tmp_path)  # the file is whole again; its bytes may order the metadata differently
    assert not made and torch.equal(first, third)


def test_a_folder_that_cannot_be_written_to_keeps_nothing(
    images: ImageList, cfg: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "features").write_text("a file in the way")
    rows, made = kept(Run(cfg, Mean().eval(), 0, 0), images, tmp_path)
    assert made and rows.shape == (8, 6) and "not kept" in " ".join(capsys.readouterr().err.split())
