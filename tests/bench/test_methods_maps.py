"""bench.methods.maps: how much of a map lies on the bird, and features pooled by the true silhouette."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bench.methods import maps
from bench.methods.maps import SilhouettePool, coverage, look, relative_mass_on_bird
from engine import build
from engine.config import Config, DataConfig, EncoderConfig, EvalConfig, MethodConfig, QueueConfig
from engine.data import catalog
from engine.synthetic import dataset
from ppssl.encoder import Trunk, global_average_pool


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> catalog.ImageList:
    root = dataset.generate(
        tmp_path_factory.mktemp("dataset") / "birds", train_per_species=1, test_per_species=2, workers=1, progress=False
    )
    return catalog.load("birds", root, cache_dir=None, progress=False).test


def test_relative_mass_on_the_bird() -> None:
    covered = torch.zeros(3, 8, 8)
    covered[:, :4] = 1  # the upper half
    flat, upper, nothing = torch.ones(4, 4), torch.zeros(4, 4), torch.zeros(4, 4)
    upper[:2] = 1
    assert relative_mass_on_bird(torch.stack([flat, flat, flat]), covered) == pytest.approx(1)
    assert relative_mass_on_bird(torch.stack([upper, upper, upper]), covered) == pytest.approx(2)
    assert relative_mass_on_bird(torch.stack([upper, flat, nothing]), covered) == pytest.approx((2 + 1 + 1) / 3)
    lower = 1 - upper
    assert relative_mass_on_bird(torch.stack([lower, upper + flat, 5 * upper]), covered) == pytest.approx((0 + 4 / 3 + 2) / 3)
    covered[2] = 0  # an image without a bird does not count
    assert relative_mass_on_bird(torch.stack([flat, upper, upper]), covered) == pytest.approx(1.5)


def test_coverage_is_that_of_the_clean_views_and_kept(images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    covered = coverage(images, config("moco"), tmp_path)
    assert covered.shape == (80, 32, 32) and covered.min() >= 0 and covered.max() <= 1 and 0.1 < covered.mean() < 0.6
    # the clean view shows the middle 224/256 of the picture
    (whole,) = dataset.silhouettes(images.root, images.names[:1])
    inner = torch.from_numpy(np.array(whole))[None, None, 8:-8, 8:-8].float() / 255
    assert float((F.adaptive_avg_pool2d(inner, 8) - F.adaptive_avg_pool2d(covered[:1, None], 8)).abs().mean()) < 0.03

    def refuse(*_):
        raise AssertionError("drawn again")

    monkeypatch.setattr(maps.dataset, "silhouettes", refuse)
    assert torch.equal(coverage(images, config("moco"), tmp_path), covered)


def test_other_images_have_no_coverage(images, tmp_path: Path) -> None:
    assert coverage(replace(images, root=tmp_path), config("moco"), tmp_path / "cache") is None


def test_pooling_by_the_silhouette() -> None:
    torch.manual_seed(0)
    trunk, x = Trunk("resnet18_w8_s16").eval(), torch.randn(5, 3, 32, 32)
    covered = torch.ones(5, 32, 32)
    covered[3:, :16] = 0
    net = SilhouettePool(trunk, covered)
    rows = torch.cat([net(x[:2]), net(x[2:])])  # in batches, in order
    feature = trunk(x)
    assert torch.allclose(rows[:3], F.normalize(global_average_pool(feature[:3]), dim=1), atol=1e-6)
    assert torch.allclose(rows[3:], F.normalize(feature[3:, :, 1:].mean((2, 3)), dim=1), atol=1e-6)


def config(name: str, **method) -> Config:
    return Config(
        batch_size=16,
        method=MethodConfig(name, **method),
        encoder=EncoderConfig("resnet18_w8_s16", "none", "mlp2", 8),
        queue=QueueConfig(32),
        data=DataConfig("birds", image_size=32, workers=0),
        eval=EvalConfig(batch_size=32),
    )


@pytest.mark.parametrize(("name", "more"), [("moco", {"cam"}), ("lcr", {"mask", "cam"}), ("simclr", set())])
def test_look(images, tmp_path: Path, name: str, more: set[str]) -> None:
    maps = {"feature"} | more
    cfg = build.resolve(config(name), torch.device("cpu"))
    labels = torch.as_tensor(images.labels)
    found = look(build.method(cfg, None), cfg, images, labels, torch.device("cpu"), tmp_path)
    assert found.keys() == {"silhouette_rank1"} | {f"{m}_on_bird" for m in maps}
    assert 0 <= found["silhouette_rank1"] <= 1 and all(0.1 < found[f"{m}_on_bird"] < 5 for m in maps)
