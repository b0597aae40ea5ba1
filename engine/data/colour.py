"""Colour of views executed from their values in torch: jitter, grey, blur and normalisation by torchvision's formulas.

The operators take planar float images in 0..255 and neither round nor truncate between each other, as torchvision does
for float tensors. On a CPU the images are taken one by one, small enough for the cache and each with only the operators
that its values ask for; on a GPU every operator runs once over all the images that ask for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from engine.data.views import ViewValues

BLUR_RADIUS = 11
"""Largest half width of the blur's window in pixels (a window of 23, MoCo v2's at 224)."""
_GREY = (0.299, 0.587, 0.114)


def adjust_brightness(x: Tensor, factor: Tensor | float) -> Tensor:
    """clamp(factor * x), in place. x: [N, 3, H, W] float, 0..255; factor: a number or [N, 1, 1, 1]; so for all
    below."""
    return x.mul_(factor).clamp_(0, 255)


def adjust_contrast(x: Tensor, factor: Tensor | float) -> Tensor:
    """Blend with the mean of the image's own grey values, in place."""
    mean = _grey_of(x).mean((-2, -1), keepdim=True)
    return x.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 255)


def adjust_saturation(x: Tensor, factor: Tensor | float) -> Tensor:
    """Blend with the grey image, in place."""
    grey = _grey_of(x)
    return x.mul_(factor).add_(grey.mul_(1 - factor)).clamp_(0, 255)


def adjust_hue(x: Tensor, turns: Tensor | float) -> Tensor:
    """Turn the hue of HSV by ``turns`` (1 is the full circle), in place.

    Value and saturation stay, so a pixel's largest and smallest channel keep their values and only who holds them
    changes: with h the new hue in sextants and c = max - min, R = min + c * (clamp(|h - 3|, 1, 2) - 1) and
    G, B = max - c * (clamp(|h - 2|, 1, 2) - 1), the same with |h - 4|.
    """
    r, g, b = x.unbind(1)
    top = torch.maximum(torch.maximum(r, g), b)
    low = torch.minimum(torch.minimum(r, g), b)
    chroma = top - low
    # With channels scaled to (x - min) / c the hue lies 1 + g + b - r sextants from red: in each sextant one of the
    # three varies while the others are 0 or 1. The sign of g - b tells the side of red.
    hue = torch.add(g, b).sub_(r).sub_(low).div_(torch.clamp(chroma, min=1e-6)).add_(1).copysign_(g - b)
    turns = turns if isinstance(turns, float) else turns[:, 0]
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


def gaussian_blur(x: Tensor, sigma: Sequence[float]) -> Tensor:
    """Gaussian blur with one sigma (> 0, pixels) an image, mirrored at the borders without repeating the edge.

    The window reaches 4 sigma, at most BLUR_RADIUS. Each direction adds up shifted copies: on planes that fit a CPU's
    cache that beats both a depthwise convolution and a product with a banded matrix.
    """
    h, w = x.shape[-2:]
    radius = min(BLUR_RADIUS, math.ceil(4 * max(sigma)), h - 1, w - 1)
    if radius < 1:
        return x
    exponent = (torch.arange(radius + 1) / torch.tensor(sigma, dtype=torch.float32)[:, None]) ** 2 / -2
    taps = torch.exp(exponent)  # [N, radius + 1], from the centre outwards
    taps /= 2 * taps.sum(1, keepdim=True) - taps[:, :1]
    weights = taps[0].tolist() if len(taps) == 1 else list(taps.to(x.device).T.reshape(radius + 1, -1, 1, 1, 1))
    padded = torch.nn.functional.pad(x, (radius, radius, radius, radius), mode="reflect")
    for axis, size in ((2, h), (3, w)):
        total = padded.narrow(axis, radius, size) * weights[0]
        for distance in range(1, radius + 1):
            for start in (radius - distance, radius + distance):
                _add_scaled(total, padded.narrow(axis, start, size), weights[distance])
        padded = total
    return padded


