"""Views of decoded images: random resized crop, flip, color jitter, grayscale, Gaussian blur and normalization, fused.

The random values are arguments, so every path makes the same views. The crop is rounded to 8 bits, as in torchvision; from
there on everything is float, without rounding between operations. CUDA takes five launches for any values. A CPU takes one
image at a time, which fits the cache, and runs only the operations that its values ask for. The view of an image never
depends on the rest of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference
from kernels.reference import BLUR_RADIUS, ViewValues
from kernels.selection import choose

Impl = Literal["auto", "triton", "torch", "reference"]

_GREY = (0.299, 0.587, 0.114)
_KINDS = {
    "crop": (torch.int32, 2), "flip": (torch.bool, 1), "jitter": (torch.bool, 1), "factors": (torch.float32, 2),
    "order": (torch.uint8, 2), "grey": (torch.bool, 1), "blur_sigma": (torch.float32, 1),
}  # fmt: skip
"""Field of ViewValues -> dtype and rank; rank 2 is [B, 4]."""


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
    out: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Makes views of B images of any sizes. Not differentiable.

    Args:
        pixels: uint8 [total], the concatenated images, [height, width, 3] each.
        offsets: int64 [B], where each image begins; several views of one image are allowed.
        sizes: int32 [B, 2], height and width of each image.
        values: what to do to each image, on the same device. Boxes must lie inside their images, which is not checked
            on CUDA.
        side: height and width of a view.
        mean, std: of RGB in [0, 1].
        dtype: float16, bfloat16 or float32; float64 on the reference and PyTorch paths.
        out: [B, 3, side, side] in channels_last, overwritten and returned. Its dtype takes the place of ``dtype``.
        impl: ``"auto"`` is Triton on CUDA and the PyTorch path elsewhere.

    Returns:
        [B, 3, side, side] of ``dtype``, channels_last: (view / 255 - mean) / std.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, two devices, a box or an image outside its bounds (on a CPU), unknown ``impl``.
    """
    count = _check("augment", values, offsets.shape[0] if offsets.dim() == 1 else -1, pixels.device, mean, std)
    for name, tensor, kind, shape in (
        ("pixels", pixels, torch.uint8, list(pixels.shape[:1])),
        ("offsets", offsets, torch.int64, [count]),
        ("sizes", sizes, torch.int32, [count, 2]),
    ):
        _check_tensor("augment", name, tensor, kind, shape, pixels.device)
    if side < 1:
        raise ValueError(f"augment: side must be at least 1, got {side}")
    if pixels.device.type == "cpu":
        _check_bounds(pixels, offsets, sizes, values.crop)
    out = _output("augment", out, count, side, dtype, pixels.device)
    chosen = choose("augment", impl, out, fast="torch")
    if chosen == "reference":
        made = reference.augment(pixels, offsets, sizes, values, side=side, mean=mean, std=std, dtype=out.dtype)
        return out.copy_(made)
    torch.ops.ppssl.augment(pixels, offsets, sizes, *values, list(mean), list(std), chosen, out)
    return out


def recolour(
    views: Tensor,
    values: ViewValues,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """The second half of :func:`augment`, for views that are already cropped and flipped: contiguous uint8 [B, S, S, 3].
    ``values.crop`` and ``values.flip`` are not read."""
    if views.dim() != 4 or views.shape[1] != views.shape[2] or views.shape[3] != 3 or views.shape[1] < 1:
        raise ValueError(f"recolour: views must be [B, S, S, 3], got {list(views.shape)}")
    count = _check("recolour", values, views.shape[0], views.device, mean, std)
    _check_tensor("recolour", "views", views, torch.uint8, list(views.shape), views.device)
    out = _output("recolour", out, count, views.shape[1], dtype, views.device)
    chosen = choose("recolour", impl, out, fast="torch")
    if chosen == "reference":
        return out.copy_(reference.recolour(views, values, mean=mean, std=std, dtype=out.dtype))
    torch.ops.ppssl.recolour(views, *values, list(mean), list(std), chosen, out)
    return out


def _check(op: str, values: ViewValues, count: int, device: torch.device, mean: Sequence[float], std: Sequence[float]) -> int:
    """Checks the values of ``count`` images, and mean and std. Returns ``count``."""
    for name, (kind, rank) in _KINDS.items():
        shape = [count] if rank == 1 else [count, 4]
        _check_tensor(op, f"values.{name}", getattr(values, name), kind, shape, device)
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"{op}: mean and std must be three numbers each, std above 0, got {list(mean)} and {list(std)}")
    return count


def _check_tensor(op: str, name: str, tensor: Tensor, kind: torch.dtype, shape: list[int], device: torch.device) -> None:
    if tensor.dtype != kind:
        raise TypeError(f"{op}: {name} must be {kind}, got {tensor.dtype}")
    if list(tensor.shape) != shape or not tensor.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous {shape}, got {list(tensor.shape)} with strides {tensor.stride()}")
    if tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, the pixels are on {device}; move one of them")


