"""The max-out projection of a feature map against the published lines and a tuned eager form.

Bytes: forward two reads of the feature, backward two reads and one write. Operations: three products of 2 B S C M.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import kernels
from bench.timing import CUDA, DEVICE, GUARDS, alternate, close, compiled, guard, measure, modes

WIDTH = 32
SHAPES = [(128, 2048, 7), (1024, 2048, 7)] if CUDA else [(32, 2048, 7)]
PROVIDERS = ["eager", "tuned", "compile", "ours"] if CUDA else ["eager", "tuned", "ours"]
DTYPE = torch.bfloat16 if CUDA else torch.float32


def published(feature, weight, gamma, beta):
    """Convolution, batch-norm, ReLU, maximum, min-max over the batch, product, pooling: one line each."""
    u = F.conv2d(feature, weight.to(feature.dtype)[:, :, None, None])
    mask = torch.relu(F.batch_norm(u.float(), None, None, gamma, beta, training=True)).max(1).values
    mask = mask - mask.min()
    mask = mask / (1e-7 + mask.max())
    return mask, F.adaptive_avg_pool2d(mask[:, None] * feature, 1).flatten(1)


def tuned(feature, weight, gamma, beta):
    """The projection as one matrix product and the masked pooling as a batched one."""
    rows = feature.permute(0, 2, 3, 1).flatten(1, 2)  # [B, S, C]
    u = (rows @ weight.to(rows.dtype).T).float()
    var, mean = torch.var_mean(u, dim=(0, 1), correction=0)
    scale = gamma * torch.rsqrt(var + 1e-5)
    mask = torch.relu(u * scale + (beta - mean * scale)).amax(2)
    mask = mask - mask.min()
    mask = mask / (1e-7 + mask.max())
    pooled = torch.bmm(mask[:, None].to(rows.dtype), rows)[:, 0] / rows.shape[1]
    return mask.unflatten(1, feature.shape[2:]), pooled


def ours(feature, weight, gamma, beta):
    return kernels.maxout(feature, weight, gamma, beta, minmax="batch")[:2]


def provider(name: str):
    return {"eager": published, "tuned": tuned, "ours": ours}.get(name) or compiled(tuned)


def inputs(batch: int, channels: int, side: int, channels_last: bool = True) -> list[torch.Tensor]:
    torch.manual_seed(0)
    feature = torch.relu(torch.randn(batch, channels, side, side, device=DEVICE)).to(DTYPE)
    if channels_last:
        feature = feature.to(memory_format=torch.channels_last)
    weight = torch.randn(WIDTH, channels, device=DEVICE) * channels**-0.5
    gamma, beta = torch.ones(WIDTH, device=DEVICE), torch.zeros(WIDTH, device=DEVICE)
    return [tensor.requires_grad_() for tensor in (feature, weight, gamma, beta)]


def scalar(function, leaves):
    """A scalar that sends a different gradient to every element of both outputs."""
    torch.manual_seed(1)
    mask, pooled = function(*leaves)
    weights = [torch.randn(part.shape, device=DEVICE) for part in (mask, pooled)]

    def forward():
        outputs = function(*leaves)
        return sum((part.float() * weight).sum() for part, weight in zip(outputs, weights, strict=True))

    return forward


@pytest.mark.parametrize("mode", ["forward", "backward", "both"])
@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("shape", SHAPES, ids="B{0[0]}-C{0[1]}-{0[2]}x{0[2]}".format)
def test_maxout(benchmark, shape, name, mode):
    leaves = inputs(*shape)
    function = provider(name)
    want = kernels.reference.maxout(*[leaf.float() for leaf in leaves], minmax="batch")[:2]
    close(name, function(*leaves), want, 1e-4 if torch.float32 == DTYPE else 5e-2)
    feature = leaves[0]
    passes = {"forward": 2, "backward": 3, "both": 5}[mode]
    products = {"forward": 1, "backward": 2, "both": 3}[mode]
    measure(
        benchmark,
        modes(scalar(function, leaves), leaves)[mode],
        moved=passes * feature.numel() * feature.element_size(),
        flop=products * 2 * feature.numel() * WIDTH,
        replay=mode != "backward",
    )


def test_maxout_guard(benchmark):
    ratios_of = {}
    for order in ("channels_last", "nchw"):
        leaves = inputs(*SHAPES[0], channels_last=order == "channels_last")
        names = PROVIDERS if order == "channels_last" else ["eager", "ours"]
        ratios_of[order] = {name: modes(scalar(provider(name), leaves), leaves)["both"] for name in names}

    def ratios() -> dict[str, float]:
        found = {}
        for order, sides in ratios_of.items():
            seconds = alternate(sides)
            found[f"over_eager_{order}"] = seconds["eager"] / seconds["ours"]
            if "compile" in seconds:
                found["over_compile"] = seconds["compile"] / seconds["ours"]
        return found

    guard(benchmark, "maxout", ratios, GUARDS["maxout"]["cuda" if CUDA else "cpu"])
    benchmark.pedantic(ratios_of["channels_last"]["ours"], rounds=1)
