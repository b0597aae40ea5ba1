"""The DALI loader on a CPU: same order, same pictures as the torchvision loader, same batches from any start."""

from __future__ import annotations

import dataclasses
import io
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.config import Config, DataConfig
from engine.data.catalog import ImageList, load
from engine.data.loaders.choose import build_loader
from engine.data.loaders.clean_batches import clean_batches
from engine.data.loaders.interface import IMAGENET_STD
from engine.data.sampler import batch_at
from engine.data.views import view_values
from engine.errors import BrokenFile

pytest.importorskip("nvidia.dali")
SIDE = 64
TO_LEVELS = 255 * torch.tensor(IMAGENET_STD).view(3, 1, 1)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> ImageList:
    """24 photo-like JPEGs of several sizes, among them rotated ones and grey ones."""
    root = tmp_path_factory.mktemp("photos é")
    rng = np.random.default_rng(0)
    for i in range(24):
        size = (180 + 5 * i, 150 if i % 2 else 240)
        picture(rng, size, i).save(root / f"{i:02d}.jpg", exif=turned(1 + i % 8), quality=92)
    return load("folder", root, progress=False).train


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> ImageList:
    """Every kind of file that PIL decodes for DALI, between plain ones."""
    root = tmp_path_factory.mktemp("odd")
    rng = np.random.default_rng(1)
    for i in range(4):
        rgb = picture(rng, (130, 110), i)
        rgb.save(root / f"plain {i}.png")
        rgb.convert("CMYK").save(root / f"cmyk {i}.jpg")
        rgb.quantize(64).save(root / f"palette {i}.png")
        Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257).save(root / f"sixteen {i}.png")
        rgb.save(root / f"turned {i}.png", exif=turned(6))
    found = load("folder", root, progress=False).train
    assert found.plain.sum() == 4
    return found


