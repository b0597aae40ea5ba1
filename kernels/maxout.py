"""Max-out/Hadamard projection: 1x1 conv (C -> M), batch-norm, ReLU, max over M, min-max, product with the feature, pooling.

With the rows ``x_s`` of the feature, ``u = x W^T`` and ``v = gamma (u - mean) / sqrt(var + eps) + beta``:

    a_s = max_m relu(v_sm)      mask = (a - min a) / (1e-7 + max a - min a)      pooled = 1/S sum_s mask_s x_s

The normalized projections and the product ``mask * feature`` are never in memory; the only new tensor of the size of the
feature is its gradient. Saved for the backward pass are the feature (which is alive anyway), ``u`` [B S, M] and a few
vectors. The backward pass recomputes ``v``:

    t      = dmask + 1/S x . dpooled
    da     = t / den + [a = min] sum(t (mask - 1)) / den - [a = max] sum(t mask) / den        (ties share equally)
    dv_sm  = da_s where m is the first maximum of v_s and v_sm > 0, otherwise 0
    du     = gamma rstd (dv - (sum dv + xhat sum(dv xhat)) / n)      (in training; without the sums otherwise)
    dx     = du W + 1/S mask dpooled,   dW = du^T x,   dgamma = sum(dv xhat),   dbeta = sum dv

Statistics, ReLU, maximum and min-max are computed in float32 (float64 for float64 features), under autocast too.
Reductions are deterministic. Batch statistics are returned; the caller updates the running statistics.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from kernels import reference
from kernels.batch_statistics import merge_statistics, minmax_groups
from kernels.group import gather, group_name, world_size
from kernels.reference import MINMAX_EPS, MaxOut, MinMax
from kernels.selection import check_projection, choose, compute_dtype, refuse_double_backward

MAX_WIDTH = 64
"""The largest number of projections M that the Triton kernels take."""


def maxout(
    feature: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
    eps: float = 1e-5,
    minmax: MinMax = None,
    group: dist.ProcessGroup | None = None,
    impl: Literal["auto", "triton", "torch", "reference"] = "auto",
) -> MaxOut:
    """The max-out mask of a feature map and the feature pooled under it (PP-SSL and LCR, method "max-out").

    Args:
        feature: [B, C, H, W], NCHW or channels_last (both used in place).
        weight: [M, C], the 1x1 convolution without bias. The Triton path rounds it to the dtype of the feature.
        gamma, beta: [M], scale and shift of the batch-norm.
        running_mean, running_var: [M], used if ``training`` is false; never written.
        training: normalize with the mean and biased variance of the batch.
        minmax: scale the mask to [0, 1] over each image, over the batch (the published form), or not at all.
        group: processes that share the batch, as with SyncBatchNorm: the statistics and the range of ``minmax="batch"``
            are those of the global batch. Gradients are those of the sum of the losses of all processes; the gradient
            to a parameter is this process's summand, to be summed over the processes.
        impl: ``"auto"`` is Triton on CUDA and the PyTorch path elsewhere.

    Returns:
        MaxOut(mask [B, H, W], pooled [B, C], mean [M], var [M]), float32 (float64 for float64 features). ``mean`` and
        ``var`` carry no gradient; update running statistics with ``var * n / (n - 1)``, n = B H W. The gradient of the
        maximum over M goes to the first maximum (as in ``torch.max``); ties of the min-max share it (as in
        ``torch.amin``).

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: wrong rank or shape, empty batch, missing running statistics, unknown option, or a group with
            ``impl="reference"``.
        RuntimeError: second derivatives of a fused path.
    """
    check_projection("maxout", feature, weight, gamma, beta, running_mean, running_var, training, eps, minmax)
    unsupported = f"M must be at most {MAX_WIDTH}, got {weight.shape[0]}" if weight.shape[0] > MAX_WIDTH else None
    chosen = choose("maxout", impl, feature, fast="torch", unsupported=unsupported)
    name = group_name(group)
    if chosen == "reference":
        if name:
            raise ValueError("maxout: impl='reference' knows one process; use impl='torch' with a group")
        with torch.autocast(feature.device.type, enabled=False):
            return reference.maxout(
                feature,
                weight,
                gamma,
                beta,
                running_mean=running_mean,
                running_var=running_var,
                training=training,
                eps=eps,
                minmax=minmax,
            )
    outputs = torch.ops.ppssl.maxout(
        feature, weight, gamma, beta, running_mean, running_var, training, float(eps), minmax or "", name, chosen
    )
    return MaxOut(*outputs[:4])


@torch.library.custom_op("ppssl::maxout", mutates_args=())
def _maxout(
    feature: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
    minmax: str,
    group: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(mask [B, H, W], pooled [B, C], mean [M], var [M], u [B H W, M], den [groups]); minmax "" is None."""
    if impl == "triton":
        from kernels import maxout_triton  # here, because triton may not be installed

        return maxout_triton.forward(feature, weight, gamma, beta, running_mean, running_var, training, eps, minmax, group)
    with torch.autocast(feature.device.type, enabled=False):
        return _forward(feature, weight, gamma, beta, running_mean, running_var, training, eps, minmax, group)


