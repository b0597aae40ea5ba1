"""Training batch-norm with what follows it in a ResNet: ``y = relu(gamma (x - mean) / sqrt(var + eps) + beta [+ residual])``.

Statistics are those of ``groups`` equal parts of the batch. With v the argument of the ReLU, ``xhat = (x - mean) rstd`` and n the
values per channel of a part, the backward pass is

    g         = dy where v > 0, otherwise 0
    dbeta     = sum g,   dgamma = sum(g xhat)                            (summed over the parts)
    dx        = gamma rstd (g - (sum g + xhat sum(g xhat)) / n)          (sums over the part)
    dresidual = g

Without a residual, v is recomputed from x, so neither y nor a mask is read. With one, the forward pass keeps one bit for each
element. Nothing else is saved but x, which the convolution before it made, and vectors of length C. On CUDA both passes are two
launches: partial sums of tiles, and one that merges them in a fixed order before it streams, so that results are bit-identical
from run to run.

Statistics and sums are float32 (float64 for float64 inputs), under autocast too. One process: statistics over several processes
(SyncBN) are not an option of this op; ``ppssl.batch_norm.SyncBatchNorm`` computes them. The op changes nothing in place: it returns
the statistics, and the running ones as they are after this batch.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kernels import reference
from kernels.batch_statistics import MASK_BITS, new_bits
from kernels.reference import BatchNorm
from kernels.selection import check_floating, choose, compute_dtype, refuse_double_backward


def batch_norm(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    residual: Tensor | None = None,
    relu: bool = True,
    eps: float = 1e-5,
    groups: int = 1,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.1,
    impl: Literal["auto", "triton", "torch", "reference"] = "auto",
) -> BatchNorm:
    """Batch-norm in training mode, plus ``residual``, through a ReLU (Ioffe and Szegedy 2015, arXiv 1502.03167).

    Args:
        x: [B, C, H, W]. The Triton path works in channels_last, copies what lies otherwise, and returns channels_last.
        gamma, beta: [C], scale and shift.
        residual: like x in shape and dtype, added before the ReLU.
        relu: whether there is a ReLU.
        groups: equal parts of the batch, in its order, with statistics of their own.
        running_mean, running_var: [C], both or neither; what ``momentum`` moves towards the mean over the groups of their means
            and unbiased variances. They are not changed.
        impl: ``"auto"`` is Triton on CUDA and the PyTorch path elsewhere.

    Returns:
        BatchNorm(y [B, C, H, W] in the dtype of x, mean [groups, C], var [groups, C], running_mean [C], running_var [C]): the
        biased statistics float32 (float64 for float64 inputs), the moved running ones in their own dtype or None; all but y without
        gradient. The gradient is zero where the argument of the ReLU is zero or less.

    Raises:
        TypeError: an argument is not a floating tensor, or the residual has another dtype than x.
        ValueError: wrong rank or shape, empty batch, groups that do not divide it, a single value per channel, one running
            statistic without the other, unknown option.
        RuntimeError: second derivatives of a fused path.
    """
    check_floating("batch_norm", x=x, gamma=gamma, beta=beta)
    if x.dim() != 4 or 0 in x.shape:
        raise ValueError(f"batch_norm: x must be a non-empty [B, C, H, W], got {list(x.shape)}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("batch_norm: running_mean and running_var go together, got one of them")
    vectors = {"gamma": gamma, "beta": beta}
    if running_mean is not None and running_var is not None:
        check_floating("batch_norm", running_mean=running_mean, running_var=running_var)
        vectors |= {"running_mean": running_mean, "running_var": running_var}
    for name, vector in vectors.items():
        if vector.shape != x.shape[1:2]:
            raise ValueError(f"batch_norm: {name} must be [{x.shape[1]}], got {list(vector.shape)}")
    if residual is not None:
        check_floating("batch_norm", x=x, residual=residual)
        if residual.dtype != x.dtype:
            raise TypeError(f"batch_norm: residual is {residual.dtype} but x {x.dtype}; cast one of them")
        if residual.shape != x.shape:
            raise ValueError(f"batch_norm: residual must be {list(x.shape)} as x, got {list(residual.shape)}")
    if groups < 1 or x.shape[0] % groups:
        raise ValueError(f"batch_norm: groups must divide the batch of {x.shape[0]}, got {groups}")
    if x.numel() == groups * x.shape[1]:
        raise ValueError(f"batch_norm: {list(x.shape)} in {groups} groups has one value per channel, whose variance is none")
    if not eps >= 0:
        raise ValueError(f"batch_norm: eps must not be negative, got {eps}")
    chosen = choose("batch_norm", impl, x, fast="torch")
    if chosen == "reference":
        with torch.autocast(x.device.type, enabled=False):
            return reference.batch_norm(
                x, gamma, beta, residual=residual, relu=relu, eps=eps, groups=groups,
                running_mean=running_mean, running_var=running_var, momentum=momentum,
            )  # fmt: skip
    y, mean, var, _, *moved = torch.ops.ppssl.batch_norm(
        x, gamma, beta, residual, running_mean, running_var, float(momentum), relu, float(eps), groups, chosen
    )
    return BatchNorm(y, mean, var, *(moved if running_mean is not None else ()))


@torch.library.custom_op("ppssl::batch_norm", mutates_args=())
def _batch_norm(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    relu: bool,
    eps: float,
    groups: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, mean [G, C], var [G, C], bits [B, H, W, ceil(C / 8)] uint8, or [0] where they are not needed, the running mean and
    variance [C] after this batch, or [0] where there are none)."""
    if impl == "triton":
        from kernels import batch_norm_triton  # here, because triton may not be installed

        forward = batch_norm_triton.forward
    else:
        forward = _forward
    return forward(x, gamma, beta, residual, running_mean, running_var, momentum, relu, eps, groups)


