"""The fused augmentation: its specification against torchvision, both paths against the specification, and bad input.

Tolerances are levels of 0..255.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from error_budget import assert_within_budget
from PIL import Image, ImageFilter
from torchvision.transforms import functional as F

import kernels
from engine.data.views import view_values
from kernels import reference
from kernels.augment import JITTER, gaussian_blur, to_grey
from kernels.reference import ViewValues

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LEVELS = {"mean": (0, 0, 0), "std": (1 / 255,) * 3}
"""Normalization that leaves 0..255."""
NAMES = ("brightness", "contrast", "saturation", "hue")
SHAPES = [(30, 40), (50, 23), (9, 70), (20, 20), (1, 1), (3, 90)]


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


def tensors(values, device="cpu") -> ViewValues:
    return ViewValues(*(torch.from_numpy(np.ascontiguousarray(column)).to(device) for column in values))


def sampled(sizes: np.ndarray, side: int, seed: int = 1) -> ViewValues:
    """Values of the recipe, with blur as strong as at 224 px."""
    values = view_values(seed, 0, np.arange(len(sizes)), 0, sizes, side)
    return tensors(values._replace(blur_sigma=values.blur_sigma * (224 / side)))


def flat_set(copies: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """pixels, offsets, sizes of photo-like images of very different shapes, each named ``copies`` times."""
    rng = np.random.default_rng(3)
    images = []
    for height, width in SHAPES:
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((width, height), Image.BICUBIC)
        noise = rng.integers(-20, 20, (height, width, 3))
        images.append(np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8))
    ends = np.cumsum([image.size for image in images])
    offsets = np.tile(ends - [image.size for image in images], copies)
    sizes = np.tile(np.array(SHAPES, np.int32), (copies, 1))
    return torch.from_numpy(np.concatenate([i.ravel() for i in images])), torch.from_numpy(offsets), torch.from_numpy(sizes)


OPS = [
    *[("brightness", f) for f in (0.6, 1.0, 1.4)],
    *[("contrast", f) for f in (0.6, 1.0, 1.4)],
    *[("saturation", f) for f in (0.6, 1.0, 1.4)],
    *[("hue", f) for f in (-0.5, -0.1, 0.0, 0.03, 0.1, 0.5)],
]


@pytest.mark.parametrize(("name", "factor"), OPS)
def test_jitter_is_torchvisions(name, factor, pictures):
    """0.05 at most against float tensors, whose grey weights have four digits. Against PIL, which truncates to integers, 1.1
    in the mean and 3 at most; for hue, where PIL has 256 steps of hue and saturation, 2.5 and 16."""
    theirs = getattr(F, f"adjust_{name}")
    for image in pictures:
        expected = theirs(image.float() / 255, factor) * 255
        specified = getattr(reference, f"adjust_{name}")(image.double(), factor)
        assert (specified - expected).abs().max() < 0.05
        got = JITTER[NAMES.index(name)](image.float()[None], factor)[0]
        assert (got - specified).abs().max() < 0.01
        pil = torch.from_numpy(np.asarray(theirs(F.to_pil_image(image), factor), np.float32)).permute(2, 0, 1)
        mean, most = (2.5, 16) if name == "hue" else (1.1, 3)
        assert (pil - got).abs().mean() < mean and (pil - got).abs().max() <= most


def test_grey_is_torchvisions(pictures):
    for image in pictures:
        expected = F.rgb_to_grayscale(image.float(), 3)
        assert (reference.grey(image.double()).expand(3, -1, -1) - expected).abs().max() < 0.05
        got = to_grey(image.float()[None])[0]
        assert (got - expected).abs().max() < 0.05
        assert np.abs(got.permute(1, 2, 0).numpy() - np.asarray(F.to_grayscale(F.to_pil_image(image), 3))).max() <= 1


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("size", [(60, 72), (41, 65), (12, 12)])
def test_blur_is_torchvisions(sigma, size, pictures):
    """0.1 at most against torchvision's window of 23; less than 1 in the mean against PIL's boxes, which MoCo v2 runs."""
    for image in pictures[..., : size[0], : size[1]]:
        expected = F.gaussian_blur(image.double(), [23, 23], [sigma] * 2)
        assert (reference.gaussian_blur(image.double(), sigma) - expected).abs().max() < 0.1
        assert (gaussian_blur(image.float()[None], sigma)[0] - expected).abs().max() < 0.1
    smooth = pictures[0]
    pil = np.asarray(F.to_pil_image(smooth).filter(ImageFilter.GaussianBlur(sigma)), np.float32)
    assert np.abs(reference.gaussian_blur(smooth.double(), sigma).permute(1, 2, 0).numpy() - pil).mean() < 1


def test_blur_of_almost_nothing_and_of_one_pixel(pictures):
    x = pictures[:1].float()
    assert gaussian_blur(x, 0.0) is x
    assert gaussian_blur(x[..., :1, :1], 1.0).shape == (1, 3, 1, 1)


@pytest.mark.parametrize("box", [(0, 0, 60, 72), (5, 9, 33, 20), (59, 71, 1, 1), (10, 0, 7, 72)])
@pytest.mark.parametrize("side", [8, 24, 96])
def test_resized_crop_is_torchvisions(box, side, pictures):
    """PIL and torchvision's 8-bit resize round twice, after each direction: half a level each, a third in the mean."""
    for image in pictures:
        specified = reference.resized_crop(image.permute(1, 2, 0), box, side)
        theirs = F.resized_crop(image, *box, [side, side], antialias=True).permute(1, 2, 0)
        pil = np.array(F.resized_crop(F.to_pil_image(image), *box, [side, side]))
        for rounded in (theirs, torch.from_numpy(pil)):
            difference = (rounded - specified).abs()
            assert difference.max() < 1.03 and difference.mean() < 0.36


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("side", [20, 37])
def test_crops_match_the_specification(impl, side, kernel_device, poisoned_empty):
    """Crop, resize and flip alone: never more than the rounding of one level. Triton rounds once, as specified (halves are
    frequent in images this small); PyTorch's 8-bit resize twice, as PIL does."""
    pixels, offsets, sizes = flat_set()
    values = sampled(sizes.numpy(), side)
    none = torch.zeros_like(values.flip)
    values = values._replace(jitter=none, grey=none, blur_sigma=values.blur_sigma * 0)
    assert 0 < values.flip.sum() < len(offsets)
    device = kernel_device if impl == "triton" else torch.device("cpu")
    given = [t.to(device) for t in (pixels, offsets, sizes)], ViewValues(*(t.to(device) for t in values))
    got = kernels.augment(*given[0], given[1], side=side, impl=impl, **LEVELS).cpu()
    truth = kernels.augment(pixels, offsets, sizes, values, side=side, impl="reference", dtype=torch.float64, **LEVELS)
    difference = (got.round() - truth).abs()
    assert difference.max() <= 1 and (difference > 0).double().mean() < (0.02 if impl == "triton" else 0.25)


