"""InfoNCE against a queue on CUDA: a split of the queue a program, online softmax, then one merge.

Program (m, s) walks over chunk s of the queue with BLOCK_B queries. For each block of queue rows it takes the scores,
the running maximum, the exponentials and their product with the same rows, which is the gradient's sum: two matrix
products a row loaded. It stores the maximum, the sum, the count of rows that beat the positive and the weighted rows,
relative to its own maximum; the merge rescales them, adds the positive once and divides. Scores are in log2, for exp2.

Accumulation is float32. The weights go into the second product in the operands' dtype. Wider than 256, the weighted
rows do not fit a program's registers: the gradient's D axis is cut in two and the kernel launched for each half.
Extra memory: splits x B x (D + 3) x 4 bytes, with at most as many splits as the device has multiprocessors.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.configs import Config, Variant, architecture, lookup, multiprocessors, table
from kernels.infonce import Partial, merge
from kernels.selection import interpreting

LN2 = tl.constexpr(math.log(2))
MASKED = tl.constexpr(-1e30)
"""Score of a row that is not there. Finite, so that a difference of two is not NaN; its weight underflows to 0."""
MAX_BLOCK_D = 256
MERGE_SPLITS = 16
"""Splits that the merge adds up at a time."""
INTERPRETED = Config(rows=16, cols=32, warps=1, stages=1)
INTERPRETED_SPLITS = 3
OPERANDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _tile(ptr, row, n_rows, first_d, dim, stride_row, stride_d, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
          MASK_ROWS: tl.constexpr, MASK_D: tl.constexpr):  # fmt: skip
    """[ROWS, BLOCK_D] of a matrix from (row, first_d); what lies outside is 0."""
    offs_row = tl.arange(0, ROWS)
    offs_d = first_d + tl.arange(0, BLOCK_D)
    pointers = ptr + row.to(tl.int64) * stride_row + offs_row[:, None] * stride_row + offs_d[None, :] * stride_d
    if MASK_ROWS and MASK_D:
        tile = tl.load(pointers, mask=(row + offs_row < n_rows)[:, None] & (offs_d < dim)[None, :], other=0.0)
    elif MASK_ROWS:
        tile = tl.load(pointers, mask=(row + offs_row < n_rows)[:, None], other=0.0)
    elif MASK_D:
        tile = tl.load(pointers, mask=(offs_d < dim)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """a @ b + acc in float32. The interpreter multiplies bit patterns of bfloat16: there the operands go up first."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _split_kernel(
    q_ptr,  # [B, D]
    k_ptr,  # [B, D]
    queue_ptr,  # [K, D]
    top_ptr,  # [S, B] largest score of the split
    total_ptr,  # [S, B] sum of exp2(score - top)
    rank_ptr,  # [S, B] rows that score above the positive
    weighted_ptr,  # [S, B, D] sum of exp2(score - top) * row
    n_rows,
    n_queue,
    chunk,
    dim,
    stride_qb, stride_qd,
    stride_kb, stride_kd,
    stride_nk, stride_nd,
    scale,  # log2(e) / temperature
    PART: tl.constexpr,  # which BLOCK_D columns of the gradient this launch adds up
    PARTS: tl.constexpr,
    WITH_DQ: tl.constexpr,
    WITH_RANK: tl.constexpr,
    EVEN_K: tl.constexpr,  # every chunk is whole
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    pid_m = tl.program_id(0)
    pid_s = tl.program_id(1)
    dtype = queue_ptr.dtype.element_ty
    row = pid_m * BLOCK_B
    offs_b = row + tl.arange(0, BLOCK_B)
    mask_b = offs_b < n_rows

    q = _tile(q_ptr, row, n_rows, 0, dim, stride_qb, stride_qd, BLOCK_B, BLOCK_D, True, not EVEN_D).to(dtype)
    if PARTS == 2:
        q_high = _tile(
            q_ptr, row, n_rows, BLOCK_D, dim, stride_qb, stride_qd, BLOCK_B, BLOCK_D, True, not EVEN_D
        ).to(dtype)
    if WITH_RANK:
        k = _tile(k_ptr, row, n_rows, 0, dim, stride_kb, stride_kd, BLOCK_B, BLOCK_D, True, not EVEN_D).to(dtype)
        positive = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)
        if PARTS == 2:
            k = _tile(
                k_ptr, row, n_rows, BLOCK_D, dim, stride_kb, stride_kd, BLOCK_B, BLOCK_D, True, not EVEN_D
            ).to(dtype)
            positive += tl.sum(q_high.to(tl.float32) * k.to(tl.float32), 1)
        positive = positive * scale
        rank = tl.zeros([BLOCK_B], tl.int32)
    top = tl.full([BLOCK_B], MASKED, tl.float32)
    total = tl.zeros([BLOCK_B], tl.float32)
    weighted = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)

    first = pid_s * chunk
    last = tl.minimum(first + chunk, n_queue)
    for block in tl.range(0, tl.cdiv(last - first, BLOCK_K), num_stages=STAGES):
        n = first + block * BLOCK_K
        rows = _tile(
            queue_ptr, n, last, 0, dim, stride_nk, stride_nd, BLOCK_K, BLOCK_D, not EVEN_K, not EVEN_D
        )  # [BLOCK_K, BLOCK_D]
        scores = _dot(q, tl.trans(rows), tl.zeros([BLOCK_B, BLOCK_K], tl.float32), PRECISION, UPCAST)
        if PARTS == 2:
            high = _tile(
                queue_ptr, n, last, BLOCK_D, dim, stride_nk, stride_nd, BLOCK_K, BLOCK_D, not EVEN_K, not EVEN_D
            )
            scores = _dot(q_high, tl.trans(high), scores, PRECISION, UPCAST)
        scores = scores * scale
        if not EVEN_K:
            scores = tl.where((n + tl.arange(0, BLOCK_K) < last)[None, :], scores, MASKED)
        if WITH_RANK:
            rank += tl.sum((scores > positive[:, None]).to(tl.int32), 1)
        new_top = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp2(top - new_top)
        weights = tl.exp2(scores - new_top[:, None])
        total = total * shrink + tl.sum(weights, 1)
        top = new_top
        if WITH_DQ:
            weighted = weighted * shrink[:, None]
            if PART == 1:
                weighted = _dot(weights.to(dtype), high, weighted, PRECISION, UPCAST)
            else:
                weighted = _dot(weights.to(dtype), rows, weighted, PRECISION, UPCAST)

    out = pid_s.to(tl.int64) * n_rows + offs_b
    tl.store(top_ptr + out, top, mask=mask_b)
    if PART == 0:
        tl.store(total_ptr + out, total, mask=mask_b)
        if WITH_RANK:
            tl.store(rank_ptr + out, rank, mask=mask_b)
    if WITH_DQ:
        offs_d = PART * BLOCK_D + tl.arange(0, BLOCK_D)
        pointers = weighted_ptr + out[:, None] * dim + offs_d[None, :]
        tl.store(pointers, weighted, mask=mask_b[:, None] & (offs_d < dim)[None, :])


