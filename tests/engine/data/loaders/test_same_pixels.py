"""Whatever a file holds, every loader sees the same pixels, or the list does without it and says why."""

from __future__ import annotations

import numpy as np
import odd_files
import pytest
import torch
from torchvision.io import decode_jpeg

from engine.config import Config, DataConfig
from engine.data.catalog import Catalog, load
from engine.data.loaders import choose, nvjpeg_loader, resident_loader, torch_loader
from engine.data.loaders.interface import IMAGENET_MEAN, IMAGENET_STD
from engine.data.views import ViewValues

SIDE = odd_files.SIDE


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Catalog:
    root = tmp_path_factory.mktemp("odd")
    for name, data in odd_files.every().items():
        (root / f"{name}.png").write_bytes(data)
    return load("folder", root, progress=False)


def whole(seed, epoch, index, view, sizes, side) -> ViewValues:
    """Views that are the images themselves."""
    n = len(index)
    return ViewValues(
        crop=np.concatenate((np.zeros((n, 2)), sizes), 1).astype(np.int32), flip=np.zeros(n, bool), jitter=np.zeros(n, bool),
        factors=np.tile(np.float32([1, 1, 1, 0]), (n, 1)), order=np.tile(np.arange(4, dtype=np.uint8), (n, 1)),
        grey=np.zeros(n, bool), blur_sigma=np.zeros(n, np.float32),
    )  # fmt: skip


def test_the_files_are_many_and_of_both_sorts(found):
    assert len(found.train) + len(found.bad) == len(odd_files.every()) >= 300
    assert found.train.plain.sum() >= 100 and (~found.train.plain).sum() >= 100 and len(found.bad) >= 50
    assert all(bad.reason.strip() for bad in found.bad)
    assert (found.train.sizes == SIDE).all()


@pytest.fixture
def nvjpeg_on_cpu(monkeypatch):
    """The nvJPEG loader up to the first thing that needs a GPU: torchvision's decoder of the CPU stands in for that of the GPU."""
    monkeypatch.setattr(nvjpeg_loader, "problem", lambda device: None)
    monkeypatch.setattr(nvjpeg_loader, "decode_jpeg", lambda data, mode, device: decode_jpeg(data, mode=mode, device="cpu"))


@pytest.mark.parametrize("loader", ["torch", "resident", "dali", "nvjpeg"])
def test_every_loader_sees_the_same_pixels(loader, found, monkeypatch, nvjpeg_on_cpu):
    module = {"torch": torch_loader, "resident": resident_loader, "nvjpeg": nvjpeg_loader}.get(loader)
    if module is None:
        module = pytest.importorskip("engine.data.loaders.dali_loader", exc_type=ImportError)
    monkeypatch.setattr(module, "view_values", whole)
    data = {"resident": "host"} if loader == "resident" else {"resident": "off", "loader": loader}
    cfg = Config(batch_size=len(found.train), data=DataConfig(name="folder", image_size=SIDE, workers=0, **data))
    made = choose.build_loader(found.train, cfg, "cpu")
    (batch,) = made.batches(0, 1)
    made.close()
    scale, shift = torch.tensor(IMAGENET_STD).view(3, 1, 1), torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    for x in (batch.x_q, batch.x_k):
        levels = ((x * scale + shift) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        differing = {}
        for i, got in zip(batch.index.tolist(), levels, strict=True):
            most = np.abs(got.astype(int) - np.asarray(found.train.read(i))).max()
            if most:
                differing[found.train.names[i]] = most
        assert not differing


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("decoder", ["dali", "nvjpeg"])
def test_a_gpu_decodes_within_rounding(decoder, found):
    """Levels of 0..255: at most 1 in the mean of a picture and 8 at a pixel, by another upsampling of colors and another inverse
    cosine transform."""
    concealed = ("flipped", "cut and closed")  # damage in the coded data: each decoder fills it in its own way
    plain = [i for i in np.flatnonzero(found.train.plain).tolist() if not found.train.names[i].startswith(concealed)]
    if decoder == "dali":
        module = pytest.importorskip("engine.data.loaders.dali_loader", exc_type=ImportError)
        decoded = module.decoded([found.train.path(i) for i in plain], {"device": "mixed"})
    else:
        data = DataConfig(name="folder", image_size=SIDE, workers=0, resident="off", loader="nvjpeg")
        made = choose.build_loader(found.train, Config(batch_size=2, data=data), "cuda")
        decoded = (image.cpu().numpy() for i in plain for image in made._decoded([i], [made._read(i)]))
    for i, got in zip(plain, decoded, strict=True):
        assert got is not None, found.train.names[i]
        difference = np.abs(got.astype(int) - np.asarray(found.train.read(i)))
        assert difference.mean() <= 1 and difference.max() <= 8, found.train.names[i]
