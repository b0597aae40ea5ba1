"""Data path on CPU: images a second of DALI over the torchvision loader; two views of 224 px from 500 x 375 JPEGs.

Both sides have two workers and run in the same process, in turns, on the same values; the fastest of nine turns counts.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from engine.config import Config, DataConfig
from engine.data import build_loader
from engine.data.catalog import ImageList, load

BATCH = 16
WARM, TIMED = 6, 10
"""Batches a turn: those that other turns' prefetching may have made, and those that are timed."""
ROUNDS = 9
GUARDS = yaml.safe_load((Path(__file__).parent / "guards.yaml").read_text())["data"]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> ImageList:
    """64 JPEGs of about 70 kB: coarse colours under fine texture."""
    root = tmp_path_factory.mktemp("jpeg")
    rng = np.random.default_rng(0)
    for i in range(64):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((500, 375), Image.Resampling.BICUBIC)
        fine = Image.fromarray(rng.integers(0, 256, (125, 167, 3), np.uint8)).resize(
            (500, 375), Image.Resampling.BICUBIC
        )
        Image.blend(coarse, fine, 0.25).save(root / f"{i:03d}.jpg", quality=92)
    return load("folder", root, progress=False).train


class Side:
    """One loader that goes on and on; a turn is the seconds for TIMED batches in steady state."""

    def __init__(self, images: ImageList, **data):
        config = Config(batch_size=BATCH, data=DataConfig(workers=2, image_size=224, **data))
        self.loader = build_loader(images, config, "cpu")
        self.step = 0

    def turn(self) -> float:
        batches = self.loader.batches(self.step, self.step + WARM + TIMED)
        for _ in range(WARM):
            next(batches)
        start = time.perf_counter()
        for _ in batches:
            pass
        self.step += WARM + TIMED
        return time.perf_counter() - start


def test_dali_over_torchvision(benchmark, images):
    pytest.importorskip("nvidia.dali")
    torch.set_num_threads(1)
    sides = {
        "dali_parity": Side(images, loader="dali", aug="parity"),
        "dali_dali": Side(images, loader="dali", aug="dali"),
        "torch": Side(images, loader="torch"),
    }

    def rates() -> dict[str, float]:
        turns = [{name: side.turn() for name, side in sides.items()} for _ in range(ROUNDS)]
        return {name: BATCH * TIMED / min(turn[name] for turn in turns) for name in sides}

    def shortfalls(rate: dict[str, float]) -> list[str]:
        return [
            f"{name}: {rate[name] / rate['torch']:.2f} < {GUARDS[f'{name}_over_torch']['bound']}"
            for name in ("dali_parity", "dali_dali")
            if rate[name] / rate["torch"] < GUARDS[f"{name}_over_torch"]["bound"]
        ]

    rate = rates()
    if shortfalls(rate):  # once more: other programs may have had the cores
        rate = rates()
    benchmark.extra_info["images_per_s"] = {name: round(r) for name, r in rate.items()}
    benchmark.extra_info["over_torch"] = {name: round(r / rate["torch"], 2) for name, r in rate.items()}
    benchmark.pedantic(sides["dali_parity"].turn, rounds=1)
    for side in sides.values():
        side.loader.close()
    assert not shortfalls(rate), shortfalls(rate)