@triton.jit
def _merge_kernel(
    q_ptr,  # [B, D]
    k_ptr,  # [B, D]
    top_ptr,  # [PARTS, S, B]
    total_ptr,  # [S, B]
    rank_ptr,  # [S, B]
    weighted_ptr,  # [S, B, D]
    loss_ptr,  # [B]
    dq_ptr,  # [B, D]
    rank_out_ptr,  # [B]
    n_rows,
    n_splits,
    dim,
    stride_qb, stride_qd,
    stride_kb, stride_kd,
    scale,
    inverse_temperature,
    OPERAND: tl.constexpr,  # dtype the products were taken in
    PARTS: tl.constexpr,
    WITH_DQ: tl.constexpr,
    WITH_RANK: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,  # at least dim
    PART_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    offs_d = tl.arange(0, BLOCK_D)
    offs_s = tl.arange(0, BLOCK_S)
    mask_d = offs_d < dim
    row = b.to(tl.int64)
    q = tl.load(q_ptr + row * stride_qb + offs_d * stride_qd, mask=mask_d, other=0.0).to(OPERAND).to(tl.float32)
    k = tl.load(k_ptr + row * stride_kb + offs_d * stride_kd, mask=mask_d, other=0.0).to(OPERAND).to(tl.float32)
    positive = tl.sum(q * k, 0) * scale

    top = positive
    for s in tl.range(0, n_splits, BLOCK_S):
        tops = tl.load(top_ptr + (s + offs_s) * n_rows + b, mask=s + offs_s < n_splits, other=MASKED)
        top = tl.maximum(top, tl.max(tops, 0))

    total = 0.0
    rank = 0
    weighted = tl.zeros([BLOCK_D], tl.float32)
    for s in tl.range(0, n_splits, BLOCK_S):
        split = s + offs_s
        mask_s = split < n_splits
        weight = tl.exp2(tl.load(top_ptr + split * n_rows + b, mask=mask_s, other=MASKED) - top)
        total += tl.sum(tl.load(total_ptr + split * n_rows + b, mask=mask_s, other=0.0) * weight, 0)
        if WITH_RANK:
            rank += tl.sum(tl.load(rank_ptr + split * n_rows + b, mask=mask_s, other=0), 0)
        if WITH_DQ:
            pointers = weighted_ptr + (split.to(tl.int64) * n_rows + b)[:, None] * dim + offs_d[None, :]
            rows = tl.load(pointers, mask=mask_s[:, None] & mask_d[None, :], other=0.0)
            weights = weight[:, None]
            if PARTS == 2:
                high = tl.load(top_ptr + (n_splits + split) * n_rows + b, mask=mask_s, other=MASKED)
                weights = tl.where(offs_d[None, :] < PART_D, weights, tl.exp2(high - top)[:, None])
            weighted += tl.sum(rows * weights, 0)

    own = tl.exp2(positive - top)
    # log(1 + total) by its series where float32 would round 1 + total; otherwise the logarithm of the whole.
    small = total * (1.0 - 0.5 * total)
    large = (top - positive + tl.log2(total + own)) * LN2
    tl.store(loss_ptr + b, tl.where((top == positive) & (total < 1e-3), small, large))
    if WITH_DQ:
        # The positive's own share is left out of both terms: 1 - p would cancel.
        dq = (weighted - total * k) / (total + own) * inverse_temperature
        tl.store(dq_ptr + row * dim + offs_d, dq, mask=mask_d)
    if WITH_RANK:
        tl.store(rank_out_ptr + b, rank.to(tl.int64))


def plan(batch: int, size: int, rows: int, cols: int, programs: int) -> tuple[int, int]:
    """(splits, chunk): about ``programs`` programs in all; no split is empty, and only the last may be ragged."""
    blocks = triton.cdiv(size, cols)
    splits = max(1, min(blocks, programs // triton.cdiv(batch, rows)))
    chunk = triton.cdiv(blocks, splits) * cols
    return triton.cdiv(size, chunk), chunk


def block_d(dim: int) -> int:
    """Columns of a tile: a power of two that holds D, or half of it beyond 256."""
    return min(MAX_BLOCK_D, max(32, triton.next_power_of_2(dim)))


def operand_key(dtype: torch.dtype, precision: str) -> str:
    """The configuration table's name of an operand type."""
    return precision if dtype == torch.float32 else str(dtype).removeprefix("torch.")


class Splits(NamedTuple):
    """What the split kernel leaves: S splits of the queue, PARTS halves of a wide gradient. Scores are in log2."""

    top: Tensor
    """[PARTS, S, B]"""
    total: Tensor
    """[S, B]"""
    rank: Tensor
    """[S, B] int32, or a tensor without meaning."""
    weighted: Tensor
    """[S, B, D], or a tensor without meaning."""


def _splits(
    q: Tensor, k: Tensor, queue: Tensor, temperature: float, with_dq: bool, with_rank: bool, precision: str
) -> Splits:
    """Launches the split kernel over the whole queue."""
    batch, dim = q.shape
    size = queue.shape[0]
    interpreted = interpreting()
    if interpreted:
        config, programs = INTERPRETED, INTERPRETED_SPLITS
    else:
        config = lookup(architecture(q.device), "infonce", operand_key(queue.dtype, precision), dim, batch)
        programs = multiprocessors(q.device)
    splits, chunk = plan(batch, size, config.rows, config.cols, programs)
    columns = block_d(dim)
    parts = triton.cdiv(dim, columns)

    def new(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=q.device)

    top, total = new(parts if with_dq else 1, splits, batch), new(splits, batch)
    ranks = new(splits, batch, dtype=torch.int32) if with_rank else top
    weighted = new(splits, batch, dim) if with_dq else top
    with torch.cuda.device_of(q):
        for part in range(parts if with_dq else 1):
            _split_kernel[(triton.cdiv(batch, config.rows), splits)](
                q, k, queue, top[part], total, ranks, weighted,
                batch, size, chunk, dim, q.stride(0), q.stride(1), k.stride(0), k.stride(1),
                queue.stride(0), queue.stride(1), math.log2(math.e) / temperature,
                PART=part,
                PARTS=parts,
                WITH_DQ=with_dq,
                WITH_RANK=with_rank and part == 0,
                EVEN_K=size % chunk == 0,
                EVEN_D=dim == columns * parts,
                PRECISION=precision,
                UPCAST=interpreted,
                BLOCK_B=config.rows,
                BLOCK_K=config.cols,
                BLOCK_D=columns,
                STAGES=config.stages,
                num_warps=config.warps,
                num_stages=config.stages,
            )
    return Splits(top, total, ranks, weighted)


def forward(
    q: Tensor, k: Tensor, queue: Tensor, temperature: float, with_dq: bool, with_rank: bool, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [B], dloss/dq [B, D] or [0, D], rank [B] or [0])."""
    batch, dim = q.shape
    top, total, ranks, weighted = _splits(q, k, queue, temperature, with_dq, with_rank, precision)
    loss = torch.empty(batch, dtype=torch.float32, device=q.device)
    dq = torch.empty((batch if with_dq else 0, dim), dtype=torch.float32, device=q.device)
    rank = torch.empty(batch if with_rank else 0, dtype=torch.int64, device=q.device)
    with torch.cuda.device_of(q):
        _merge_kernel[(batch,)](
            q, k, top, total, ranks, weighted, loss, dq, rank,
            batch, total.shape[0], dim, q.stride(0), q.stride(1), k.stride(0), k.stride(1),
            math.log2(math.e) / temperature, 1 / temperature,
            OPERAND=OPERANDS[queue.dtype],
            PARTS=top.shape[0],
            WITH_DQ=with_dq,
            WITH_RANK=with_rank,
            BLOCK_S=MERGE_SPLITS,
            BLOCK_D=max(32, triton.next_power_of_2(dim)),
            PART_D=block_d(dim),
            num_warps=4,
        )
    return loss, dq, rank


def partial(
    q: Tensor, k: Tensor, queue: Tensor, temperature: float, with_dq: bool, with_rank: bool, precision: str
) -> Partial:
    """What these rows of the queue add to every query's softmax, for a queue that several processes hold."""
    top, total, ranks, weighted = _splits(q, k, queue, temperature, with_dq, with_rank, precision)
    if len(top) == 2:  # the upper half of the gradient was summed relative to a maximum of its own
        weighted[..., block_d(q.shape[1]) :] *= torch.exp2(top[1] - top[0])[..., None]
    splits = total.shape[0]
    return merge(Partial(
        top[0] * LN2.value,
        total,
        ranks.long() if with_rank else torch.zeros((splits, 0), dtype=torch.int64, device=q.device),
        weighted if with_dq else weighted.new_zeros((splits, 0, q.shape[1])),
    ))  # fmt: skip


def variants(arch: str) -> list[Variant]:
    """Every tabulated form of the split kernel, and the merge.

    float16 where it has a configuration of its own, and once besides: otherwise it is bfloat16's code with another type.
    """
    short = {"bfloat16": "bf16", "float16": "fp16", "ieee": "fp32", "tf32": "fp32"}
    found = []
    for operand, widths in table()[arch]["infonce"].items():
        pointer = f"*{short[operand]}"
        for width in map(int, widths):
            for batch, config in widths[str(width)].items():
                columns = block_d(width)
                twin = table()[arch]["infonce"]["bfloat16"].get(str(width), {}).get(batch)
                if operand == "float16" and config == twin and width != 128:
                    continue
                ragged = operand == "bfloat16" and width == 128
                for even, part in [(True, 0)] + [(True, 1)] * (width > columns) + [(False, 0)] * ragged:
                    found.append(_split_variant(operand, pointer, width, batch, Config(**config), even, part))
    for width in (128, 512):
        found.append(_merge_variant(width))
    return found


def _split_variant(
    operand: str, pointer: str, width: int, batch: str, config: Config, even: bool, part: int
) -> Variant:
    columns = block_d(width)
    name = f"infonce {operand} D{width} B{batch}" + ("" if even else " ragged") + (" high" if part else "")
    return Variant(
        name=name,
        kernel=_split_kernel,
        types=dict(
            q_ptr=pointer, k_ptr=pointer, queue_ptr=pointer, top_ptr="*fp32", total_ptr="*fp32", rank_ptr="*i32",
            weighted_ptr="*fp32", n_rows="i32", n_queue="i32", chunk="i32", dim="i32", stride_qb="i32",
            stride_kb="i32", stride_nk="i32", scale="fp32",
        ),
        constants=dict(
            stride_qd=1, stride_kd=1, stride_nd=1, PART=part, PARTS=triton.cdiv(width, columns), WITH_DQ=True,
            WITH_RANK=part == 0, EVEN_K=even, EVEN_D=even, PRECISION=operand if operand == "tf32" else "ieee",
            UPCAST=False, BLOCK_B=config.rows, BLOCK_K=config.cols, BLOCK_D=columns, STAGES=config.stages,
        ),
        aligned=("n_queue", "chunk", "dim", "stride_qb", "stride_kb", "stride_nk"),
        warps=config.warps,
        stages=config.stages,
        kind="ieee" if operand == "ieee" else "dot",
    )


def _merge_variant(width: int) -> Variant:
    return Variant(
        name=f"infonce merge D{width}",
        kernel=_merge_kernel,
        types=dict(
            q_ptr="*bf16", k_ptr="*bf16", top_ptr="*fp32", total_ptr="*fp32", rank_ptr="*i32", weighted_ptr="*fp32",
            loss_ptr="*fp32", dq_ptr="*fp32", rank_out_ptr="*i64", n_rows="i32", n_splits="i32", dim="i32",
            stride_qb="i32", stride_kb="i32", scale="fp32", inverse_temperature="fp32",
        ),
        constants=dict(
            stride_qd=1, stride_kd=1, OPERAND=tl.bfloat16, PARTS=triton.cdiv(width, block_d(width)), WITH_DQ=True,
            WITH_RANK=True, BLOCK_S=MERGE_SPLITS, BLOCK_D=max(32, triton.next_power_of_2(width)),
            PART_D=block_d(width),
        ),
        aligned=("n_rows", "dim", "stride_qb", "stride_kb"),
        warps=4,
        stages=3,
        kind="small",
    )