def _check_bounds(pixels: Tensor, offsets: Tensor, sizes: Tensor, crop: Tensor) -> None:
    ends = offsets + 3 * sizes.long().prod(1)
    inside = (offsets >= 0) & (ends <= len(pixels)) & (sizes > 0).all(1)
    boxes = (crop[:, :2] >= 0).all(1) & (crop[:, 2:] > 0).all(1) & (crop[:, :2] + crop[:, 2:] <= sizes).all(1)
    for good, what in ((inside, "image"), (boxes, "box")):
        if not good.all():
            b = int((~good).nonzero()[0])
            raise ValueError(
                f"augment: {what} {b} lies outside its bounds: crop {crop[b].tolist()} of size {sizes[b].tolist()} at "
                f"offset {int(offsets[b])} of {len(pixels)} bytes"
            )


def _output(op: str, out: Tensor | None, count: int, side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if out is None:
        if not dtype.is_floating_point:
            raise TypeError(f"{op}: dtype must be a floating type, got {dtype}")
        return torch.empty((count, side, side, 3), dtype=dtype, device=device).permute(0, 3, 1, 2)
    good = list(out.shape) == [count, 3, side, side] and out.permute(0, 2, 3, 1).is_contiguous()
    if not good or not out.is_floating_point() or out.device != device:
        raise ValueError(
            f"{op}: out must be a floating [{count}, 3, {side}, {side}] in channels_last order on {device}, got {out.dtype} "
            f"{list(out.shape)} with strides {out.stride()} on {out.device}"
        )
    return out


@torch.library.custom_op("ppssl::augment", mutates_args=("out",))
def _augment(
    pixels: Tensor, offsets: Tensor, sizes: Tensor, crop: Tensor, flip: Tensor, jitter: Tensor, factors: Tensor,
    order: Tensor, grey: Tensor, blur_sigma: Tensor, mean: list[float], std: list[float], impl: str, out: Tensor,
) -> None:  # fmt: skip
    values = ViewValues(crop, flip, jitter, factors, order, grey, blur_sigma)
    if impl == "triton":
        from kernels import augment_triton  # here, because triton may not be installed

        views = augment_triton.crops(pixels, offsets, sizes, values, out.shape[-1])
        augment_triton.recolour(views, values, mean, std, out)
        return
    side, color = out.shape[-1], _Color(values, mean, std, out.device)
    places = zip(offsets.tolist(), sizes.tolist(), crop.tolist(), flip.tolist(), strict=True)
    for b, (start, (height, width), box, mirrored) in enumerate(places):
        view = _resized_crop(pixels[start : start + 3 * height * width].view(height, width, 3), box, side)
        color(b, view.flip(-1) if mirrored else view, out[b])


@torch.library.custom_op("ppssl::recolour", mutates_args=("out",))
def _recolour(
    views: Tensor, crop: Tensor, flip: Tensor, jitter: Tensor, factors: Tensor, order: Tensor, grey: Tensor,
    blur_sigma: Tensor, mean: list[float], std: list[float], impl: str, out: Tensor,
) -> None:  # fmt: skip
    values = ViewValues(crop, flip, jitter, factors, order, grey, blur_sigma)
    if impl == "triton":
        from kernels import augment_triton  # here, because triton may not be installed

        augment_triton.recolour(views, values, mean, std, out)
        return
    color = _Color(values, mean, std, out.device)
    for b, view in enumerate(views):
        color(b, view.permute(2, 0, 1)[None], out[b])


@_augment.register_fake
def _(pixels, offsets, sizes, crop, flip, jitter, factors, order, grey, blur_sigma, mean, std, impl, out):
    return None


@_recolour.register_fake
def _(views, crop, flip, jitter, factors, order, grey, blur_sigma, mean, std, impl, out):
    return None


def _resized_crop(image: Tensor, box: list[int], side: int) -> Tensor:
    """uint8 [1, 3, side, side]. PyTorch's 8-bit resize on a CPU rounds its weights to 15 bits, as PIL does."""
    top, left, height, width = box
    part = image[top : top + height, left : left + width].permute(2, 0, 1)[None]
    if part.is_cuda:  # PyTorch has no 8-bit resize on CUDA
        resized = F.interpolate(part.float(), (side, side), mode="bilinear", antialias=True)
        return resized.round_().clamp_(0, 255).to(torch.uint8)
    return F.interpolate(part, (side, side), mode="bilinear", antialias=True)


class _Color:
    """Jitter, grayscale, blur and normalization of one view at a time."""

    def __init__(self, values: ViewValues, mean: Sequence[float], std: Sequence[float], device: torch.device):
        self.jitter, self.factors, self.order = values.jitter.tolist(), values.factors.tolist(), values.order.tolist()
        self.grey, self.sigma = values.grey.tolist(), values.blur_sigma.tolist()
        self.scale = (1 / (255 * torch.tensor(std, dtype=torch.float64))).view(3, 1, 1).to(device)
        self.shift = -torch.tensor(mean, dtype=torch.float64, device=device).view(3, 1, 1) * 255 * self.scale

    def __call__(self, b: int, view: Tensor, out: Tensor) -> None:
        """view: uint8 [1, 3, S, S]; out: [3, S, S] of any strides, overwritten."""
        dtype = torch.promote_types(out.dtype, torch.float32)
        x = view.to(dtype, memory_format=torch.contiguous_format, copy=True)  # contiguous channels are faster in every operation
        if self.jitter[b]:
            for op in self.order[b]:
                JITTER[op](x, self.factors[b][op])
        if self.grey[b]:
            to_grey(x)
        x = gaussian_blur(x, self.sigma[b])
        out.copy_(x[0].mul_(self.scale.to(dtype)).add_(self.shift.to(dtype)))


def adjust_brightness(x: Tensor, factor: float) -> Tensor:
    """clamp(factor * x), in place. Here and below, x is float [1, 3, H, W] in 0..255."""
    return x.mul_(factor).clamp_(0, 255)


def adjust_contrast(x: Tensor, factor: float) -> Tensor:
    """Blend with the mean of the image's gray values, in place."""
    mean = _grey_of(x).mean()
    return x.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 255)


