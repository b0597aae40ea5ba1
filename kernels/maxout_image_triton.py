"""The max-out mask of an image on CUDA. Forward: moments, affine, search, scale. Backward: cells, parameters.

The derivation is in ``maxout_image.py``. In the two passes over the image, a program is one row of cells of one image, cut
into tiles of a few pixel rows. Pass 1 adds up the colors and their products in float64. Pass 2 keeps, for each lane of
the tile, the largest value so far and its step, and finds the winner of each cell once, at the end; the same for the
smallest value. Nothing larger than three colors per cell is written. Reductions are deterministic, and the work after the
two passes is small.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.batch_statistics import minmax_groups
from kernels.configs import Config, Variant, Workload, architecture, lookup, table
from kernels.group import gather, local_shard, world_size
from kernels.selection import interpreting

MINMAX_EPS = tl.constexpr(1e-7)
ABSENT = tl.constexpr(-1e30)
INTERPRETED = Config(rows=4, cols=0, warps=1, stages=1)
KERNELS = ("moments", "search")
BLOCK = 64
"""How many partial results, cells or images a loop takes at a time."""


@triton.jit
def _moments_kernel(
    x_ptr,  # [B, 3, H, W]
    partial_ptr,  # [programs, 9] float64: sums of r g b, rr rg rb gg gb bb
    width,
    cell,
    stride_b, stride_c, stride_h, stride_w,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    # 1. One row of cells of one image.
    image = tl.program_id(0)
    band = tl.program_id(1)
    offs_r = tl.arange(0, ROWS)
    offs_w = tl.arange(0, BLOCK_W)
    mask = (offs_w < width)[None, :]
    start = x_ptr + image.to(tl.int64) * stride_b
    r1 = tl.zeros([ROWS, BLOCK_W], tl.float64)
    g1 = tl.zeros([ROWS, BLOCK_W], tl.float64)
    b1 = tl.zeros([ROWS, BLOCK_W], tl.float64)
    rr = tl.zeros([ROWS, BLOCK_W], tl.float64)
    rg = tl.zeros([ROWS, BLOCK_W], tl.float64)
    rb = tl.zeros([ROWS, BLOCK_W], tl.float64)
    gg = tl.zeros([ROWS, BLOCK_W], tl.float64)
    gb = tl.zeros([ROWS, BLOCK_W], tl.float64)
    bb = tl.zeros([ROWS, BLOCK_W], tl.float64)
    # 2. Sums over the pixels of r, g, b and of their six products, in float64.
    for step in tl.range(0, tl.cdiv(cell, ROWS)):
        row = band * cell + step * ROWS + offs_r
        pixels = start + row[:, None] * stride_h + offs_w[None, :] * stride_w
        r = tl.load(pixels, mask=mask, other=0.0).to(tl.float64)
        g = tl.load(pixels + stride_c, mask=mask, other=0.0).to(tl.float64)
        b = tl.load(pixels + 2 * stride_c, mask=mask, other=0.0).to(tl.float64)
        r1 += r
        g1 += g
        b1 += b
        rr += r * r
        rg += r * g
        rb += r * b
        gg += g * g
        gb += g * b
        bb += b * b
    # 3. Nine numbers per program.
    out = partial_ptr + (image * tl.num_programs(1) + band) * 9
    tl.store(out, tl.sum(tl.sum(r1, 1), 0))
    tl.store(out + 1, tl.sum(tl.sum(g1, 1), 0))
    tl.store(out + 2, tl.sum(tl.sum(b1, 1), 0))
    tl.store(out + 3, tl.sum(tl.sum(rr, 1), 0))
    tl.store(out + 4, tl.sum(tl.sum(rg, 1), 0))
    tl.store(out + 5, tl.sum(tl.sum(rb, 1), 0))
    tl.store(out + 6, tl.sum(tl.sum(gg, 1), 0))
    tl.store(out + 7, tl.sum(tl.sum(gb, 1), 0))
    tl.store(out + 8, tl.sum(tl.sum(bb, 1), 0))


@triton.jit
def _column(partial_ptr, n_programs, n_pixels, COLUMN: tl.constexpr, BLOCK_P: tl.constexpr):
    """The mean over all pixels of one of the nine quantities."""
    total = tl.zeros([BLOCK_P], tl.float64)
    for block in tl.range(0, tl.cdiv(n_programs, BLOCK_P)):
        offs = block * BLOCK_P + tl.arange(0, BLOCK_P)
        total += tl.load(partial_ptr + offs * 9 + COLUMN, mask=offs < n_programs, other=0.0)
    return tl.sum(total, 0) / n_pixels


@triton.jit
def _affine_kernel(
    partial_ptr,  # [programs, 9] float64
    w_ptr,  # [M, 3]
    gamma_ptr, beta_ptr,  # [M]
    mean_ptr, var_ptr,  # [M] written in training, read otherwise
    moments_ptr,  # [4, 3] float64
    slope_ptr,  # [M, 4] float32: A and the shift
    n_programs,
    n_pixels,
    n_proj,
    stride_wm, stride_wc,
    eps,
    TRAINING: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    # 1. mu = E[x] and S = E[x x^T] - mu mu^T of the colors x.
    r1 = _column(partial_ptr, n_programs, n_pixels, 0, BLOCK_P)
    g1 = _column(partial_ptr, n_programs, n_pixels, 1, BLOCK_P)
    b1 = _column(partial_ptr, n_programs, n_pixels, 2, BLOCK_P)
    rr = _column(partial_ptr, n_programs, n_pixels, 3, BLOCK_P) - r1 * r1
    rg = _column(partial_ptr, n_programs, n_pixels, 4, BLOCK_P) - r1 * g1
    rb = _column(partial_ptr, n_programs, n_pixels, 5, BLOCK_P) - r1 * b1
    gg = _column(partial_ptr, n_programs, n_pixels, 6, BLOCK_P) - g1 * g1
    gb = _column(partial_ptr, n_programs, n_pixels, 7, BLOCK_P) - g1 * b1
    bb = _column(partial_ptr, n_programs, n_pixels, 8, BLOCK_P) - b1 * b1
    tl.store(moments_ptr, r1)
    tl.store(moments_ptr + 1, g1)
    tl.store(moments_ptr + 2, b1)
    tl.store(moments_ptr + 3, rr)
    tl.store(moments_ptr + 4, rg)
    tl.store(moments_ptr + 5, rb)
    tl.store(moments_ptr + 6, rg)
    tl.store(moments_ptr + 7, gg)
    tl.store(moments_ptr + 8, gb)
    tl.store(moments_ptr + 9, rb)
    tl.store(moments_ptr + 10, gb)
    tl.store(moments_ptr + 11, bb)
    # 2. Of the projection u = w.x: mean = w.mu, var = w^T S w.
    offs = tl.arange(0, BLOCK_M)
    there = offs < n_proj
    wr = tl.load(w_ptr + offs * stride_wm, mask=there, other=0.0).to(tl.float64)
    wg = tl.load(w_ptr + offs * stride_wm + stride_wc, mask=there, other=0.0).to(tl.float64)
    wb = tl.load(w_ptr + offs * stride_wm + 2 * stride_wc, mask=there, other=0.0).to(tl.float64)
    if TRAINING:
        mean = wr * r1 + wg * g1 + wb * b1
        var = wr * (wr * rr + 2.0 * (wg * rg + wb * rb)) + wg * (wg * gg + 2.0 * (wb * gb)) + wb * wb * bb
        # Rounding may turn a variance of 0 slightly negative. tl.where keeps a NaN, which tl.maximum would drop.
        var = tl.where(var < 0.0, 0.0, var)
        tl.store(mean_ptr + offs, mean.to(tl.float32), mask=there)
        tl.store(var_ptr + offs, var.to(tl.float32), mask=there)
    else:
        mean = tl.load(mean_ptr + offs, mask=there, other=0.0).to(tl.float64)
        var = tl.load(var_ptr + offs, mask=there, other=1.0).to(tl.float64)
    # 3. v = A.x + shift with A = gamma w / sqrt(var + eps), shift = beta - gamma mean / sqrt(var + eps).
    scale = tl.load(gamma_ptr + offs, mask=there, other=0.0).to(tl.float64) / tl.sqrt(var + eps)
    shift = tl.load(beta_ptr + offs, mask=there, other=0.0).to(tl.float64) - mean * scale
    tl.store(slope_ptr + offs * 4, (scale * wr).to(tl.float32), mask=there)
    tl.store(slope_ptr + offs * 4 + 1, (scale * wg).to(tl.float32), mask=there)
    tl.store(slope_ptr + offs * 4 + 2, (scale * wb).to(tl.float32), mask=there)
    tl.store(slope_ptr + offs * 4 + 3, shift.to(tl.float32), mask=there)


@triton.jit
def _search_kernel(
    x_ptr,  # [B, 3, H, W]
    slope_ptr,  # [M, 4]
    value_ptr,  # [B, h, w] the winner's relu(max v)
    winner_ptr,  # [B h w, 3] its colors
    low_ptr,  # [B, h] smallest relu(max v) of the band
    lowest_ptr,  # [B, h, 3] its colors
    width,
    n_cols,
    n_proj,
    stride_b, stride_c, stride_h, stride_w,
    WITH_LOW: tl.constexpr,
    CELL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,  # a power of two of whole cells
):  # fmt: skip
    # 1. One row of cells of one image, ROWS pixel rows at a time.
    image = tl.program_id(0)
    band = tl.program_id(1)
    offs_r = tl.arange(0, ROWS)
    offs_w = tl.arange(0, BLOCK_W)
    inside = (offs_w < width)[None, :]
    start = x_ptr + image.to(tl.int64) * stride_b
    best = tl.full([ROWS, BLOCK_W], float("-inf"), tl.float32)
    best_step = tl.zeros([ROWS, BLOCK_W], tl.int32)
    least = tl.full([ROWS, BLOCK_W], float("inf"), tl.float32)
    least_step = tl.zeros([ROWS, BLOCK_W], tl.int32)
    poison = tl.zeros([ROWS, BLOCK_W], tl.float32)
    for step in tl.range(0, CELL // ROWS):
        row = band * CELL + step * ROWS + offs_r
        pixels = start + row[:, None] * stride_h + offs_w[None, :] * stride_w
        r = tl.load(pixels, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(pixels + stride_c, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(pixels + 2 * stride_c, mask=inside, other=0.0).to(tl.float32)
        # 2. z = max over projections m of relu(A_m.x + shift_m) at every pixel.
        value = tl.zeros([ROWS, BLOCK_W], tl.float32)  # the ReLU
        for m in tl.range(0, n_proj):
            slope = slope_ptr + m * 4
            v = r * tl.load(slope) + g * tl.load(slope + 1) + b * tl.load(slope + 2) + tl.load(slope + 3)
            value = tl.maximum(value, v, propagate_nan=tl.PropagateNan.ALL)
        # A comparison drops a NaN; 0 * z keeps it.
        poison += value * 0.0
        # 3. Each lane keeps the largest z so far and its step, and the smallest.
        better = value > best
        best = tl.where(better, value, best)
        best_step = tl.where(better, step, best_step)
        if WITH_LOW:
            value = tl.where(inside, value, float("inf"))
            lower = value < least
            least = tl.where(lower, value, least)
            least_step = tl.where(lower, step, least_step)
    # [ROWS, BLOCK_W] -> [cells, ROWS * CELL]
    # 4. Over the lanes of each cell, the winner: the first pixel with the largest z. Store its z and colors.
    cells: tl.constexpr = BLOCK_W // CELL
    pixel = (band * CELL + best_step * ROWS + offs_r[:, None]) * width + offs_w[None, :]
    by_cell = tl.reshape(tl.permute(tl.reshape(best, [ROWS, cells, CELL]), [1, 0, 2]), [cells, ROWS * CELL])
    pixel = tl.reshape(tl.permute(tl.reshape(pixel, [ROWS, cells, CELL]), [1, 0, 2]), [cells, ROWS * CELL])
    poison = tl.reshape(tl.permute(tl.reshape(poison, [ROWS, cells, CELL]), [1, 0, 2]), [cells, ROWS * CELL])
    top = tl.max(by_cell, 1)
    first = tl.min(tl.where(by_cell == top[:, None], pixel, 2147483647), 1)
    column = tl.arange(0, cells)
    kept = column < n_cols
    out = (image * tl.num_programs(1) + band) * n_cols + column
    tl.store(value_ptr + out, top + tl.sum(poison, 1), mask=kept)
    found = start + (first // width) * stride_h + (first % width) * stride_w
    tl.store(winner_ptr + out * 3, tl.load(found, mask=kept, other=0.0).to(tl.float32), mask=kept)
    tl.store(winner_ptr + out * 3 + 1, tl.load(found + stride_c, mask=kept, other=0.0).to(tl.float32), mask=kept)
    tl.store(winner_ptr + out * 3 + 2, tl.load(found + 2 * stride_c, mask=kept, other=0.0).to(tl.float32), mask=kept)
    # 5. In the same way the smallest pixel of the band, for the min-max.
    if WITH_LOW:
        bottom = tl.min(tl.min(least, 1), 0)
        pixel = (band * CELL + least_step * ROWS + offs_r[:, None]) * width + offs_w[None, :]
        pixel = tl.min(tl.min(tl.where(least == bottom, pixel, 2147483647), 1), 0)
        out = image * tl.num_programs(1) + band
        tl.store(low_ptr + out, bottom)
        found = start + (pixel // width) * stride_h + (pixel % width) * stride_w
        tl.store(lowest_ptr + out * 3, tl.load(found).to(tl.float32))
        tl.store(lowest_ptr + out * 3 + 1, tl.load(found + stride_c).to(tl.float32))
        tl.store(lowest_ptr + out * 3 + 2, tl.load(found + 2 * stride_c).to(tl.float32))


@triton.jit
def _scale_kernel(
    value_ptr,  # [B, cells]
    low_ptr,  # [B bands]
    lowest_ptr,  # [B bands, 3]
    mask_ptr,  # [B, cells]
    den_ptr,  # [groups]
    lowest_out_ptr,  # [groups, 3]
    n_images,
    n_cells,
    n_bands,
    BATCH: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    image = tl.program_id(0)
    if BATCH:
        first_band = image * 0
        last_band = n_images * n_bands
        first_cell = image * 0
        last_cell = n_images * n_cells
    else:
        first_band = image * n_bands
        last_band = first_band + n_bands
        first_cell = image * n_cells
        last_cell = first_cell + n_cells
    # 1. The smallest z of the range, and the first band that holds it.
    lows = tl.full([BLOCK_N], float("inf"), tl.float32)
    for block in tl.range(0, tl.cdiv(last_band - first_band, BLOCK_N)):
        offs = first_band + block * BLOCK_N + tl.arange(0, BLOCK_N)
        lows = tl.minimum(lows, tl.load(low_ptr + offs, mask=offs < last_band, other=float("inf")))
    low = tl.min(lows, 0)
    bands = tl.full([BLOCK_N], 2147483647, tl.int32)
    for block in tl.range(0, tl.cdiv(last_band - first_band, BLOCK_N)):
        offs = first_band + block * BLOCK_N + tl.arange(0, BLOCK_N)
        equal = tl.load(low_ptr + offs, mask=offs < last_band, other=float("inf")) == low
        bands = tl.minimum(bands, tl.where(equal & (offs < last_band), offs, 2147483647))
    band = tl.min(bands, 0)
    # 2. den = 1e-7 + max z - min z.
    highs = tl.full([BLOCK_N], float("-inf"), tl.float32)
    for block in tl.range(0, tl.cdiv(last_cell - first_cell, BLOCK_N)):
        offs = first_cell + block * BLOCK_N + tl.arange(0, BLOCK_N)
        highs = tl.maximum(highs, tl.load(value_ptr + offs, mask=offs < last_cell, other=float("-inf")))
    den = MINMAX_EPS + (tl.max(highs, 0) - low)
    # 3. mask = (z - min z) / den of this image's cells.
    for block in tl.range(0, tl.cdiv(n_cells, BLOCK_N)):
        cell = block * BLOCK_N + tl.arange(0, BLOCK_N)
        offs = image * n_cells + cell
        value = tl.load(value_ptr + offs, mask=cell < n_cells, other=0.0)
        tl.store(mask_ptr + offs, (value - low) / den, mask=cell < n_cells)
    # 4. den and the colors of the smallest pixel, once per range.
    group = image
    if BATCH:
        group = image * 0
    if (not BATCH) or image == 0:
        tl.store(den_ptr + group, den)
        # With a NaN no band compares equal. The result is NaN, whatever the colors.
        band = tl.minimum(band, last_band - 1)
        tl.store(lowest_out_ptr + group * 3, tl.load(lowest_ptr + band * 3))
        tl.store(lowest_out_ptr + group * 3 + 1, tl.load(lowest_ptr + band * 3 + 1))
        tl.store(lowest_out_ptr + group * 3 + 2, tl.load(lowest_ptr + band * 3 + 2))


@triton.jit
def _spread(r, g, b, dz, there, slope_r, slope_g, slope_b, shift, BLOCK_M: tl.constexpr):
    """Per projection [BLOCK_M], sums of dz times (r, g, b, 1) over the pixels where it is the largest and above the ReLU."""
    offs = tl.arange(0, BLOCK_M)
    v = r[:, None] * slope_r[None, :] + g[:, None] * slope_g[None, :] + b[:, None] * slope_b[None, :] + shift[None, :]
    top, winner = tl.max(v, 1, return_indices=True)
    dv = tl.where((offs[None, :] == winner[:, None]) & (there & (top > 0.0))[:, None], dz[:, None], 0.0)
    return tl.sum(dv * r[:, None], 0), tl.sum(dv * g[:, None], 0), tl.sum(dv * b[:, None], 0), tl.sum(dv, 0)


@triton.jit
def _grad_cells_kernel(
    grad_ptr,  # [B, cells]
    mask_ptr,  # [B, cells]
    winner_ptr,  # [B cells, 3]
    lowest_ptr,  # [groups, 3]
    den_ptr,  # [groups]
    w_ptr,  # [M, 3]
    gamma_ptr, beta_ptr, mean_ptr, var_ptr,  # [M]
    partial_ptr,  # [B, 4, M] sums of dz r, dz g, dz b, dz
    n_images,
    n_cells,
    n_proj,
    stride_wm, stride_wc,
    eps,
    MINMAX: tl.constexpr,  # 0 none, 1 image, 2 batch
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0)
    offs_m = tl.arange(0, BLOCK_M)
    mask_m = offs_m < n_proj
    # 1. A_m and shift_m as in the forward pass; projections beyond M are never the largest.
    mean = tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0)
    scale = tl.load(gamma_ptr + offs_m, mask=mask_m, other=0.0).to(tl.float32)
    scale = scale / tl.sqrt(tl.load(var_ptr + offs_m, mask=mask_m, other=1.0) + eps)
    slope_r = tl.load(w_ptr + offs_m * stride_wm, mask=mask_m, other=0.0).to(tl.float32) * scale
    slope_g = tl.load(w_ptr + offs_m * stride_wm + stride_wc, mask=mask_m, other=0.0).to(tl.float32) * scale
    slope_b = tl.load(w_ptr + offs_m * stride_wm + 2 * stride_wc, mask=mask_m, other=0.0).to(tl.float32) * scale
    shift = tl.load(beta_ptr + offs_m, mask=mask_m, other=ABSENT).to(tl.float32) - mean * scale
    group = image
    if MINMAX == 2:
        group = image * 0
    # 2. With t = dL/dmask: the smallest pixel gets sum t (mask - 1) / den, each largest cell -sum t mask / #(largest) / den.
    if MINMAX:
        first = image * n_cells
        last = first + n_cells
        if MINMAX == 2:
            first = image * 0
            last = n_images * n_cells
        den = tl.load(den_ptr + group)
        tops = tl.full([BLOCK_N], float("-inf"), tl.float32)
        for block in tl.range(0, tl.cdiv(last - first, BLOCK_N)):
            offs = first + block * BLOCK_N + tl.arange(0, BLOCK_N)
            tops = tl.maximum(tops, tl.load(mask_ptr + offs, mask=offs < last, other=float("-inf")))
        top = tl.max(tops, 0)
        low_sum = tl.zeros([BLOCK_N], tl.float32)
        high_sum = tl.zeros([BLOCK_N], tl.float32)
        highest = tl.zeros([BLOCK_N], tl.float32)
        for block in tl.range(0, tl.cdiv(last - first, BLOCK_N)):
            offs = first + block * BLOCK_N + tl.arange(0, BLOCK_N)
            there = offs < last
            t = tl.load(grad_ptr + offs, mask=there, other=0.0).to(tl.float32)
            mask = tl.load(mask_ptr + offs, mask=there, other=0.0)
            low_sum += t * (mask - 1.0)
            high_sum += t * mask
            highest += tl.where(there & (mask == top), 1.0, 0.0)
        to_low = tl.sum(low_sum, 0) / den
        to_high = tl.sum(high_sum, 0) / tl.sum(highest, 0)
    # 3. dz of every winner; per projection, sums of dz x and dz over the winners where it is the largest.
    sum_r = tl.zeros([BLOCK_M], tl.float32)
    sum_g = tl.zeros([BLOCK_M], tl.float32)
    sum_b = tl.zeros([BLOCK_M], tl.float32)
    sum_1 = tl.zeros([BLOCK_M], tl.float32)
    for block in tl.range(0, tl.cdiv(n_cells, BLOCK_N)):
        cell = block * BLOCK_N + tl.arange(0, BLOCK_N)
        there = cell < n_cells
        offs = image * n_cells + cell
        dz = tl.load(grad_ptr + offs, mask=there, other=0.0).to(tl.float32)
        if MINMAX:
            mask = tl.load(mask_ptr + offs, mask=there, other=0.0)
            dz = (dz - tl.where(mask == top, to_high, 0.0)) / den
        r = tl.load(winner_ptr + offs * 3, mask=there, other=0.0)
        g = tl.load(winner_ptr + offs * 3 + 1, mask=there, other=0.0)
        b = tl.load(winner_ptr + offs * 3 + 2, mask=there, other=0.0)
        dr, dg, db, d1 = _spread(r, g, b, dz, there, slope_r, slope_g, slope_b, shift, BLOCK_M)
        sum_r += dr
        sum_g += dg
        sum_b += db
        sum_1 += d1
    if MINMAX:
        # 4. And of the smallest pixel.
        # The smallest pixel is one more winner; with one range for the batch, the first program adds it.
        alone = tl.arange(0, 16)
        there = (alone == 0) & ((MINMAX == 1) | (image == 0))
        r = tl.load(lowest_ptr + group * 3 + alone * 0)
        g = tl.load(lowest_ptr + group * 3 + 1 + alone * 0)
        b = tl.load(lowest_ptr + group * 3 + 2 + alone * 0)
        dr, dg, db, d1 = _spread(r, g, b, to_low + r * 0.0, there, slope_r, slope_g, slope_b, shift, BLOCK_M)
        sum_r += dr
        sum_g += dg
        sum_b += db
        sum_1 += d1
    out = partial_ptr + image * 4 * n_proj + offs_m
    tl.store(out, sum_r, mask=mask_m)
    tl.store(out + n_proj, sum_g, mask=mask_m)
    tl.store(out + 2 * n_proj, sum_b, mask=mask_m)
    tl.store(out + 3 * n_proj, sum_1, mask=mask_m)


@triton.jit
def _grad_affine_kernel(
    partial_ptr,  # [B, 4, M]
    w_ptr,  # [M, 3]
    gamma_ptr, mean_ptr, var_ptr,  # [M]
    moments_ptr,  # [4, 3] float64
    dw_ptr,  # [M, 3]
    dgamma_ptr, dbeta_ptr,  # [M]
    n_images,
    n_proj,
    stride_wm, stride_wc,
    eps,
    TRAINING: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    offs = tl.arange(0, BLOCK_M)
    there = offs < n_proj
    # 1. s = sum dz x and d1 = sum dz over all winners, per projection.
    dr = tl.zeros([BLOCK_M], tl.float64)
    dg = tl.zeros([BLOCK_M], tl.float64)
    db = tl.zeros([BLOCK_M], tl.float64)
    d1 = tl.zeros([BLOCK_M], tl.float64)
    for block in tl.range(0, tl.cdiv(n_images, BLOCK_N)):
        image = block * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (image < n_images)[:, None] & there[None, :]
        rows = partial_ptr + image[:, None] * 4 * n_proj + offs[None, :]
        dr += tl.sum(tl.load(rows, mask=mask, other=0.0).to(tl.float64), 0)
        dg += tl.sum(tl.load(rows + n_proj, mask=mask, other=0.0).to(tl.float64), 0)
        db += tl.sum(tl.load(rows + 2 * n_proj, mask=mask, other=0.0).to(tl.float64), 0)
        d1 += tl.sum(tl.load(rows + 3 * n_proj, mask=mask, other=0.0).to(tl.float64), 0)
    wr = tl.load(w_ptr + offs * stride_wm, mask=there, other=0.0).to(tl.float64)
    wg = tl.load(w_ptr + offs * stride_wm + stride_wc, mask=there, other=0.0).to(tl.float64)
    wb = tl.load(w_ptr + offs * stride_wm + 2 * stride_wc, mask=there, other=0.0).to(tl.float64)
    rstd = 1.0 / tl.sqrt(tl.load(var_ptr + offs, mask=there, other=1.0).to(tl.float64) + eps)
    scale = tl.load(gamma_ptr + offs, mask=there, other=0.0).to(tl.float64) * rstd
    # 2. With G = s - d1 mu, through mean = w.mu and var = w^T S w:
    #    dw = gamma rstd [ G - rstd^2 (G.w) S w ],  dgamma = rstd G.w,  dbeta = d1.
    #    Out of training, with constant mean and var: dw = gamma rstd s,  dgamma = rstd (s.w - mean d1).
    if TRAINING:
        dr -= d1 * tl.load(moments_ptr)
        dg -= d1 * tl.load(moments_ptr + 1)
        db -= d1 * tl.load(moments_ptr + 2)
        along = dr * wr + dg * wg + db * wb
        dgamma = rstd * along
        pull = rstd * rstd * along
        rg = tl.load(moments_ptr + 4)
        rb = tl.load(moments_ptr + 5)
        gb = tl.load(moments_ptr + 8)
        dr -= pull * (tl.load(moments_ptr + 3) * wr + rg * wg + rb * wb)
        dg -= pull * (rg * wr + tl.load(moments_ptr + 7) * wg + gb * wb)
        db -= pull * (rb * wr + gb * wg + tl.load(moments_ptr + 11) * wb)
    else:
        mean = tl.load(mean_ptr + offs, mask=there, other=0.0).to(tl.float64)
        dgamma = rstd * (dr * wr + dg * wg + db * wb - mean * d1)
    dtype = dw_ptr.dtype.element_ty
    tl.store(dw_ptr + offs * 3, (scale * dr).to(dtype), mask=there)
    tl.store(dw_ptr + offs * 3 + 1, (scale * dg).to(dtype), mask=there)
    tl.store(dw_ptr + offs * 3 + 2, (scale * db).to(dtype), mask=there)
    tl.store(dgamma_ptr + offs, dgamma.to(dgamma_ptr.dtype.element_ty), mask=there)
    tl.store(dbeta_ptr + offs, d1.to(dbeta_ptr.dtype.element_ty), mask=there)


def _config(kernel: str, device: torch.device, cell: int) -> Config:
    config = INTERPRETED if interpreting() else lookup(architecture(device), f"maxout_image {kernel}", "any", 224, 0)
    return config._replace(rows=min(config.rows, cell))


def _block_m(n_proj: int) -> int:
    return max(16, triton.next_power_of_2(n_proj))


def forward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(mask [B, h, w], mean [M], var [M], winners [B h w, 3], lowest [groups, 3], den [groups], moments [4, 3])."""
    batch, _, height, width = image.shape
    bands, columns, n_proj = height // cell, width // cell, weight.shape[0]
    block_w = triton.next_power_of_2(columns) * cell

    def new(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=image.device)

    partial, moments = new(batch * bands, 9, dtype=torch.float64), new(4, 3, dtype=torch.float64)
    mean, var, slope = new(n_proj), new(n_proj), new(n_proj, 4)
    value, winners = new(batch, bands, columns), new(batch * bands * columns, 3)
    low, lowest = new(batch, bands), new(batch, bands, 3)
    groups = minmax_groups(minmax, batch)
    den, lowest_out = new(groups), new(groups, 3)
    mask = torch.empty_like(value) if minmax else value
    if not training:
        mean.copy_(running_mean)
        var.copy_(running_var)
    with torch.cuda.device_of(image):
        config = _config("moments", image.device, cell)
        _moments_kernel[(batch, bands)](
            image, partial, width, cell, *image.stride(),
            ROWS=config.rows, BLOCK_W=block_w, num_warps=config.warps,
        )  # fmt: skip
        partial = gather(partial, group)
        _affine_kernel[(1,)](
            partial, weight, gamma, beta, mean, var, moments, slope, partial.shape[0],
            batch * world_size(group) * height * width, n_proj, *weight.stride(), eps,
            TRAINING=training, BLOCK_P=16 * BLOCK, BLOCK_M=_block_m(n_proj), num_warps=4,
        )  # fmt: skip
        config = _config("search", image.device, cell)
        _search_kernel[(batch, bands)](
            image, slope, value, winners, low, lowest, width, columns, n_proj, *image.stride(),
            WITH_LOW=bool(minmax), CELL=cell, ROWS=config.rows, BLOCK_W=block_w, num_warps=config.warps,
        )  # fmt: skip
        if minmax:
            if minmax == "batch":  # every process scales all masks, which costs less than a second collective
                value, low, lowest = (gather(tensor, group) for tensor in (value, low, lowest))
                mask = torch.empty_like(value)
            _scale_kernel[(value.shape[0],)](
                value, low, lowest, mask, den, lowest_out, value.shape[0], bands * columns, bands,
                BATCH=minmax == "batch", BLOCK_N=4 * BLOCK, num_warps=4,
            )  # fmt: skip
    if minmax == "batch" and group:
        mask = local_shard(mask, group).clone()
    return mask, mean, var, winners, lowest_out, den, moments


