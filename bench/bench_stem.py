"""The first convolution (7 x 7, stride 2, 3 channels) with its input padded to 4 or 8 channels: is it worth a copy?

    pytest bench/bench_stem.py --benchmark-only

A pass here is what PP-SSL asks of it in a step: two forwards, the gradient of the image and the gradient of the weight.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bench.timing import CUDA, DEVICE, alternate, facts, synchronize

BATCH = 128 if CUDA else 2  # on a CPU only that it runs
CHANNELS = (4, 8)


def passes(channels: int):
    """A call that runs the four passes on bf16 channels_last tensors; the copy that pads is not in it."""

    def random(*shape):
        return torch.randn(shape, device=DEVICE).bfloat16().contiguous(memory_format=torch.channels_last)

    x, weight, grad = random(BATCH, channels, 224, 224), random(64, channels, 7, 7), random(BATCH, 64, 112, 112)

    def run() -> None:
        for _ in range(2):
            F.conv2d(x, weight, stride=2, padding=3)
        for mask in ([True, False, False], [False, True, False]):
            torch.ops.aten.convolution_backward(grad, x, weight, None, [2, 2], [3, 3], [1, 1], False, [0, 0], 1, mask)
        synchronize()

    return run


@pytest.mark.parametrize("channels", CHANNELS)
def test_stem(benchmark, channels: int):
    sides = {"3": passes(3), "padded": passes(channels)}
    seconds = alternate(sides, 30 if CUDA else 3)
    ratio = seconds["3"] / seconds["padded"]
    benchmark.extra_info.update(facts() | {"batch": BATCH, "channels": channels, "three_over_padded": ratio})
    benchmark.pedantic(sides["padded"], rounds=3, warmup_rounds=1)