def picture(rng: np.random.Generator, size: tuple[int, int], i: int) -> Image.Image:
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    fine = Image.fromarray(rng.integers(0, 256, (size[1] // 6, size[0] // 6, 3), np.uint8)).resize(size)
    image = Image.blend(coarse, fine, 0.2)
    return image.convert("L") if i % 8 == 7 else image


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def config(batch_size: int = 8, **data) -> Config:
    given = {"loader": "dali", "image_size": SIDE, "workers": 2, **data}
    return Config(seed=5, batch_size=batch_size, data=DataConfig(**given))


def run(images: ImageList, cfg: Config, start: int, stop: int, **options) -> list:
    loader = build_loader(images, cfg, "cpu", **options)
    batches = list(loader.batches(start, stop))
    loader.close()
    return batches


def levels(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of each image in levels of 0..255."""
    return ((a - b).abs() * TO_LEVELS).mean((1, 2, 3))


@pytest.mark.parametrize("aug", ["parity", "dali"])
def test_every_index_once_an_epoch_in_the_sampler_s_order(images, aug):
    batches = run(images, config(5, aug=aug), 0, 8)
    for step, batch in enumerate(batches):
        np.testing.assert_array_equal(batch.index, batch_at(5, step, 24, 5)[1])
        for x in (batch.x_q, batch.x_k):
            assert x.shape == (5, 3, SIDE, SIDE) and x.dtype == torch.float32 and x.isfinite().all()
            assert x.is_contiguous(memory_format=torch.channels_last)
        assert batch.x_clean is None
    for epoch in (batches[:4], batches[4:]):
        assert len(set(torch.cat([b.index for b in epoch]).tolist())) == 20


@pytest.mark.parametrize("aug", ["parity", "dali"])
def test_any_start_gives_the_batches_of_a_run_that_got_there(images, aug):
    cfg = config(aug=aug)
    whole = run(images, cfg, 0, 7, with_clean=True)
    again = run(images, cfg, 4, 7, with_clean=True)
    for a, b in zip(whole[4:], again, strict=True):
        for x, y in zip(a[:4], b[:4], strict=True):
            assert torch.equal(x, y)


def test_one_loader_goes_on_and_jumps(images):
    whole = run(images, config(), 0, 6)
    loader = build_loader(images, config(), "cpu")
    parts = [*loader.batches(0, 2), *loader.batches(2, 4)]
    left = loader.batches(4, 6)
    next(left)
    left.close()
    parts += [*loader.batches(4, 6)]
    for a, b in zip(whole, parts, strict=True):
        assert torch.equal(a.x_q, b.x_q) and torch.equal(a.index, b.index)
    assert list(loader.batches(3, 3)) == []
    loader.close()
    assert not [t for t in threading.enumerate() if t.name.startswith(("data", "views"))]


def test_parity_with_the_torchvision_loader(images):
    """Same values, same pictures: 2 levels in the mean over all views, where the torchvision loader runs PIL (integers
    between operators, 256 hues, a blur of boxes, another resize), at most 6 for any view; the original, which only
    resizes, 0.5."""
    ours = run(images, config(), 0, 6, with_clean=True)
    theirs = run(images, config(loader="torch"), 0, 6, with_clean=True)
    views = torch.cat([levels(a.x_q, b.x_q) for a, b in zip(ours, theirs, strict=True)])
    views = torch.cat([views, *[levels(a.x_k, b.x_k) for a, b in zip(ours, theirs, strict=True)]])
    assert views.mean() < 2 and views.max() < 6, (views.mean(), views.max())
    original = torch.cat([levels(a.x_clean, b.x_clean) for a, b in zip(ours, theirs, strict=True)])
    assert original.max() < 0.5, original


def test_crop_resize_and_flip_are_pil_s(images, monkeypatch):
    """Without colour the views differ by the rounding of the resize only: at most 2 levels, 0.25 in the mean."""

    def colourless(*args):
        values = view_values(*args)
        none = np.zeros_like(values.flip)
        return values._replace(jitter=none, grey=none, blur_sigma=values.blur_sigma * 0)

    monkeypatch.setattr("engine.data.loaders.dali_loader.view_values", colourless)
    monkeypatch.setattr("engine.data.loaders.torch_loader.view_values", colourless)
    ours = run(images, config(), 0, 3)
    theirs = run(images, config(loader="torch", workers=0), 0, 3)
    for a, b in zip(ours, theirs, strict=True):
        assert levels(a.x_q, b.x_q).max() < 0.25 and ((a.x_k - b.x_k).abs() * TO_LEVELS).max() < 2.5


def test_tiny_and_narrow_images(tmp_path):
    rng = np.random.default_rng(2)
    for i, size in enumerate([(1, 1), (2, 1), (1, 40), (300, 2), (5, 7)]):
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(tmp_path / f"{i}.png")
    found = load("folder", tmp_path, progress=False).train
    ours, theirs = (run(found, config(5, loader=name), 0, 3, with_clean=True) for name in ("dali", "torch"))
    for a, b in zip(ours, theirs, strict=True):
        assert levels(a.x_q, b.x_q).max() < 4 and levels(a.x_clean, b.x_clean).max() < 1


def test_files_that_pil_decodes_are_the_same_pictures(odd):
    ours = run(odd, config(10), 0, 2, with_clean=True)
    theirs = run(odd, config(10, loader="torch"), 0, 2, with_clean=True)
    for a, b in zip(ours, theirs, strict=True):
        assert levels(a.x_clean, b.x_clean).max() < 0.5 and levels(a.x_q, b.x_q).mean() < 2.5


def test_dali_s_own_colour_differs_in_colour_only(images):
    """Crop, flip, grey and blur are the values'; hue, contrast and order are DALI's."""
    own = run(images, config(aug="dali"), 0, 6, with_clean=True)
    parity = run(images, config(), 0, 6, with_clean=True)
    difference = torch.cat([levels(a.x_q, b.x_q) for a, b in zip(own, parity, strict=True)])
    assert (difference < 0.7).any() and 1 < difference.mean() < 15
    for a, b in zip(own, parity, strict=True):
        assert torch.equal(a.x_clean, b.x_clean)
        grey = [(x * TO_LEVELS + 255 * torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) for x in (a.x_q, b.x_q)]
        spread = [(g.amax(1) - g.amin(1)).amax((1, 2)) < 1.5 for g in grey]
        assert torch.equal(*spread)


def test_other_processes_start_and_end_while_it_runs(images):
    """Evaluation between two steps forks its workers beside DALI's threads."""
    whole = run(images, config(), 0, 3)
    loader = build_loader(images, config(), "cpu")
    batches = loader.batches(0, 3)
    got = [next(batches)]
    clean = list(clean_batches(images, resize=40, crop=32, batch_size=8, workers=2))
    assert torch.cat([index for _, index in clean]).tolist() == list(range(24))
    got += batches
    loader.close()
    for a, b in zip(whole, got, strict=True):
        assert torch.equal(a.x_q, b.x_q) and torch.equal(a.index, b.index)


@pytest.mark.parametrize("damage", ["text", "cut", "gone"])
def test_a_file_that_breaks_later_is_named(images, tmp_path, damage):
    for name in images.names:
        (tmp_path / name).write_bytes(images.path(images.names.index(name)).read_bytes())
    broken = images.names[int(batch_at(5, 2, 24, 8)[1][3])]
    content = io.BytesIO(b"gone bad") if damage == "text" else io.BytesIO((tmp_path / broken).read_bytes()[:700])
    (tmp_path / broken).unlink()
    if damage != "gone":
        (tmp_path / broken).write_bytes(content.getvalue())
    loader = build_loader(dataclasses.replace(images, root=Path(tmp_path)), config(), "cpu")
    with pytest.raises(BrokenFile, match=broken):
        list(loader.batches(0, 3))
    loader.close()


def test_a_file_that_dali_alone_cannot_decode_is_named(images, tmp_path):
    shutil.copytree(images.root, tmp_path / "photos")
    root = tmp_path / "photos"
    whole = images.path(5).read_bytes()
    (root / images.names[5]).write_bytes(whole[:20] + b"junk" + whole[20:])
    odd = load("folder", root, progress=False).train
    assert np.flatnonzero(~odd.plain).tolist() == [5]
    loader = build_loader(dataclasses.replace(odd, plain=np.ones(len(odd), bool)), config(), "cpu")
    with pytest.raises(BrokenFile, match=f"{images.names[5]}: DALI cannot decode it, though PIL can; .*data.loader=torch"):
        list(loader.batches(0, 3))
    loader.close()


def test_images_of_another_step_are_noticed(images, monkeypatch):
    """Should DALI ever lose or repeat a batch, the run stops instead of training on the wrong teacher's rows."""
    from engine.data.loaders.dali_loader import DaliLoader

    values, asked = DaliLoader._values, set()

    def values_once_wrong(self, step):
        first = step not in asked  # the pipeline asks first, the loop later
        asked.add(step)
        return values(self, 3 if first and step == 2 else step)

    monkeypatch.setattr(DaliLoader, "_values", values_once_wrong)
    loader = build_loader(images, config(), "cpu")
    batches = loader.batches(0, 4)
    for _ in range(2):
        next(batches)
    with pytest.raises(RuntimeError, match="where step 2 has"):
        next(batches)
    loader.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("aug", ["parity", "dali"])
def test_on_a_gpu_the_pictures_are_those_of_the_cpu(images, aug):
    """nvJPEG rounds its own way: 2 levels in the mean of a view."""
    loader = build_loader(images, config(aug=aug), "cuda", with_clean=True)
    batches = list(loader.batches(0, 6))
    loader.close()
    for ours, expected in zip(batches, run(images, config(aug=aug), 0, 6, with_clean=True), strict=True):
        assert ours.x_q.is_cuda and ours.x_q.dtype == torch.float16 and torch.equal(ours.index.cpu(), expected.index)
        for x, y in ((ours.x_q, expected.x_q), (ours.x_k, expected.x_k), (ours.x_clean, expected.x_clean)):
            assert x.is_contiguous(memory_format=torch.channels_last)
            assert levels(x.float().cpu(), y).max() < 2


def test_batches_ahead_within_memory():
    from engine.data.loaders.dali_loader import depth_within

    assert [depth_within(batch, 100) for batch in (10, 50, 51, 1000)] == [2, 2, 1, 1]


def test_threads_of_the_process_stay_as_they_were(images):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        loader = build_loader(images, config(), "cpu")
        list(loader.batches(0, 1))
        loader.close()
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert torch.get_num_threads() == 2 and later == [2]
    finally:
        torch.set_num_threads(before)
