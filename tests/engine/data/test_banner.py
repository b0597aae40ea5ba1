"""The banner of FGVC-Aircraft's images: cut off for every reader, or left."""

from __future__ import annotations

import numpy as np
import pytest
from miniatures import make, open_set
from PIL import Image

from engine.config import Config, DataConfig, from_yaml
from engine.data.loaders.choose import build_loader
from engine.data.loaders.clean_batches import clean_batches
from engine.errors import ConfigError


@pytest.fixture(scope="module")
def bannered(tmp_path_factory):
    """(aircraft with its banner to be cut, the same images without one as a folder), training lists in one order."""
    root = make("aircraft", tmp_path_factory.mktemp("aircraft"), (96, 100))
    with pytest.warns(UserWarning, match="official split"):
        train = open_set("aircraft", root).train
    rng = np.random.default_rng(0)
    plain_root = tmp_path_factory.mktemp("plain")
    for i in range(len(train)):
        smooth = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)).resize((96 + i, 80 + 3 * i), Image.Resampling.BICUBIC)
        pixels = np.asarray(smooth)
        banner = np.broadcast_to(np.uint8((255, 0, 255)), (20, pixels.shape[1], 3))
        mode = "RGB" if i % 2 else "P"  # DALI opens the first kind itself and is handed the pixels of the second
        whole = Image.fromarray(np.concatenate((pixels, banner)))
        whole = whole if mode == "RGB" else whole.quantize(256, dither=Image.Dither.NONE)
        whole.save(train.path(i), "PNG")  # without loss, under the set's own names
        Image.fromarray(np.asarray(whole.convert("RGB"))[:-20]).save(plain_root / f"{i}.png")
    with pytest.warns(UserWarning, match="official split"):  # noqa: PT031  (each of both warns)
        cut = open_set("aircraft", root, crop_banner=True).train
        assert cut.fingerprint != open_set("aircraft", root).train.fingerprint
    return cut, open_set("folder", plain_root).train


def test_a_cut_banner_is_in_no_size_and_no_picture(bannered):
    cut, plain = bannered
    assert cut.cut == 20 and cut.sizes.tolist() == plain.sizes.tolist() and set(cut.plain.tolist()) == {True, False}
    for i in range(len(cut)):
        assert np.array_equal(np.asarray(cut.read(i)), np.asarray(plain.read(i)))


@pytest.mark.parametrize("loader", ["torch", "dali", "resident"])
def test_a_cut_banner_is_in_no_view_of_a_loader(loader, bannered):
    if loader == "dali":
        pytest.importorskip("nvidia.dali")

    def batches(images):
        resident = {"resident": "host"} if loader == "resident" else {"resident": "off", "loader": loader}
        data = DataConfig(name="aircraft", image_size=64, workers=0 if loader == "torch" else 1, **resident)
        made = build_loader(images, Config(batch_size=6, data=data), "cpu", with_clean=True)
        found = list(made.batches(0, 3))
        made.close()
        return found

    for one, other in zip(*map(batches, bannered), strict=True):
        assert one.index.tolist() == other.index.tolist()
        for views in ("x_q", "x_k", "x_clean"):
            assert np.array_equal(getattr(one, views).numpy(), getattr(other, views).numpy()), views


def test_a_cut_banner_is_in_no_clean_batch(bannered):
    one, other = (next(iter(clean_batches(images, resize=73, crop=73, workers=0)))[0] for images in bannered)
    assert np.array_equal(one.numpy(), other.numpy())


@pytest.mark.filterwarnings("ignore:.*official split")
def test_only_aircraft_have_a_banner_and_one_must_be_left(tmp_path):
    with pytest.raises(ValueError, match="data.crop_banner: only images of data.name=aircraft"):
        open_set("cub", tmp_path, crop_banner=True)
    with pytest.raises(ConfigError, match="data.crop_banner: got True, only .* data.name=aircraft"):
        from_yaml("data: {name: dogs, crop_banner: true}")
    assert from_yaml("data: {name: aircraft, crop_banner: true}").data.crop_banner
    root = make("aircraft", tmp_path / "low", (30, 20))
    with pytest.raises(ValueError, match="6 training files, none readable .*only 20 rows high, 20 of which data.crop_banner"):
        open_set("aircraft", root, crop_banner=True)
