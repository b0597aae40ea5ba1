"""Resident data: decoded once, kept or found again, the same views as every other loader, and what happens when it does not fit."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import engine.data.loaders.decoded
from engine.config import Config, DataConfig
from engine.data.catalog import ImageList, load
from engine.data.loaders import resident_loader
from engine.data.loaders.choose import build_loader
from engine.data.loaders.decoded import cache_path, decode, kept_sizes
from engine.data.loaders.interface import IMAGENET_STD
from engine.data.sampler import batch_at
from engine.errors import BrokenFile
from ppssl.ops import augment

SIDE = 32
TO_LEVELS = 255 * torch.tensor(IMAGENET_STD).view(3, 1, 1)
CPU = torch.device("cpu")


@pytest.fixture
def images(tmp_path) -> ImageList:
    """13 photo-like JPEGs of several sizes, one of them turned by EXIF."""
    root = tmp_path / "photos"
    root.mkdir()
    rng = np.random.default_rng(0)
    for i in range(13):
        size = (48 + 4 * i, 64) if i % 2 else (60, 44 + 3 * i)
        small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6 if i == 3 else 1
        small.resize(size, Image.Resampling.BICUBIC).save(root / f"{i:02d}.jpg", exif=exif)
    return load("folder", root, progress=False).train


def config(batch_size: int = 4, **data) -> Config:
    return Config(seed=3, batch_size=batch_size, data=DataConfig(**{"resident": "host", "image_size": SIDE, "workers": 2, **data}))


def run(images: ImageList, cfg: Config, start: int, stop: int, **options) -> list:
    loader = build_loader(images, cfg, "cpu", **options)
    batches = list(loader.batches(start, stop))
    loader.close()
    return batches


def same(a: list, b: list) -> bool:
    pairs = [(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)]
    return all(torch.equal(x, y) if x is not None else y is None for x, y in pairs)


@pytest.fixture
def decoded_names(monkeypatch) -> list[str]:
    """The files that are decoded from here on."""
    names: list[str] = []
    read = ImageList.read
    monkeypatch.setattr(ImageList, "read", lambda self, i: names.append(self.names[i]) or read(self, i))
    return names


def test_every_index_once_an_epoch_in_the_sampler_s_order(images):
    batches = run(images, config(), 0, 6)
    for step, batch in enumerate(batches):
        np.testing.assert_array_equal(batch.index, batch_at(3, step, 13, 4)[1])
        for x in (batch.x_q, batch.x_k):
            assert x.shape == (4, 3, SIDE, SIDE) and x.dtype == torch.float32 and x.isfinite().all()
            assert x.is_contiguous(memory_format=torch.channels_last)
        assert batch.x_clean is None
    for epoch in (batches[:3], batches[3:]):
        assert len(set(torch.cat([b.index for b in epoch]).tolist())) == 12


def test_the_same_views_as_the_torchvision_loader(images):
    """2 levels in the mean where that one runs PIL (integers between operators, 256 hues, a blur of boxes), at most 6 for a view;
    the original, which only resizes, 0.5."""
    ours = run(images, config(), 0, 6, with_clean=True)
    theirs = run(images, config(resident="off", loader="torch", workers=0), 0, 6, with_clean=True)
    views, originals = [], []
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.index, b.index)
        views += [((x - y).abs() * TO_LEVELS).mean((1, 2, 3)) for x, y in ((a.x_q, b.x_q), (a.x_k, b.x_k))]
        originals.append(((a.x_clean - b.x_clean).abs() * TO_LEVELS).amax((1, 2, 3)))
    views = torch.cat(views)
    assert views.mean() < 2 and views.max() < 6, views
    assert torch.cat(originals).max() < 1.1


@pytest.mark.parametrize("workers", [1, 3])
def test_any_start_and_any_number_of_threads_give_the_same_bits(images, workers):
    whole = run(images, config(), 0, 7, with_clean=True)
    loader = build_loader(images, config(workers=workers), "cpu", with_clean=True)
    left = loader.batches(0, 7)
    next(left)
    left.close()
    for start in (2, 5):
        assert same(whole[start:], list(loader.batches(start, 7)))
    assert list(loader.batches(3, 3)) == []
    loader.close()
    assert not [t for t in threading.enumerate() if t.name.startswith(("data", "views"))]
    with pytest.raises(RuntimeError, match="closed"):
        loader.batches(0, 1)


def test_the_interpreted_kernels_make_the_same_views(images, monkeypatch, kernel_device):
    ours = run(images, config(), 0, 1)
    if kernel_device.type == "cpu":
        monkeypatch.setattr(resident_loader, "augment", lambda *args, **options: augment(*args, **options, impl="triton"))
        theirs = run(images, config(workers=1), 0, 1)
    else:
        theirs = list(build_loader(images, config(resident="device"), kernel_device).batches(0, 1))
    for x, y in ((ours[0].x_q, theirs[0].x_q.cpu()), (ours[0].x_k, theirs[0].x_k.cpu())):
        difference = (x - y).abs() * TO_LEVELS
        assert difference.mean() < 0.3 and difference.mean((1, 2, 3)).max() < 1, difference.mean((1, 2, 3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("where", ["device", "host"])
def test_on_a_gpu_from_the_device_and_from_pinned_memory(images, where):
    loader = build_loader(images, config(resident=where), "cuda", with_clean=True)
    batches = list(loader.batches(1, 7))
    loader.close()
    for ours, expected in zip(batches, run(images, config(), 1, 7, with_clean=True), strict=True):
        assert ours.x_q.is_cuda and ours.x_q.dtype == torch.float16
        assert torch.equal(ours.index.cpu(), expected.index)
        for x, y in ((ours.x_q, expected.x_q), (ours.x_k, expected.x_k), (ours.x_clean, expected.x_clean)):
            assert x.is_contiguous(memory_format=torch.channels_last)
            assert ((x.float().cpu() - y).abs() * TO_LEVELS).mean((1, 2, 3)).max() < 1


def test_a_second_start_decodes_nothing(images, tmp_path, decoded_names):
    cold = run(images, config(), 0, 3, cache_dir=tmp_path / "cache", with_clean=True)
    assert sorted(decoded_names) == sorted(images.names)
    warm = run(images, config(), 0, 3, cache_dir=tmp_path / "cache", with_clean=True)
    assert len(decoded_names) == 13 and same(cold, warm)
    assert same(run(images, config(), 0, 3, with_clean=True), cold)  # without a cache folder, in memory
    assert len(decoded_names) == 26


def test_the_file_is_readable_by_others(images, tmp_path):
    from safetensors.numpy import load_file

    found = decode(images, cache_dir=tmp_path)
    pixels = load_file(cache_path(images, images.sizes, tmp_path / "decoded"))["pixels"]
    np.testing.assert_array_equal(pixels, found.pixels)
    for i in range(13):
        np.testing.assert_array_equal(found.image(i), np.asarray(images.read(i)))


def touched(images: ImageList) -> ImageList:
    """The list after one of its files was replaced by a picture of the same size."""
    path = images.path(4)
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    os.utime(path, ns=(1, 1))
    return load("folder", images.root, progress=False).train


def test_a_cache_of_other_files_is_not_used_and_does_not_pile_up(images, tmp_path):
    before = decode(images, cache_dir=tmp_path)
    old = before.image(4).copy()
    changed = touched(images)
    after = decode(changed, cache_dir=tmp_path)
    assert np.abs(after.image(4).astype(int) - old).mean() > 20
    assert [path.suffix for path in sorted((tmp_path / "decoded").glob("*.safetensors"))] == [".safetensors"]
    np.testing.assert_array_equal(before.image(4), old)  # who has the old one mapped keeps it


@pytest.mark.parametrize("damage", ["version", "cut", "text", "renamed"])
def test_a_damaged_or_foreign_cache_is_said_and_made_anew(images, tmp_path, damage, monkeypatch, capfd, decoded_names):
    path = cache_path(images, images.sizes, tmp_path / "decoded")
    first = decode(images, cache_dir=tmp_path).pixels.copy()
    if damage == "version":  # a file under this name, written by another version
        monkeypatch.setattr(engine.data.loaders.decoded, "FORMAT", 999)
        other = decode(images, cache_dir=tmp_path / "other")
        assert len(other.pixels)
        cache_path(images, images.sizes, tmp_path / "other" / "decoded").replace(path)
        monkeypatch.undo()
    elif damage == "renamed":
        changed = touched(images)
        decode(changed, cache_dir=tmp_path / "other")
        cache_path(changed, changed.sizes, tmp_path / "other" / "decoded").replace(path)
        first = decode(changed).pixels.copy()  # what the files hold now
    else:
        path.write_bytes(path.read_bytes()[:-5] if damage == "cut" else b"not a cache")
    again = decode(images, cache_dir=tmp_path)
    np.testing.assert_array_equal(again.pixels, first)
    assert "damaged or was made from other files; decoding anew" in capfd.readouterr().err


@pytest.mark.parametrize("short_side", [None, 50])
@pytest.mark.parametrize("damaged", ["pixels", "an image", "checksums"])
def test_damaged_pixels_are_said_repaired_and_never_trained_on(
    images, tmp_path, damaged, short_side, capfd, decoded_names, monkeypatch
):
    size = engine.data.loaders.decoded.total_bytes(kept_sizes(images, short_side))
    monkeypatch.setattr(resident_loader, "plan", lambda *_: resident_loader.Plan("host", short_side, ""))
    whole = run(images, config(), 0, 6, cache_dir=tmp_path, with_clean=True)
    (path,) = (tmp_path / "decoded").glob("*.safetensors")
    content = bytearray(path.read_bytes())
    start = len(content) - size
    part = {"pixels": slice(start, None), "an image": slice(start + 7, start + 8), "checksums": slice(start - 52, start)}[damaged]
    content[part] = (255 - np.frombuffer(content[part], np.uint8)).tobytes()
    path.write_bytes(content)
    decoded_names.clear(), capfd.readouterr()
    assert same(whole, run(images, config(), 0, 6, cache_dir=tmp_path, with_clean=True))
    assert capfd.readouterr().err.count("is damaged; images are decoded anew") == 1
    assert sorted(decoded_names) == sorted(images.names[:1] if damaged == "an image" else set(decoded_names))
    assert not path.exists()
    assert same(whole, run(images, config(), 0, 6, cache_dir=tmp_path, with_clean=True)) and path.exists()  # made again


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("where", ["device", "host"])
def test_damaged_pixels_do_not_reach_a_gpu(images, tmp_path, where):
    (first,) = run_on_gpu(images, where, tmp_path)
    (path,) = (tmp_path / "decoded").glob("*.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[:-500] + bytes(255 - b for b in content[-500:]))
    (second,) = run_on_gpu(images, where, tmp_path)
    assert torch.equal(first.x_q, second.x_q) and not path.exists()


def run_on_gpu(images: ImageList, where: str, cache: Path) -> list:
    loader = build_loader(images, config(13, resident=where), "cuda", cache_dir=cache)
    batches = list(loader.batches(0, 1))
    loader.close()
    return batches


def test_waiting_for_another_process_that_decodes_is_said(images, tmp_path, capfd):
    path = cache_path(images, images.sizes, tmp_path / "decoded").with_suffix(".lock")
    path.parent.mkdir()
    holder = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print('pid 12 on node7', file=f, flush=True)"
    other = subprocess.Popen([sys.executable, "-c", f"{holder}; print(flush=True); input()", path], stdin=-1, stdout=-1)
    other.stdout.readline()
    thread = threading.Thread(target=lambda: decode(images, cache_dir=tmp_path))
    thread.start()
    thread.join(1)
    assert thread.is_alive()
    other.communicate(b"\n")
    thread.join(60)
    assert not thread.is_alive()
    assert capfd.readouterr().err.count("waiting for pid 12 on node7, which decodes the same images") == 1


def test_a_file_that_breaks_before_it_is_decoded_is_named_and_nothing_is_left(images, tmp_path):
    images.path(7).write_bytes(b"gone bad")
    with pytest.raises(BrokenFile, match="07.jpg: unreadable now"):
        build_loader(images, config(), "cpu", cache_dir=tmp_path)
    Image.new("RGB", (10, 12)).save(images.path(7))
    with pytest.raises(BrokenFile, match="07.jpg: .*10 x 12 pixels"):
        build_loader(images, config(), "cpu", cache_dir=tmp_path)
    assert not list((tmp_path / "decoded").glob("*safetensors*"))


def test_what_a_killed_process_decoded_is_removed(images, tmp_path):
    path = cache_path(images, images.sizes, tmp_path / "decoded")
    path.parent.mkdir()
    left, other = path.with_name(f".{path.name}.abc.tmp"), path.with_name(".another-list.safetensors.abc.tmp")
    left.touch(), other.touch()
    decode(images, cache_dir=tmp_path)
    assert sorted(p.name for p in path.parent.iterdir()) == sorted([path.name, path.with_suffix(".lock").name, other.name])


def test_a_file_that_breaks_later_is_not_missed(images, tmp_path):
    whole = run(images, config(), 0, 3)
    loader = build_loader(images, config(), "cpu", cache_dir=tmp_path)
    for i in range(13):
        images.path(i).unlink()
    assert same(whole, list(loader.batches(0, 3)))
    loader.close()


def test_a_full_disk_keeps_the_pixels_in_memory(images, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(engine.data.loaders.decoded, "_SPARE_DISK", 1 << 60)
    whole = run(images, config(), 0, 2, cache_dir=tmp_path)
    assert same(whole, run(images, config(), 0, 2))
    assert "kept in memory only" in capfd.readouterr().err
    assert not list((tmp_path / "decoded").glob("*safetensors*"))


def test_a_short_side_that_is_bounded_is_said_and_crops_the_same_part(images, monkeypatch, capfd):
    whole = engine.data.loaders.decoded.total_bytes(images.sizes)
    bounded = engine.data.loaders.decoded.total_bytes(kept_sizes(images, round(1.5 * SIDE)))
    monkeypatch.setattr(resident_loader, "free_host_bytes", lambda: int((whole + bounded) / 2 / resident_loader.HOST_SHARE))
    loader = build_loader(images, config(), "cpu")
    assert loader.name == f"resident (host, short side {round(1.5 * SIDE)})"
    assert "crops contain less detail" in capfd.readouterr().err
    (batch,) = loader.batches(0, 1)
    loader.close()
    monkeypatch.undo()
    (expected,) = run(images, config(), 0, 1)
    assert ((batch.x_q - expected.x_q).abs() * TO_LEVELS).mean() < 8  # the same parts, from fewer pixels


def test_sizes_of_a_bounded_list(images):
    sizes = kept_sizes(images, 50)
    assert sizes.min(1).max() == 50 and (sizes <= images.sizes).all()
    unchanged = images.sizes.min(1) <= 50
    assert unchanged.any() and (sizes[unchanged] == images.sizes[unchanged]).all()
    assert kept_sizes(images, None) is images.sizes


def test_auto_keeps_images_as_they_are_or_not_at_all(images, monkeypatch, capfd):
    assert resident_loader.plan(images, config(resident="auto"), CPU)[:2] == ("host", None)
    monkeypatch.setattr(resident_loader, "free_host_bytes", lambda: 1000)
    assert resident_loader.plan(images, config(resident="auto"), CPU).where == "off"
    assert "do not fit on the host" in capfd.readouterr().err
    assert build_loader(images, config(resident="auto", workers=0), "cpu").name.startswith(("dali", "torch"))
    with pytest.raises(ValueError, match="data.resident=host: even with a short side of 37 px .* use data.resident=off"):
        resident_loader.plan(images, config(), CPU)


def test_auto_leaves_the_memory_that_training_takes(images, monkeypatch):
    cfg = config(resident="auto", batch_size=64)
    whole, taken = engine.data.loaders.decoded.total_bytes(images.sizes), resident_loader.training_bytes(cfg)
    trunk = resident_loader.build_trunk(cfg.encoder.arch)
    weights = sum(p.nbytes for p in trunk.parameters())
    activations = sum(y.nbytes for y in trunk.maps(torch.zeros(64, 3, SIDE, SIDE)).values())
    assert 4 * weights + activations < taken < 4 * weights + 100 * activations
    assert resident_loader.training_bytes(config(resident="auto", batch_size=128)) - 4 * weights == 2 * (taken - 4 * weights)
    for free, where in ((taken + whole, "host"), (taken + whole - 1, "off"), (taken // 2, "off")):
        monkeypatch.setattr(resident_loader, "free_host_bytes", lambda free=free: free)
        assert resident_loader.plan(images, cfg, CPU).where == where
    assert resident_loader.plan(images, config(batch_size=64), CPU).where == "host"  # who asks for it is obeyed


def test_memory_that_is_short_after_all_goes_down_one_level(images, monkeypatch, capfd):
    def no_memory(*args, **options):
        raise MemoryError("Unable to allocate 1 GiB")

    monkeypatch.setattr(resident_loader, "decode", no_memory)
    assert resident_loader.build(images, config(resident="auto"), CPU) is None
    assert "not enough memory after all (Unable to allocate 1 GiB); now off" in capfd.readouterr().err
    with pytest.raises(MemoryError):
        resident_loader.build(images, config(), CPU)


def test_explicit_choices_are_obeyed_or_refused_by_name(images):
    plan = resident_loader.plan
    assert plan(images, config(resident="off"), CPU).where == "off"
    assert plan(images, config(resident="auto", loader="torch"), CPU).where == "off"
    assert plan(images, config(resident="auto", aug="dali"), CPU).where == "off"
    with pytest.raises(ValueError, match="data.resident=host: data.loader=torch streams; use data.loader=auto"):
        plan(images, config(loader="torch"), CPU)
    with pytest.raises(ValueError, match="data.resident=host: data.aug=dali wants DALI's operators; use data.aug=parity"):
        plan(images, config(aug="dali"), CPU)
    with pytest.raises(ValueError, match="data.resident=device: there is no GPU; use data.resident=host"):
        plan(images, config(resident="device"), CPU)
    with pytest.raises(ValueError, match="13 readable training images"):
        build_loader(images, config(14), "cpu")


def test_free_memory_is_no_more_than_the_machine_has():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < resident_loader.free_host_bytes() <= total


def test_a_list_in_another_place_has_a_cache_of_its_own(images, tmp_path):
    elsewhere = dataclasses.replace(images, root=Path(tmp_path))
    assert cache_path(images, images.sizes, tmp_path) != cache_path(elsewhere, images.sizes, tmp_path)
