"""What ops with batch statistics share with their kernels, and how statistics of several processes are merged."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.group import gather

MASK_BITS = 8
"""Channels whose ReLU is packed into one byte, the first in the lowest bit."""


def merge_statistics(mean: Tensor, var: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over the rows of all processes, which hold equally many (Chan et al. 1979)."""
    if not group:
        return mean, var
    means, variances = gather(mean[None], group), gather(var[None], group)
    mean = means.mean(0)
    return mean, (variances + (means - mean).square()).mean(0)


def minmax_groups(minmax: str, batch: int) -> int:
    """The number of min-max ranges: one per image, one per batch, or none for ``""``."""
    return {"": 0, "image": batch, "batch": 1}[minmax]


def new_bits(x: Tensor, needed: bool) -> Tensor:
    """[B, H, W, ceil(C / 8)] uint8, room for the bits of the ReLU after ``x`` [B, C, H, W]; [0] unless ``needed``."""
    batch, channels, height, width = x.shape
    shape = (batch, height, width, -(-channels // MASK_BITS)) if needed else (0,)
    return torch.empty(shape, dtype=torch.uint8, device=x.device)
