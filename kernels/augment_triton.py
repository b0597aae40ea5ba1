"""Views on CUDA in five launches: crop, sums of gray values, color, and the two directions of the blur.

A program is a tile of one image, and every launch covers all images: those without jitter leave the second launch at once,
and those without blur are finished by the third. The crop reads the window of each output pixel from the source, so its
work grows with the area of the crop; the windows of neighboring pixels share the cache. Sums are float32, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.configs import Config, Variant
from kernels.reference import BLUR_RADIUS, ViewValues
from kernels.selection import interpreting

TILE = Config(rows=4, cols=64, warps=4, stages=1)
"""Output pixels of a program, long in the direction of the rows, whose pixels share cache lines."""
LINE = Config(rows=1, cols=1024, warps=4, stages=1)
"""Pixels of a program where their position in the image does not matter."""
INTERPRETED = Config(rows=8, cols=32, warps=1, stages=1)


@triton.jit
def _crop_kernel(
    pixels_ptr,  # uint8 [total]
    offset_ptr,  # int64 [B]
    size_ptr,  # int32 [B, 2]
    crop_ptr,  # int32 [B, 4]
    flip_ptr,  # uint8 [B]
    out_ptr,  # uint8 [B, side, side, 3]
    side,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    # 1. Load the box of the image; y and x of the output pixels of this program are row and column.
    image = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(2) * COLS + tl.arange(0, COLS)
    width = tl.load(size_ptr + 2 * image + 1)
    top = tl.load(crop_ptr + 4 * image)
    left = tl.load(crop_ptr + 4 * image + 1)
    box_height = tl.load(crop_ptr + 4 * image + 2)
    box_width = tl.load(crop_ptr + 4 * image + 3)
    base = pixels_ptr + tl.load(offset_ptr + image)
    mirrored = tl.load(flip_ptr + image) != 0

    # 2. The window of source pixels of each output pixel: a triangle of half-width max(1, box / side) around its center.
    scale_y = box_height.to(tl.float32) / side
    scale_x = box_width.to(tl.float32) / side
    reach_y = tl.maximum(scale_y, 1.0)
    reach_x = tl.maximum(scale_x, 1.0)
    center_y = (row.to(tl.float32) + 0.5) * scale_y
    center_x = (tl.where(mirrored, side - 1 - column, column).to(tl.float32) + 0.5) * scale_x
    first_y = tl.maximum(tl.floor(center_y - reach_y + 0.5), 0.0).to(tl.int32)
    first_x = tl.maximum(tl.floor(center_x - reach_x + 0.5), 0.0).to(tl.int32)
    taps_y = tl.ceil(2 * reach_y).to(tl.int32) + 1
    taps_x = tl.ceil(2 * reach_x).to(tl.int32) + 1

    # 3. out = sum_ij w_i w_j pixel_ij / (sum_i w_i sum_j w_j) over the pixels inside the box (PIL's antialiased resize).
    red = tl.zeros([ROWS, COLS], tl.float32)
    green = tl.zeros([ROWS, COLS], tl.float32)
    blue = tl.zeros([ROWS, COLS], tl.float32)
    norm_y = tl.zeros([ROWS], tl.float32)
    norm_x = tl.zeros([COLS], tl.float32)
    for j in tl.range(0, taps_x):
        x = first_x + j
        weight = tl.maximum(1 - tl.abs(x.to(tl.float32) + 0.5 - center_x) / reach_x, 0.0)
        norm_x += tl.where(x < box_width, weight, 0.0)
    for i in tl.range(0, taps_y):
        y = first_y + i
        weight_y = tl.maximum(1 - tl.abs(y.to(tl.float32) + 0.5 - center_y) / reach_y, 0.0)
        weight_y = tl.where(y < box_height, weight_y, 0.0)
        norm_y += weight_y
        inside_y = (row < side) & (y < box_height)
        line = base + ((top + y) * width + left) * 3
        for j in tl.range(0, taps_x):
            x = first_x + j
            weight_x = tl.maximum(1 - tl.abs(x.to(tl.float32) + 0.5 - center_x) / reach_x, 0.0)
            inside = inside_y[:, None] & ((column < side) & (x < box_width))[None, :]
            source = line[:, None] + x[None, :] * 3
            weight = weight_y[:, None] * weight_x[None, :]
            red += weight * tl.load(source, mask=inside, other=0).to(tl.float32)
            green += weight * tl.load(source + 1, mask=inside, other=0).to(tl.float32)
            blue += weight * tl.load(source + 2, mask=inside, other=0).to(tl.float32)
    share = 1 / tl.maximum(norm_y[:, None] * norm_x[None, :], 1e-6)  # the norm of pixels beyond the view may be 0
    # 4. Round to 8 bits, as PIL does.
    out = out_ptr + (image.to(tl.int64) * side * side + row[:, None] * side + column[None, :]) * 3
    kept = (row < side)[:, None] & (column < side)[None, :]
    tl.store(out, _eight_bits(red * share), mask=kept)
    tl.store(out + 1, _eight_bits(green * share), mask=kept)
    tl.store(out + 2, _eight_bits(blue * share), mask=kept)


@triton.jit
def _eight_bits(x):
    return tl.floor(tl.minimum(tl.maximum(x + 0.5, 0.0), 255.0)).to(tl.uint8)


@triton.jit
def _grey(r, g, b):
    return 0.299 * r + 0.587 * g + 0.114 * b


@triton.jit
def _level(x):
    return tl.minimum(tl.maximum(x, 0.0), 255.0)


@triton.jit
def _adjust(r, g, b, op, factor, mean):
    """Jitter ``op`` (0 brightness, 1 contrast around ``mean``, 2 saturation, 3 hue in turns) of levels 0..255."""
    if op == 0:
        r = _level(factor * r)
        g = _level(factor * g)
        b = _level(factor * b)
    elif op == 1:
        r = _level(factor * r + (1 - factor) * mean)
        g = _level(factor * g + (1 - factor) * mean)
        b = _level(factor * b + (1 - factor) * mean)
    elif op == 2:
        grey = (1 - factor) * _grey(r, g, b)
        r = _level(factor * r + grey)
        g = _level(factor * g + grey)
        b = _level(factor * b + grey)
    else:
        # the largest and the smallest value stay, and the channels that have them change: see augment.adjust_hue
        top = tl.maximum(tl.maximum(r, g), b)
        low = tl.minimum(tl.minimum(r, g), b)
        chroma = top - low
        hue = 1 + (g + b - r - low) / tl.maximum(chroma, 1e-6)
        hue = tl.where(g < b, -hue, hue) / 6 + factor + 1
        hue = (hue - tl.floor(hue)) * 6
        r = low + chroma * (tl.minimum(tl.maximum(tl.abs(hue - 3), 1.0), 2.0) - 1)
        g = top - chroma * (tl.minimum(tl.maximum(tl.abs(hue - 2), 1.0), 2.0) - 1)
        b = top - chroma * (tl.minimum(tl.maximum(tl.abs(hue - 4), 1.0), 2.0) - 1)
    return r, g, b


@triton.jit
def _sum_kernel(
    view_ptr,  # uint8 [B, pixels, 3]
    jitter_ptr,  # uint8 [B]
    factor_ptr,  # float32 [B, 4]
    order_ptr,  # uint8 [B, 4]
    sum_ptr,  # float32 [B, parts]
    n_pixels,
    BLOCK: tl.constexpr,
):
    """Sums of gray values of each part of an image, after the operations that precede contrast."""
    image = tl.program_id(0)
    part = tl.program_id(1)
    # 1. Apply the operations that precede contrast in the order of this image.
    if tl.load(jitter_ptr + image) != 0:
        pixel = part * BLOCK + tl.arange(0, BLOCK)
        inside = pixel < n_pixels
        view = view_ptr + (image.to(tl.int64) * n_pixels + pixel) * 3
        r = tl.load(view, mask=inside, other=0).to(tl.float32)
        g = tl.load(view + 1, mask=inside, other=0).to(tl.float32)
        b = tl.load(view + 2, mask=inside, other=0).to(tl.float32)
        before = True
        for place in tl.static_range(3):
            op = tl.load(order_ptr + 4 * image + place).to(tl.int32)
            before = before & (op != 1)
            if before:
                r, g, b = _adjust(r, g, b, op, tl.load(factor_ptr + 4 * image + op), 0.0)
        # 2. The sum over the pixels of this part of gray = 0.299 r + 0.587 g + 0.114 b.
        total = tl.sum(tl.where(inside, _grey(r, g, b), 0.0), 0)
        tl.store(sum_ptr + image * tl.num_programs(1) + part, total)


@triton.jit
def _colour_kernel(
    view_ptr,  # uint8 [B, pixels, 3]
    jitter_ptr,  # uint8 [B]
    factor_ptr,  # float32 [B, 4]
    order_ptr,  # uint8 [B, 4]
    grey_ptr,  # uint8 [B]
    sigma_ptr,  # float32 [B]
    sum_ptr,  # float32 [B, parts]
    level_ptr,  # float32 [B, 3, pixels]: the images that will be blurred, in 0..255
    out_ptr,  # [B, pixels, 3]: the other images, finished
    n_pixels,
    scale_r, scale_g, scale_b, shift_r, shift_g, shift_b,
    PARTS: tl.constexpr,  # a power of two
    BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < n_pixels
    place_in = (image.to(tl.int64) * n_pixels + pixel) * 3
    # 1. Load the pixels of this program.
    r = tl.load(view_ptr + place_in, mask=inside, other=0).to(tl.float32)
    g = tl.load(view_ptr + place_in + 1, mask=inside, other=0).to(tl.float32)
    b = tl.load(view_ptr + place_in + 2, mask=inside, other=0).to(tl.float32)
    # 2. Apply the four jitter operations in the order of this image; contrast blends with the mean of the gray values.
    if tl.load(jitter_ptr + image) != 0:
        parts = tl.arange(0, PARTS)
        sums = tl.load(sum_ptr + image * tl.num_programs(1) + parts, mask=parts < tl.num_programs(1), other=0.0)
        mean = tl.sum(sums, 0) / n_pixels
        for place in tl.static_range(4):
            op = tl.load(order_ptr + 4 * image + place).to(tl.int32)
            r, g, b = _adjust(r, g, b, op, tl.load(factor_ptr + 4 * image + op), mean)
    # 3. If the image is to be grayscale: r = g = b = 0.299 r + 0.587 g + 0.114 b.
    if tl.load(grey_ptr + image) != 0:
        r = _grey(r, g, b)
        g = r
        b = r
    # 4. Store x for the blur, or the finished (x / 255 - mean) / std = scale x + shift.
    if tl.load(sigma_ptr + image) > 0:
        level = level_ptr + image.to(tl.int64) * 3 * n_pixels + pixel
        tl.store(level, r, mask=inside)
        tl.store(level + n_pixels, g, mask=inside)
        tl.store(level + 2 * n_pixels, b, mask=inside)
    else:
        kind = out_ptr.dtype.element_ty
        tl.store(out_ptr + place_in, (r * scale_r + shift_r).to(kind), mask=inside)
        tl.store(out_ptr + place_in + 1, (g * scale_g + shift_g).to(kind), mask=inside)
        tl.store(out_ptr + place_in + 2, (b * scale_b + shift_b).to(kind), mask=inside)


@triton.jit
def _reflected(i, side):
    """The position that reflect padding gives for ``i``."""
    i = tl.abs(i)
    return tl.where(i < side, i, 2 * (side - 1) - i)


@triton.jit
def _blur_kernel(
    sigma_ptr,  # float32 [B]
    level_ptr,  # float32 [B, 3, side, side]
    out_ptr,  # along the columns: float32 [B, 3, side, side]; along the rows, normalized: [B, side, side, 3]
    side,
    scale_r, scale_g, scale_b, shift_r, shift_g, shift_b,
    ALONG_ROWS: tl.constexpr,
    RADIUS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0)
    sigma = tl.load(sigma_ptr + image)
    if sigma > 0:
        row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        column = tl.program_id(2) * COLS + tl.arange(0, COLS)
        inside = (row < side)[:, None] & (column < side)[None, :]
        place = row[:, None] * side + column[None, :]
        plane = side * side
        level = level_ptr + image.to(tl.int64) * 3 * plane
        r = tl.load(level + place, mask=inside, other=0.0)
        g = tl.load(level + plane + place, mask=inside, other=0.0)
        b = tl.load(level + 2 * plane + place, mask=inside, other=0.0)
        # 1. The pixel itself, w_0 = 1. The window: w_d = exp(-d^2 / (2 sigma^2)) for |d| <= min(4 sigma, RADIUS, side - 1).
        radius = tl.minimum(tl.minimum(tl.ceil(4 * sigma).to(tl.int32), RADIUS), side - 1)
        norm = 1.0
        for distance in tl.range(1, radius + 1):
            share = distance / sigma
            weight = tl.exp(-0.5 * share * share)
            norm += 2 * weight
            # 2. sum += w_d (x_-d + x_+d);  norm += 2 w_d, with reflect padding.
            if ALONG_ROWS:
                near = row[:, None] * side + _reflected(column - distance, side)[None, :]
                far = row[:, None] * side + _reflected(column + distance, side)[None, :]
            else:
                near = _reflected(row - distance, side)[:, None] * side + column[None, :]
                far = _reflected(row + distance, side)[:, None] * side + column[None, :]
            r += weight * (tl.load(level + near, mask=inside, other=0.0) + tl.load(level + far, mask=inside, other=0.0))
            near += plane
            far += plane
            g += weight * (tl.load(level + near, mask=inside, other=0.0) + tl.load(level + far, mask=inside, other=0.0))
            near += plane
            far += plane
            b += weight * (tl.load(level + near, mask=inside, other=0.0) + tl.load(level + far, mask=inside, other=0.0))
        # 3. Store sum / norm; after the second direction also normalize: scale x + shift.
        if ALONG_ROWS:
            kind = out_ptr.dtype.element_ty
            out = out_ptr + (image.to(tl.int64) * plane + place) * 3
            tl.store(out, (r / norm * scale_r + shift_r).to(kind), mask=inside)
            tl.store(out + 1, (g / norm * scale_g + shift_g).to(kind), mask=inside)
            tl.store(out + 2, (b / norm * scale_b + shift_b).to(kind), mask=inside)
        else:
            out = out_ptr + image.to(tl.int64) * 3 * plane + place
            tl.store(out, r / norm, mask=inside)
            tl.store(out + plane, g / norm, mask=inside)
            tl.store(out + 2 * plane, b / norm, mask=inside)


def crops(pixels: Tensor, offsets: Tensor, sizes: Tensor, values: ViewValues, side: int) -> Tensor:
    """The cropped, resized and flipped views: uint8 [B, side, side, 3]."""
    out = torch.empty((len(offsets), side, side, 3), dtype=torch.uint8, device=pixels.device)
    if len(out):
        tile = INTERPRETED if interpreting() else TILE
        grid = (len(out), triton.cdiv(side, tile.rows), triton.cdiv(side, tile.cols))
        with torch.cuda.device_of(pixels):
            _crop_kernel[grid](
                pixels, offsets, sizes, values.crop, values.flip.view(torch.uint8), out, side,
                ROWS=tile.rows, COLS=tile.cols, num_warps=tile.warps,
            )  # fmt: skip
    return out


def recolour(views: Tensor, values: ViewValues, mean: Sequence[float], std: Sequence[float], out: Tensor) -> None:
    """Jitter, grayscale, blur and normalization of uint8 [B, S, S, 3] into ``out`` [B, 3, S, S], channels_last."""
    count, side = views.shape[:2]
    if not count:
        return
    tile, block = (INTERPRETED, 256) if interpreting() else (TILE, LINE.cols)
    parts = triton.cdiv(side * side, block)
    sums = torch.empty((count, parts), dtype=torch.float32, device=views.device)
    levels = torch.empty((2, count, 3, side, side), dtype=torch.float32, device=views.device)
    jitter, grey = values.jitter.view(torch.uint8), values.grey.view(torch.uint8)
    affine = [1 / (255 * s) for s in std] + [-m / s for m, s in zip(mean, std, strict=True)]
    grid = (count, triton.cdiv(side, tile.rows), triton.cdiv(side, tile.cols))
    with torch.cuda.device_of(views):
        _sum_kernel[(count, parts)](
            views, jitter, values.factors, values.order, sums, side * side, BLOCK=block, num_warps=LINE.warps
        )
        _colour_kernel[(count, parts)](
            views, jitter, values.factors, values.order, grey, values.blur_sigma, sums, levels[0], out, side * side, *affine,
            PARTS=triton.next_power_of_2(parts), BLOCK=block, num_warps=LINE.warps,
        )  # fmt: skip
        for source, target, along_rows in ((levels[0], levels[1], False), (levels[1], out, True)):
            _blur_kernel[grid](
                values.blur_sigma, source, target, side, *affine,
                ALONG_ROWS=along_rows, RADIUS=BLUR_RADIUS, ROWS=tile.rows, COLS=tile.cols, num_warps=tile.warps,
            )  # fmt: skip


def variants(arch: str) -> list[Variant]:
    """Views of 224 pixels in three output types, the same for every architecture."""
    byte = dict(view_ptr="*u8", jitter_ptr="*u8", factor_ptr="*fp32", order_ptr="*u8", grey_ptr="*u8")
    affine = dict.fromkeys((f"{kind}_{channel}" for kind in ("scale", "shift") for channel in "rgb"), "fp32")
    tile, line = dict(ROWS=TILE.rows, COLS=TILE.cols), dict(BLOCK=LINE.cols)
    crop = dict(pixels_ptr="*u8", offset_ptr="*i64", size_ptr="*i32", crop_ptr="*i32", flip_ptr="*u8", out_ptr="*u8", side="i32")
    found = [
        Variant("augment crop", _crop_kernel, crop, tile, ("side",), TILE.warps, 1, "small"),
        Variant("augment sum", _sum_kernel, {name: byte[name] for name in list(byte)[:4]} | dict(sum_ptr="*fp32", n_pixels="i32"),
                line, ("n_pixels",), LINE.warps, 1, "small"),
    ]  # fmt: skip
    blur = dict(sigma_ptr="*fp32", level_ptr="*fp32")
    for kind in ("bf16", "fp16", "fp32"):
        types = byte | blur | dict(sum_ptr="*fp32", out_ptr=f"*{kind}", n_pixels="i32") | affine
        constants = line | dict(PARTS=64)
        found.append(Variant(f"augment colour {kind}", _colour_kernel, types, constants, ("n_pixels",), LINE.warps, 1, "small"))
        types = blur | dict(out_ptr=f"*{kind}", side="i32") | affine
        constants = tile | dict(ALONG_ROWS=True, RADIUS=BLUR_RADIUS)
        found.append(Variant(f"augment blur rows {kind}", _blur_kernel, types, constants, ("side",), TILE.warps, 1, "small"))
    types = blur | dict(out_ptr="*fp32", side="i32") | affine
    constants = tile | dict(ALONG_ROWS=False, RADIUS=BLUR_RADIUS)
    found.append(Variant("augment blur columns", _blur_kernel, types, constants, ("side",), TILE.warps, 1, "small"))
    return found
