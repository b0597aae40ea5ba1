"""How fast this device multiplies and copies, measured in a second."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def convolution_tflop_s(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Rate of a 3x3 convolution of ResNet-50's third stage, forward and backward, channels_last, on ``device``."""
    batch = 64 if device.type == "cuda" else 8
    x = torch.randn(batch, 256, 14, 14, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(256, 256, 3, 3, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    x.requires_grad_(), weight.requires_grad_()

    def once() -> None:
        y = torch.nn.functional.conv2d(x, weight, padding=1)
        torch.autograd.grad(y, (x, weight), torch.ones_like(y))

    flop = 3 * 2 * batch * 14 * 14 * 256 * 256 * 9
    return flop / _fastest(once, device, seconds) / 1e12


def copy_tb_s(device: torch.device, seconds: float = 0.5) -> float:
    """Bytes read and written by a large copy on ``device``."""
    source = torch.empty(2**28, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source), device, seconds) / 1e12


def _fastest(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of the fastest of the calls that fit into ``seconds``, after one that does not count."""

    def once() -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / repeats

    repeats = 1
    once()
    repeats = max(1, round(0.01 / max(once(), 1e-6)))  # launches and one wait, spread over many calls
    until = time.perf_counter() + seconds
    best = once()
    while time.perf_counter() < until:
        best = min(best, once())
    return best
