"""Batch-norm on CUDA in two launches forward and two backward: partial sums of tiles, then a pass that merges them and streams.

The rows of a group are its positions in channels_last order, each C values long. A program is a block of channels and a run of
``run`` rows, the same in all four kernels. Forward: mean and sum of squared deviations of each run, by Welford's update (1); the
second kernel merges those of all runs by Chan's rule in its prologue and writes y, the statistics and, with a residual and a ReLU,
one bit for each element (2). Backward: the two sums of each run (3); the second kernel adds them up and writes the gradients (4).
The merge reads a few KiB out of the L2 cache; it saves a launch and a small kernel that leaves the device idle. There are no
atomics, so results are bit-identical from run to run. Everything between loads and stores is float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.batch_statistics import MASK_BITS, new_bits
from kernels.configs import Config, Variant, Workload, architecture, lookup, multiprocessors, table
from kernels.selection import interpreting

BITS = tl.constexpr(MASK_BITS)
INTERPRETED = Config(rows=64, cols=32, warps=1, stages=1)
KERNELS = ("statistics", "apply", "grad_sums", "grad_apply")
WARPS_PER_SM = 16
"""Warps of all programs on a multiprocessor: few, because each program of the second pass reads the sums of all runs."""
MERGE_RUNS = 64
"""How many runs a merge adds up at a time."""


@triton.jit
def _run(n_rows, n_channels, run, BLOCK_C: tl.constexpr):
    """(first and last row of this program in its group, offset of the group's first row, its channels)."""
    first = tl.program_id(1) * run
    last = tl.minimum(first + run, n_rows)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    return first, last, tl.program_id(2).to(tl.int64) * n_rows, offs_c


@triton.jit
def _tile(first, block, last, start, offs_c, n_channels, EVEN_C: tl.constexpr, BLOCK_R: tl.constexpr):
    """Of the ``block``-th tile of a run: (rows in the whole batch, which are inside the run, which elements are), the first two
    [BLOCK_R, 1]."""
    row = (first + block * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    inside = row < last
    mask = inside
    if not EVEN_C:
        mask = inside & (offs_c < n_channels)[None, :]
    return start + row, inside, mask


@triton.jit
def _bytes(row, inside, n_bytes, BLOCK_C: tl.constexpr):
    """(places, mask) of the bytes that hold the bits of a tile."""
    offs_b = tl.program_id(0) * (BLOCK_C // BITS) + tl.arange(0, BLOCK_C // BITS)
    return row * n_bytes + offs_b[None, :], inside & (offs_b < n_bytes)[None, :]


@triton.jit
def _normalize(x, mean, scale, beta):
    """gamma (x - mean) rstd + beta, in the backward pass exactly as in the forward pass."""
    return (x - mean[None, :]) * scale[None, :] + beta[None, :]


@triton.jit
def _bn_statistics_kernel(
    x_ptr,  # [G, R, C]
    partial_ptr,  # [G, runs, 2, C] mean and sum of squared deviations
    n_rows,
    n_channels,
    run,
    EVEN_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    # 1. The rows of this run and its channels.
    first, last, start, offs_c = _run(n_rows, n_channels, run, BLOCK_C)
    mean = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for block in tl.range(0, tl.cdiv(last - first, BLOCK_R), num_stages=STAGES):
        row, inside, mask = _tile(first, block, last, start, offs_c, n_channels, EVEN_C, BLOCK_R)
        x = tl.load(x_ptr + row * n_channels + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
        # 2. Of each position of the tile, after i values: d = x - mean, mean += d / i, M += d^2 (1 - 1 / i).
        step = 1.0 / (block + 1)
        d = tl.where(mask, x - mean, 0.0)
        mean += d * step
        squares += d * d * (1.0 - step)
    # 3. Over the positions: mean = sum(n_r mean_r) / n, M = sum(M_r + n_r (mean_r - mean)^2).
    rows = last - first
    count = ((rows - tl.arange(0, BLOCK_R) + BLOCK_R - 1) // BLOCK_R).to(tl.float32)[:, None]
    total = tl.sum(count * mean, 0) / rows
    d = mean - total[None, :]
    squares = tl.sum(squares + count * d * d, 0)
    out = partial_ptr + ((tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * 2) * n_channels + offs_c
    tl.store(out, total, mask=offs_c < n_channels)
    tl.store(out + n_channels, squares, mask=offs_c < n_channels)


@triton.jit
def _merge_statistics(partial_ptr, group, n_rows, n_channels, run, offs_c, BLOCK_C: tl.constexpr, MERGE: tl.constexpr):
    """(mean, biased variance) of a group, [BLOCK_C] each: Chan's rule for all runs at once, with the means taken relative to the
    first run's, so that nothing cancels."""
    runs = tl.num_programs(1)
    mask_c = offs_c < n_channels
    partial = partial_ptr + group * runs * 2 * n_channels + offs_c
    origin = tl.load(partial, mask=mask_c, other=0.0)
    means = tl.zeros([MERGE, BLOCK_C], tl.float32)
    squares = tl.zeros([MERGE, BLOCK_C], tl.float32)
    for block in tl.range(0, tl.cdiv(runs, MERGE)):
        r = block * MERGE + tl.arange(0, MERGE)
        mask = (r < runs)[:, None] & mask_c[None, :]
        count = tl.minimum(n_rows - r * run, run).to(tl.float32)[:, None]
        pointers = partial[None, :] + (2 * r * n_channels)[:, None]
        d = tl.where(mask, tl.load(pointers, mask=mask, other=0.0) - origin[None, :], 0.0)
        means += count * d
        squares += tl.load(pointers + n_channels, mask=mask, other=0.0) + count * d * d
    mean = tl.sum(means, 0) / n_rows
    return origin + mean, tl.maximum(tl.sum(squares, 0) / n_rows - mean * mean, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _move(running_ptr, moved_ptr, batch, momentum, offs_c, mask_c):
    """moved = running + momentum (batch - running), [BLOCK_C]."""
    running = tl.load(running_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    tl.store(moved_ptr + offs_c, (running + momentum * (batch - running)).to(moved_ptr.dtype.element_ty), mask=mask_c)


@triton.jit
def _bn_apply_kernel(
    x_ptr,  # [G, R, C]
    residual_ptr,  # like x
    gamma_ptr,  # [C]
    beta_ptr,  # [C]
    partial_ptr,  # [G, runs, 2, C]
    y_ptr,  # like x
    bits_ptr,  # [G, R, ceil(C / 8)] uint8
    mean_ptr,  # [G, C]
    var_ptr,  # [G, C]
    running_mean_ptr,  # [C]
    running_var_ptr,  # [C]
    moved_mean_ptr,  # [C]
    moved_var_ptr,  # [C]
    n_rows,
    n_channels,
    n_bytes,
    run,
    eps,
    momentum,
    RUNNING: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    EVEN_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MERGE: tl.constexpr,
    STAGES: tl.constexpr,
):
    first, last, start, offs_c = _run(n_rows, n_channels, run, BLOCK_C)
    mask_c = offs_c < n_channels
    # 1. The running statistics, by one program for each block of channels: r + momentum (s - r), s the mean over the groups of the
    #    mean, and of the variance n / (n - 1). First, while no register holds anything else.
    if RUNNING and tl.program_id(1) + tl.program_id(2) == 0:
        of_mean = tl.zeros([BLOCK_C], tl.float32)
        of_var = tl.zeros([BLOCK_C], tl.float32)
        for group in tl.range(0, tl.num_programs(2)):
            m, v = _merge_statistics(partial_ptr, group, n_rows, n_channels, run, offs_c, BLOCK_C, MERGE)
            of_mean += m
            of_var += v
        share = 1.0 / tl.num_programs(2)
        unbiased = share * n_rows / tl.maximum(n_rows - 1, 1)
        _move(running_mean_ptr, moved_mean_ptr, of_mean * share, momentum, offs_c, mask_c)
        _move(running_var_ptr, moved_var_ptr, of_var * unbiased, momentum, offs_c, mask_c)
    # 2. The statistics of the group, written down by its first program.
    mean, var = _merge_statistics(partial_ptr, tl.program_id(2), n_rows, n_channels, run, offs_c, BLOCK_C, MERGE)
    if tl.program_id(1) == 0:
        tl.store(mean_ptr + tl.program_id(2) * n_channels + offs_c, mean, mask=mask_c)
        tl.store(var_ptr + tl.program_id(2) * n_channels + offs_c, var, mask=mask_c)
    scale = tl.load(gamma_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32) / tl.sqrt(var + eps)
    beta = tl.load(beta_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    for block in tl.range(0, tl.cdiv(last - first, BLOCK_R), num_stages=STAGES):
        # 3. v = gamma (x - mean) rstd + beta [+ residual].
        row, inside, mask = _tile(first, block, last, start, offs_c, n_channels, EVEN_C, BLOCK_R)
        place = row * n_channels + offs_c[None, :]
        v = _normalize(tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32), mean, scale, beta)
        if RESIDUAL:
            v += tl.load(residual_ptr + place, mask=mask, other=0.0).to(tl.float32)
        if RELU and RESIDUAL:
            # 4. Bit c mod 8 of byte c div 8: whether v_c > 0.
            bit = tl.where(v > 0.0, 1, 0) << (offs_c % BITS)[None, :]
            byte = tl.sum(tl.reshape(bit, [BLOCK_R, BLOCK_C // BITS, BITS]), 2)
            at, held = _bytes(row, inside, n_bytes, BLOCK_C)
            tl.store(bits_ptr + at, byte.to(tl.uint8), mask=held)
        # 5. y = relu(v).
        if RELU:
            v = tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(y_ptr + place, v.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _affine(gamma_ptr, beta_ptr, mean_ptr, var_ptr, n_channels, offs_c, eps):
    """(mean, rstd, gamma rstd, beta) of this program's group and channels."""
    mask_c = offs_c < n_channels
    mean = tl.load(mean_ptr + tl.program_id(2) * n_channels + offs_c, mask=mask_c, other=0.0)
    var = tl.load(var_ptr + tl.program_id(2) * n_channels + offs_c, mask=mask_c, other=1.0)
    scale = tl.load(gamma_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32) / tl.sqrt(var + eps)
    return mean, 1.0 / tl.sqrt(var + eps), scale, tl.load(beta_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)


@triton.jit
def _bn_grad_sums_kernel(
    grad_ptr,  # [G, R, C]
    other_ptr,  # [G, R, C] what is added to it
    x_ptr,  # [G, R, C]
    bits_ptr,  # [G, R, ceil(C / 8)] uint8
    gamma_ptr,  # [C]
    beta_ptr,  # [C]
    mean_ptr,  # [G, C]
    var_ptr,  # [G, C]
    partial_ptr,  # [G, runs, 2, C] sum g and sum(g xhat)
    g_ptr,  # [G, R, C]
    n_rows,
    n_channels,
    n_bytes,
    run,
    eps,
    SUM: tl.constexpr,
    BITWISE: tl.constexpr,
    RELU: tl.constexpr,
    EVEN_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    # 1. The rows of this run and its channels.
    first, last, start, offs_c = _run(n_rows, n_channels, run, BLOCK_C)
    mean, rstd, scale, beta = _affine(gamma_ptr, beta_ptr, mean_ptr, var_ptr, n_channels, offs_c, eps)
    of_beta = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    of_gamma = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for block in tl.range(0, tl.cdiv(last - first, BLOCK_R), num_stages=STAGES):
        row, inside, mask = _tile(first, block, last, start, offs_c, n_channels, EVEN_C, BLOCK_R)
        place = row * n_channels + offs_c[None, :]
        x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32)
        # 2. dy, rounded as a sum of its own would be.
        if SUM:
            g += tl.load(other_ptr + place, mask=mask, other=0.0).to(tl.float32)
            g = g.to(grad_ptr.dtype.element_ty).to(tl.float32)
        # 3. g = dy where the argument of the ReLU was positive, otherwise 0; the argument is recomputed, or BITWISE looked up.
        if BITWISE:
            at, held = _bytes(row, inside, n_bytes, BLOCK_C)
            byte = tl.load(bits_ptr + at, mask=held, other=0)
            # spread in registers: a load for each element costs registers, a change of layout shared memory
            byte = tl.reshape(tl.broadcast_to(byte[:, :, None], [BLOCK_R, BLOCK_C // BITS, BITS]), [BLOCK_R, BLOCK_C])
            g = tl.where((byte.to(tl.int32) >> (offs_c % BITS)[None, :]) & 1 != 0, g, 0.0)
        elif RELU:
            g = tl.where(_normalize(x, mean, scale, beta) > 0.0, g, 0.0)
        if SUM or BITWISE:
            tl.store(g_ptr + place, g.to(g_ptr.dtype.element_ty), mask=mask)
        # 4. sum g, sum(g (x - mean)); rstd comes last.
        of_beta += g
        of_gamma += g * (x - mean[None, :])
    out = partial_ptr + ((tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * 2) * n_channels + offs_c
    tl.store(out, tl.sum(of_beta, 0), mask=offs_c < n_channels)
    tl.store(out + n_channels, tl.sum(of_gamma, 0) * rstd, mask=offs_c < n_channels)


@triton.jit
def _merge_sums(partial_ptr, group, n_channels, offs_c, BLOCK_C: tl.constexpr, MERGE: tl.constexpr):
    """(sum g, sum(g xhat)) of a group, [BLOCK_C] each."""
    runs = tl.num_programs(1)
    partial = partial_ptr + group * runs * 2 * n_channels + offs_c[None, :]
    of_beta = tl.zeros([MERGE, BLOCK_C], tl.float32)
    of_gamma = tl.zeros([MERGE, BLOCK_C], tl.float32)
    for block in tl.range(0, tl.cdiv(runs, MERGE)):
        r = block * MERGE + tl.arange(0, MERGE)
        mask = (r < runs)[:, None] & (offs_c < n_channels)[None, :]
        of_beta += tl.load(partial + (2 * r * n_channels)[:, None], mask=mask, other=0.0)
        of_gamma += tl.load(partial + ((2 * r + 1) * n_channels)[:, None], mask=mask, other=0.0)
    return tl.sum(of_beta, 0), tl.sum(of_gamma, 0)


@triton.jit
def _bn_grad_apply_kernel(
    grad_ptr,  # [G, R, C] dy, or where RELU is false g
    x_ptr,  # [G, R, C]
    gamma_ptr,  # [C]
    beta_ptr,  # [C]
    mean_ptr,  # [G, C]
    var_ptr,  # [G, C]
    partial_ptr,  # [G, runs, 2, C]
    dx_ptr,  # [G, R, C]
    dgamma_ptr,  # [C]
    dbeta_ptr,  # [C]
    n_rows,
    n_channels,
    run,
    eps,
    RELU: tl.constexpr,
    EVEN_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MERGE: tl.constexpr,
    STAGES: tl.constexpr,
):
    first, last, start, offs_c = _run(n_rows, n_channels, run, BLOCK_C)
    # 1. The gradients to gamma and beta, by one program for each block of channels: those of all groups together.
    if tl.program_id(1) + tl.program_id(2) == 0:
        dbeta = tl.zeros([BLOCK_C], tl.float32)
        dgamma = tl.zeros([BLOCK_C], tl.float32)
        for group in tl.range(0, tl.num_programs(2)):
            b, a = _merge_sums(partial_ptr, group, n_channels, offs_c, BLOCK_C, MERGE)
            dbeta += b
            dgamma += a
        tl.store(dbeta_ptr + offs_c, dbeta.to(dbeta_ptr.dtype.element_ty), mask=offs_c < n_channels)
        tl.store(dgamma_ptr + offs_c, dgamma.to(dgamma_ptr.dtype.element_ty), mask=offs_c < n_channels)
    # 2. dx = gamma rstd (g - sum g / n - (x - mean) rstd sum(g xhat) / n).
    mean, rstd, scale, beta = _affine(gamma_ptr, beta_ptr, mean_ptr, var_ptr, n_channels, offs_c, eps)
    of_beta, of_gamma = _merge_sums(partial_ptr, tl.program_id(2), n_channels, offs_c, BLOCK_C, MERGE)
    shift = of_beta / n_rows
    slope = of_gamma * rstd / n_rows
    for block in tl.range(0, tl.cdiv(last - first, BLOCK_R), num_stages=STAGES):
        row, inside, mask = _tile(first, block, last, start, offs_c, n_channels, EVEN_C, BLOCK_R)
        place = row * n_channels + offs_c[None, :]
        x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32)
        if RELU:
            g = tl.where(_normalize(x, mean, scale, beta) > 0.0, g, 0.0)
        dx = scale[None, :] * (g - shift[None, :] - (x - mean[None, :]) * slope[None, :])
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def _config(kernel: str, x: Tensor) -> Config:
    if interpreting():
        return INTERPRETED
    return lookup(architecture(x.device), f"batch_norm {kernel}", "any", x.shape[1], 0)


def _runs(x: Tensor, groups: int, config: Config) -> tuple[int, int, int]:
    """(rows of a group, rows of a run, runs of a group): about as many programs as the device holds at once."""
    n_rows = x.numel() // x.shape[1] // groups
    programs = 4 if interpreting() else max(1, WARPS_PER_SM // config.warps) * multiprocessors(x.device)
    most = max(1, programs // (triton.cdiv(x.shape[1], config.cols) * groups))
    run = triton.cdiv(n_rows, min(most, triton.cdiv(n_rows, config.rows)))
    return n_rows, run, triton.cdiv(n_rows, run)


def _launch(kernel: Any, config: Config, channels: int, runs: int, groups: int, *arguments: Any, **switches: Any) -> None:
    """One program for each block of channels, run and group."""
    if "MERGE" in kernel.arg_names:
        switches["MERGE"] = MERGE_RUNS
    kernel[(triton.cdiv(channels, config.cols), runs, groups)](
        *arguments,
        **switches,
        EVEN_C=channels % config.cols == 0,
        BLOCK_R=config.rows,
        BLOCK_C=config.cols,
        STAGES=config.stages,
        num_warps=config.warps,
    )


def _rows(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _partial(x: Tensor, groups: int, runs: int) -> Tensor:
    return torch.empty((groups, runs, 2, x.shape[1]), dtype=torch.float32, device=x.device)


def forward(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    relu: bool,
    eps: float,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, mean [G, C], var [G, C], bits, the two running statistics [C], or [0] without them)."""
    x, channels = _rows(x), x.shape[1]
    has_residual = residual is not None
    residual = _rows(residual) if has_residual else x
    y, bits = torch.empty_like(x), new_bits(x, relu and has_residual)
    config = _config("statistics", x)
    n_rows, run, runs = _runs(x, groups, config)
    partial = _partial(x, groups, runs)
    mean, var = (torch.empty((groups, channels), dtype=torch.float32, device=x.device) for _ in range(2))
    has_running = running_mean is not None
    running = (running_mean, running_var) if has_running else (mean, var)
    moved = [torch.empty_like(r) if has_running else mean.new_empty(0) for r in running]
    with torch.cuda.device_of(x):
        _launch(_bn_statistics_kernel, config, channels, runs, groups, x, partial, n_rows, channels, run)
        _launch(
            _bn_apply_kernel, _config("apply", x), channels, runs, groups,
            x, residual, gamma, beta, partial, y, bits, mean, var, *running, *moved,
            n_rows, channels, triton.cdiv(channels, MASK_BITS), run, eps, momentum,
            RUNNING=has_running, RESIDUAL=has_residual, RELU=relu,
        )  # fmt: skip
    return y, mean, var, bits, *moved


def backward(
    grad_y: Tensor,
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    var: Tensor,
    bits: Tensor,
    relu: bool,
    eps: float,
    other: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dgamma, dbeta, dresidual or [0])."""
    x, grad_y = _rows(x), _rows(grad_y)
    has_other, bitwise = other is not None, bits.numel() > 0
    other = _rows(other) if has_other else grad_y
    groups, channels = mean.shape
    dx, dgamma, dbeta = torch.empty_like(x), torch.empty_like(gamma), torch.empty_like(beta)
    g = torch.empty_like(x) if has_other or bitwise else grad_y
    config = _config("grad_sums", x)
    n_rows, run, runs = _runs(x, groups, config)
    partial = _partial(x, groups, runs)
    affine = (gamma, beta, mean, var, partial)
    with torch.cuda.device_of(x):
        _launch(
            _bn_grad_sums_kernel, config, channels, runs, groups,
            grad_y, other, x, bits, *affine, g, n_rows, channels, triton.cdiv(channels, MASK_BITS), run, eps,
            SUM=has_other, BITWISE=bitwise, RELU=relu,
        )  # fmt: skip
        _launch(
            _bn_grad_apply_kernel, _config("grad_apply", x), channels, runs, groups,
            g, x, *affine, dx, dgamma, dbeta, n_rows, channels, run, eps,
            RELU=relu and g is grad_y,
        )  # fmt: skip
    return dx, dgamma, dbeta, g if bitwise else x.new_empty(0)


def variants(arch: str) -> list[Variant]:
    """The forms that a ResNet calls: with ReLU, with residual and ReLU, and with neither (the shortcut's); a gradient that is a sum
    of two where the next block begins."""
    fp32 = "*fp32"
    types = dict.fromkeys(
        (
            "gamma_ptr", "beta_ptr", "mean_ptr", "var_ptr", "partial_ptr", "dgamma_ptr", "dbeta_ptr",
            "running_mean_ptr", "running_var_ptr", "moved_mean_ptr", "moved_var_ptr",
        ),
        fp32,
    )  # fmt: skip
    types |= dict(bits_ptr="*u8", n_rows="i32", n_channels="i32", n_bytes="i32", run="i32", eps="fp32", momentum="fp32")
    kernels = {
        "statistics": (_bn_statistics_kernel, [("", {})]),
        "apply": (_bn_apply_kernel, [
            (" relu", dict(RUNNING=True, RESIDUAL=False, RELU=True)),
            (" residual", dict(RUNNING=True, RESIDUAL=True, RELU=True)),
            (" plain", dict(RUNNING=True, RESIDUAL=False, RELU=False)),
        ]),
        "grad_sums": (_bn_grad_sums_kernel, [
            (" relu", dict(SUM=False, BITWISE=False, RELU=True)),
            (" residual", dict(SUM=False, BITWISE=True, RELU=True)),
            (" residual sum", dict(SUM=True, BITWISE=True, RELU=True)),
            (" plain", dict(SUM=False, BITWISE=False, RELU=False)),
        ]),
        "grad_apply": (_bn_grad_apply_kernel, [(" relu", dict(RELU=True)), (" plain", dict(RELU=False))]),
    }  # fmt: skip
    found = []
    for name, (kernel, forms) in kernels.items():
        for width, by_batch in table()[arch][f"batch_norm {name}"]["any"].items():
            config = Config(**by_batch["0"])
            tile = dict(EVEN_C=True, BLOCK_R=config.rows, BLOCK_C=config.cols, MERGE=MERGE_RUNS, STAGES=config.stages)
            for pixel in ("bf16", "fp16", "fp32"):
                streams = dict.fromkeys(("x_ptr", "residual_ptr", "y_ptr", "grad_ptr", "other_ptr", "g_ptr", "dx_ptr"), f"*{pixel}")
                for form, switches in forms:
                    constants = {arg: value for arg, value in (tile | switches).items() if arg in kernel.arg_names}
                    given = {arg: (types | streams)[arg] for arg in kernel.arg_names if arg not in constants}
                    found.append(
                        Variant(
                            f"batch_norm {name} {pixel} C{width}{form}", kernel, given, constants, ("n_channels",),
                            config.warps, config.stages, "stream",
                        )
                    )  # fmt: skip
    return found


def candidates(key: str, committed: Config) -> Iterator[Config]:
    """The configurations that a sweep tries."""
    return map(Config._make, itertools.product((64, 128, 256), (32, 64, 128), (8, 16), (1, 2, 3)))


def workload(key: str, operand: str, width: int, batch: int, device: str) -> Workload:
    """The last layer of a block of a ResNet-50's third stage, [128, 1024, 14, 14] with a residual, and all gradients."""
    pair = (torch.randn(128, 1024, 14, 14, device=device).bfloat16() for _ in range(2))
    x, residual = (tensor.to(memory_format=torch.channels_last) for tensor in pair)
    gamma, beta = torch.ones(1024, device=device), torch.randn(1024, device=device)
    leaves = dict(x=x, gamma=gamma, beta=beta, residual=residual)
    return Workload("batch_norm", {name: leaf.requires_grad_() for name, leaf in leaves.items()})
