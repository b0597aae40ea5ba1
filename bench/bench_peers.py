"""MoCo v2 end to end, from JPEG files to the optimizer: this engine beside lightly (extra ``peers``).

    pytest bench/bench_peers.py --benchmark-only   images per second in turns, guarded
    python -m bench.bench_peers [SIZE]             the table: first step, images per second, memory, one process per side

lightly is used as its documentation writes it (bench/methods/lightly_moco.py). Both sides have the same trunk, photos, batch,
queue, optimizer, precision (float32), threads of torch, and workers that load. The photos are those of CUB-200-2011 below the
folder that PPSSL_REAL names, else drawn JPEGs of 500 x 375. The engine decodes the photos once and keeps them; the table's first
step holds that decoding. What is learned after equal images: python -m bench.methods --setting cub-finetune --study peers.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.bench_data import Memory, draw_jpegs
from bench.methods.lightly_moco import Training
from bench.timing import DEVICE, GUARDS, guard, synchronize
from engine.build import assemble, resolve
from engine.config import Config, DataConfig, EncoderConfig, MethodConfig, OptimConfig, QueueConfig
from engine.data import cores
from engine.data.catalog import Catalog, ImageList, load
from engine.evaluation.validation import subset

PHOTOS = 512
BATCH = 64
SIZES = {"small": ("resnet18_w16_s16", 64), "resnet18": ("resnet18", 128)}
"""Trunk and pixels."""
WORKERS = cores()
WARM, TIMED, ROUNDS = 2 * WORKERS + 1, 4, 5
"""Steps per turn: those whose batches were made during the other side's turn, and those that are timed."""
MISSING = importlib.util.find_spec("lightly") is None
SIDES = ("ours", "lightly")


def config(size: str) -> Config:
    arch, side = SIZES[size]
    cfg = Config(
        epochs=1000,
        batch_size=BATCH,
        method=MethodConfig("moco"),
        encoder=EncoderConfig(arch, "none", "mlp2", 128),
        queue=QueueConfig(4096),
        optim=OptimConfig(lr=1e-3, schedule="constant"),
        data=DataConfig("folder", image_size=side, workers=WORKERS),
    )
    return resolve(cfg, DEVICE)


def photos(scratch: Path) -> ImageList:
    """``PHOTOS`` training photos of CUB-200-2011, or drawn ones in ``scratch``."""
    root = Path(os.environ.get("PPSSL_REAL", ""), "CUB_200_2011_50")
    if os.environ.get("PPSSL_REAL") and root.is_dir():
        found = load("cub", root, cache_dir=scratch, progress=False).train
        return subset(found, np.linspace(0, len(found) - 1, PHOTOS, dtype=np.int64))  # spread over the classes
    draw_jpegs(scratch / "jpeg", PHOTOS)
    return load("folder", scratch / "jpeg", cache_dir=scratch, progress=False).train


class Ours:
    """This engine's trainer, a step at a time."""

    def __init__(self, size: str, images: ImageList, cache: Path):
        cfg = config(size)
        self.trainer = assemble(cfg, Catalog(images, None, ()), DEVICE, teacher=None, out=None, cache=cache, embed=_no_teacher)
        self.batches = self.trainer.loader.batches(0, self.trainer.total_steps)

    def step(self) -> None:
        self.trainer.step(self.trainer.with_teacher(next(self.batches)))

    def close(self) -> None:
        self.batches.close()
        self.trainer.loader.close()


def _no_teacher(_: Any) -> torch.Tensor:
    raise AssertionError("MoCo has no teacher")


class Theirs:
    """lightly's MoCo v2, a step at a time."""

    def __init__(self, size: str, images: ImageList, cache: Path):
        self.training = Training(config(size), images, DEVICE, WORKERS)
        self.batches = self.training.batches()

    def step(self) -> None:
        self.training.step(next(self.batches))

    def close(self) -> None:
        self.batches.close()


def build(side: str, size: str, images: ImageList, cache: Path) -> Ours | Theirs:
    return (Ours if side == "ours" else Theirs)(size, images, cache)


def turn(side: Ours | Theirs) -> float:
    """Images per second of ``TIMED`` steps in steady state."""
    for _ in range(WARM):
        side.step()
    synchronize()
    start = time.perf_counter()
    for _ in range(TIMED):
        side.step()
    synchronize()
    return BATCH * TIMED / (time.perf_counter() - start)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageList, Path]:
    cache = tmp_path_factory.mktemp("cache")
    return photos(cache), cache


@pytest.mark.skipif(MISSING, reason="lightly is not installed: pip install lightly")
@pytest.mark.parametrize("size", list(SIZES))
def test_images_per_second_over_lightly(benchmark, images: tuple[ImageList, Path], size: str) -> None:
    torch.set_num_threads(1)
    sides = {side: build(side, size, *images) for side in SIDES}

    def ratios() -> dict[str, float]:
        rates = [{name: turn(side) for name, side in sides.items()} for _ in range(ROUNDS)]
        best = {name: max(rate[name] for rate in rates) for name in SIDES}
        benchmark.extra_info["images_per_s"] = {name: round(rate, 1) for name, rate in best.items()}
        return {"over_lightly": best["ours"] / best["lightly"]}

    try:
        guard(benchmark, f"peers.{size}", ratios, GUARDS["peers"][size])
        benchmark.pedantic(sides["ours"].step, rounds=1)
    finally:
        for side in sides.values():
            side.close()


def alone(side: str, size: str, scratch: Path) -> dict[str, float]:
    """One row of the table, in this process. Importing is not counted."""
    torch.set_num_threads(1)
    images, memory = photos(scratch), Memory()
    memory.start()
    start = time.perf_counter()
    built = build(side, size, images, scratch)
    built.step()
    synchronize()
    first = time.perf_counter() - start
    rate = max(turn(built) for _ in range(ROUNDS))
    memory.stop.set()
    built.close()
    return {"first_step_s": first, "images_per_s": rate, "memory_mb": memory.most / 1e6}


def table(sizes: list[str]) -> None:
    """Each side in a separate process, ours twice: the second start finds the decoded photos."""
    for size in sizes:
        with tempfile.TemporaryDirectory() as scratch:
            for name, side in {"ours": "ours", "ours, again": "ours", "lightly": "lightly"}.items():
                command = [sys.executable, "-m", "bench.bench_peers", "one", side, size, scratch]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                row = json.loads(done.stdout.splitlines()[-1])
                print(f"{size:10} {name:12}", "  ".join(f"{k} {v:,.1f}" for k, v in row.items()), flush=True)


if __name__ == "__main__":
    if MISSING:
        sys.exit("lightly is not installed: pip install lightly")
    if sys.argv[1:2] == ["one"]:
        print(json.dumps(alone(sys.argv[2], sys.argv[3], Path(sys.argv[4]))))
    elif unknown := [name for name in sys.argv[1:] if name not in SIZES]:
        sys.exit(f"{unknown[0]!r} is no size; use {', '.join(SIZES)}")
    else:
        table(sys.argv[1:] or list(SIZES))
