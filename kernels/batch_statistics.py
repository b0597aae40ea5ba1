"""Statistics of a batch that several ops and several processes share."""

from __future__ import annotations

from torch import Tensor

from kernels.group import gather


def merge_statistics(mean: Tensor, var: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of all processes' rows together (Chan et al. 1979, equal counts)."""
    if not group:
        return mean, var
    means, variances = gather(mean[None], group), gather(var[None], group)
    mean = means.mean(0)
    return mean, (variances + (means - mean).square()).mean(0)


def minmax_groups(minmax: str, batch: int) -> int:
    """How many ranges a min-max over ``minmax`` ("" for none) takes."""
    return {"": 0, "image": batch, "batch": 1}[minmax]
