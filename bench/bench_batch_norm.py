"""Batch-norm with residual and ReLU against torch's own, forward and backward. Bytes: x twice, y; dy and x twice, dx."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

import kernels
from bench.timing import CUDA, DEVICE, GUARDS, alternate, close, compiled, guard, measure

# the widest maps of a ResNet-50 at 224 pixels: of the stem, and of the last layer of a block of the first and the third stage
CASES = {
    "stem": ((128, 64, 112, 112) if CUDA else (4, 64, 56, 56), False),
    "layer1": ((128, 256, 56, 56) if CUDA else (4, 256, 28, 28), True),
    "layer3": ((128, 1024, 14, 14) if CUDA else (16, 1024, 7, 7), True),
}
PROVIDERS = ["eager", "compile", "ours"] if CUDA else ["eager", "ours"]
DTYPE = torch.bfloat16 if CUDA else torch.float32


def eager(x, gamma, beta, residual):
    """torch's modules: on CUDA cuDNN's batch-norm, which takes channels_last."""
    y = F.batch_norm(x, None, None, gamma, beta, training=True)
    return F.relu(y if residual is None else y + residual, inplace=True)


def ours(x, gamma, beta, residual):
    return kernels.batch_norm(x, gamma, beta, residual=residual).y


def provider(name: str):
    return {"eager": eager, "ours": ours}.get(name) or compiled(eager)


def inputs(case: str) -> tuple[dict, torch.Tensor]:
    shape, with_residual = CASES[case]
    torch.manual_seed(0)
    x, residual, upstream = (torch.randn(shape, device=DEVICE).to(DTYPE).to(memory_format=torch.channels_last) for _ in range(3))
    gamma, beta = torch.rand(shape[1], device=DEVICE) + 0.5, torch.randn(shape[1], device=DEVICE)
    leaves = dict(x=x, gamma=gamma, beta=beta, residual=residual if with_residual else None)
    return {name: leaf if leaf is None else leaf.requires_grad_() for name, leaf in leaves.items()}, upstream


def differentiate(function, tensors: dict, upstream: torch.Tensor) -> tuple[torch.Tensor, ...]:
    leaves = [tensor for tensor in tensors.values() if tensor is not None]
    return torch.autograd.grad(function(**tensors), leaves, upstream)


@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("case", CASES)
def test_batch_norm(benchmark, case, name):
    tensors, upstream = inputs(case)
    function = provider(name)
    want = differentiate(eager, {key: None if t is None else t.float() for key, t in tensors.items()}, upstream.float())
    close(name, differentiate(function, tensors, upstream), want, 1e-4 if torch.float32 == DTYPE else 5e-2)
    passes = 8 + (2 if CASES[case][1] else 0)  # the residual in and its gradient out; its bits are a sixteenth
    measure(
        benchmark,
        lambda: differentiate(function, tensors, upstream),
        moved=passes * upstream.numel() * upstream.element_size(),
        flop=0,
    )


@pytest.mark.skipif(not CUDA, reason="the PyTorch path of the op is not meant to be faster than torch's own")
def test_batch_norm_guard(benchmark):
    sides = {
        f"over_{other}_{case}": {
            name: functools.partial(differentiate, provider(name), *inputs(case)) for name in (other, "ours")
        }
        for case in CASES
        for other in ("eager", "compile")
    }  # fmt: skip

    def ratios() -> dict[str, float]:
        found = {}
        for name, pair in sides.items():
            seconds = alternate(pair)
            found[name] = seconds[name.split("_")[1]] / seconds["ours"]
        return found

    guard(benchmark, "batch_norm", ratios, GUARDS["batch_norm"]["cuda"])
    benchmark.pedantic(sides["over_eager_layer1"]["ours"], rounds=1)
