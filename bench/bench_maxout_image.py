"""The image's max-out mask against the plain form, which holds [B, 32, 224, 224] several times.

Bytes: two reads of the image. Operations: 2 * 3 * 32 per pixel in the search, 18 in the moments.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import kernels
from bench.timing import CUDA, DEVICE, GUARDS, alternate, close, compiled, guard, measure, modes, peak_extra_bytes

WIDTH, CELL = 32, 32
BATCHES = [128, 256] if CUDA else [8]
PROVIDERS = ["eager", "tuned", "compile", "ours"] if CUDA else ["eager", "tuned", "ours"]
DTYPE = torch.bfloat16 if CUDA else torch.float32


def published(image, weight, gamma, beta):
    """Convolution, batch-norm, ReLU, maximum, min-max over the batch, max-pooling: one line each."""
    u = F.conv2d(image, weight.to(image.dtype)[:, :, None, None])
    mask = torch.relu(F.batch_norm(u.float(), None, None, gamma, beta, training=True)).max(1).values
    mask = mask - mask.min()
    mask = mask / (1e-7 + mask.max())
    return F.max_pool2d(mask[:, None], CELL)[:, 0]


def tuned(image, weight, gamma, beta):
    """Min-max after the pooling but for the minimum. (ReLU after the maximum is slower: it loses channels_last.)"""
    u = F.conv2d(image, weight.to(image.dtype)[:, :, None, None])
    mask = torch.relu(F.batch_norm(u.float(), None, None, gamma, beta, training=True)).max(1).values
    low, mask = mask.min(), F.max_pool2d(mask[:, None], CELL)[:, 0]
    return (mask - low) / (1e-7 + (mask - low).max())


def ours(image, weight, gamma, beta):
    return kernels.maxout_image(image, weight, gamma, beta, cell=CELL, minmax="batch").mask


def provider(name: str):
    return {"eager": published, "tuned": tuned, "ours": ours}.get(name) or compiled(tuned)


def inputs(batch: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(0)
    image = torch.randn(batch, 3, 224, 224, device=DEVICE).to(DTYPE).to(memory_format=torch.channels_last)
    weight = torch.randn(WIDTH, 3, device=DEVICE) * 3**-0.5
    leaves = [t.requires_grad_() for t in (weight, torch.ones(WIDTH, device=DEVICE), torch.zeros(WIDTH, device=DEVICE))]
    return image, leaves


def scalar(function, image, leaves):
    torch.manual_seed(1)
    weights = torch.randn(image.shape[0], 224 // CELL, 224 // CELL, device=DEVICE)
    return lambda: (function(image, *leaves) * weights).sum()


@pytest.mark.parametrize("mode", ["forward", "backward", "both"])
@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("batch", BATCHES, ids="B{}".format)
def test_maxout_image(benchmark, batch, name, mode):
    image, leaves = inputs(batch)
    function = provider(name)
    with torch.no_grad():
        want = kernels.reference.maxout_image(image.float(), *leaves, cell=CELL, minmax="batch").mask
        close(name, [function(image, *leaves)], [want], 1e-4 if torch.float32 == DTYPE else 5e-2)
    pixels = image.numel() // 3
    measure(
        benchmark,
        modes(scalar(function, image, leaves), leaves)[mode],
        moved=0 if mode == "backward" else 2 * image.numel() * image.element_size(),
        flop=0 if mode == "backward" else (6 * WIDTH + 18) * pixels,
        memory=mode == "both" and name != "tuned",
        replay=mode != "backward",
    )


def test_maxout_image_guard(benchmark):
    image, leaves = inputs(BATCHES[0])
    sides = {name: modes(scalar(provider(name), image, leaves), leaves)["both"] for name in ("eager", "ours")}

    def ratios() -> dict[str, float]:
        seconds = alternate(sides)
        found = {"over_eager": seconds["eager"] / seconds["ours"]}
        if CUDA:
            found["pixels_a_byte"] = 2 * (image.numel() / 3) / peak_extra_bytes(sides["ours"])
        return found

    guard(benchmark, "maxout_image", ratios, GUARDS["maxout_image"]["cuda" if CUDA else "cpu"])
    benchmark.pedantic(sides["ours"], rounds=1)
