"""The nvJPEG loader without a GPU: everything but the decoder itself, for which torchvision's on the CPU stands in."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.io
from PIL import Image, ImageOps

from engine.config import Config, DataConfig
from engine.data.catalog import ImageList, load
from engine.data.loaders import nvjpeg_loader
from engine.data.loaders.choose import build_loader
from engine.data.loaders.interface import IMAGENET_STD
from engine.errors import BrokenFile

SIDE = 32
TO_LEVELS = 255 * torch.tensor(IMAGENET_STD).view(3, 1, 1)
CPU = torch.device("cpu")


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    return exif.tobytes()


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> ImageList:
    """JPEGs in every orientation, gray ones, PNGs, and a CMYK one."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(12):
        picture = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize((90 + i, 70), Image.Resampling.BICUBIC)
        if i == 9:
            picture = picture.convert("L")
        if i == 10:
            picture = picture.convert("CMYK")
        picture.save(root / f"{i:02d}.{'png' if i == 11 else 'jpg'}", **({} if i == 11 else {"exif": turned(1 + i % 8)}))
    return load("folder", root, progress=False).train


def config(loader: str, **data) -> Config:
    return Config(batch_size=6, data=DataConfig(name="folder", image_size=SIDE, resident="off", loader=loader, workers=0, **data))


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """The number of files of each call of the decoder."""
    calls: list[int] = []

    def decode(data, mode, device):
        calls.append(len(data))
        return torchvision.io.decode_jpeg(data, mode=mode, device="cpu")

    monkeypatch.setattr(nvjpeg_loader, "problem", lambda device: None)
    monkeypatch.setattr(nvjpeg_loader, "decode_jpeg", decode)
    return calls


def run(images: ImageList, cfg: Config, start: int, stop: int, **options) -> list:
    loader = build_loader(images, cfg, CPU, **options)
    batches = list(loader.batches(start, stop))
    loader.close()
    return batches


def test_it_gives_the_pictures_of_the_torchvision_loader(images, decoded):
    ours, theirs = (run(images, config(name), 0, 4, with_clean=True) for name in ("nvjpeg", "torch"))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.index, b.index)
        for x, y in ((a.x_q, b.x_q), (a.x_k, b.x_k), (a.x_clean, b.x_clean)):
            assert x.is_contiguous(memory_format=torch.channels_last)
            assert ((x - y) * TO_LEVELS).abs().mean((1, 2, 3)).max() < 3
    assert len(decoded) == 4 and sum(decoded) == 20  # ten of twelve files, each once an epoch, a batch at a time


def test_any_start_gives_the_same_batches(images, decoded):
    whole, later = run(images, config("nvjpeg"), 0, 4), run(images, config("nvjpeg"), 2, 4)
    for a, b in zip(whole[2:], later, strict=True):
        assert torch.equal(a.x_q, b.x_q) and torch.equal(a.x_k, b.x_k) and torch.equal(a.index, b.index)


@pytest.mark.parametrize("turn", range(1, 9))
def test_an_orientation_is_undone(turn):
    stored = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    image = Image.fromarray(stored)
    image.getexif()[274] = turn
    shown = np.asarray(ImageOps.exif_transpose(image))
    ours = nvjpeg_loader.upright(torch.from_numpy(stored).permute(2, 0, 1), turn)
    assert np.array_equal(ours.permute(1, 2, 0).numpy(), shown)


def test_rows_that_are_cut_off_are_no_part_of_a_view(images, decoded):
    cut = dataclasses.replace(images, cut=10, sizes=images.sizes - np.int32([10, 0]))
    ours, theirs = (run(cut, config(name), 0, 2, with_clean=True) for name in ("nvjpeg", "torch"))
    for a, b in zip(ours, theirs, strict=True):
        assert ((a.x_clean - b.x_clean) * TO_LEVELS).abs().mean() < 3 and ((a.x_q - b.x_q) * TO_LEVELS).abs().mean() < 3


def test_a_file_that_nvjpeg_refuses_is_left_to_pil(images, decoded, monkeypatch, capfd):
    expected = run(images, config("nvjpeg"), 0, 2)
    stand_in = nvjpeg_loader.decode_jpeg

    def refuse(data, mode, device):
        if any(len(file) == images.file_sizes[3] for file in data):
            raise RuntimeError("Error while decoding JPEG images: 5")
        return stand_in(data, mode, device)

    monkeypatch.setattr(nvjpeg_loader, "decode_jpeg", refuse)
    for a, b in zip(run(images, config("nvjpeg"), 0, 2), expected, strict=True):
        assert torch.equal(a.x_q, b.x_q) and torch.equal(a.x_k, b.x_k)
    assert capfd.readouterr().err.count(f"nvjpeg does not decode {images.names[3]}") == 1


def test_a_want_of_memory_is_no_fault_of_a_file(images, decoded, monkeypatch):
    def full(data, mode, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(nvjpeg_loader, "decode_jpeg", full)
    with pytest.raises(torch.OutOfMemoryError):
        run(images, config("nvjpeg"), 0, 1)


def test_a_file_that_changed_is_named(images, decoded, tmp_path: Path):
    shutil.copytree(images.root, tmp_path / "photos")
    moved = dataclasses.replace(images, root=tmp_path / "photos")
    Image.new("RGB", (50, 40)).save(moved.path(0))
    with pytest.raises(BrokenFile, match=r"00\.jpg.*50 x 40 pixels now instead of 90 x 70"):
        run(moved, config("nvjpeg"), 0, 2)
    moved.path(0).unlink()
    with pytest.raises(BrokenFile, match=r"00\.jpg.*unreadable now"):
        run(moved, config("nvjpeg"), 0, 2)


def test_a_machine_without_a_gpu_is_told_what_to_use(images):
    with pytest.raises(ImportError, match=r"data\.loader=nvjpeg: .*needs a CUDA GPU, the device is cpu; use data\.loader=dali or"):
        build_loader(images, config("nvjpeg"), CPU)
    with pytest.raises(ValueError, match=r"data\.aug=dali needs DALI.*nvJPEG loader"):
        build_loader(images, config("nvjpeg", aug="dali"), CPU)


def test_auto_does_not_take_it(images, monkeypatch):
    """Before a GPU has measured it."""
    monkeypatch.setattr("engine.data.loaders.choose.dali_problem", lambda: "not here")
    assert build_loader(images, config("auto"), CPU).name.startswith("torch")