def backward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """(dweight, dgamma, dbeta)."""
    batch, cells = mask.shape[0], mask[0].numel()
    n_proj = weight.shape[0]
    shared = group if minmax == "batch" else ""
    grad_mask, mask, winners = (gather(tensor, shared) for tensor in (grad_mask.contiguous(), mask, winners))
    batch *= world_size(shared)
    partial = torch.empty((batch, 4, n_proj), dtype=torch.float32, device=mask.device)
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    dgamma = torch.empty(gamma.shape, dtype=gamma.dtype, device=gamma.device)
    dbeta = torch.empty(beta.shape, dtype=beta.dtype, device=beta.device)
    with torch.cuda.device_of(mask):
        _grad_cells_kernel[(batch,)](
            grad_mask, mask, winners, lowest, den, weight, gamma, beta, mean, var, partial, batch, cells, n_proj,
            *weight.stride(), eps,
            MINMAX={"": 0, "image": 1, "batch": 2}[minmax], BLOCK_N=BLOCK, BLOCK_M=_block_m(n_proj), num_warps=4,
        )  # fmt: skip
        partial = local_shard(partial, shared)
        _grad_affine_kernel[(1,)](
            partial, weight, gamma, mean, var, moments, dweight, dgamma, dbeta, partial.shape[0], n_proj, *weight.stride(), eps,
            TRAINING=training, BLOCK_N=16, BLOCK_M=_block_m(n_proj), num_warps=4,
        )  # fmt: skip
    return dweight, dgamma, dbeta


