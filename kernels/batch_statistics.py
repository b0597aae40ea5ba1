"""Batch statistics: what the max-out ops share, and how statistics of several processes are merged."""

from __future__ import annotations

from torch import Tensor

from kernels.group import gather


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
