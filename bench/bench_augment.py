"""Views of decoded images: the fused op over torchvision one image after the other, and its two halves.

CPU: 32 views, one thread, against torchvision's PIL operators and PIL's blur. CUDA: two views of 128 images in one call,
against torchvision's tensor operators on the same device. 500 x 375 pixels to 224.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as F

import kernels
from bench.timing import CUDA, DEVICE, GUARDS, alternate, guard, measure
from engine.data.loaders.interface import IMAGENET_MEAN, IMAGENET_STD
from engine.data.loaders.torch_loader import Normalize, execute_view
from engine.data.views import view_values
from kernels.reference import ViewValues

SIDE, HEIGHT, WIDTH = 224, 375, 500
COUNT = 256 if CUDA else 32
GOALS = GUARDS["augment"]["cuda" if CUDA else "cpu"]


class Case:
    """Images, values and what each side makes of them."""

    def __init__(self):
        rng = np.random.default_rng(0)
        sets = [Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)) for _ in range(8)]
        self.images = [np.asarray(image.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)) for image in sets]
        sizes = np.tile(np.array([[HEIGHT, WIDTH]], np.int32), (COUNT, 1))
        self.values = view_values(0, 0, np.arange(COUNT), 0, sizes, SIDE)
        columns = (torch.from_numpy(np.ascontiguousarray(column)).to(DEVICE) for column in self.values)
        self.tensors = ViewValues(*columns)
        self.pixels = torch.from_numpy(np.concatenate([image.ravel() for image in self.images])).to(DEVICE)
        self.offsets = (torch.arange(COUNT) % 8 * 3 * HEIGHT * WIDTH).to(DEVICE)
        self.sizes = torch.from_numpy(sizes).to(DEVICE)
        self.dtype = torch.float16 if CUDA else torch.float32
        self.normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD, DEVICE, self.dtype)

    def ours(self, impl: str = "auto") -> torch.Tensor:
        given = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "dtype": self.dtype, "impl": impl}
        return kernels.augment(self.pixels, self.offsets, self.sizes, self.tensors, side=SIDE, **given)

    def torchvision(self) -> torch.Tensor:
        if not CUDA:
            views = [np.asarray(execute_view(Image.fromarray(self.images[b % 8]), self.values, b, SIDE)) for b in range(COUNT)]
            return self.normalize(torch.from_numpy(np.stack(views)))
        stored = self.pixels.view(8, HEIGHT, WIDTH, 3).permute(0, 3, 1, 2)
        return torch.stack([self.on_tensors(stored[b % 8], b) for b in range(COUNT)])

    def on_tensors(self, image: torch.Tensor, b: int) -> torch.Tensor:
        values = self.values
        view = F.resized_crop(image, *values.crop[b].tolist(), [SIDE, SIDE], antialias=True)
        if values.jitter[b]:
            for op in values.order[b].tolist():
                adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)[op]
                view = adjust(view, float(values.factors[b, op]))
        if values.grey[b]:
            view = F.rgb_to_grayscale(view, 3)
        if values.blur_sigma[b] > 0:
            view = F.gaussian_blur(view, [23, 23], [float(values.blur_sigma[b])] * 2)
        view = F.hflip(view) if values.flip[b] else view
        return F.normalize(view.to(self.dtype) / 255, IMAGENET_MEAN, IMAGENET_STD)


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def levels(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of each view in levels of 0..255."""
    scale = 255 * torch.tensor(IMAGENET_STD, device=a.device).view(3, 1, 1)
    return ((a.float() - b.float()).abs() * scale).mean((1, 2, 3))


def gate(case: Case) -> None:
    """Nothing is timed before it is right: near torchvision, which works in integers, and at real shapes on CUDA near the op's own
    PyTorch path, whose resize rounds twice on a CPU and once there."""
    assert levels(case.ours(), case.torchvision()).mean() < 2.5
    if CUDA:
        assert levels(case.ours(), case.ours("torch")).max() < 0.5
        on_host = kernels.augment(
            case.pixels.cpu(), case.offsets.cpu(), case.sizes.cpu(), ViewValues(*(column.cpu() for column in case.tensors)),
            side=SIDE, mean=IMAGENET_MEAN, std=IMAGENET_STD,
        )  # fmt: skip
        assert levels(case.ours().cpu(), on_host).mean() < 0.5


def test_over_torchvision(benchmark, case):
    gate(case)

    def ratios() -> dict[str, float]:
        best = alternate({"ours": case.ours, "torchvision": case.torchvision})
        return {"over_torchvision": best["torchvision"] / best["ours"]}

    guard(benchmark, "augment", ratios, GOALS)
    benchmark.pedantic(case.ours, rounds=1)


@pytest.mark.parametrize("part", ["augment", "recolour"])
def test_time(benchmark, case, part):
    """Bytes that must move: the crops once, the views once."""
    written = COUNT * SIDE * SIDE * 3 * torch.finfo(case.dtype).bits // 8
    if part == "augment":
        read = 3 * int(case.values.crop[:, 2:].astype(np.int64).prod(1).sum())
        measure(benchmark, case.ours, moved=read + written, flop=0)
    else:
        views = torch.zeros((COUNT, SIDE, SIDE, 3), dtype=torch.uint8, device=DEVICE)
        given = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "dtype": case.dtype}
        measure(benchmark, lambda: kernels.recolour(views, case.tensors, **given), moved=views.numel() + written, flop=0)
    benchmark.extra_info["views_per_s"] = COUNT / benchmark.stats.stats.min
