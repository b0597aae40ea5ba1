"""Embedding photos over the bare forward pass of the same network in the same process, and the search in an embedding.

Both sides have one thread for the network. Decoding has threads of its own: on a machine with a spare core it hides behind the
forward pass, on one without it is added to it.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench.timing import CUDA, DEVICE, GUARDS, guard, synchronize
from engine.data import list_photos
from engine.evaluation import embed_photos, embedding_file, most_similar, open_source
from engine.training import precision
from ppssl.encoder import Trunk

ARCH, SIDE = "resnet50", 224
PHOTOS, BATCH = (4096, 128) if CUDA else (32, 8)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """JPEG files of a usual size, 500 x 375."""
    generator = np.random.default_rng(0)
    for i in range(min(PHOTOS, 64)):
        small = Image.fromarray(generator.integers(0, 256, (24, 32, 3), np.uint8))
        path = tmp_path / f"photos/{i:03d}.jpg"
        path.parent.mkdir(exist_ok=True)
        small.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
    rows = [f"photos/{i % 64:03d}.jpg" for i in range(PHOTOS)] if PHOTOS > 64 else [f"photos/{i:03d}.jpg" for i in range(PHOTOS)]
    (tmp_path / "list.csv").write_text("path\n" + "".join(f"{row}\n" for row in rows))
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*listed twice")
def test_over_the_forward_pass(benchmark, photos: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PPSSL_CACHE", str(photos / "cache"))
    weights = photos / "resnet50.pth"
    torch.manual_seed(0)
    torch.save({"state_dict": Trunk(ARCH).state_dict()}, weights)
    amp = "bf16" if CUDA else "null"
    overrides = ["data.name=list", f"data.root={photos}", "data.train=list.csv", f"eval.batch_size={BATCH}", f"amp={amp}"]
    source = open_source(weights, DEVICE, overrides=[f"encoder.arch={ARCH}", f"data.image_size={SIDE}", *overrides])
    listed = list_photos(source.run.config.data)
    x = torch.randn(BATCH, 3, SIDE, SIDE, device=DEVICE).contiguous(memory_format=torch.channels_last)
    network, autocast = source.run.network, precision.resolve(source.run.config.amp, DEVICE)

    def forward() -> float:
        started = time.perf_counter()
        with torch.inference_mode(), autocast.autocast():
            for _ in range(PHOTOS // BATCH):
                network(x)
        synchronize()
        return time.perf_counter() - started

    def embed() -> float:
        started = time.perf_counter()
        done = embed_photos(source, listed, photos / "e.npz", DEVICE, half=True, force=True)
        assert done.photos == PHOTOS
        return time.perf_counter() - started

    def ratios() -> dict[str, float]:
        forward(), embed()
        seconds = [min(times) for times in zip(*((forward(), embed()) for _ in range(3)), strict=True)]
        benchmark.extra_info["images_per_s"] = {name: PHOTOS / s for name, s in zip(("forward", "embed"), seconds, strict=True)}
        return {"over_forward": seconds[0] / seconds[1]}

    guard(benchmark, "embed", ratios, GUARDS["embed"])
    benchmark.pedantic(embed, rounds=1)


def test_search_in_100000(benchmark, tmp_path: Path):
    """Of an embedding that is loaded, one photo's ten nearest: recorded, not guarded, since it depends on the machine."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(100_000, 2048, generator=generator), dim=1).half()
    about = {"dim": 2048, "dtype": "float16"}
    parts = [
        embedding_file.Rows({"path": [str(i) for i in range(s, s + 10_000)]}, rows[s : s + 10_000].numpy())
        for s in range(0, 100_000, 10_000)
    ]
    embedding_file.write(tmp_path / "e.npz", lambda: parts, about)
    started = time.perf_counter()
    stored = torch.from_numpy(embedding_file.read(tmp_path / "e.npz").feature)
    benchmark.extra_info["load_seconds"] = time.perf_counter() - started
    query = rows[4321:4322].float() + 0.01
    found = benchmark.pedantic(most_similar, (query, stored, 10), rounds=5, warmup_rounds=1)
    assert found.index[0, 0] == 4321
    benchmark.extra_info["goal_seconds"] = GUARDS["embed"]["search_100000"]["goal_seconds"]
