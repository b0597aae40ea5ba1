"""Every random number of a view as a value: pure functions of (seed, epoch, index, view) for loaders to execute.

The recipe is MoCo v2's: random resized crop, colour jitter p 0.8, grey p 0.2, Gaussian blur p 0.5, horizontal flip
p 0.5, in this order. The clean view, which has no random numbers, has its geometry here too.
"""

from __future__ import annotations

from itertools import permutations
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

CROP_AREA = (0.2, 1.0)
CROP_ASPECT = (3 / 4, 4 / 3)
CROP_TRIES = 10
JITTER_PROBABILITY = 0.8
JITTER = (0.4, 0.4, 0.4, 0.1)
"""Brightness, contrast, saturation: factor in 1 +- x. Hue: shift in +- x turns."""
GREY_PROBABILITY = 0.2
BLUR_PROBABILITY = 0.5
BLUR_SIGMA = (0.1, 2.0)
"""Pixels of a view of ``BLUR_SIDE``; a smaller view is blurred as much less, or its details would be gone."""
BLUR_SIDE = 224
FLIP_PROBABILITY = 0.5

ORDER_STREAM = 0xFFFFFFFF
"""Second counter word of the words behind the sample order; views take 0 and 1."""

_ORDERS = np.array(list(permutations(range(4))), np.uint8)
_BLOCKS = CROP_TRIES + 3


class ViewValues(NamedTuple):
    """One view of each of B images, as numbers."""

    crop: npt.NDArray[np.int32]
    """[B, 4] top, left, height, width in pixels of the upright image."""
    flip: npt.NDArray[np.bool_]
    """[B] mirrored left to right."""
    jitter: npt.NDArray[np.bool_]
    """[B] colour jitter happens."""
    factors: npt.NDArray[np.float32]
    """[B, 4] brightness, contrast, saturation, hue (turns); 1, 1, 1, 0 where ``jitter`` is false."""
    order: npt.NDArray[np.uint8]
    """[B, 4] a permutation: the column of ``factors`` that is applied first, second, …"""
    grey: npt.NDArray[np.bool_]
    """[B] turned to grey."""
    blur_sigma: npt.NDArray[np.float32]
    """[B] pixels of the view; 0 is no blur."""


def philox4x32(counter: npt.NDArray[np.uint32], key: tuple[int, int]) -> npt.NDArray[np.uint32]:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    counter: [..., 4] uint32; key: two 32-bit words. Returns [..., 4] uint32.
    """
    low = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    c0, c1, c2, c3 = np.ascontiguousarray(np.moveaxis(counter, -1, 0), np.uint64)
    k0, k1 = key
    for _ in range(10):
        p0 = c0 * np.uint64(0xD2511F53)
        p1 = c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ np.uint64(k0), p1 & low, (p0 >> shift) ^ c3 ^ np.uint64(k1), p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack((c0, c1, c2, c3), -1).astype(np.uint32)


def seed_key(seed: int) -> tuple[int, int]:
    """The low 64 bits of a seed as a Philox key."""
    return seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF


def view_values(
    seed: int,
    epoch: int,
    index: npt.NDArray[np.int64],
    view: Literal[0, 1],
    sizes: npt.NDArray[np.int32],
    side: int = BLUR_SIDE,
) -> ViewValues:
    """Values of one view (0 query, 1 key) of the images at positions ``index`` [B] of the training list.

    sizes: [B, 2] height and width of these images, upright; side: of the view, in pixels. Image b's values depend on b's own
    index and size only.
    """
    index = np.asarray(index)
    counter = np.empty((_BLOCKS, len(index), 4), np.uint32)
    counter[..., 0] = np.arange(_BLOCKS)[:, None]
    counter[..., 1] = view
    counter[..., 2] = index
    counter[..., 3] = epoch
    uniform = philox4x32(counter, seed_key(seed)) * 2.0**-32  # [blocks, B, 4] in [0, 1)
    colour, coins, rest = uniform[CROP_TRIES:]

    jitter = coins[:, 0] < JITTER_PROBABILITY
    center = np.array([1.0, 1.0, 1.0, 0.0])
    factors = np.where(jitter[:, None], center + np.array(JITTER) * (2 * colour - 1), center)
    sigma = (BLUR_SIGMA[0] + (BLUR_SIGMA[1] - BLUR_SIGMA[0]) * rest[:, 0]) * (side / BLUR_SIDE)
    return ViewValues(
        crop=_random_resized_crop(uniform[:CROP_TRIES], np.asarray(sizes, np.int64)),
        flip=coins[:, 3] < FLIP_PROBABILITY,
        jitter=jitter,
        factors=factors.astype(np.float32),
        order=_ORDERS[(rest[:, 1] * len(_ORDERS)).astype(np.int64)],
        grey=coins[:, 1] < GREY_PROBABILITY,
        blur_sigma=np.where(coins[:, 2] < BLUR_PROBABILITY, sigma, 0).astype(np.float32),
    )


def clean_resize(image_size: int) -> int:
    """Short side of the clean image before its center crop: 256 for 224."""
    return round(image_size * 256 / 224)


def resized(size: tuple[int, int], short: int) -> tuple[int, int]:
    """(height, width) of an image of ``size`` (height, width) whose short side becomes ``short``, as torchvision's
    Resize rounds."""
    height, width = size
    if height <= width:
        return short, int(short * width / height)
    return int(short * height / width), short


def center_crop(size: tuple[int, int], crop: int) -> tuple[int, int]:
    """(top, left) of torchvision's CenterCrop of side ``crop``."""
    return round((size[0] - crop) / 2), round((size[1] - crop) / 2)


def _random_resized_crop(uniform: npt.NDArray[np.float64], sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """torchvision's RandomResizedCrop.get_params for B images: the first of ten tries that fits, else the largest
    central box within the aspect limits. uniform: [tries, B, 4]; sizes: [B, 2]. Returns [B, 4] top, left, height,
    width."""
    height, width = sizes[:, 0], sizes[:, 1]
    area = height * width * (CROP_AREA[0] + (CROP_AREA[1] - CROP_AREA[0]) * uniform[..., 0])
    log_low, log_high = np.log(CROP_ASPECT)
    aspect = np.exp(log_low + (log_high - log_low) * uniform[..., 1])
    w = np.rint(np.sqrt(area * aspect)).astype(np.int64)  # rint rounds halves to even, as Python's round does
    h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first, image = fits.argmax(0), np.arange(len(sizes))
    w, h, u = w[first, image], h[first, image], uniform[first, image]
    top = np.floor(u[:, 2] * (height - h + 1))
    left = np.floor(u[:, 3] * (width - w + 1))

    narrow, wide = width / height < CROP_ASPECT[0], width / height > CROP_ASPECT[1]
    central_w = np.where(wide, np.rint(height * CROP_ASPECT[1]), width)
    central_h = np.where(narrow, np.rint(width / CROP_ASPECT[0]), height)
    central = np.stack(((height - central_h) // 2, (width - central_w) // 2, central_h, central_w), 1)
    return np.where(fits.any(0)[:, None], np.stack((top, left, h, w), 1), central).astype(np.int32)