PATHS = [("torch", torch.float32), ("torch", torch.bfloat16), ("torch", torch.float64), ("triton", torch.float32)]
PATHS += [("triton", torch.float16)] + [("triton", torch.bfloat16)] * torch.cuda.is_available()


@pytest.mark.parametrize(("impl", "dtype"), PATHS, ids=str)
def test_colour_matches_float64(impl, dtype, kernel_device, poisoned_empty):
    """Every operator in many orders on the same 8-bit views: the error budget of every other op, not levels."""
    pixels, _, _ = flat_set()
    views = pixels[: 9 * 17 * 17 * 3].view(9, 17, 17, 3).contiguous()
    values = sampled(np.full((9, 2), 17, np.int32), 17, seed=4)
    assert values.jitter.any() and values.grey.any() and (values.blur_sigma > 0).any() and (values.blur_sigma == 0).any()
    device = kernel_device if impl == "triton" else torch.device("cpu")
    got = kernels.recolour(
        views.to(device), ViewValues(*(t.to(device) for t in values)), mean=MEAN, std=STD, dtype=dtype, impl=impl
    )
    assert got.is_contiguous(memory_format=torch.channels_last) and got.dtype == dtype
    truth = kernels.recolour(views, values, mean=MEAN, std=STD, dtype=torch.float64, impl="reference")
    eager = kernels.recolour(views, values, mean=MEAN, std=STD, dtype=dtype, impl="reference")
    assert_within_budget("views", got, eager, truth, units=64)  # a blur and four operators, of numbers a hundred times the result


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_rows_do_not_depend_on_the_batch_and_repeat(impl, kernel_device):
    pixels, offsets, sizes = (t.to(kernel_device) for t in flat_set())
    values = ViewValues(*(t.to(kernel_device) for t in sampled(sizes.cpu().numpy(), 16)))
    whole = kernels.augment(pixels, offsets, sizes, values, side=16, mean=MEAN, std=STD, impl=impl)
    out = torch.full((3, 16, 16, 3), torch.nan, device=kernel_device).permute(0, 3, 1, 2)
    part = ViewValues(*(t[4:7] for t in values))
    given = {"side": 16, "mean": MEAN, "std": STD, "impl": impl}
    assert kernels.augment(pixels, offsets[4:7], sizes[4:7], part, out=out, **given) is out
    assert torch.equal(out, whole[4:7])
    none = ViewValues(*(t[:0] for t in values))
    assert kernels.augment(pixels, offsets[:0], sizes[:0], none, **given).shape == (0, 3, 16, 16)


