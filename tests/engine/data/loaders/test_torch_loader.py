"""The torchvision loader, the clean batches and the choice between loaders."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T

import engine.data.loaders.choose
from engine.config import Config, DataConfig
from engine.data.catalog import ImageList, load
from engine.data.loaders import torch_loader
from engine.data.loaders.choose import build_loader
from engine.data.loaders.clean_batches import clean_batches
from engine.data.loaders.interface import IMAGENET_MEAN, IMAGENET_STD
from engine.data.loaders.torch_loader import execute_view
from engine.data.sampler import batch_at
from engine.data.views import view_values
from engine.errors import BrokenFile, WorkerDied

SIDE = 32


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> ImageList:
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(13):
        size = (48 + 4 * i, 64) if i % 2 else (60, 44 + 3 * i)
        small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8))
        small.resize(size, Image.Resampling.BICUBIC).save(root / f"{i:02d}.jpg")
    return load("folder", root, progress=False).train


def config(batch_size: int = 4, **data) -> Config:
    given = {"loader": "torch", "image_size": SIDE, "workers": 0, **data}
    return Config(seed=3, batch_size=batch_size, data=DataConfig(**given))


def test_batches_have_the_sampler_s_order_and_the_promised_form(images):
    loader = build_loader(images, config(), "cpu", with_clean=True)
    assert loader.steps_per_epoch == 3 and loader.name.startswith("torch")
    seen = []
    for step, batch in enumerate(loader.batches(0, 6)):
        assert batch.index.dtype == torch.int64
        np.testing.assert_array_equal(batch.index, batch_at(3, step, 13, 4)[1])
        for x in (batch.x_q, batch.x_k, batch.x_clean):
            assert x.shape == (4, 3, SIDE, SIDE) and x.dtype == torch.float32
            assert x.is_contiguous(memory_format=torch.channels_last)
        assert not torch.equal(batch.x_q, batch.x_k) and batch.teacher is None
        seen.append(batch.index)
    assert len(seen) == 6 and len(set(torch.cat(seen[:3]).tolist())) == 12
    assert next(iter(build_loader(images, config(), "cpu").batches(0, 1))).x_clean is None
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(iter(loader.batches(0, 1)))


def test_any_start_gives_the_batches_of_a_run_that_got_there(images):
    """With worker processes, and with the same workers again after an iteration that was left half way."""
    whole = list(build_loader(images, config(), "cpu").batches(0, 7))
    loader = build_loader(images, config(workers=2), "cpu")
    left = loader.batches(0, 7)
    next(left)
    left.close()
    for start in (2, 5):
        for a, b in zip(whole[start:], loader.batches(start, 7), strict=True):
            assert torch.equal(a.index, b.index) and torch.equal(a.x_q, b.x_q) and torch.equal(a.x_k, b.x_k)
    loader.close()


def test_a_view_is_what_torchvision_makes_of_its_values(images):
    loader = build_loader(images, config(), "cpu")
    (batch,) = loader.batches(1, 2)
    epoch, index = batch_at(3, 1, 13, 4)
    for view, got in ((0, batch.x_q), (1, batch.x_k)):
        values = view_values(3, epoch, index, view, images.sizes[index], SIDE)
        for b, i in enumerate(index):
            expected = execute_view(images.read(i), values, b, SIDE)
            expected = T.functional.normalize(T.functional.to_tensor(expected), IMAGENET_MEAN, IMAGENET_STD)
            torch.testing.assert_close(got[b], expected, rtol=0, atol=1e-5)


def test_crop_and_flip_are_torchvision_s(images):
    values = view_values(0, 0, np.arange(13), 0, images.sizes)
    plain = values._replace(jitter=values.jitter & False, grey=values.grey & False, blur_sigma=values.blur_sigma * 0)
    assert 0 < values.flip.sum() < 13
    for b in range(13):
        image = images.read(b)
        expected = T.functional.resized_crop(image, *values.crop[b].tolist(), [SIDE, SIDE])
        if values.flip[b]:
            expected = T.functional.hflip(expected)
        np.testing.assert_array_equal(np.asarray(execute_view(image, plain, b, SIDE)), np.asarray(expected))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
def test_clean_batches_are_torchvision_s_test_transform_in_file_order(images, workers, kind):
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    filter = T.InterpolationMode(kind)
    transform = T.Compose([T.Resize(40, filter), T.CenterCrop(32), T.ToTensor(), T.Normalize(mean, std)])
    given = {"resize": 40, "crop": 32, "mean": mean, "std": std, "batch_size": 5, "device": "cpu"}
    batches = list(clean_batches(images, interpolation=kind, workers=workers, **given))
    assert [len(x) for x, _ in batches] == [5, 5, 3]
    assert torch.cat([i for _, i in batches]).tolist() == list(range(13))
    expected = torch.stack([transform(images.read(i)) for i in range(13)])
    torch.testing.assert_close(torch.cat([x for x, _ in batches]), expected, rtol=0, atol=1e-5)


def test_clean_batches_need_neither_processes_nor_shared_memory(images, monkeypatch):
    def none(*_, **__):
        raise RuntimeError("unable to allocate shared memory(shm)")

    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", none)
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", none)
    batches = list(clean_batches(images, resize=40, crop=32, batch_size=4, workers=3))
    alone = list(clean_batches(images, resize=40, crop=32, batch_size=4, workers=0))
    assert [i.tolist() for _, i in batches] == [list(range(s, min(s + 4, len(images)))) for s in range(0, len(images), 4)]
    assert all(torch.equal(x, y) for (x, _), (y, _) in zip(batches, alone, strict=True))


def test_clean_batches_refuse_what_cannot_be(images):
    with pytest.raises(ValueError, match="crop=64 exceeds resize=40"):
        next(clean_batches(images, resize=40, crop=64, workers=0))
    with pytest.raises(ValueError, match="interpolation='nearest'; known are bilinear, bicubic"):
        next(clean_batches(images, resize=40, crop=32, interpolation="nearest", workers=0))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_breaks_later_is_named(images, tmp_path, workers):
    for name in images.names:
        (tmp_path / name).write_bytes(images.path(images.names.index(name)).read_bytes())
    mine = dataclasses.replace(images, root=Path(tmp_path))
    broken = images.names[int(batch_at(3, 1, 13, 4)[1][2])]
    (tmp_path / broken).write_bytes(b"gone bad")
    loader = build_loader(mine, config(workers=workers), "cpu")
    batches = loader.batches(0, 3)
    next(batches)
    with pytest.raises(BrokenFile, match=f"^[^\n]*{broken}: unreadable now"):
        list(batches)
    loader.close()
    with pytest.raises(BrokenFile, match=f"^[^\n]*{broken}: unreadable now"):
        list(clean_batches(mine, resize=40, crop=32, workers=workers))


def test_settings_that_cannot_be_executed_are_named(images, monkeypatch):
    with pytest.raises(ValueError, match="13 readable training images.*batch_size=14"):
        build_loader(images, config(14), "cpu")
    with pytest.raises(ValueError, match="data.aug=dali needs DALI, but data.loader=torch"):
        build_loader(images, config(aug="dali"), "cpu")
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ImportError, match="data.loader=dali: .*install nvidia-dali-cuda130"):
        build_loader(images, config(loader="dali"), "cpu")
    assert build_loader(images, config(loader="auto", resident="off"), "cpu").name.startswith("torch")


def test_importing_the_package_imports_neither_torch_nor_dali():
    code = "import sys, engine.data.sampler; print([m for m in ('torch', 'nvidia.dali', 'PIL') if m in sys.modules])"
    root = Path(engine.data.__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert result.stdout.strip() == "[]"


def test_a_worker_that_is_killed_ends_the_run_with_its_cause_and_remedy(images):
    handler = signal.getsignal(signal.SIGCHLD)
    loader = build_loader(images, config(workers=2), "cpu")
    batches = loader.batches(0, 10_000)
    next(batches)
    assert signal.getsignal(signal.SIGCHLD) == handler  # a worker's death interrupts nothing but the wait for its batch
    worker = loader._loader._iterator._workers[1]
    os.kill(worker.pid, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(WorkerDied, match=rf"\(pid {worker.pid}\) was ended by SIGKILL; .*lack of memory: lower data.workers"):
        for _ in batches:
            pass
    assert time.monotonic() - started < 30
    loader.close()
    assert "--shm-size=8g" in torch_loader._death(1, -signal.SIGBUS) and "code 3" in torch_loader._death(1, 3)


def test_workers_do_without_shared_memory_where_there_is_none(images, monkeypatch, capfd):
    expected = list(build_loader(images, config(), "cpu", with_clean=True).batches(0, 4))

    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", full)  # what DataLoader itself would call
    loader = build_loader(images, config(workers=1), "cpu", with_clean=True)
    for a, b in zip(loader.batches(0, 4), expected, strict=True):
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("x_q", "x_k", "x_clean", "index"))
    loader.close()
    assert capfd.readouterr().err.count("shared memory (/dev/shm) is short") == 1


def test_a_script_that_spawns_without_a_main_guard_is_told_of_it(images, tmp_path):
    script = tmp_path / "mine.py"
    script.write_text(
        "import multiprocessing\n"
        "from engine.config import Config, DataConfig\n"
        "from engine.data.catalog import load\n"
        "from engine.data.loaders.torch_loader import TorchLoader\n"
        "multiprocessing.set_start_method('spawn', force=True)\n"
        f"images = load('folder', {str(images.root)!r}, progress=False).train\n"
        "cfg = Config(batch_size=4, data=DataConfig(workers=1, image_size=32))\n"
        "next(TorchLoader(images, cfg, 'cpu').batches(0, 1))\n"
    )
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    lines = ended.stderr.splitlines()
    assert ended.returncode == 1 and "below `if __name__ == '__main__':`" in lines[-1] and "data.workers=0" in lines[-1]
    assert sum(line.startswith("Traceback") for line in lines) == 1  # the script's own
