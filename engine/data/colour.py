"""Colour of a view executed from its values on batches of 8-bit pixels: jitter, grey, blur and normalisation, in torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Normalise:
    """uint8 [B, H, W, 3] on any device -> (x / 255 - mean) / std as [B, 3, H, W] channels_last of ``dtype`` on ``device``."""

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
