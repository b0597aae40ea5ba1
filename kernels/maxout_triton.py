"""The max-out projection on CUDA: four launches forward, three launches and two sums backward, two reads of the feature in each.

A tile is BLOCK_S positions of one image. Forward: projections and the statistics of each tile (1), their merge by Chan's
rule (2), the mask before scaling and its range (3), scaling and pooling (4). Backward: the gradient to the mask (5), back
through min-max and maximum with the sums of batch-norm (6), then the gradients to feature and weight (7). Every reduction
over tiles goes through a buffer of partial results that is added up afterwards: no atomics, so that results are
bit-identical from run to run.

Projections and everything derived from them are float32. Products take operands in the dtype of the feature. A maximum
drops NaN, so the sum of a row of projections, times zero, is added to its maximum.

The statistics of a tile are its mean and its sum of squared deviations, which merge over tiles and over processes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.batch_statistics import merge_statistics, minmax_groups
from kernels.configs import Config, Variant, Workload, architecture, lookup, multiprocessors, operand_dtype, table
from kernels.group import gather, world_size
from kernels.selection import interpreting

MINMAX_EPS = tl.constexpr(1e-7)
ABSENT = tl.constexpr(-1e30)
"""Value of a projection beyond M: below every maximum, and the ReLU would zero it anyway."""
INTERPRETED = Config(rows=16, cols=32, warps=1, stages=1)
KERNELS = ("project", "pool", "grad_mask", "grad_feature")
MERGE_TILES = 64
"""How many tiles a merge adds up at a time."""


@triton.jit
def _dot(a, b, acc, UPCAST: tl.constexpr):
    """a @ b + acc in float32. UPCAST is for the interpreter, which multiplies the bit patterns of bfloat16 operands."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _affine(gamma_ptr, beta_ptr, mean_ptr, var_ptr, eps, n_proj, BLOCK_M: tl.constexpr):
    """(mean, rstd, scale, shift), [BLOCK_M] each, of ``v = u * scale + shift``; v is ABSENT beyond M."""
    offs = tl.arange(0, BLOCK_M)
    mask = offs < n_proj
    mean = tl.load(mean_ptr + offs, mask=mask, other=0.0)
    rstd = 1.0 / tl.sqrt(tl.load(var_ptr + offs, mask=mask, other=1.0) + eps)
    scale = tl.load(gamma_ptr + offs, mask=mask, other=0.0).to(tl.float32) * rstd
    shift = tl.load(beta_ptr + offs, mask=mask, other=ABSENT).to(tl.float32) - mean * scale
    return mean, rstd, scale, shift