def test_operators_follow_the_order_of_the_values(pictures):
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)):
        factors = np.array([[1.4, 0.6, 1.3, 0.1]], np.float32)
        no, yes = np.zeros(1, bool), np.ones(1, bool)
        values = tensors((np.zeros((1, 4), np.int32), no, yes, factors, np.array([order], np.uint8), no, np.zeros(1, np.float32)))
        expected = pictures[:1, :, :, :60].float() / 255
        for place in order:
            expected = getattr(F, f"adjust_{NAMES[place]}")(expected, float(factors[0, place]))
        got = kernels.recolour(pictures[:1, :, :, :60].permute(0, 2, 3, 1).contiguous(), values, **LEVELS)
        assert (got - expected * 255).abs().max() < 0.2


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_opcheck(impl, kernel_device):
    pixels, offsets, sizes = (t.to(kernel_device) for t in flat_set(1))
    values = ViewValues(*(t.to(kernel_device) for t in sampled(sizes.cpu().numpy(), 8)))
    out = torch.empty((6, 8, 8, 3), device=kernel_device).permute(0, 3, 1, 2)
    arguments = (pixels, offsets, sizes, *values, list(MEAN), list(STD), impl, out)
    torch.library.opcheck(torch.ops.ppssl.augment.default, arguments)
    views = torch.zeros((6, 8, 8, 3), dtype=torch.uint8, device=kernel_device)
    torch.library.opcheck(torch.ops.ppssl.recolour.default, (views, *values, list(MEAN), list(STD), impl, out))


def good() -> dict:
    pixels, offsets, sizes = flat_set(1)
    return {
        "pixels": pixels, "offsets": offsets, "sizes": sizes, "values": sampled(sizes.numpy(), 8), "side": 8,
        "mean": MEAN, "std": STD,
    }  # fmt: skip


def outside(given: dict) -> dict:
    crop = given["values"].crop.clone()
    crop[2, 2] += 100
    return {"values": given["values"]._replace(crop=crop)}


BAD = [
    (lambda g: {"pixels": g["pixels"].float()}, TypeError, "pixels must be torch.uint8, got torch.float32"),
    (lambda g: {"offsets": g["offsets"].int()}, TypeError, "offsets must be torch.int64"),
    (lambda g: {"offsets": g["offsets"][:2]}, ValueError, "values.crop must be contiguous .2, 4., got .6, 4."),
    (lambda g: {"sizes": g["sizes"][:2]}, ValueError, "sizes must be contiguous .6, 2., got .2, 2."),
    (lambda g: {"sizes": g["sizes"].flip(1).T}, ValueError, "sizes must be contiguous"),
    (lambda g: {"values": g["values"]._replace(order=g["values"].order.long())}, TypeError, "values.order must be torch.uint8"),
    (lambda g: {"values": g["values"]._replace(grey=g["values"].grey[:3])}, ValueError, "values.grey must be contiguous .6."),
    (outside, ValueError, "box 2 lies outside its bounds"),
    (lambda g: {"offsets": g["offsets"] + 10}, ValueError, "image 5 lies outside its bounds"),
    (lambda g: {"side": 0}, ValueError, "side must be at least 1, got 0"),
    (lambda g: {"std": (1, 0, 1)}, ValueError, "std above 0"),
    (lambda g: {"dtype": torch.uint8}, TypeError, "dtype must be a floating type"),
    (lambda g: {"out": torch.empty(6, 3, 8, 8)}, ValueError, "channels_last"),
    (lambda g: {"impl": "fast"}, ValueError, "fast"),
    (lambda g: {"impl": "triton", "dtype": torch.float64}, ValueError, "float64"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input_is_named(change, error, message):
    given = good()
    with pytest.raises(error, match=message):
        kernels.augment(**(given | change(given)))


def test_views_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"must be \[B, S, S, 3\], got \[2, 3, 8, 8\]"):
        kernels.recolour(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), good()["values"], mean=MEAN, std=STD)
