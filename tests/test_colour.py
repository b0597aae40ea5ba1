"""The colour operators against torchvision's, one by one, and the two ways of running them against each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as F

from engine.data import IMAGENET_MEAN, IMAGENET_STD, colour
from engine.data.views import ViewValues, view_values


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    """uint8 [6, 3, 60, 72]: smooth colours, noise, dark, pale, grey, and flat with pure channels."""
    rng = np.random.default_rng(0)
    smooth = np.asarray(Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8)).resize((72, 60), Image.BICUBIC))
    noise = rng.integers(0, 256, (60, 72, 3), np.uint8)
    flat = np.zeros((60, 72, 3), np.uint8)
    for i, rgb in enumerate(np.ndindex(2, 2, 2)):
        flat[:, 9 * i : 9 * i + 9] = 255 * np.array(rgb)
    grey = np.repeat(noise[..., :1], 3, 2)
    images = np.stack((smooth, noise, smooth // 3, 200 + smooth // 5, grey, flat))
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


OPS = [
    *[(colour.adjust_brightness, F.adjust_brightness, f) for f in (0.6, 1.0, 1.4)],
    *[(colour.adjust_contrast, F.adjust_contrast, f) for f in (0.6, 1.0, 1.4)],
    *[(colour.adjust_saturation, F.adjust_saturation, f) for f in (0.6, 1.0, 1.4)],
    *[(colour.adjust_hue, F.adjust_hue, f) for f in (-0.5, -0.1, 0.0, 0.03, 0.1, 0.5)],
]


@pytest.mark.parametrize(("ours", "theirs", "factor"), OPS, ids=[f"{o.__name__}-{f}" for o, _, f in OPS])
def test_an_operator_equals_torchvisions_on_floats_and_nearly_on_pil(ours, theirs, factor, pictures):
    """Levels of 0..255: 0.05 at most against float tensors, whose grey weights have four digits. Against PIL, which
    truncates to integers, 1.1 in the mean and 3 at most; for hue, where PIL has 256 steps of hue and saturation, 2.5
    and 15."""
    got = ours(pictures.float(), factor)
    expected = theirs(pictures.float() / 255, factor) * 255
    assert (got - expected).abs().max() < 0.05
    vector = ours(pictures.float(), torch.full((6, 1, 1, 1), factor))
    torch.testing.assert_close(vector, got, rtol=0, atol=1e-4)
    for image, result in zip(pictures, got, strict=True):
        pil = np.asarray(theirs(F.to_pil_image(image), factor), np.float32)
        difference = np.abs(pil - result.permute(1, 2, 0).numpy())
        mean, most = (2.5, 16) if ours is colour.adjust_hue else (1.1, 3)
        assert difference.mean() < mean and difference.max() <= most, (difference.mean(), difference.max())


def test_grey_equals_torchvisions(pictures):
    got = colour.to_grey(pictures.float())
    assert (got - F.rgb_to_grayscale(pictures.float(), 3)).abs().max() < 0.05
    pil = np.stack([np.asarray(F.to_grayscale(F.to_pil_image(p), 3)) for p in pictures])
    assert np.abs(got.permute(0, 2, 3, 1).numpy() - pil).max() <= 1


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("size", [(60, 72), (130, 65), (12, 12)])
def test_blur_equals_torchvisions(sigma, size, pictures):
    x = pictures[:, :, : size[0], : size[1]].float()
    x = torch.nn.functional.interpolate(x, size)  # more rows than one block of the product
    got = colour.gaussian_blur(x, [sigma] * 6)
    assert (got - F.gaussian_blur(x, [23, 23], [sigma] * 2)).abs().max() < 0.1


def test_blur_takes_a_sigma_an_image_and_leaves_the_input(pictures):
    x = pictures.float()
    sigma = [0.2, 0.6, 1.0, 1.4, 1.8, 2.0]
    got = colour.gaussian_blur(x, sigma)
    for b, s in enumerate(sigma):
        torch.testing.assert_close(got[b : b + 1], colour.gaussian_blur(x[b : b + 1], [s]), rtol=0, atol=0.05)
    assert torch.equal(x, pictures.float())
    assert colour.gaussian_blur(x[..., :1, :1], [1.0] * 6).shape == (6, 3, 1, 1)


def test_blur_is_within_a_level_of_what_moco_v2_runs(pictures):
    from PIL import ImageFilter

    smooth = pictures[:1]
    for sigma in (0.3, 1.0, 2.0):
        pil = np.asarray(F.to_pil_image(smooth[0]).filter(ImageFilter.GaussianBlur(sigma)), np.float32)
        got = colour.gaussian_blur(smooth.float(), [sigma])[0].permute(1, 2, 0).numpy()
        assert np.abs(got - pil).mean() < 1


def test_one_by_one_and_as_a_batch_are_the_same(pictures):
    n = 64
    sizes = np.tile(np.array([[60, 72]], np.int32), (n, 1))
    values = view_values(0, 0, np.arange(n), 0, sizes)
    assert values.jitter.any() and values.grey.any() and (values.blur_sigma > 0).any()
    pixels = pictures[torch.arange(n) % 6].permute(0, 2, 3, 1).contiguous()
    run = colour.Colour(IMAGENET_MEAN, IMAGENET_STD)
    batch = run.batch(pixels, values, torch.float32)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    single = torch.full((n, 60, 72, 3), torch.nan).permute(0, 3, 1, 2)
    for b in range(n):
        run.one(pixels[b], values, b, single[b])
    torch.testing.assert_close(single, batch, rtol=0, atol=0.1 / 57)  # a blur's window may reach farther in a batch


def test_operators_follow_the_order_of_the_values(pictures):
    pixels = pictures[:1].permute(0, 2, 3, 1).contiguous()
    run = colour.Colour((0, 0, 0), (1 / 255,) * 3)  # leaves 0..255
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)):
        factors = np.array([[1.4, 0.6, 1.3, 0.1]], np.float32)
        no = np.zeros(1, bool)
        values = ViewValues(None, no, ~no, factors, np.array([order], np.uint8), no, np.zeros(1, np.float32))
        expected = pictures[:1].float() / 255
        adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
        for op in order:
            expected = adjust[op](expected, float(factors[0, op]))
        got = run.batch(pixels, values, torch.float32)
        assert (got - expected * 255).abs().max() < 0.2


def test_normalise_is_torchvisions(pictures):
    pixels = pictures.permute(0, 2, 3, 1).contiguous()
    got = colour.Normalise(IMAGENET_MEAN, IMAGENET_STD, torch.device("cpu"), torch.float32)(pixels)
    expected = F.normalize(pictures.float() / 255, IMAGENET_MEAN, IMAGENET_STD)
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6, check_stride=False)
