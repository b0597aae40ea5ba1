"""The specification of every op in plain eager PyTorch: any floating dtype, float64 too, differentiable by autograd.

Nothing here is fast. Tests and benchmarks compare the fused paths with it, and ``impl="reference"`` runs it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MINMAX_EPS = 1e-7
"""Added to the range before dividing, as in the published code."""

Reduction = Literal["mean", "sum", "none"]
MinMax = Literal["image", "batch"] | None


class MaxOut(NamedTuple):
    """What :func:`maxout` returns."""

    mask: Tensor
    """[B, H, W] the maximum over the projections, after the optional min-max."""
    pooled: Tensor
    """[B, C] global average pool of mask * feature."""
    mean: Tensor
    """[M] mean that normalised the projections (the batch's in training)."""
    var: Tensor
    """[M] biased variance that normalised the projections."""


class MaxOutImage(NamedTuple):
    """What :func:`maxout_image` returns."""

    mask: Tensor
    """[B, H / cell, W / cell]"""
    mean: Tensor
    """[M]"""
    var: Tensor
    """[M] biased."""


def infonce(
    q: Tensor, k: Tensor, queue: Tensor, *, temperature: float, reduction: Reduction = "mean", return_rank: bool = False,
    own: tuple[Tensor, Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of the positive ``<q, k> / temperature`` among the queue's ``<q, queue_j> / temperature`` (MoCo).

    Args:
        q, k: [B, D], or [V, B, D] for V stacked queries (k may then stay [B, D]).
        queue: [K, D], no gradient.
        reduction: over the batch axis.
        return_rank: also return how many queue rows score strictly above the positive, int64, shape of the losses.
        own: (index [B], queue_index [K]): rows of a query's own index are left out.
    """
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), queue.dtype)
    q, k, queue = q.to(dtype), k.to(dtype), queue.detach().to(dtype)
    positive = (q * k).sum(-1, keepdim=True)
    negative = q @ queue.T
    if own is not None:
        negative = negative.masked_fill(own[0][:, None] == own[1], float("-inf"))
    logits = torch.cat([positive, negative], dim=-1)
    logits = logits.to(torch.promote_types(dtype, torch.float32)) / temperature
    loss = torch.logsumexp(logits, dim=-1) - logits[..., 0]
    loss = {"mean": loss.mean(-1), "sum": loss.sum(-1), "none": loss}[reduction]
    return (loss, (negative > positive).sum(-1)) if return_rank else loss


def minmax(z: Tensor, over: MinMax) -> Tensor:
    """``(z - min z) / (1e-7 + max(z - min z))`` with the range of each image (``z[b]``) or of the whole batch."""
    if over is None:
        return z
    dims = tuple(range(1, z.dim())) if over == "image" else tuple(range(z.dim()))
    z = z - z.amin(dims, keepdim=True)
    return z / (MINMAX_EPS + z.amax(dims, keepdim=True))


def _maxout_map(
    x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    training: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """max over the M channels of relu(batch_norm(conv1x1(x))): [B, H, W], and the statistics used, [M] each."""
    projected = F.conv2d(x, weight.to(x.dtype)[:, :, None, None])
    projected = projected.to(torch.promote_types(x.dtype, torch.float32))
    if training:
        var, mean = torch.var_mean(projected, dim=(0, 2, 3), correction=0)
    else:
        mean, var = running_mean.to(projected.dtype), running_var.to(projected.dtype)
    scale = gamma.to(projected.dtype) * torch.rsqrt(var + eps)
    normalised = (projected - mean[:, None, None]) * scale[:, None, None] + beta.to(projected.dtype)[:, None, None]
    return torch.relu(normalised).max(dim=1).values, mean.detach(), var.detach()


def maxout(
    feature: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, *, running_mean: Tensor | None = None,
    running_var: Tensor | None = None, training: bool = True, eps: float = 1e-5, minmax: MinMax = None,
) -> MaxOut:
    """Max-out projection: ``mask = minmax(max_m relu(bn(conv1x1(feature))))``, ``pooled = gap(mask * feature)``.

    Args:
        feature: [B, C, H, W].
        weight: [M, C], the 1x1 convolution without bias.
        gamma, beta: [M], affine part of the batch-norm.
        running_mean, running_var: [M], read when not ``training``; never written.
    """
    mask, mean, var = _maxout_map(feature, weight, gamma, beta, running_mean, running_var, training, eps)
    mask = _minmax(mask, minmax)
    pooled = (mask[:, None] * feature).mean(dim=(2, 3))
    return MaxOut(mask, pooled, mean, var)


def maxout_image(
    image: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, *, running_mean: Tensor | None = None,
    running_var: Tensor | None = None, training: bool = True, eps: float = 1e-5, cell: int = 32, minmax: MinMax = None,
    pool: Literal["max", "mean"] = "max",
) -> MaxOutImage:
    """The same mask taken on the image [B, 3, H, W], min-max over pixels, then pooled over cells."""
    mask, mean, var = _maxout_map(image, weight, gamma, beta, running_mean, running_var, training, eps)
    mask = _minmax(mask, minmax)
    pooling = F.max_pool2d if pool == "max" else F.avg_pool2d
    return MaxOutImage(pooling(mask[:, None], cell)[:, 0], mean, var)


def gradcam(
    act: Tensor, grad: Tensor, *, size: tuple[int, int], weighting: Literal["elementwise", "channel"] = "elementwise",
    pool: Literal["max", "mean"] = "max", sign: int = 1,
) -> Tensor:
    """``relu(sign * sum_c act * grad)``, or with ``mean_hw(grad)`` as the weight of each channel, pooled to ``size``.

    Args:
        act: [B, C, H, W], differentiable.
        grad: [B, C, H, W], a constant.

    Returns:
        [B, h, w], float32 (float64 for float64 inputs).
    """
    dtype = torch.promote_types(torch.promote_types(act.dtype, grad.dtype), torch.float32)
    grad = grad.detach().to(dtype)
    if weighting == "channel":
        grad = grad.mean(dim=(2, 3), keepdim=True)
    cam = torch.relu(sign * (act.to(dtype) * grad).sum(1))
    pooling = F.adaptive_max_pool2d if pool == "max" else F.adaptive_avg_pool2d
    return pooling(cam[:, None], size)[:, 0]


_minmax = minmax  # the functions above take an argument of this name
