"""The specification of every op, in plain eager PyTorch: for any floating dtype including float64, differentiated by autograd.

Nothing here is meant to be fast. Tests and benchmarks compare the fused paths with it, and ``impl="reference"`` runs it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MINMAX_EPS = 1e-7
"""Added to the range before dividing, as in the published code."""
BLUR_RADIUS = 11
"""Largest half-width of the window of the blur in pixels (a window of 23, as in MoCo v2 at 224)."""

Reduction = Literal["mean", "sum", "none"]
MinMax = Literal["image", "batch"] | None


class BatchNorm(NamedTuple):
    """What :func:`batch_norm` returns."""

    y: Tensor
    """[B, C, H, W] in the dtype of x."""
    mean: Tensor
    """[groups, C] means of the parts of the batch."""
    var: Tensor
    """[groups, C] biased variances of the parts."""
    running_mean: Tensor | None = None
    """[C] after this batch, where one was given."""
    running_var: Tensor | None = None
    """[C] likewise."""


class MaxOut(NamedTuple):
    """What :func:`maxout` returns."""

    mask: Tensor
    """[B, H, W] the maximum over the projections, after the optional min-max."""
    pooled: Tensor
    """[B, C] global average pool of mask * feature."""
    mean: Tensor
    """[M] mean that normalized the projections (that of the batch in training)."""
    var: Tensor
    """[M] biased variance that normalized the projections."""


class MaxOutImage(NamedTuple):
    """What :func:`maxout_image` returns."""

    mask: Tensor
    """[B, H / cell, W / cell]"""
    mean: Tensor
    """[M]"""
    var: Tensor
    """[M] biased."""


def infonce(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    *,
    temperature: float,
    reduction: Reduction = "mean",
    return_rank: bool = False,
    exclude: tuple[Tensor, Tensor] | None = None,
    count: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of the positive ``<q, k> / temperature`` against the negatives ``<q, queue_j> / temperature`` (MoCo).

    Args:
        q, k: [B, D], or [V, B, D] for V stacked queries (k may then stay [B, D]).
        queue: [K, D], receives no gradient.
        reduction: over the batch axis.
        return_rank: also return how many queue rows score strictly above the positive: int64, one per query.
        exclude: (index [B], queue_index [K]): rows of a query's own index are left out.
        count: 0-d int64, how many of the first rows of the queue count; None: all. With 0 the loss is 0.
    """
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), queue.dtype)
    q, k, queue = q.to(dtype), k.to(dtype), queue.detach().to(dtype)
    positive = (q * k).sum(-1, keepdim=True)
    negative = q @ queue.T
    if exclude is not None:
        negative = negative.masked_fill(exclude[0][:, None] == exclude[1], float("-inf"))
    if count is not None:
        negative = negative.masked_fill(torch.arange(len(queue), device=queue.device) >= count, float("-inf"))
    logits = torch.cat([positive, negative], dim=-1)
    logits = logits.to(torch.promote_types(dtype, torch.float32)) / temperature
    loss = torch.logsumexp(logits, dim=-1) - logits[..., 0]
    loss = {"mean": loss.mean(-1), "sum": loss.sum(-1), "none": loss}[reduction]
    return (loss, (negative > positive).sum(-1)) if return_rank else loss


def minmax(z: Tensor, over: MinMax) -> Tensor:
    """``(z - min z) / (1e-7 + max(z - min z))`` over each image (``z[b]``) or over the whole batch."""
    if over is None:
        return z
    dims = tuple(range(1, z.dim())) if over == "image" else tuple(range(z.dim()))
    z = z - z.amin(dims, keepdim=True)
    return z / (MINMAX_EPS + z.amax(dims, keepdim=True))