@triton.jit
def _project_kernel(
    x_ptr,  # [B, C, S]
    w_ptr,  # [M, C]
    u_ptr,  # [B S, M]
    partial_ptr,  # [tiles, 2, M] mean and sum of squared deviations of the tile
    n_positions,
    n_channels,
    n_proj,
    tiles_per_image,
    stride_xb, stride_xc, stride_xs,
    stride_wm, stride_wc,
    EVEN_C: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    # 1. The positions of this tile, all of one image.
    tile = tl.program_id(0)
    image = tile // tiles_per_image
    offs_s = (tile % tiles_per_image) * BLOCK_S + tl.arange(0, BLOCK_S)
    offs_m = tl.arange(0, BLOCK_M)
    mask_s = offs_s < n_positions
    mask_m = offs_m < n_proj
    rows = x_ptr + image.to(tl.int64) * stride_xb + offs_s[:, None] * stride_xs
    # 2. u = x w^T: the 1 x 1 convolution, one block of channels at a time.
    u = tl.zeros([BLOCK_S, BLOCK_M], tl.float32)
    for block in tl.range(0, tl.cdiv(n_channels, BLOCK_C), num_stages=STAGES):
        offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
        mask_x = mask_s[:, None]
        mask_w = mask_m[None, :]
        if not EVEN_C:
            mask_x = mask_x & (offs_c < n_channels)[None, :]
            mask_w = mask_w & (offs_c < n_channels)[:, None]
        x = tl.load(rows + offs_c[None, :] * stride_xc, mask=mask_x, other=0.0)
        w = tl.load(w_ptr + offs_m[None, :] * stride_wm + offs_c[:, None] * stride_wc, mask=mask_w, other=0.0)
        u = _dot(x, w.to(x.dtype), u, UPCAST)
    out = (image.to(tl.int64) * n_positions + offs_s)[:, None] * n_proj + offs_m[None, :]
    mask = mask_s[:, None] & mask_m[None, :]
    tl.store(u_ptr + out, u, mask=mask)
    # 3. Of the tile, per projection: mean(u) and sum (u - mean)^2, which merge without cancellation (Chan et al. 1979).
    count = tl.minimum(n_positions - (tile % tiles_per_image) * BLOCK_S, BLOCK_S)
    mean = tl.sum(u, 0) / count  # rows beyond the image are zero
    deviation = tl.where(mask, u - mean[None, :], 0.0)
    tl.store(partial_ptr + (tile * 2) * n_proj + offs_m, mean, mask=mask_m)
    tl.store(partial_ptr + (tile * 2 + 1) * n_proj + offs_m, tl.sum(deviation * deviation, 0), mask=mask_m)


@triton.jit
def _statistics_kernel(
    partial_ptr,  # [tiles, 2, M]
    mean_ptr,  # [M]
    var_ptr,  # [M]
    n_tiles,
    n_positions,
    n_proj,
    tiles_per_image,
    TILE_ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    offs_m = tl.arange(0, BLOCK_M)
    mask_m = offs_m < n_proj
    # 1. mean = sum_t (n_t / n) mean_t over the tiles t of n_t rows.
    total = (n_tiles // tiles_per_image) * n_positions
    mean = tl.zeros([BLOCK_M], tl.float32)
    for block in tl.range(0, tl.cdiv(n_tiles, BLOCK_T)):
        tile = block * BLOCK_T + tl.arange(0, BLOCK_T)
        mask = (tile < n_tiles)[:, None] & mask_m[None, :]
        count = tl.minimum(n_positions - (tile % tiles_per_image) * TILE_ROWS, TILE_ROWS).to(tl.float32)
        means = tl.load(partial_ptr + (tile * 2)[:, None] * n_proj + offs_m[None, :], mask=mask, other=0.0)
        mean += tl.sum(means * (count / total)[:, None], 0)
    # 2. n var = sum_t [ sum_t (u - mean_t)^2 + n_t (mean_t - mean)^2 ].
    spread = tl.zeros([BLOCK_M], tl.float32)
    for block in tl.range(0, tl.cdiv(n_tiles, BLOCK_T)):
        tile = block * BLOCK_T + tl.arange(0, BLOCK_T)
        mask = (tile < n_tiles)[:, None] & mask_m[None, :]
        count = tl.minimum(n_positions - (tile % tiles_per_image) * TILE_ROWS, TILE_ROWS).to(tl.float32)
        means = tl.load(partial_ptr + (tile * 2)[:, None] * n_proj + offs_m[None, :], mask=mask, other=0.0)
        squares = tl.load(partial_ptr + (tile * 2 + 1)[:, None] * n_proj + offs_m[None, :], mask=mask, other=0.0)
        apart = means - mean[None, :]
        spread += tl.sum(tl.where(mask, squares + count[:, None] * apart * apart, 0.0), 0)
    tl.store(mean_ptr + offs_m, mean, mask=mask_m)
    tl.store(var_ptr + offs_m, spread / total, mask=mask_m)


@triton.jit
def _activate_kernel(
    u_ptr,  # [B S, M]
    gamma_ptr, beta_ptr, mean_ptr, var_ptr,  # [M]
    a_ptr,  # [B, S] max over M of relu(v)
    range_ptr,  # [2, B] smallest and largest a of the image
    n_images,
    n_positions,
    n_proj,
    eps,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    # 1. v = scale u + shift with scale = gamma / sqrt(var + eps), shift = beta - mean scale.
    image = tl.program_id(0)
    offs_m = tl.arange(0, BLOCK_M)
    _, _, scale, shift = _affine(gamma_ptr, beta_ptr, mean_ptr, var_ptr, eps, n_proj, BLOCK_M)
    # 2. a = max over projections of relu(v), and the smallest and largest a of the image.
    low = tl.full([BLOCK_S], float("inf"), tl.float32)
    high = tl.full([BLOCK_S], float("-inf"), tl.float32)
    first = image.to(tl.int64) * n_positions
    for block in tl.range(0, tl.cdiv(n_positions, BLOCK_S)):
        offs_s = block * BLOCK_S + tl.arange(0, BLOCK_S)
        mask_s = offs_s < n_positions
        mask = mask_s[:, None] & (offs_m < n_proj)[None, :]
        u = tl.load(u_ptr + (first + offs_s)[:, None] * n_proj + offs_m[None, :], mask=mask, other=0.0)
        v = u * scale[None, :] + shift[None, :]
        # A maximum drops a NaN; 0 * v keeps it.
        poison = tl.sum(v * 0.0, 1)
        a = tl.maximum(tl.max(v, 1), 0.0) + poison
        tl.store(a_ptr + first + offs_s, a, mask=mask_s)
        low = tl.minimum(low, tl.where(mask_s, a, float("inf")))
        high = tl.maximum(high, tl.where(mask_s, a, float("-inf")))
    tl.store(range_ptr + image, tl.min(low, 0))
    tl.store(range_ptr + n_images + image, tl.max(high, 0))


@triton.jit
def _extent(range_ptr, image, n_images, MINMAX: tl.constexpr, BLOCK_R: tl.constexpr):
    """(smallest value, denominator) of the range of ``image``: the image's with MINMAX 1, the batch's with 2."""
    if MINMAX == 1:
        low = tl.load(range_ptr + image)
        high = tl.load(range_ptr + n_images + image)
    else:
        lows = tl.full([BLOCK_R], float("inf"), tl.float32)
        highs = tl.full([BLOCK_R], float("-inf"), tl.float32)
        for block in tl.range(0, tl.cdiv(n_images, BLOCK_R)):
            offs = block * BLOCK_R + tl.arange(0, BLOCK_R)
            there = offs < n_images
            lows = tl.minimum(lows, tl.load(range_ptr + offs, mask=there, other=float("inf")))
            highs = tl.maximum(highs, tl.load(range_ptr + n_images + offs, mask=there, other=float("-inf")))
        low = tl.min(lows, 0)
        high = tl.max(highs, 0)
    return low, MINMAX_EPS + (high - low)


@triton.jit
def _pool_kernel(
    x_ptr,  # [B, C, S]
    a_ptr,  # [B, S]
    range_ptr,  # [2, B]
    mask_ptr,  # [B, S] a after the min-max
    den_ptr,  # [groups]
    pooled_ptr,  # [B, C]
    n_images,
    n_positions,
    n_channels,
    stride_xb, stride_xc, stride_xs,
    MINMAX: tl.constexpr,  # 0 none, 1 image, 2 batch
    EVEN_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0)
    part = tl.program_id(1)
    offs_c = part * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < n_channels
    # 1. den = 1e-7 + max a - min a over the image or the batch.
    if MINMAX:
        low, den = _extent(range_ptr, image, n_images, MINMAX, BLOCK_R)
        if part == 0:
            if MINMAX == 1:
                tl.store(den_ptr + image, den)
            elif image == 0:
                tl.store(den_ptr, den)
    # 2. A = (a - min a) / den, stored once;  pooled_c = (1 / S) sum_s A_s x_cs.
    pooled = tl.zeros([BLOCK_C], tl.float32)
    for block in tl.range(0, tl.cdiv(n_positions, BLOCK_S)):
        offs_s = block * BLOCK_S + tl.arange(0, BLOCK_S)
        mask_s = offs_s < n_positions
        a = tl.load(a_ptr + image * n_positions + offs_s, mask=mask_s, other=0.0)
        if MINMAX:
            a = tl.where(mask_s, (a - low) / den, 0.0)
            if part == 0:
                tl.store(mask_ptr + image * n_positions + offs_s, a, mask=mask_s)
        wanted = mask_s[:, None]
        if not EVEN_C:
            wanted = wanted & mask_c[None, :]
        pointers = x_ptr + image.to(tl.int64) * stride_xb + offs_s[:, None] * stride_xs + offs_c[None, :] * stride_xc
        x = tl.load(pointers, mask=wanted, other=0.0).to(tl.float32)
        pooled += tl.sum(x * a[:, None], 0)
    tl.store(pooled_ptr + image * n_channels + offs_c, pooled / n_positions, mask=mask_c)


@triton.jit
def _grad_mask_kernel(
    x_ptr,  # [B, C, S]
    grad_mask_ptr,  # [B, S]
    grad_pooled_ptr,  # [B, C]
    mask_ptr,  # [B, S]
    t_ptr,  # [B, S] total gradient to the mask
    partial_ptr,  # [tiles, 5] sum t (mask - 1), sum t mask, how many are 0, largest mask, how many equal it
    n_positions,
    n_channels,
    tiles_per_image,
    stride_xb, stride_xc, stride_xs,
    stride_gb, stride_gc,
    HAS_MASK: tl.constexpr,
    HAS_POOLED: tl.constexpr,
    MINMAX: tl.constexpr,
    EVEN_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    image = tile // tiles_per_image
    offs_s = (tile % tiles_per_image) * BLOCK_S + tl.arange(0, BLOCK_S)
    mask_s = offs_s < n_positions
    row = image * n_positions + offs_s
    # 1. t_s = dL/dA_s = (1 / S) sum_c dL/dpooled_c x_cs + dL/dmask_s.
    t = tl.zeros([BLOCK_S], tl.float32)
    if HAS_POOLED:
        rows = x_ptr + image.to(tl.int64) * stride_xb + offs_s[:, None] * stride_xs
        for block in tl.range(0, tl.cdiv(n_channels, BLOCK_C), num_stages=STAGES):
            offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
            wanted = mask_s[:, None]
            if not EVEN_C:
                wanted = wanted & (offs_c < n_channels)[None, :]
            x = tl.load(rows + offs_c[None, :] * stride_xc, mask=wanted, other=0.0).to(tl.float32)
            grad = tl.load(grad_pooled_ptr + image * stride_gb + offs_c * stride_gc, mask=offs_c < n_channels, other=0.0).to(
                tl.float32
            )
            t += tl.sum(x * grad[None, :], 1)
        t = t / n_positions
    if HAS_MASK:
        t += tl.load(grad_mask_ptr + row, mask=mask_s, other=0.0).to(tl.float32)
    tl.store(t_ptr + row, t, mask=mask_s)
    # 2. What the min-max needs of this tile: sum t (A - 1), sum t A, #(A = 0), max A, #(A = max A).
    if MINMAX:
        mask = tl.load(mask_ptr + row, mask=mask_s, other=0.0)
        largest = tl.max(tl.where(mask_s, mask, float("-inf")), 0)
        tl.store(partial_ptr + tile * 5, tl.sum(tl.where(mask_s, t * (mask - 1.0), 0.0), 0))
        tl.store(partial_ptr + tile * 5 + 1, tl.sum(tl.where(mask_s, t * mask, 0.0), 0))
        tl.store(partial_ptr + tile * 5 + 2, tl.sum((mask_s & (mask == 0.0)).to(tl.float32), 0))
        tl.store(partial_ptr + tile * 5 + 3, largest)
        tl.store(partial_ptr + tile * 5 + 4, tl.sum((mask_s & (mask == largest)).to(tl.float32), 0))


@triton.jit
def _grad_projection_kernel(
    u_ptr,  # [B S, M]
    gamma_ptr, beta_ptr, mean_ptr, var_ptr,  # [M]
    mask_ptr,  # [B, S]
    den_ptr,  # [groups]
    t_ptr,  # [B, S]
    tiles_ptr,  # [tiles, 5], see _grad_mask_kernel
    dv_ptr,  # [B S] gradient to the largest v, 0 where the ReLU zeroed it
    partial_ptr,  # [tiles, 2, M] sum dv, sum dv xhat
    n_tiles,
    n_positions,
    n_proj,
    tiles_per_image,
    eps,
    MINMAX: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    image = tile // tiles_per_image
    offs_s = (tile % tiles_per_image) * BLOCK_S + tl.arange(0, BLOCK_S)
    offs_m = tl.arange(0, BLOCK_M)
    mask_s = offs_s < n_positions
    mask_m = offs_m < n_proj
    row = image.to(tl.int64) * n_positions + offs_s
    # 1. dL/da = [ t + [A = 0] sum t (A - 1) / #(A = 0) - [A = max A] sum t A / #(A = max A) ] / den, ties shared.
    da = tl.load(t_ptr + row, mask=mask_s, other=0.0)
    if MINMAX:
        if MINMAX == 1:
            first = image * tiles_per_image
            last = first + tiles_per_image
            den = tl.load(den_ptr + image)
        else:
            first = image * 0
            last = first + n_tiles
            den = tl.load(den_ptr)
        largest = tl.full([BLOCK_T], float("-inf"), tl.float32)
        for block in tl.range(0, tl.cdiv(last - first, BLOCK_T)):
            offs = first + block * BLOCK_T + tl.arange(0, BLOCK_T)
            tops = tl.load(tiles_ptr + offs * 5 + 3, mask=offs < last, other=float("-inf"))
            largest = tl.maximum(largest, tops)
        top = tl.max(largest, 0)
        to_low = 0.0
        to_high = 0.0
        n_low = 0.0
        n_high = 0.0
        for block in tl.range(0, tl.cdiv(last - first, BLOCK_T)):
            offs = first + block * BLOCK_T + tl.arange(0, BLOCK_T)
            there = offs < last
            to_low += tl.sum(tl.load(tiles_ptr + offs * 5, mask=there, other=0.0), 0)
            to_high += tl.sum(tl.load(tiles_ptr + offs * 5 + 1, mask=there, other=0.0), 0)
            n_low += tl.sum(tl.load(tiles_ptr + offs * 5 + 2, mask=there, other=0.0), 0)
            tops = tl.load(tiles_ptr + offs * 5 + 3, mask=there, other=float("-inf"))
            counts = tl.load(tiles_ptr + offs * 5 + 4, mask=there, other=0.0)
            n_high += tl.sum(tl.where(tops == top, counts, 0.0), 0)
        mask = tl.load(mask_ptr + row, mask=mask_s, other=0.0)
        da += tl.where(mask == 0.0, to_low / n_low, 0.0) - tl.where(mask == top, to_high / n_high, 0.0)
        da = da / den
    # 2. It goes to the largest projection, unless the ReLU zeroed that: dv = [v_max > 0] dL/da.
    mean, rstd, scale, shift = _affine(gamma_ptr, beta_ptr, mean_ptr, var_ptr, eps, n_proj, BLOCK_M)
    u = tl.load(u_ptr + row[:, None] * n_proj + offs_m[None, :], mask=mask_s[:, None] & mask_m[None, :], other=0.0)
    v = u * scale[None, :] + shift[None, :]
    top_v, winner = tl.max(v, 1, return_indices=True)
    dv = tl.where(mask_s & (top_v > 0.0), da, 0.0)
    tl.store(dv_ptr + row, dv, mask=mask_s)
    # 3. Of the tile, per projection: sum dv (= dbeta) and sum dv xhat (= dgamma), xhat = (u - mean) rstd.
    spread = tl.where(offs_m[None, :] == winner[:, None], dv[:, None], 0.0)
    xhat = (u - mean[None, :]) * rstd[None, :]
    tl.store(partial_ptr + (tile * 2) * n_proj + offs_m, tl.sum(spread, 0), mask=mask_m)
    tl.store(partial_ptr + (tile * 2 + 1) * n_proj + offs_m, tl.sum(spread * xhat, 0), mask=mask_m)


@triton.jit
def _grad_feature_kernel(
    x_ptr,  # [B, C, S]
    w_ptr,  # [M, C]
    u_ptr,  # [B S, M]
    gamma_ptr, beta_ptr, mean_ptr, var_ptr,  # [M]
    mask_ptr,  # [B, S]
    dv_ptr,  # [B S]
    sums_ptr,  # [2, M] sum dv, sum dv xhat over the batch
    grad_pooled_ptr,  # [B, C]
    dx_ptr,  # like x
    partial_ptr,  # [splits, M, C] gradient to the weight
    n_tiles,
    tiles_per_program,
    n_positions,
    n_channels,
    n_proj,
    tiles_per_image,
    stride_xb, stride_xc, stride_xs,
    stride_wm, stride_wc,
    stride_gb, stride_gc,
    stride_db, stride_dc, stride_ds,
    eps,
    TRAINING: tl.constexpr,
    HAS_POOLED: tl.constexpr,
    WITH_DX: tl.constexpr,
    EVEN_C: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    split = tl.program_id(1)
    offs_c = part * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_m = tl.arange(0, BLOCK_M)
    mask_c = offs_c < n_channels
    mask_m = offs_m < n_proj
    mean, rstd, scale, shift = _affine(gamma_ptr, beta_ptr, mean_ptr, var_ptr, eps, n_proj, BLOCK_M)
    # 1. The means over the batch of dv and dv xhat that batch-norm's backward subtracts.
    n_rows = (n_tiles // tiles_per_image) * n_positions
    if TRAINING:
        mean_dv = tl.load(sums_ptr + offs_m, mask=mask_m, other=0.0) / n_rows
        mean_dv_xhat = tl.load(sums_ptr + n_proj + offs_m, mask=mask_m, other=0.0) / n_rows
    w = tl.load(
        w_ptr + offs_m[:, None] * stride_wm + offs_c[None, :] * stride_wc,
        mask=mask_m[:, None] & mask_c[None, :],
        other=0.0,
    ).to(x_ptr.dtype.element_ty)  # [BLOCK_M, BLOCK_C]
    dw = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    first = split * tiles_per_program
    last = tl.minimum(first + tiles_per_program, n_tiles)
    for step in tl.range(0, last - first):
        tile = first + step
        image = tile // tiles_per_image
        offs_s = (tile % tiles_per_image) * BLOCK_S + tl.arange(0, BLOCK_S)
        mask_s = offs_s < n_positions
        row = image.to(tl.int64) * n_positions + offs_s
        mask_u = mask_s[:, None] & mask_m[None, :]
        # 2. du = gamma rstd [ dv - mean(dv) - xhat mean(dv xhat) ]; without the means in eval mode.
        u = tl.load(u_ptr + row[:, None] * n_proj + offs_m[None, :], mask=mask_u, other=0.0)
        winner = tl.argmax(u * scale[None, :] + shift[None, :], 1)
        dv = tl.load(dv_ptr + row, mask=mask_s, other=0.0)
        du = tl.where(offs_m[None, :] == winner[:, None], dv[:, None], 0.0)
        if TRAINING:
            du = du - mean_dv[None, :] - (u - mean[None, :]) * (rstd * mean_dv_xhat)[None, :]
        du = tl.where(mask_u, du * scale[None, :], 0.0)
        wanted = mask_s[:, None]
        if not EVEN_C:
            wanted = wanted & mask_c[None, :]
        offsets = offs_s[:, None] * stride_xs + offs_c[None, :] * stride_xc
        x = tl.load(x_ptr + image.to(tl.int64) * stride_xb + offsets, mask=wanted, other=0.0)
        # 3. dw += du^T x.
        low = du.to(x.dtype)
        dw = _dot(tl.trans(low), x, dw, UPCAST)
        # 4. dx = du w + (A / S) dL/dpooled.
        if WITH_DX:
            dx = _dot(low, w, tl.zeros([BLOCK_S, BLOCK_C], tl.float32), UPCAST)
            if HAS_POOLED:
                mask = tl.load(mask_ptr + row, mask=mask_s, other=0.0)
                grad = tl.load(grad_pooled_ptr + image * stride_gb + offs_c * stride_gc, mask=mask_c, other=0.0)
                dx += (mask / n_positions)[:, None] * grad.to(tl.float32)[None, :]
            offsets = offs_s[:, None] * stride_ds + offs_c[None, :] * stride_dc
            out = dx_ptr + image.to(tl.int64) * stride_db + offsets
            tl.store(out, dx.to(dx_ptr.dtype.element_ty), mask=wanted)
    out = partial_ptr + (split * n_proj + offs_m)[:, None].to(tl.int64) * n_channels + offs_c[None, :]
    tl.store(out, dw, mask=mask_m[:, None] & mask_c[None, :])


def _configs(device: torch.device, dtype: torch.dtype, channels: int) -> dict[str, Config]:
    """The configuration of each kernel; all four have the same number of rows per tile."""
    if interpreting():
        return dict.fromkeys(KERNELS, INTERPRETED)
    arch = architecture(device)
    operand = "ieee" if dtype == torch.float32 else str(dtype).removeprefix("torch.")
    return {name: lookup(arch, f"maxout {name}", operand, channels, 0) for name in KERNELS}


def forward(
    feature: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
    minmax: str,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(mask [B, H, W], pooled [B, C], mean [M], var [M], u [B S, M], den [groups])."""
    batch, channels, height, width = feature.shape
    n_proj, positions = weight.shape[0], height * width
    x = feature.flatten(2)  # a view of NCHW and channels_last; other memory orders (a crop, a transpose) are copied
    configs = _configs(feature.device, feature.dtype, channels)
    rows = configs["project"].rows
    tiles_per_image = triton.cdiv(positions, rows)
    tiles = batch * tiles_per_image
    block_m = max(16, triton.next_power_of_2(n_proj))

    def new(*shape):
        return torch.empty(shape, dtype=torch.float32, device=feature.device)

    u, partial, mean, var = new(batch * positions, n_proj), new(tiles, 2, n_proj), new(n_proj), new(n_proj)
    a, extent, pooled = new(batch, positions), new(2, batch), new(batch, channels)
    mask = new(batch, positions) if minmax else a
    den = new(minmax_groups(minmax, batch))
    with torch.cuda.device_of(feature):
        config = configs["project"]
        _project_kernel[(tiles,)](
            x, weight, u, partial, positions, channels, n_proj, tiles_per_image, *x.stride(), *weight.stride(),
            EVEN_C=channels % config.cols == 0, UPCAST=interpreting(), BLOCK_S=rows, BLOCK_M=block_m, BLOCK_C=config.cols,
            STAGES=config.stages, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        if training:
            _statistics_kernel[(1,)](
                partial, mean, var, tiles, positions, n_proj, tiles_per_image,
                TILE_ROWS=rows, BLOCK_T=MERGE_TILES, BLOCK_M=block_m, num_warps=4,
            )  # fmt: skip
            mean, var = merge_statistics(mean, var, group)
        else:
            mean.copy_(running_mean)
            var.copy_(running_var)
        _activate_kernel[(batch,)](
            u, gamma, beta, mean, var, a, extent, batch, positions, n_proj, eps,
            BLOCK_S=rows, BLOCK_M=block_m, num_warps=4,
        )  # fmt: skip
        images = batch
        if minmax == "batch" and group:
            extent = gather(extent.T, group).T.contiguous()  # [2, images of all processes]
            images = extent.shape[1]
        config = configs["pool"]
        _pool_kernel[(batch, triton.cdiv(channels, config.cols))](
            x, a, extent, mask, den, pooled, images, positions, channels, *x.stride(),
            MINMAX={"": 0, "image": 1, "batch": 2}[minmax], EVEN_C=channels % config.cols == 0, BLOCK_S=rows,
            BLOCK_C=config.cols, BLOCK_R=MERGE_TILES, num_warps=config.warps,
        )  # fmt: skip
    return mask.view(batch, height, width), pooled, mean, var, u, den


def backward(
    grad_mask: Tensor | None,
    grad_pooled: Tensor | None,
    feature: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mask: Tensor,
    mean: Tensor,
    var: Tensor,
    u: Tensor,
    den: Tensor,
    training: bool,
    eps: float,
    minmax: str,
    need_feature: bool,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dfeature or [0], dweight, dgamma, dbeta)."""
    batch, channels, height, width = feature.shape
    n_proj, positions = weight.shape[0], height * width
    x = feature.flatten(2)
    grad_feature = torch.empty_like(feature) if need_feature else feature.new_empty(0)
    dx = grad_feature.flatten(2) if need_feature else x
    configs = _configs(feature.device, feature.dtype, channels)
    rows = configs["project"].rows
    tiles_per_image = triton.cdiv(positions, rows)
    tiles = batch * tiles_per_image
    block_m = max(16, triton.next_power_of_2(n_proj))
    minmax_code = {"": 0, "image": 1, "batch": 2}[minmax]
    if grad_mask is not None:
        grad_mask = grad_mask.contiguous()
    pooled = grad_pooled if grad_pooled is not None else mean.view(1, -1)

    def new(*shape):
        return torch.empty(shape, dtype=torch.float32, device=feature.device)

    t, dv = new(batch, positions), new(batch * positions)
    tile_sums, partial = new(tiles, 5), new(tiles, 2, n_proj)
    with torch.cuda.device_of(feature):
        config = configs["grad_mask"]
        _grad_mask_kernel[(tiles,)](
            x, t if grad_mask is None else grad_mask, pooled, mask, t, tile_sums, positions, channels, tiles_per_image,
            *x.stride(), *pooled.stride(),
            HAS_MASK=grad_mask is not None, HAS_POOLED=grad_pooled is not None, MINMAX=minmax_code,
            EVEN_C=channels % config.cols == 0, BLOCK_S=rows, BLOCK_C=config.cols, STAGES=config.stages, num_warps=config.warps,
            num_stages=config.stages,
        )  # fmt: skip
        if minmax == "batch":
            tile_sums = gather(tile_sums, group)
        _grad_projection_kernel[(tiles,)](
            u, gamma, beta, mean, var, mask, den, t, tile_sums, dv, partial, tile_sums.shape[0], positions, n_proj,
            tiles_per_image, eps,
            MINMAX=minmax_code, BLOCK_S=rows, BLOCK_M=block_m, BLOCK_T=MERGE_TILES, num_warps=4,
        )  # fmt: skip
        sums = partial.sum(0)  # [2, M]
        shared = gather(sums[None], group).sum(0) / world_size(group)  # the kernel divides by this process's rows
        config = configs["grad_feature"]
        parts = triton.cdiv(channels, config.cols)
        programs = 2 if interpreting() else multiprocessors(feature.device)
        per_program = triton.cdiv(tiles, max(1, min(tiles, programs // parts)))
        splits = triton.cdiv(tiles, per_program)
        weight_parts = new(splits, n_proj, channels)
        _grad_feature_kernel[(parts, splits)](
            x, weight, u, gamma, beta, mean, var, mask, dv, shared, pooled, dx, weight_parts, tiles, per_program, positions,
            channels, n_proj, tiles_per_image, *x.stride(), *weight.stride(), *pooled.stride(), *dx.stride(), eps,
            TRAINING=training, HAS_POOLED=grad_pooled is not None, WITH_DX=need_feature, EVEN_C=channels % config.cols == 0,
            UPCAST=interpreting(), BLOCK_S=rows, BLOCK_M=block_m, BLOCK_C=config.cols, num_warps=config.warps,
            num_stages=config.stages,
        )  # fmt: skip
    dweight = weight_parts.sum(0)
    if need_feature and dx.data_ptr() != grad_feature.data_ptr():
        grad_feature.copy_(dx.view_as(feature))
    dgamma, dbeta = sums[1].to(gamma.dtype, copy=True), sums[0].to(beta.dtype, copy=True)
    return grad_feature, dweight.to(weight.dtype), dgamma, dbeta


def variants(arch: str) -> list[Variant]:
    """Every configuration in the table for channels_last features of 7 x 7, and the small kernels."""
    short = {"bfloat16": "bf16", "float16": "fp16", "ieee": "fp32"}
    fp32 = "*fp32"
    norm = dict(gamma_ptr=fp32, beta_ptr=fp32, mean_ptr=fp32, var_ptr=fp32)
    found = []

    def add(name, kernel, types, constants, config, kind, strides=()):
        sizes = dict(n_images="i32", n_positions="i32", n_channels="i32", n_proj="i32", n_tiles="i32",
                     tiles_per_image="i32", tiles_per_program="i32", eps="fp32")  # fmt: skip
        types = types | sizes | dict.fromkeys(strides, "i32")
        types = {arg: types[arg] for arg in kernel.arg_names if arg in types and arg not in constants}
        aligned = ("n_channels", "n_proj", *strides)
        found.append(Variant(name, kernel, types, constants, aligned, config.warps, config.stages, kind))

    rows = {}
    for operand, widths in table()[arch]["maxout project"].items():
        if operand == "float16" and all(
            table()[arch][f"maxout {name}"]["float16"] == table()[arch][f"maxout {name}"]["bfloat16"] for name in KERNELS
        ):
            continue  # otherwise the same code as for bfloat16
        x = f"*{short[operand]}"
        for width, by_batch in widths.items():
            config = Config(**next(iter(by_batch.values())))
            rows[operand] = config.rows
            shared = dict(BLOCK_S=config.rows, BLOCK_M=32)
            suffix = f"{operand} C{width}"
            add(f"maxout project {suffix}", _project_kernel,
                dict(x_ptr=x, w_ptr=fp32, u_ptr=fp32, partial_ptr=fp32),
                shared | dict(stride_xc=1, stride_wc=1, EVEN_C=True, UPCAST=False, BLOCK_C=config.cols,
                              STAGES=config.stages),
                config, "ieee" if operand == "ieee" else "dot",
                ("stride_xb", "stride_xs", "stride_wm"))  # fmt: skip
            config = lookup(arch, "maxout pool", operand, int(width), 0)
            add(f"maxout pool {suffix}", _pool_kernel,
                dict(x_ptr=x, a_ptr=fp32, range_ptr=fp32, mask_ptr=fp32, den_ptr=fp32, pooled_ptr=fp32),
                dict(stride_xc=1, MINMAX=2, EVEN_C=True, BLOCK_S=rows[operand], BLOCK_C=config.cols,
                     BLOCK_R=MERGE_TILES),
                config, "stream", ("stride_xb", "stride_xs"))  # fmt: skip
            config = lookup(arch, "maxout grad_mask", operand, int(width), 0)
            # what a gradient reaches: mask and pooled feature, the mask alone, or the pooled feature alone
            uses = {"": (True, True)} | ({" mask": (True, False), " pooled": (False, True)} if operand == "bfloat16" else {})
            for use, (of_mask, of_pooled) in uses.items():
                add(f"maxout grad_mask {suffix}{use}", _grad_mask_kernel,
                    dict(x_ptr=x, grad_mask_ptr=fp32, grad_pooled_ptr=fp32, mask_ptr=fp32, t_ptr=fp32, partial_ptr=fp32),
                    dict(stride_xc=1, stride_gc=1, HAS_MASK=of_mask, HAS_POOLED=of_pooled, MINMAX=2, EVEN_C=True,
                         BLOCK_S=rows[operand], BLOCK_C=config.cols, STAGES=config.stages),
                    config, "stream" if of_pooled else "small", ("stride_xb", "stride_xs", "stride_gb"))  # fmt: skip
            config = lookup(arch, "maxout grad_feature", operand, int(width), 0)
            for use in [use for use in uses if use != " pooled"]:
                add(f"maxout grad_feature {suffix}{use}", _grad_feature_kernel,
                    dict(x_ptr=x, w_ptr=fp32, u_ptr=fp32, mask_ptr=fp32, dv_ptr=fp32, sums_ptr=fp32, grad_pooled_ptr=fp32,
                         dx_ptr=x, partial_ptr=fp32) | norm,
                    shared | dict(stride_xc=1, stride_wc=1, stride_gc=1, stride_dc=1, TRAINING=True, HAS_POOLED=not use,
                                  WITH_DX=True, EVEN_C=True, UPCAST=False, BLOCK_C=config.cols),
                    config, "ieee" if operand == "ieee" else "dot",
                    ("stride_xb", "stride_xs", "stride_wm", "stride_gb", "stride_db", "stride_ds"))  # fmt: skip
    small = Config(rows["bfloat16"], 0, 4, 3)
    add("maxout statistics", _statistics_kernel, dict(partial_ptr=fp32, mean_ptr=fp32, var_ptr=fp32),
        dict(TILE_ROWS=small.rows, BLOCK_T=MERGE_TILES, BLOCK_M=32), small, "small")  # fmt: skip
    add("maxout activate", _activate_kernel, norm | dict(u_ptr=fp32, a_ptr=fp32, range_ptr=fp32),
        dict(BLOCK_S=small.rows, BLOCK_M=32), small, "small")  # fmt: skip
    add("maxout grad_projection", _grad_projection_kernel,
        norm | dict(u_ptr=fp32, mask_ptr=fp32, den_ptr=fp32, t_ptr=fp32, tiles_ptr=fp32, dv_ptr=fp32, partial_ptr=fp32),
        dict(MINMAX=2, BLOCK_S=small.rows, BLOCK_M=32, BLOCK_T=MERGE_TILES), small, "small")  # fmt: skip
    return found


def candidates(key: str, committed: Config) -> Iterator[Config]:
    """The configurations that a sweep tries; all four kernels share the rows of a tile, so these stay."""
    return map(Config._make, itertools.product((committed.rows,), (64, 128, 256, 512), (4, 8), (1, 2, 3)))


def workload(key: str, operand: str, width: int, batch: int, device: str) -> Workload:
    """Mask, pooled feature and all gradients of a channels_last feature [128, width, 7, 7]."""
    feature = torch.relu(torch.randn(128, width, 7, 7, device=device))
    feature = feature.to(operand_dtype(operand)).to(memory_format=torch.channels_last)
    weight = torch.randn(32, width, device=device) * width**-0.5
    gamma, beta = torch.ones(32, device=device), torch.randn(32, device=device)
    leaves = dict(feature=feature, weight=weight, gamma=gamma, beta=beta)
    return Workload("maxout", {name: leaf.requires_grad_() for name, leaf in leaves.items()} | dict(minmax="batch"))