EXCEPTIONS = {
    ("maxout_image moments bf16 nchw", "*", "loads"): "8 bytes per thread keep the nine float64 sums at 112 registers",
    ("maxout_image * nhwc", "*", "loads"): "three interleaved channels of 16 bits have no wide load",
}
"""See ``registry.exceptions``."""


def variants(arch: str) -> list[Variant]:
    """The two passes over images of 224 x 224 with cells of 32, NCHW and channels_last, and the small kernels."""
    f32, f64 = "*fp32", "*fp64"
    weights = dict(w_ptr=f32, gamma_ptr=f32, beta_ptr=f32, mean_ptr=f32, var_ptr=f32)
    scalars = dict(width="i32", cell="i32", n_cols="i32", n_proj="i32", n_programs="i32", n_pixels="i32",
                   n_images="i32", n_cells="i32", n_bands="i32", stride_b="i32", stride_c="i32", stride_h="i32",
                   stride_w="i32", stride_wm="i32", eps="fp32")  # fmt: skip
    found = []

    def add(name, kernel, types, constants, config, kind):
        types = types | scalars
        types = {arg: types[arg] for arg in kernel.arg_names if arg in types and arg not in constants}
        aligned = tuple(arg for arg in ("width", "cell", "stride_b", "stride_c", "stride_h", "n_proj") if arg in types)
        found.append(Variant(f"maxout_image {name}", kernel, types, constants, aligned, config.warps, 3, kind))

    configs = {name: Config(**table()[arch][f"maxout_image {name}"]["any"]["224"]["0"]) for name in KERNELS}
    for pixel, order in (("bf16", "nchw"), ("fp32", "nchw"), ("bf16", "nhwc")):
        unit = dict(stride_w=1) if order == "nchw" else dict(stride_c=1, stride_w=3)
        tile = unit | dict(BLOCK_W=256)
        add(f"moments {pixel} {order}", _moments_kernel, dict(x_ptr=f"*{pixel}", partial_ptr=f64),
            tile | dict(ROWS=configs["moments"].rows), configs["moments"], "stream")  # fmt: skip
        add(f"search {pixel} {order}", _search_kernel,
            dict(x_ptr=f"*{pixel}", slope_ptr=f32, value_ptr=f32, winner_ptr=f32, low_ptr=f32, lowest_ptr=f32),
            tile | dict(WITH_LOW=True, CELL=32, ROWS=configs["search"].rows), configs["search"], "stream")  # fmt: skip
    small = Config(0, 0, 4, 3)
    add("affine", _affine_kernel, weights | dict(partial_ptr=f64, moments_ptr=f64, slope_ptr=f32),
        dict(stride_wc=1, TRAINING=True, BLOCK_P=16 * BLOCK, BLOCK_M=32), small, "small")  # fmt: skip
    add("scale", _scale_kernel,
        dict(value_ptr=f32, low_ptr=f32, lowest_ptr=f32, mask_ptr=f32, den_ptr=f32, lowest_out_ptr=f32),
        dict(BATCH=True, BLOCK_N=4 * BLOCK), small, "small")  # fmt: skip
    add("grad_cells", _grad_cells_kernel,
        weights | dict(grad_ptr=f32, mask_ptr=f32, winner_ptr=f32, lowest_ptr=f32, den_ptr=f32, partial_ptr=f32),
        dict(stride_wc=1, MINMAX=2, BLOCK_N=BLOCK, BLOCK_M=32), small, "small")  # fmt: skip
    add("grad_affine", _grad_affine_kernel,
        weights | dict(partial_ptr=f32, moments_ptr=f64, dw_ptr=f32, dgamma_ptr=f32, dbeta_ptr=f32),
        dict(stride_wc=1, TRAINING=True, BLOCK_N=16, BLOCK_M=32), small, "small")  # fmt: skip
    return found


def candidates(key: str, committed: Config) -> Iterator[Config]:
    """The configurations that a sweep tries for the two passes over the image."""
    return map(Config._make, itertools.product((1, 2, 4, 8, 16), (committed.cols,), (2, 4, 8), (1,)))


def workload(key: str, operand: str, width: int, batch: int, device: str) -> Workload:
    """The mask of images [128, 3, 224, 224] on 7 x 7 cells, and the gradients of the parameters."""
    image = torch.randn(128, 3, 224, 224, device=device).bfloat16()
    leaves = dict(
        weight=torch.randn(32, 3, device=device), gamma=torch.ones(32, device=device), beta=torch.randn(32, device=device)
    )
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    return Workload("maxout_image", dict(image=image, minmax="batch") | leaves)