def _maxout_map(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """max over M of relu(batch_norm(conv1x1(x))): [B, H, W], and the mean and variance that were used: [M] each."""
    projected = F.conv2d(x, weight.to(x.dtype)[:, :, None, None])
    projected = projected.to(torch.promote_types(x.dtype, torch.float32))
    if training:
        var, mean = torch.var_mean(projected, dim=(0, 2, 3), correction=0)
    else:
        mean, var = running_mean.to(projected.dtype), running_var.to(projected.dtype)
    scale = gamma.to(projected.dtype) * torch.rsqrt(var + eps)
    normalized = (projected - mean[:, None, None]) * scale[:, None, None] + beta.to(projected.dtype)[:, None, None]
    return torch.relu(normalized).max(dim=1).values, mean.detach(), var.detach()


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
) -> BatchNorm:
    """``y = relu(gamma (x - mean) / sqrt(var + eps) + beta [+ residual])`` with the statistics of each of ``groups`` parts of the
    batch, in float32 at least and rounded once.

    Args:
        x, residual: [B, C, H, W].
        gamma, beta, running_mean, running_var: [C].
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    ys, means, variances = [], [], []
    for part in x.to(dtype).chunk(groups):
        mean = part.mean((0, 2, 3))
        centered = part - mean[:, None, None]
        var = centered.square().mean((0, 2, 3))
        scale = gamma.to(dtype) * torch.rsqrt(var + eps)
        ys.append(centered * scale[:, None, None] + beta.to(dtype)[:, None, None])
        means.append(mean.detach())
        variances.append(var.detach())
    v = torch.cat(ys)
    if residual is not None:
        v = v + residual.to(dtype)
    mean, var = torch.stack(means), torch.stack(variances)
    moved = moved_statistics(mean, var, running_mean, running_var, momentum, x.numel() // x.shape[1] // groups)
    return BatchNorm((torch.relu(v) if relu else v).to(x.dtype), mean, var, *moved)


def moved_statistics(
    mean: Tensor, var: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float, count: int
) -> tuple[Tensor | None, Tensor | None]:
    """The running statistics [C], moved by ``momentum`` towards the mean over the groups of ``mean`` and of the unbiased variance,
    from ``mean`` and biased ``var`` [groups, C] of ``count`` values each; (None, None) without them."""
    if running_mean is None or running_var is None:
        return None, None
    unbiased = var.mean(0) * (count / max(1, count - 1))
    return (
        running_mean.lerp(mean.mean(0).to(running_mean.dtype), momentum),
        running_var.lerp(unbiased.to(running_var.dtype), momentum),
    )


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
) -> MaxOut:
    """Max-out projection: ``mask = minmax(max_m relu(bn(conv1x1(feature))))``, ``pooled = gap(mask * feature)``.

    Args:
        feature: [B, C, H, W].
        weight: [M, C], the 1x1 convolution without bias.
        gamma, beta: [M], scale and shift of the batch-norm.
        running_mean, running_var: [M], used if ``training`` is false; never written.
    """
    mask, mean, var = _maxout_map(feature, weight, gamma, beta, running_mean, running_var, training, eps)
    mask = _minmax(mask, minmax)
    pooled = (mask[:, None] * feature).mean(dim=(2, 3))
    return MaxOut(mask, pooled, mean, var)


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
) -> MaxOutImage:
    """The same mask of an image [B, 3, H, W]: min-max over pixels, then pooling over cells."""
    mask, mean, var = _maxout_map(image, weight, gamma, beta, running_mean, running_var, training, eps)
    mask = _minmax(mask, minmax)
    pooling = F.max_pool2d if pool == "max" else F.avg_pool2d
    return MaxOutImage(pooling(mask[:, None], cell)[:, 0], mean, var)


def gradcam(
    act: Tensor,
    grad: Tensor,
    *,
    size: tuple[int, int],
    weighting: Literal["elementwise", "channel"] = "elementwise",
    pool: Literal["max", "mean"] = "max",
    sign: int = 1,
) -> Tensor:
    """``relu(sign * sum_c act * grad)``, or with ``mean_hw(grad)`` as the weight of each channel, pooled to ``size``.

    Args:
        act: [B, C, H, W], differentiable.
        grad: [B, C, H, W], receives no gradient.

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


class ViewValues(NamedTuple):
    """What :func:`augment` does to each of B images, as tensors on one device."""

    crop: Tensor
    """int32 [B, 4] top, left, height, width in pixels of the image."""
    flip: Tensor
    """bool [B] whether to flip left to right."""
    jitter: Tensor
    """bool [B] whether to apply color jitter."""
    factors: Tensor
    """float32 [B, 4] brightness, contrast, saturation, hue (turns)."""
    order: Tensor
    """uint8 [B, 4] the permutation of the columns of ``factors`` in which they are applied."""
    grey: Tensor
    """bool [B] whether to convert to grayscale."""
    blur_sigma: Tensor
    """float32 [B] in pixels of the view; 0 is no blur."""