@_maxout.register_fake
def _(feature, weight, gamma, beta, running_mean, running_var, training, eps, minmax, group, impl):
    batch, channels, height, width = feature.shape
    projections = weight.shape[0]

    def new(*shape):
        return feature.new_empty(shape, dtype=compute_dtype(feature))

    return (
        new(batch, height, width),
        new(batch, channels),
        new(projections),
        new(projections),
        new(batch * height * width, projections),
        new(minmax_groups(minmax, batch)),
    )


@torch.library.custom_op("ppssl::maxout_backward", mutates_args=())
def _maxout_backward(
    grad_mask: Tensor | None,
    grad_pooled: Tensor | None,
    feature: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mask: Tensor,
    mean: Tensor,
    var: Tensor,
    u: Tensor,
    den: Tensor,
    training: bool,
    eps: float,
    minmax: str,
    need_feature: bool,
    group: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dfeature or [0], dweight, dgamma, dbeta), each in the dtype of its tensor."""
    if impl == "triton":
        from kernels import maxout_triton  # here, because triton may not be installed

        return maxout_triton.backward(
            grad_mask,
            grad_pooled,
            feature,
            weight,
            gamma,
            beta,
            mask,
            mean,
            var,
            u,
            den,
            training,
            eps,
            minmax,
            need_feature,
            group,
        )
    with torch.autocast(feature.device.type, enabled=False):
        return _backward(
            grad_mask,
            grad_pooled,
            feature,
            weight,
            gamma,
            beta,
            mask,
            mean,
            var,
            u,
            den,
            training,
            eps,
            minmax,
            need_feature,
            group,
        )


@_maxout_backward.register_fake
def _(
    grad_mask,
    grad_pooled,
    feature,
    weight,
    gamma,
    beta,
    mask,
    mean,
    var,
    u,
    den,
    training,
    eps,
    minmax,
    need_feature,
    group,
    impl,
):
    return (
        torch.empty_like(feature) if need_feature else feature.new_empty(0),
        weight.new_empty(weight.shape),
        gamma.new_empty(gamma.shape),
        beta.new_empty(beta.shape),
    )


def _setup_context(ctx, inputs, output):
    feature, weight, gamma, beta, _, _, ctx.training, ctx.eps, ctx.minmax, ctx.group, ctx.impl = inputs
    mask, _, mean, var, u, den = output
    ctx.mark_non_differentiable(mean, var, u, den)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(feature, weight, gamma, beta, mask, mean, var, u, den)


def _autograd(ctx, grad_mask, grad_pooled, *_):
    refuse_double_backward("maxout")
    grads = (None,) * 4
    if grad_mask is not None or grad_pooled is not None:
        grads = torch.ops.ppssl.maxout_backward(
            grad_mask,
            grad_pooled,
            *ctx.saved_tensors,
            ctx.training,
            ctx.eps,
            ctx.minmax,
            ctx.needs_input_grad[0],
            ctx.group,
            ctx.impl,
        )
        grads = tuple(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=False))
    return (
        *grads,  # feature, weight, gamma, beta
        None,  # running_mean
        None,  # running_var
        None,  # training
        None,  # eps
        None,  # minmax
        None,  # group
        None,  # impl
    )


_maxout.register_autograd(_autograd, setup_context=_setup_context)


def _is_rows(feature: Tensor) -> bool:
    """Whether the C values of a position are contiguous (channels_last), so that positions are the rows of a matrix."""
    return feature.stride(1) == 1 and feature.shape[1] > 1


def _forward(feature, weight, gamma, beta, running_mean, running_var, training, eps, minmax, group):
    dtype = compute_dtype(feature)
    batch, channels, height, width = feature.shape
    x = feature.flatten(2).to(dtype)  # [B, C, S], in either memory order
    w = weight.to(dtype)
    if _is_rows(feature):
        u = x.transpose(1, 2).reshape(-1, channels) @ w.T
    else:
        # bmm, because matmul of a matrix with a batch may copy the batch into one large matrix
        u = torch.bmm(w.expand(batch, -1, -1), x).transpose(1, 2).reshape(-1, w.shape[0])
    if training:
        mean = u.mean(0)
        var = (u - mean).square_().mean(0)
        mean, var = merge_statistics(mean, var, group)
    else:
        mean, var = running_mean.to(dtype, copy=True), running_var.to(dtype, copy=True)
    a = torch.relu(_normalize(u, gamma, beta, mean, var, eps).amax(1)).view(batch, -1)
    mask, den = a, a.new_empty(0)
    if minmax:
        grouped = a.view(minmax_groups(minmax, batch), -1)
        low, high = grouped.amin(1), grouped.amax(1)
        if minmax == "batch":
            low, high = gather(low, group).amin(0, keepdim=True), gather(high, group).amax(0, keepdim=True)
        above = grouped - low[:, None]
        den = MINMAX_EPS + (high - low)
        mask = (above / den[:, None]).view(batch, -1)
    pooled = torch.bmm(mask[:, None], x.transpose(1, 2))[:, 0] / mask.shape[1]
    return mask.view(batch, height, width), pooled, mean, var, u, den


def _normalize(u, gamma, beta, mean, var, eps):
    return (u - mean) * (gamma.to(u.dtype) * torch.rsqrt(var + eps)) + beta.to(u.dtype)


def _minmax_backward(t: Tensor, mask: Tensor, den: Tensor, group: str) -> Tensor:
    """Gradient to ``a`` of ``mask = (a - min a) / den``, from ``t = dmask`` [B, S]; one ``den`` a range."""
    shape = t.shape
    t, mask, den = t.reshape(den.numel(), -1), mask.reshape(den.numel(), -1), den[:, None]
    every_t, every_mask = (gather(t.T, group).T, gather(mask.T, group).T) if den.numel() == 1 else (t, mask)
    top = every_mask.amax(1, keepdim=True)
    to_lowest = (every_t * (every_mask - 1)).sum(1, keepdim=True) / (every_mask == 0).sum(1, keepdim=True)
    to_highest = (every_t * every_mask).sum(1, keepdim=True) / (every_mask == top).sum(1, keepdim=True)
    return ((t + (mask == 0) * to_lowest - (mask == top) * to_highest) / den).view(shape)


def _backward(
    grad_mask,
    grad_pooled,
    feature,
    weight,
    gamma,
    beta,
    mask,
    mean,
    var,
    u,
    den,
    training,
    eps,
    minmax,
    need_feature,
    group,
):
    dtype = u.dtype
    batch, channels, height, width = feature.shape
    positions = height * width
    x = feature.flatten(2).to(dtype)
    w = weight.to(dtype)
    mask = mask.view(batch, positions)
    t = torch.zeros_like(mask) if grad_mask is None else grad_mask.reshape(batch, positions)
    if grad_pooled is not None:
        grad_pooled = grad_pooled.to(dtype)
        t = t + torch.bmm(grad_pooled[:, None], x)[:, 0] / positions
    da = _minmax_backward(t, mask, den, group if minmax == "batch" else "") if minmax else t

    top, winner = _normalize(u, gamma, beta, mean, var, eps).max(1, keepdim=True)
    dv = torch.zeros_like(u).scatter_(1, winner, torch.where(top > 0, da.reshape(-1, 1), 0))
    rstd = torch.rsqrt(var + eps)
    xhat = (u - mean) * rstd
    dbeta, dgamma = dv.sum(0), (dv * xhat).sum(0)
    du = dv
    if training:
        both = gather(torch.stack([dbeta, dgamma])[None], group).sum(0)
        du = dv - (both[0] + xhat * both[1]) / (u.shape[0] * world_size(group))
    du = du * (gamma.to(dtype) * rstd)

    grad_feature = feature.new_empty(0)
    if _is_rows(feature):
        dw = du.T @ x.transpose(1, 2).reshape(-1, channels)
        if need_feature:
            rows = (du @ w).view(batch, positions, channels)
            if grad_pooled is not None:
                rows.baddbmm_(mask[:, :, None], grad_pooled[:, None], alpha=1 / positions)
            grad_feature = rows.transpose(1, 2)
    else:
        du = du.view(batch, positions, -1)
        dw = torch.bmm(du.transpose(1, 2), x.transpose(1, 2)).sum(0)
        if need_feature:
            grad_feature = torch.bmm(w.T.expand(batch, -1, -1), du.transpose(1, 2))
            if grad_pooled is not None:
                grad_feature.baddbmm_(grad_pooled[:, :, None], mask[:, None], alpha=1 / positions)
    if need_feature:
        grad_feature = grad_feature.reshape(feature.shape).to(feature.dtype)
    return grad_feature, dw.to(weight.dtype), dgamma.to(gamma.dtype), dbeta.to(beta.dtype)
