"""GradCAM weighting of images and feature maps against the lines of LCR. Bytes: one read of act and of grad."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

import kernels
from bench.timing import CUDA, DEVICE, GUARDS, alternate, close, compiled, guard, measure

CASES = {
    "image": ((128, 3, 224, 224) if CUDA else (8, 3, 224, 224), (7, 7)),
    "feature": ((128, 2048, 7, 7) if CUDA else (32, 2048, 7, 7), (7, 7)),
}
PROVIDERS = ["eager", "tuned", "compile", "ours"] if CUDA else ["eager", "tuned", "ours"]
DTYPE = torch.bfloat16 if CUDA else torch.float32


def lcr(act, grad, size):
    """The product at full size, its sum, ReLU and pooling."""
    return F.adaptive_max_pool2d(torch.relu((act * grad).sum(1, keepdim=True)), size)[:, 0].float()


def tuned(act, grad, size):
    """One product at a time where the channels are few, so that only the map is held."""
    if act.shape[1] > 8:
        return lcr(act, grad, size)
    total = act[:, 0] * grad[:, 0]
    for channel in range(1, act.shape[1]):
        total = total.addcmul(act[:, channel], grad[:, channel])
    return F.adaptive_max_pool2d(torch.relu(total), size).float()


def ours(act, grad, size):
    return kernels.gradcam(act, grad, size=size)


def provider(name: str):
    return {"eager": lcr, "tuned": tuned, "ours": ours}.get(name) or compiled(lcr)


def inputs(case: str, channels_last: bool = False) -> tuple:
    shape, size = CASES[case]
    torch.manual_seed(0)
    act, grad = (torch.randn(shape, device=DEVICE).to(DTYPE) for _ in range(2))
    if channels_last:
        act, grad = (tensor.to(memory_format=torch.channels_last) for tensor in (act, grad))
    return act, grad, size


@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("order", ["nchw", "channels_last"])
@pytest.mark.parametrize("case", CASES)
def test_gradcam(benchmark, case, order, name):
    act, grad, size = inputs(case, order == "channels_last")
    function = provider(name)
    want = kernels.reference.gradcam(act.float(), grad.float(), size=size)
    close(name, [function(act, grad, size)], [want], 1e-5 if torch.float32 == DTYPE else 2e-2)
    measure(
        benchmark,
        lambda: function(act, grad, size),
        moved=2 * act.numel() * act.element_size(),
        flop=0,
    )


def test_gradcam_guard(benchmark):
    sides = {}
    for case in CASES:
        for order in ("nchw", "channels_last"):
            pair = inputs(case, order == "channels_last")
            sides[f"over_eager_{case}_{order}"] = {name: functools.partial(provider(name), *pair) for name in ("eager", "ours")}

    def ratios() -> dict[str, float]:
        found = {}
        for name, pair in sides.items():
            seconds = alternate(pair, rounds=25)
            found[name] = seconds["eager"] / seconds["ours"]
        return found

    guard(benchmark, "gradcam", ratios, GUARDS["gradcam"]["cuda" if CUDA else "cpu"])
    benchmark.pedantic(sides["over_eager_image_nchw"]["ours"], rounds=1)
