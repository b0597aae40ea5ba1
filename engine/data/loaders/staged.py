"""Batches on a device from whole decoded images: what is brought there ahead of time, and the fused op that makes the views."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.data import views
from engine.data.loaders.execute import to_tensors
from engine.data.views import center_crop, resized
from ppssl.method import Batch
from ppssl.ops import ViewValues, augment, recolour
from ppssl.timm_trunk import IMAGENET, ImageInput

_NEUTRAL = ([0, 0, 1, 1], False, False, [1, 1, 1, 0], [0, 1, 2, 3], False, 0)


class Staged(NamedTuple):
    """What a step's op takes, on the device. The query views' rows stand before the key views'."""

    position: Tensor
    """[B] int64, of the images in the training list."""
    values: ViewValues
    """[2B] rows."""
    offsets: Tensor
    """[2B] int64, where each view's image begins in ``pixels``."""
    sizes: Tensor
    """[2B, 2] int32, its height and width."""
    pixels: Tensor
    """[bytes] uint8, images [height, width, 3]."""
    host: list[tuple[int, list[int]]]
    """Offset and size of each of the B images, on the host."""
    ready: torch.cuda.Event | None
    """After which all of it is there; None where nothing runs ahead."""

    def batch(self, side: int, how: ImageInput, *, with_clean: bool) -> Batch:
        """Views of ``side`` pixels, normalized as ``how`` says, on the current stream: float16 on CUDA, float32 on a CPU."""
        dtype = torch.float16 if self.pixels.is_cuda else torch.float32
        if self.ready is not None:
            stream = torch.cuda.current_stream(self.pixels.device)
            stream.wait_event(self.ready)
            for tensor in (self.position, self.offsets, self.sizes, self.pixels, *self.values):
                tensor.record_stream(stream)  # made on the other stream: not reused before this one is done with it
        made = augment(self.pixels, self.offsets, self.sizes, self.values, side=side, mean=how.mean, std=how.std, dtype=dtype)
        clean = None
        if with_clean:
            images = (self.pixels[o : o + 3 * h * w].view(h, w, 3) for o, (h, w) in self.host)
            clean = normalized(torch.stack([original_pixels(image, side, how) for image in images]), dtype, how)
        count = len(self.position)
        return Batch(x_q=made[:count], x_k=made[count:], index=self.position, x_clean=clean)


def original_pixels(image: Tensor, side: int, how: ImageInput = IMAGENET) -> Tensor:
    """The clean view of one image: short side resized (antialiased), center crop. uint8 [H, W, 3] to [side, side, 3]."""
    size = resized((image.shape[0], image.shape[1]), how.resize(side))
    x = image.permute(2, 0, 1)[None]
    x = F.interpolate(x.float() if x.is_cuda else x, size, mode=how.interpolation, antialias=True)  # 8-bit on a CPU only
    top, left = center_crop(size, side)
    return x[0, :, top : top + side, left : left + side].clamp(0, 255).round().to(torch.uint8).permute(1, 2, 0)


def normalized(pixels: Tensor, dtype: torch.dtype, how: ImageInput) -> Tensor:
    """uint8 [B, S, S, 3] -> normalized [B, 3, S, S] channels_last, by the fused op with nothing to do in between."""
    kinds = (np.int32, bool, bool, np.float32, np.uint8, bool, np.float32)
    columns = (np.repeat(np.array(row, kind)[None], len(pixels), 0) for row, kind in zip(_NEUTRAL, kinds, strict=True))
    values = to_tensors([views.ViewValues(*columns)], pixels.device)
    return recolour(pixels, values, mean=how.mean, std=how.std, dtype=dtype)