@_batch_norm.register_fake
def _(x, gamma, beta, residual, running_mean, running_var, momentum, relu, eps, groups, impl):
    mean, var = (x.new_empty((groups, x.shape[1]), dtype=compute_dtype(x)) for _ in range(2))
    moved = (mean.new_empty(0) if r is None else torch.empty_like(r) for r in (running_mean, running_var))
    return _like(x, impl), mean, var, new_bits(x, relu and residual is not None), *moved


@torch.library.custom_op("ppssl::batch_norm_backward", mutates_args=())
def _batch_norm_backward(
    grad_y: Tensor,
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    var: Tensor,
    bits: Tensor,
    relu: bool,
    eps: float,
    impl: str,
    other: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dgamma, dbeta, and where there are bits dresidual, otherwise [0]), each in the dtype of its tensor. The gradient is
    ``grad_y + other``, which a compiler may put here in place of a sum (``engine.training.inductor``)."""
    if impl == "triton":
        from kernels import batch_norm_triton  # here, because triton may not be installed

        return batch_norm_triton.backward(grad_y, x, gamma, beta, mean, var, bits, relu, eps, other)
    return _backward(grad_y if other is None else grad_y + other, x, gamma, beta, mean, var, bits, relu, eps)


@_batch_norm_backward.register_fake
def _(grad_y, x, gamma, beta, mean, var, bits, relu, eps, impl, other=None):
    grad_residual = _like(x, impl) if bits.numel() else x.new_empty(0)
    return _like(x, impl), gamma.new_empty(gamma.shape), beta.new_empty(beta.shape), grad_residual


def _like(x: Tensor, impl: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last if impl == "triton" else torch.preserve_format)


def _setup_context(ctx, inputs, output):
    x, gamma, beta, residual, _, _, _, ctx.relu, ctx.eps, _, ctx.impl = inputs
    _, mean, var, bits, *moved = output
    ctx.has_residual = residual is not None
    ctx.mark_non_differentiable(mean, var, bits, *moved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, gamma, beta, mean, var, bits)


def _autograd(ctx, grad_y, *_):
    refuse_double_backward("batch_norm")
    grads, grad_residual = (None,) * 3, None
    if grad_y is not None:
        *grads, masked = torch.ops.ppssl.batch_norm_backward(grad_y, *ctx.saved_tensors, ctx.relu, ctx.eps, ctx.impl)
        grads = tuple(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=False))
        if ctx.has_residual and ctx.needs_input_grad[3]:
            grad_residual = masked if ctx.relu else grad_y
    return (
        *grads,  # x, gamma, beta
        grad_residual,
        None,  # running_mean
        None,  # running_var
        None,  # momentum
        None,  # relu
        None,  # eps
        None,  # groups
        None,  # impl
    )


_batch_norm.register_autograd(_autograd, setup_context=_setup_context)


def _parts(x: Tensor, groups: int) -> Tensor:
    """A view of x [B, C, H, W] as [G, B / G, C, H, W] in the dtype of the sums."""
    return x.to(compute_dtype(x)).unflatten(0, (groups, -1))


def _each(vector: Tensor) -> Tensor:
    """[G, C] or [C] against [G, B / G, C, H, W]."""
    return vector.view(-1, 1, vector.shape[-1], 1, 1)


def _forward(x, gamma, beta, residual, running_mean, running_var, momentum, relu, eps, groups):
    parts = _parts(x, groups)
    var, mean = torch.var_mean(parts, (1, 3, 4), correction=0)
    v = _normalize(parts, gamma, beta, mean, var, eps)
    if residual is not None:
        v += _parts(residual, groups)
    v = v.flatten(0, 1)
    bits = _pack(v > 0) if relu and residual is not None else new_bits(x, needed=False)
    moved = reference.moved_statistics(mean, var, running_mean, running_var, momentum, parts[0].numel() // x.shape[1])
    moved = [mean.new_empty(0) if tensor is None else tensor for tensor in moved]
    return _copy(v.relu_() if relu else v, x), mean, var, bits, *moved


def _normalize(parts, gamma, beta, mean, var, eps):
    """A new tensor: every path computes the argument of the ReLU in this way, so that none is positive here and not there."""
    scale = gamma.to(parts.dtype) * torch.rsqrt(var + eps)
    return (parts - _each(mean)).mul_(_each(scale)).add_(_each(beta.to(parts.dtype)))


def _pack(active: Tensor) -> Tensor:
    """[B, C, H, W] bool -> [B, H, W, ceil(C / 8)] uint8."""
    rows = active.movedim(1, -1)
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % MASK_BITS)).unflatten(-1, (-1, MASK_BITS))
    return (rows.to(torch.uint8) << _places(rows.device)).sum(-1, dtype=torch.uint8)


def _unpack(bits: Tensor, channels: int) -> Tensor:
    """The reverse of ``_pack``."""
    return (bits[..., None] >> _places(bits.device) & 1).flatten(-2)[..., :channels].movedim(-1, 1).bool()


def _places(device: torch.device) -> Tensor:
    return torch.arange(MASK_BITS, dtype=torch.uint8, device=device)


def _backward(grad_y, x, gamma, beta, mean, var, bits, relu, eps):
    parts = _parts(x, len(mean))
    g = _parts(grad_y, len(mean))
    if bits.numel():
        g = g * _unpack(bits, x.shape[1]).view_as(g)
    elif relu:
        g = torch.where(_normalize(parts, gamma, beta, mean, var, eps) > 0, g, 0)
    rstd = torch.rsqrt(var + eps)
    xhat = (parts - _each(mean)).mul_(_each(rstd))
    dbeta, dgamma = g.sum((1, 3, 4)), (g * xhat).sum((1, 3, 4))
    n = parts[0].numel() // x.shape[1]
    dx = (g - xhat.mul_(_each(dgamma / n)).add_(_each(dbeta / n))).mul_(_each(gamma.to(g.dtype) * rstd))
    return (
        _copy(dx.flatten(0, 1), x),
        dgamma.sum(0).to(gamma.dtype),
        dbeta.sum(0).to(beta.dtype),
        _copy(g.flatten(0, 1), x) if bits.numel() else x.new_empty(0),
    )


def _copy(values: Tensor, x: Tensor) -> Tensor:
    """``values`` in the dtype and memory order of x."""
    return torch.empty_like(x).copy_(values)