def augment(
    pixels: Tensor,
    offsets: Tensor,
    sizes: Tensor,
    values: ViewValues,
    *,
    side: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Random resized crop, flip, color jitter, grayscale, Gaussian blur and normalization of 8-bit images (as MoCo v2).

    Args:
        pixels: uint8 [total], the concatenated images, [height, width, 3] each.
        offsets: int64 [B], where each image begins.
        sizes: int32 [B, 2], height and width of each image.
        mean, std: of RGB in [0, 1].

    Returns:
        [B, 3, side, side] of ``dtype``, computed in float32, or in float64 if ``dtype`` is that.
    """
    views = []
    for b, (start, (height, width)) in enumerate(zip(offsets.tolist(), sizes.tolist(), strict=True)):
        image = pixels[start : start + 3 * height * width].view(height, width, 3)
        view = resized_crop(image, values.crop[b].tolist(), side)  # torchvision rounds to 8 bits
        view = (view + 0.5).floor().clamp(0, 255)
        views.append(view.flip(-2) if values.flip[b] else view)
    if not views:
        return torch.empty(0, 3, side, side, dtype=dtype, device=pixels.device)
    return recolour(torch.stack(views), values, mean=mean, std=std, dtype=dtype)


def recolour(
    views: Tensor, values: ViewValues, *, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> Tensor:
    """The second half of :func:`augment`, for views [B, S, S, 3] that are cropped and flipped: jitter in the order of the
    values, grayscale, blur, normalization."""
    compute = torch.promote_types(dtype, torch.float32)
    adjust = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    results = []
    for b, view in enumerate(views):
        x = view.permute(2, 0, 1).to(compute)
        if values.jitter[b]:
            for op in values.order[b].tolist():
                x = adjust[op](x, values.factors[b, op].item())
        if values.grey[b]:
            x = grey(x).expand_as(x)
        results.append(gaussian_blur(x, values.blur_sigma[b].item()))
    x = torch.stack(results) / 255
    center, spread = (torch.tensor(v, dtype=compute, device=x.device).view(3, 1, 1) for v in (mean, std))
    return ((x - center) / spread).to(dtype=dtype, memory_format=torch.channels_last)


def resized_crop(image: Tensor, crop: Sequence[int], side: int) -> Tensor:
    """The box (top, left, height, width) of an image [H, W, 3], resized: float64 [side, side, 3], not rounded.

    Antialiased bilinear as in PIL and torchvision: a triangle around the center of each output pixel, whose half-width is
    one input pixel, or ``box / side`` of them where the image shrinks. Pixels beyond the box have no weight.
    """
    top, left, height, width = crop

    def weights(length: int) -> Tensor:
        scale = length / side
        center = (torch.arange(side, dtype=torch.float64, device=image.device) + 0.5) * scale
        position = torch.arange(length, dtype=torch.float64, device=image.device) + 0.5
        triangle = (1 - (position - center[:, None]).abs() / max(scale, 1)).clamp(min=0)
        return triangle / triangle.sum(1, keepdim=True)

    box = image[top : top + height, left : left + width].double()
    return torch.einsum("yi,xj,ijc->yxc", weights(height), weights(width), box)


def grey(x: Tensor) -> Tensor:
    """0.299 R + 0.587 G + 0.114 B: [3, H, W] to [1, H, W]."""
    return 0.299 * x[:1] + 0.587 * x[1:2] + 0.114 * x[2:]


def adjust_brightness(x: Tensor, factor: float) -> Tensor:
    """As in torchvision. Here and in the next three functions, x is float [3, H, W] in 0..255."""
    return (factor * x).clamp(0, 255)


def adjust_contrast(x: Tensor, factor: float) -> Tensor:
    """Blend with the mean of the image's gray values."""
    return (factor * x + (1 - factor) * grey(x).mean()).clamp(0, 255)


def adjust_saturation(x: Tensor, factor: float) -> Tensor:
    """Blend with the grayscale image."""
    return (factor * x + (1 - factor) * grey(x)).clamp(0, 255)


def adjust_hue(x: Tensor, turns: float) -> Tensor:
    """Convert to HSV, rotate the hue by ``turns`` (1 is the full circle), and convert back."""
    r, g, b = x
    value, chroma = x.amax(0), x.amax(0) - x.amin(0)
    divisor = torch.where(chroma == 0, 1, chroma)
    from_green = torch.where(value == g, (b - r) / divisor + 2, (r - g) / divisor + 4)
    sextant = torch.where(value == r, (g - b) / divisor, from_green)
    sextant = (sextant / 6 + turns) % 1 * 6

    def channel(n: int) -> Tensor:
        k = (n + sextant) % 6
        return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)

    return torch.stack((channel(5), channel(3), channel(1)))


def gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of an image [3, H, W] with reflect padding. ``sigma`` is in pixels; 0 returns x itself. The window reaches
    4 sigma, at most BLUR_RADIUS and the size of the image - 1."""
    radius = min(BLUR_RADIUS, math.ceil(4 * sigma), x.shape[-2] - 1, x.shape[-1] - 1)
    if radius < 1:
        return x
    taps = torch.exp(-((torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device) / sigma) ** 2) / 2)
    taps = taps / taps.sum()
    padded = F.pad(x[None], (radius, radius, radius, radius), mode="reflect")[0][:, None]
    return F.conv2d(F.conv2d(padded, taps.view(1, 1, -1, 1)), taps.view(1, 1, 1, -1))[:, 0]


_minmax = minmax  # the functions above take an argument of this name