def adjust_saturation(x: Tensor, factor: float) -> Tensor:
    """Blend with the grayscale image, in place."""
    grey = _grey_of(x)
    return x.mul_(factor).add_(grey.mul_(1 - factor)).clamp_(0, 255)


def adjust_hue(x: Tensor, turns: float) -> Tensor:
    """Rotate the hue of HSV by ``turns`` (1 is the full circle), in place.

    Value and saturation stay. So the largest and the smallest value of a pixel stay too, and only the channels that have
    them change. With h the new hue in sextants and c = max - min, R = min + c * (clamp(|h - 3|, 1, 2) - 1) and
    G = max - c * (clamp(|h - 2|, 1, 2) - 1); B is like G, with |h - 4|.
    """
    r, g, b = x.unbind(1)
    top = torch.maximum(torch.maximum(r, g), b)
    low = torch.minimum(torch.minimum(r, g), b)
    chroma = top - low
    # With channels scaled to (x - min) / c, the distance of the hue from red is 1 + g + b - r sextants, because in each
    # sextant one of the three varies while the others are 0 and 1. The sign of g - b is the direction.
    hue = torch.add(g, b).sub_(r).sub_(low).div_(torch.clamp(chroma, min=1e-6)).add_(1).copysign_(g - b)
    hue.mul_(1 / 6).add_(turns + 1).frac_().mul_(6)
    low.sub_(chroma)
    torch.addcmul(low, chroma, torch.sub(hue, 3).abs_().clamp_(1, 2), out=r)
    top.add_(chroma)
    torch.addcmul(top, chroma, torch.sub(hue, 2).abs_().clamp_(1, 2), value=-1, out=g)
    torch.addcmul(top, chroma, torch.sub(hue, 4).abs_().clamp_(1, 2), value=-1, out=b)
    return x


def to_grey(x: Tensor) -> Tensor:
    """All three channels become 0.299 R + 0.587 G + 0.114 B, in place."""
    return x.copy_(_grey_of(x).expand_as(x))


def gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur with reflect padding; with sigma 0 it returns x itself.

    The window reaches 4 sigma, at most BLUR_RADIUS. Each direction adds up shifted copies: on images that fit the cache of
    a CPU this is faster than a depthwise convolution and than a product with a banded matrix.
    """
    h, w = x.shape[-2:]
    radius = min(BLUR_RADIUS, math.ceil(4 * sigma), h - 1, w - 1)
    if radius < 1:
        return x
    taps = [math.exp(-((distance / sigma) ** 2) / 2) for distance in range(radius + 1)]  # from the center outward
    total = 2 * sum(taps) - taps[0]
    for axis, size, margin in ((2, h, (0, 0, radius, radius)), (3, w, (radius, radius, 0, 0))):
        padded = F.pad(x, margin, mode="reflect")
        x = padded.narrow(axis, radius, size) * (taps[0] / total)
        for distance in range(1, radius + 1):
            for start in (radius - distance, radius + distance):
                x.add_(padded.narrow(axis, start, size), alpha=taps[distance] / total)
    return x


JITTER = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
"""In the order of the columns of ``ViewValues.factors``."""


def _grey_of(x: Tensor) -> Tensor:
    r, g, b = x.split(1, 1)
    return (r * _GREY[0]).add_(g, alpha=_GREY[1]).add_(b, alpha=_GREY[2])
