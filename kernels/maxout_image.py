"""The max-out mask of an image, min-max over pixels and max-pooled over cells; [B, M, H, W] is never in memory.

A 1x1 convolution is linear in the three channels, ``u_m(p) = w_m . x(p)``. Everything follows from that:

1. Its batch-norm statistics are moments of the image: ``mean_m = w_m . mu`` and ``var_m = w_m S w_m``, where mu [3] and
   S [3, 3] are the mean and the biased covariance of all pixels. These are nine numbers, accumulated in float64.
2. So ``v_m(p) = A_m . x(p) + s_m`` with ``A_m = gamma_m rstd_m w_m`` and ``s_m = beta_m - A_m . mu`` is known before the
   second pass over the pixels, and relu(max_m v_m(p)) takes 3 M multiplications per pixel and no memory.
3. ReLU, maximum, min-max and max-pooling are monotone, so the value of a cell is that of its winner, the pixel whose
   maximum is largest. The second pass finds it, and for the min-max the pixel with the smallest value.
4. The gradient of max and max-pooling goes to the winner. Hence the backward pass needs the three colors of each winner
   and of the smallest pixel, and the derivatives of mu and S from step 1. With ``dA_m = sum_p dz_p x_p`` and
   ``ds_m = sum_p dz_p`` over the pixels p at which channel m is largest, and ``G_m = dA_m - ds_m mu``,

       dbeta_m = ds_m,   dgamma_m = rstd_m G_m . w_m,
       dw_m = gamma_m rstd_m (G_m - rstd_m^2 (G_m . w_m) S w_m)      (the last term in training only)

No step is an approximation: values and gradients equal those of the direct computation up to rounding. The same algorithm
runs on the CPU and, in ``maxout_image_triton.py``, on CUDA.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kernels import reference
from kernels.batch_statistics import minmax_groups
from kernels.group import gather, group_name, is_first, local_shard
from kernels.reference import MINMAX_EPS, MaxOutImage, MinMax
from kernels.selection import check_projection, choose, compute_dtype, refuse_double_backward


def maxout_image(
    image: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
    eps: float = 1e-5,
    cell: int = 32,
    minmax: MinMax = None,
    pool: Literal["max", "mean"] = "max",
    group: dist.ProcessGroup | None = None,
    impl: Literal["auto", "triton", "torch", "reference"] = "auto",
) -> MaxOutImage:
    """The max-out mask of an image on a grid of cells (PP-SSL, IADM's image branch).

    Args:
        image: [B, 3, H, W], NCHW or channels_last; H and W are multiples of ``cell``. It receives no gradient.
        weight: [M, 3], the 1x1 convolution without bias.
        gamma, beta: [M], scale and shift of the batch-norm.
        running_mean, running_var: [M], used if ``training`` is false; never written.
        cell: side of a cell in pixels. The Triton path takes powers of two of at most 128.
        minmax: scale the pixels' mask to [0, 1] over each image, over the batch, or not at all, before pooling.
        pool: how pixels become cells. ``"mean"`` has no fused path: ``impl="auto"`` runs the reference for it.
        group: processes that share the batch; see :func:`kernels.maxout`. No gradient flows between them, because images
            are constants.
        impl: ``"auto"`` is Triton on CUDA and the PyTorch path elsewhere.

    Returns:
        MaxOutImage(mask [B, H / cell, W / cell], mean [M], var [M]), float32 (float64 for float64 images). ``mean`` and
        ``var`` (biased) carry no gradient.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: wrong rank or shape, H or W not a multiple of cell, missing running statistics, unknown option,
            ``pool="mean"`` with an explicit fused path, or a group where the reference runs.
        RuntimeError: second derivatives of a fused path.
    """
    check_projection("maxout_image", image, weight, gamma, beta, running_mean, running_var, training, eps, minmax)
    if image.shape[1] != 3:
        raise ValueError(f"maxout_image: image must be [B, 3, H, W], got {list(image.shape)}")
    if not isinstance(cell, int) or cell < 1 or image.shape[2] % cell or image.shape[3] % cell:
        raise ValueError(f"maxout_image: cell must divide the image's {list(image.shape[2:])}, got {cell}")
    if pool not in ("max", "mean"):
        raise ValueError(f"maxout_image: pool must be 'max' or 'mean', got {pool!r}")
    image = image.detach()
    if pool == "mean":
        if impl not in ("auto", "reference"):
            raise ValueError(f"maxout_image: impl={impl!r} has no pool='mean'; use impl='auto' or 'reference'")
        impl = "reference"
    unsupported = None
    if cell & (cell - 1) or cell > 128:
        unsupported = f"cell must be a power of two of at most 128, got {cell}"
    chosen = choose("maxout_image", impl, image, fast="torch", unsupported=unsupported)
    name = group_name(group)
    if chosen == "reference":
        if name:
            raise ValueError("maxout_image: impl='reference' and pool='mean' know one process; use pool='max'")
        with torch.autocast(image.device.type, enabled=False):
            return reference.maxout_image(
                image,
                weight,
                gamma,
                beta,
                running_mean=running_mean,
                running_var=running_var,
                training=training,
                eps=eps,
                cell=cell,
                minmax=minmax,
                pool=pool,
            )
    outputs = torch.ops.ppssl.maxout_image(
        image, weight, gamma, beta, running_mean, running_var, training, float(eps), cell, minmax or "", name, chosen
    )
    return MaxOutImage(*outputs[:3])


@torch.library.custom_op("ppssl::maxout_image", mutates_args=())
def _maxout_image(
    image: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
    cell: int,
    minmax: str,
    group: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(mask [B, h, w], mean [M], var [M], winners [B h w, 3], lowest [groups, 3], den [groups], moments [4, 3]).

    ``winners`` and ``lowest`` are colors; ``moments`` (float64) holds mu, then the rows of S. minmax "" is None.
    """
    if impl == "triton":
        from kernels import maxout_image_triton  # here, because triton may not be installed

        return maxout_image_triton.forward(
            image, weight, gamma, beta, running_mean, running_var, training, eps, cell, minmax, group
        )
    with torch.autocast(image.device.type, enabled=False):
        return _forward(image, weight, gamma, beta, running_mean, running_var, training, eps, cell, minmax, group)


@_maxout_image.register_fake
def _(image, weight, gamma, beta, running_mean, running_var, training, eps, cell, minmax, group, impl):
    batch, _, height, width = image.shape
    rows, columns = height // cell, width // cell
    groups = minmax_groups(minmax, batch)

    def new(*shape):
        return image.new_empty(shape, dtype=compute_dtype(image))

    return (
        new(batch, rows, columns),
        new(weight.shape[0]),
        new(weight.shape[0]),
        new(batch * rows * columns, 3),
        new(groups, 3),
        new(groups),
        image.new_empty((4, 3), dtype=torch.float64),
    )


@torch.library.custom_op("ppssl::maxout_image_backward", mutates_args=())
def _maxout_image_backward(
    grad_mask: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mask: Tensor,
    mean: Tensor,
    var: Tensor,
    winners: Tensor,
    lowest: Tensor,
    den: Tensor,
    moments: Tensor,
    training: bool,
    eps: float,
    minmax: str,
    group: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dweight, dgamma, dbeta), each in the dtype of its tensor."""
    if impl == "triton":
        from kernels import maxout_image_triton  # here, because triton may not be installed

        return maxout_image_triton.backward(
            grad_mask, weight, gamma, beta, mask, mean, var, winners, lowest, den, moments, training, eps, minmax, group
        )
    with torch.autocast(mask.device.type, enabled=False):
        return _backward(
            grad_mask, weight, gamma, beta, mask, mean, var, winners, lowest, den, moments, training, eps, minmax, group
        )


@_maxout_image_backward.register_fake
def _(grad_mask, weight, gamma, beta, mask, mean, var, winners, lowest, den, moments, training, eps, minmax, group, impl):
    return weight.new_empty(weight.shape), gamma.new_empty(gamma.shape), beta.new_empty(beta.shape)


def _setup_context(ctx, inputs, output):
    _, weight, gamma, beta, _, _, ctx.training, ctx.eps, _, ctx.minmax, ctx.group, ctx.impl = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(weight, gamma, beta, *output)


def _autograd(ctx, grad_mask, *_):
    refuse_double_backward("maxout_image")
    grads = (None,) * 3
    if grad_mask is not None:
        grads = torch.ops.ppssl.maxout_image_backward(
            grad_mask, *ctx.saved_tensors, ctx.training, ctx.eps, ctx.minmax, ctx.group, ctx.impl
        )
        grads = tuple(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad[1:], strict=False))
    return (
        None,  # image
        *grads,  # weight, gamma, beta
        None,  # running_mean
        None,  # running_var
        None,  # training
        None,  # eps
        None,  # cell
        None,  # minmax
        None,  # group
        None,  # impl
    )


_maxout_image.register_autograd(_autograd, setup_context=_setup_context)


def _moments(image: Tensor, group: str) -> Tensor:
    """Mean and biased covariance of the colors of all pixels of the batch: [4, 3] float64."""
    total = torch.zeros(3, dtype=torch.float64, device=image.device)
    products = torch.zeros(3, 3, dtype=torch.float64, device=image.device)
    for picture in image:
        colors = picture.flatten(1).double()
        total += colors.sum(1)
        products.addmm_(colors, colors.T)
    pixels = image.shape[0] * image.shape[2] * image.shape[3]
    sums = gather(torch.cat([total[None], products])[None] / pixels, group).mean(0)
    mean, products = sums[0], sums[1:]
    return torch.cat([mean[None], products - torch.outer(mean, mean)])


def _affine(weight, gamma, beta, mean, var, eps):
    """``v = A x + shift`` in float64: A [M, 3], shift [M], and rstd [M]."""
    rstd = torch.rsqrt(var.double() + eps)
    slope = (gamma.double() * rstd)[:, None] * weight.double()
    return slope, beta.double() - mean.double() * gamma.double() * rstd, rstd


def _forward(image, weight, gamma, beta, running_mean, running_var, training, eps, cell, minmax, group):
    dtype = compute_dtype(image)
    batch, _, height, width = image.shape
    moments = _moments(image, group)
    if training:
        mean = weight.double() @ moments[0]
        var = ((weight.double() @ moments[1:]) * weight.double()).sum(1).clamp_min(0)
    else:
        mean, var = running_mean.double(), running_var.double()
    slope, shift, _ = _affine(weight, gamma, beta, mean, var, eps)
    winners, lowest = _search(image, slope.to(dtype), shift.to(dtype), cell)

    def value(colors):
        return torch.relu((colors.double() @ slope.T + shift).amax(-1))

    mask = value(winners)  # [B, h w]
    smallest, den = lowest[:0, 0], mask.new_empty(0)
    if minmax:
        if minmax == "batch":
            lowest = gather(lowest, group)
        bottom = value(lowest)  # [B]
        if minmax == "batch":
            first = bottom.argmin(0, keepdim=True)
            lowest, bottom = lowest[first], bottom[first]
        grouped = mask.view(lowest.shape[0], -1) - bottom[:, None]
        high = grouped.amax(1)
        if minmax == "batch":
            high = gather(high, group).amax(0, keepdim=True)
        den = MINMAX_EPS + high
        mask = grouped / den[:, None]
        smallest = lowest
    return (
        mask.view(batch, height // cell, width // cell).to(dtype),
        mean.to(dtype, copy=True),
        var.to(dtype, copy=True),
        winners.reshape(-1, 3),
        smallest.reshape(-1, 3).clone(),
        den.to(dtype),
        moments,
    )


def _search(image: Tensor, slope: Tensor, shift: Tensor, cell: int) -> tuple[Tensor, Tensor]:
    """Colors of each cell's winner [B, h w, 3] and of each image's smallest pixel [B, 3], one image at a time."""
    batch, _, height, width = image.shape
    winners = image.new_empty((batch, (height // cell) * (width // cell), 3), dtype=slope.dtype)
    lowest = image.new_empty((batch, 3), dtype=slope.dtype)
    pixels = cell * width
    values = image.new_empty((height * width,), dtype=slope.dtype)
    for b, picture in enumerate(image):
        colors = picture.flatten(1).to(slope.dtype)
        for start in range(0, height * width, pixels):
            # One row of cells at a time: its [M, cell * W] block stays in the cache.
            stop = start + pixels
            values[start:stop] = torch.addmm(shift[:, None], slope, colors[:, start:stop]).amax(0)
        values.relu_()
        _, index = F.max_pool2d(values.view(1, height, width), cell, return_indices=True)
        winners[b] = colors[:, index.flatten()].T
        lowest[b] = colors[:, values.argmin()]
    return winners, lowest


def _backward(grad_mask, weight, gamma, beta, mask, mean, var, winners, lowest, den, moments, training, eps, minmax, group):
    slope, shift, rstd = _affine(weight, gamma, beta, mean, var, eps)
    t = grad_mask.double().reshape(mask.shape[0], -1)
    colors = winners.double()
    if minmax:
        wide = mask.double().view(t.shape)
        if minmax == "batch":
            t, wide = gather(t, group), gather(wide, group)
        shape = t.shape
        t, wide = t.view(den.numel(), -1), wide.view(den.numel(), -1)
        to_lowest = (t * (wide - 1)).sum(1) / den
        highest = wide == wide.amax(1, keepdim=True)
        to_highest = (t * wide).sum(1, keepdim=True) / highest.sum(1, keepdim=True)
        t = ((t - highest * to_highest) / den.double()[:, None]).view(shape)
        if minmax == "batch":
            t = local_shard(t, group)
            to_lowest = to_lowest * is_first(group)  # the smallest pixel of the group counts once
        colors = torch.cat([colors, lowest.double()])
        t = torch.cat([t.flatten(), to_lowest])
    top, winner = (colors @ slope.T + shift).max(1, keepdim=True)
    dv = colors.new_zeros(colors.shape[0], slope.shape[0])
    dv.scatter_(1, winner, torch.where(top > 0, t.reshape(-1, 1), 0))
    dshift = dv.sum(0)
    w, scale = weight.double(), gamma.double() * rstd
    center = moments[0] if training else None
    if training:
        pull = dv.T @ colors - torch.outer(dshift, center)
        along = (pull * w).sum(1)
        dw = scale[:, None] * (pull - (rstd * rstd * along)[:, None] * (w @ moments[1:]))
        dgamma = rstd * along
    else:
        slopes = dv.T @ colors
        dw = scale[:, None] * slopes
        dgamma = rstd * ((slopes * w).sum(1) - mean.double() * dshift)
    return dw.to(weight.dtype), dgamma.to(gamma.dtype), dshift.to(beta.dtype)