def _add_scaled(total: Tensor, x: Tensor, weight: Tensor | float) -> None:
    if isinstance(weight, float):
        total.add_(x, alpha=weight)
    else:
        total.addcmul_(x, weight)


_JITTER: tuple[Callable[[Tensor, Tensor | float], Tensor], ...] = (
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    adjust_hue,
)
"""In the order of the columns of ``ViewValues.factors``."""


def _grey_of(x: Tensor) -> Tensor:
    r, g, b = x.split(1, 1)
    return (r * _GREY[0]).add_(g, alpha=_GREY[1]).add_(b, alpha=_GREY[2])


class Normalise:
    """uint8 [B, H, W, 3] on any device -> (x / 255 - mean) / std: [B, 3, H, W] channels_last of ``dtype`` on
    ``device``."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device, dtype: torch.dtype):
        self._scale = 1 / (255 * torch.tensor(std, dtype=torch.float32, device=device))
        self._shift = -torch.tensor(mean, dtype=torch.float32, device=device) * 255 * self._scale
        self._device, self._dtype = device, dtype

    def __call__(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(self._device, non_blocking=True)
        b, h, w, c = pixels.shape
        rows = pixels.reshape(b, h, w * c)  # a long last dimension instead of 3 keeps the CPU's vector units busy
        x = torch.mul(rows, self._scale.repeat(w)).add_(self._shift.repeat(w))
        return x.to(self._dtype).view(b, h, w, c).permute(0, 3, 1, 2)


class Colour:
    """Executes what a view's values say about colour, then normalises."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        self._scale = (1 / (255 * torch.tensor(std, dtype=torch.float32))).view(3, 1, 1)
        self._shift = -torch.tensor(mean, dtype=torch.float32).view(3, 1, 1) * 255 * self._scale

    def one(self, pixels: Tensor, values: ViewValues, b: int, out: Tensor) -> None:
        """Image ``b`` of a view on a CPU. pixels: uint8 [H, W, 3]; out: float32 [3, H, W] of any strides,
        overwritten."""
        x = pixels.permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format)[None]
        if values.jitter[b]:
            factors = values.factors[b].tolist()
            for op in values.order[b].tolist():
                _JITTER[op](x, factors[op])
        if values.grey[b]:
            to_grey(x)
        if values.blur_sigma[b] > 0:
            x = gaussian_blur(x, [float(values.blur_sigma[b])])
        out.copy_(x[0].mul_(self._scale).add_(self._shift))

    def batch(self, pixels: Tensor, values: ViewValues, dtype: torch.dtype) -> Tensor:
        """A whole view on its device. pixels: uint8 [B, H, W, 3]; returns [B, 3, H, W] channels_last of ``dtype``."""
        device = pixels.device
        x = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        factors = torch.from_numpy(values.factors).to(device, non_blocking=True)
        for place in range(4):
            for op, adjust in enumerate(_JITTER):
                chosen = np.flatnonzero(values.jitter & (values.order[:, place] == op))
                _on_subset(
                    x, chosen, lambda part, i, op=op, adjust=adjust: adjust(part, factors[i, op].view(-1, 1, 1, 1))
                )
        _on_subset(x, np.flatnonzero(values.grey), lambda part, i: to_grey(part))
        chosen = np.flatnonzero(values.blur_sigma > 0)
        _on_subset(x, chosen, lambda part, i: gaussian_blur(part, values.blur_sigma[chosen].tolist()))
        x.mul_(self._scale.to(device)).add_(self._shift.to(device))
        return x.to(dtype=dtype, memory_format=torch.channels_last)


def _on_subset(x: Tensor, chosen: np.ndarray, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """``x[chosen] = change(x[chosen], chosen)``; which images are chosen is known on the host, so nothing waits for the
    GPU."""
    if len(chosen):
        index = torch.from_numpy(chosen).to(x.device, non_blocking=True)
        x.index_copy_(0, index, change(x.index_select(0, index), index))
