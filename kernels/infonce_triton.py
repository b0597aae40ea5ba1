"""InfoNCE against a queue on CUDA: each program takes one split of the queue (online softmax), then one kernel merges them.

Program (m, s) walks over split s of the queue with BLOCK_B queries. For each block of queue rows it computes the scores,
the running maximum, the exponentials and their product with the same rows, which becomes the gradient: two matrix
products per block loaded. It stores m_i, l_i and acc relative to its maximum (``online_softmax.py``), and the number of
rows that score above the positive. The merge rescales them, adds the positive once and divides. Scores are in units of
log2, for exp2.

Accumulation is in float32. The second product takes the exponentials in the dtype of the operands. An acc wider than 256
does not fit into the registers of a program: then D is cut in two, and the kernel is launched once for each half.
Extra memory: splits x B x (D + 3) x 4 bytes, with at most as many splits as the device has multiprocessors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.configs import Config, Variant, Workload, architecture, lookup, multiprocessors, operand_dtype, table
from kernels.online_softmax import Partial, merge
from kernels.selection import interpreting

LN2 = tl.constexpr(math.log(2))
MASKED = tl.constexpr(-1e30)
"""Score of a row beyond the queue. Finite, so that the difference of two is not NaN; its exponential underflows to 0."""
MAX_BLOCK_D = 256
MERGE_SPLITS = 16
"""How many splits the merge adds up at a time."""
INTERPRETED = Config(rows=16, cols=32, warps=1, stages=1)
INTERPRETED_SPLITS = 3
OPERANDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _tile(ptr, row, n_rows, first_d, dim, stride_row, stride_d, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
          MASK_ROWS: tl.constexpr, MASK_D: tl.constexpr):  # fmt: skip
    """The tile [ROWS, BLOCK_D] of a matrix that starts at (row, first_d), with zeros outside the matrix."""
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
    """a @ b + acc in float32. UPCAST is for the interpreter, which multiplies the bit patterns of bfloat16 operands."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _split_kernel(
    q_ptr,  # [B, D]
    k_ptr,  # [B, D]
    queue_ptr,  # [K, D]
    m_ptr,  # [S, B] largest score of the split
    l_ptr,  # [S, B] sum of exp2(score - m_i)
    rank_ptr,  # [S, B] rows that score above the positive
    acc_ptr,  # [S, B, D] sum of exp2(score - m_i) * row
    count_ptr,  # how many of the first queue rows count; None: all
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
    COUNTED: tl.constexpr,  # then EVEN_K is false
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

    # 1. Load the queries of this program. For their rank, the score of the positive: s_+ = q.k / T.
    q = _tile(q_ptr, row, n_rows, 0, dim, stride_qb, stride_qd, BLOCK_B, BLOCK_D, True, not EVEN_D).to(dtype)
    if PARTS == 2:
        q_high = _tile(q_ptr, row, n_rows, BLOCK_D, dim, stride_qb, stride_qd, BLOCK_B, BLOCK_D, True, not EVEN_D).to(dtype)
    if WITH_RANK:
        k = _tile(k_ptr, row, n_rows, 0, dim, stride_kb, stride_kd, BLOCK_B, BLOCK_D, True, not EVEN_D).to(dtype)
        positive = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)
        if PARTS == 2:
            k = _tile(k_ptr, row, n_rows, BLOCK_D, dim, stride_kb, stride_kd, BLOCK_B, BLOCK_D, True, not EVEN_D).to(dtype)
            positive += tl.sum(q_high.to(tl.float32) * k.to(tl.float32), 1)
        positive = positive * scale
        rank = tl.zeros([BLOCK_B], tl.int32)
    # 2. Start with no rows: m_i = -inf, l_i = 0, acc_i = 0 (online_softmax.py).
    m_i = tl.full([BLOCK_B], MASKED, tl.float32)
    l_i = tl.zeros([BLOCK_B], tl.float32)
    acc = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)

    first = pid_s * chunk
    last = tl.minimum(first + chunk, n_queue)
    if COUNTED:
        last = tl.maximum(first, tl.minimum(last, tl.load(count_ptr).to(tl.int32)))
    for block in tl.range(0, tl.cdiv(last - first, BLOCK_K), num_stages=STAGES):
        # 3. Load the next block of queue rows and compute their scores, in log2: s = q.row / T.
        n = first + block * BLOCK_K
        rows = _tile(
            queue_ptr, n, last, 0, dim, stride_nk, stride_nd, BLOCK_K, BLOCK_D, not EVEN_K, not EVEN_D
        )  # [BLOCK_K, BLOCK_D]
        scores = _dot(q, tl.trans(rows), tl.zeros([BLOCK_B, BLOCK_K], tl.float32), PRECISION, UPCAST)
        if PARTS == 2:
            high = _tile(queue_ptr, n, last, BLOCK_D, dim, stride_nk, stride_nd, BLOCK_K, BLOCK_D, not EVEN_K, not EVEN_D)
            scores = _dot(q_high, tl.trans(high), scores, PRECISION, UPCAST)
        scores = scores * scale
        if not EVEN_K:
            scores = tl.where((n + tl.arange(0, BLOCK_K) < last)[None, :], scores, MASKED)
        # 4. rank += #(s > s_+).
        if WITH_RANK:
            rank += tl.sum((scores > positive[:, None]).to(tl.int32), 1)
        # 5. m' = max(m_i, max s);  l_i <- exp(m_i - m') l_i + sum exp(s - m').
        new_m_i = tl.maximum(m_i, tl.max(scores, 1))
        alpha = tl.exp2(m_i - new_m_i)
        weights = tl.exp2(scores - new_m_i[:, None])
        l_i = l_i * alpha + tl.sum(weights, 1)
        m_i = new_m_i
        # 6. acc_i <- exp(m_i - m') acc_i + sum exp(s - m') row.
        if WITH_DQ:
            acc = acc * alpha[:, None]
            if PART == 1:
                acc = _dot(weights.to(dtype), high, acc, PRECISION, UPCAST)
            else:
                acc = _dot(weights.to(dtype), rows, acc, PRECISION, UPCAST)

    # 7. Store m_i, l_i, rank and acc_i of this split for the merge.
    out = pid_s.to(tl.int64) * n_rows + offs_b
    tl.store(m_ptr + out, m_i, mask=mask_b)
    if PART == 0:
        tl.store(l_ptr + out, l_i, mask=mask_b)
        if WITH_RANK:
            tl.store(rank_ptr + out, rank, mask=mask_b)
    if WITH_DQ:
        offs_d = PART * BLOCK_D + tl.arange(0, BLOCK_D)
        pointers = acc_ptr + out[:, None] * dim + offs_d[None, :]
        tl.store(pointers, acc, mask=mask_b[:, None] & (offs_d < dim)[None, :])


@triton.jit
def _merge_kernel(
    q_ptr,  # [B, D]
    k_ptr,  # [B, D]
    m_ptr,  # [PARTS, S, B]
    l_ptr,  # [S, B]
    rank_ptr,  # [S, B]
    acc_ptr,  # [S, B, D]
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
    # One query per program. online_softmax.py derives the formulas.
    b = tl.program_id(0)
    offs_d = tl.arange(0, BLOCK_D)
    offs_s = tl.arange(0, BLOCK_S)
    mask_d = offs_d < dim
    row = b.to(tl.int64)
    # 1. s_+ = q.k / T in log2, with operands rounded as in the split kernel.
    q = tl.load(q_ptr + row * stride_qb + offs_d * stride_qd, mask=mask_d, other=0.0).to(OPERAND).to(tl.float32)
    k = tl.load(k_ptr + row * stride_kb + offs_d * stride_kd, mask=mask_d, other=0.0).to(OPERAND).to(tl.float32)
    positive = tl.sum(q * k, 0) * scale

    # 2. m = max(s_+, max over splits of m_s).
    m_i = positive
    for s in tl.range(0, n_splits, BLOCK_S):
        tops = tl.load(m_ptr + (s + offs_s) * n_rows + b, mask=s + offs_s < n_splits, other=MASKED)
        m_i = tl.maximum(m_i, tl.max(tops, 0))

    # 3. l = sum_s exp(m_s - m) l_s;  acc = sum_s exp(m_s - m) acc_s;  rank = sum_s rank_s.
    l_i = 0.0
    rank = 0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for s in tl.range(0, n_splits, BLOCK_S):
        split = s + offs_s
        mask_s = split < n_splits
        weight = tl.exp2(tl.load(m_ptr + split * n_rows + b, mask=mask_s, other=MASKED) - m_i)
        l_i += tl.sum(tl.load(l_ptr + split * n_rows + b, mask=mask_s, other=0.0) * weight, 0)
        if WITH_RANK:
            rank += tl.sum(tl.load(rank_ptr + split * n_rows + b, mask=mask_s, other=0), 0)
        if WITH_DQ:
            pointers = acc_ptr + (split.to(tl.int64) * n_rows + b)[:, None] * dim + offs_d[None, :]
            rows = tl.load(pointers, mask=mask_s[:, None] & mask_d[None, :], other=0.0)
            weights = weight[:, None]
            if PARTS == 2:
                high = tl.load(m_ptr + (n_splits + split) * n_rows + b, mask=mask_s, other=MASKED)
                weights = tl.where(offs_d[None, :] < PART_D, weights, tl.exp2(high - m_i)[:, None])
            acc += tl.sum(rows * weights, 0)

    # 4. e = exp(s_+ - m); loss = log(1 + l) where m = s_+, else (m - s_+) + log(l + e).
    e = tl.exp2(positive - m_i)
    #    log(1 + l) by its series where it is small, since float32 rounds 1 + l.
    small = l_i * (1.0 - 0.5 * l_i)
    large = (m_i - positive + tl.log2(l_i + e)) * LN2
    tl.store(loss_ptr + b, tl.where((m_i == positive) & (l_i < 1e-3), small, large))
    if WITH_DQ:
        # 5. dloss/dq = (acc - l k) / ((l + e) T); a form with 1 - p would suffer from cancellation.
        dq = (acc - l_i * k) / (l_i + e) * inverse_temperature
        tl.store(dq_ptr + row * dim + offs_d, dq, mask=mask_d)
    if WITH_RANK:
        tl.store(rank_out_ptr + b, rank.to(tl.int64))


def plan(batch: int, size: int, rows: int, cols: int, programs: int) -> tuple[int, int]:
    """(number of splits, rows per split) for about ``programs`` programs. No split is empty; only the last may be shorter."""
    blocks = triton.cdiv(size, cols)
    splits = max(1, min(blocks, programs // triton.cdiv(batch, rows)))
    chunk = triton.cdiv(blocks, splits) * cols
    return triton.cdiv(size, chunk), chunk


def block_d(dim: int) -> int:
    """Columns of a tile: a power of two that holds D, or half of D if D is more than 256."""
    return min(MAX_BLOCK_D, max(32, triton.next_power_of_2(dim)))


def operand_key(dtype: torch.dtype, precision: str) -> str:
    """The key of an operand type in the table of configurations."""
    return precision if dtype == torch.float32 else str(dtype).removeprefix("torch.")


class Splits(NamedTuple):
    """Output of the split kernel for S splits of the queue and PARTS halves of a wide gradient. m_i is in units of log2."""

    m_i: Tensor
    """[PARTS, S, B]"""
    l_i: Tensor
    """[S, B]"""
    rank: Tensor
    """[S, B] int32, or a placeholder."""
    acc: Tensor
    """[S, B, D], or a placeholder."""


def _splits(
    q: Tensor, k: Tensor, queue: Tensor, temperature: float, with_dq: bool, with_rank: bool, precision: str, count: Tensor | None
) -> Splits:
    """Launches the split kernel over the whole queue. q and k have the queue's dtype: to convert wider rows in the kernel takes
    registers that D 256 does not have."""
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

    m_i, l_i = new(parts if with_dq else 1, splits, batch), new(splits, batch)
    ranks = new(splits, batch, dtype=torch.int32) if with_rank else m_i
    acc = new(splits, batch, dim) if with_dq else m_i
    with torch.cuda.device_of(q):
        for part in range(parts if with_dq else 1):
            _split_kernel[(triton.cdiv(batch, config.rows), splits)](
                q,
                k,
                queue,
                m_i[part],
                l_i,
                ranks,
                acc,
                count,
                batch,
                size,
                chunk,
                dim,
                q.stride(0),
                q.stride(1),
                k.stride(0),
                k.stride(1),
                queue.stride(0),
                queue.stride(1),
                math.log2(math.e) / temperature,
                PART=part,
                PARTS=parts,
                WITH_DQ=with_dq,
                WITH_RANK=with_rank and part == 0,
                EVEN_K=size % chunk == 0 and count is None,
                COUNTED=count is not None,
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
    return Splits(m_i, l_i, ranks, acc)


def forward(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    temperature: float,
    with_dq: bool,
    with_rank: bool,
    precision: str,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [B], dloss/dq [B, D] or [0, D], rank [B] or [0])."""
    batch, dim = q.shape
    q, k = q.to(queue.dtype), k.to(queue.dtype)
    m_i, l_i, ranks, acc = _splits(q, k, queue, temperature, with_dq, with_rank, precision, count)
    loss = torch.empty(batch, dtype=torch.float32, device=q.device)
    dq = torch.empty((batch if with_dq else 0, dim), dtype=torch.float32, device=q.device)
    rank = torch.empty(batch if with_rank else 0, dtype=torch.int64, device=q.device)
    with torch.cuda.device_of(q):
        _merge_kernel[(batch,)](
            q,
            k,
            m_i,
            l_i,
            ranks,
            acc,
            loss,
            dq,
            rank,
            batch,
            l_i.shape[0],
            dim,
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            math.log2(math.e) / temperature,
            1 / temperature,
            OPERAND=OPERANDS[queue.dtype],
            PARTS=m_i.shape[0],
            WITH_DQ=with_dq,
            WITH_RANK=with_rank,
            BLOCK_S=MERGE_SPLITS,
            BLOCK_D=max(32, triton.next_power_of_2(dim)),
            PART_D=block_d(dim),
            num_warps=4,
        )
    return loss, dq, rank


def partial(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    temperature: float,
    with_dq: bool,
    with_rank: bool,
    precision: str,
    count: Tensor | None = None,
) -> Partial:
    """What these rows of the queue add to every query's softmax, for a queue that several processes hold."""
    q, k = q.to(queue.dtype), k.to(queue.dtype)
    m_i, l_i, ranks, acc = _splits(q, k, queue, temperature, with_dq, with_rank, precision, count)
    if len(m_i) == 2:  # the upper half of acc is relative to the m_i of its own launch
        acc[..., block_d(q.shape[1]) :] *= torch.exp2(m_i[1] - m_i[0])[..., None]
    splits = l_i.shape[0]
    return merge(Partial(
        m_i[0] * LN2.value,
        l_i,
        ranks.long() if with_rank else torch.zeros((splits, 0), dtype=torch.int64, device=q.device),
        acc if with_dq else acc.new_zeros((splits, 0, q.shape[1])),
    ))  # fmt: skip


EXCEPTIONS = {
    ("infonce ieee D512*", "*", "spill"): "float32 without tensor cores at D 512: exact but slow, use tf32",
}
"""See ``registry.exceptions``."""


def variants(arch: str) -> list[Variant]:
    """The split kernel with every configuration in the table, and the merge kernel.

    float16 is included at D 128 and where its configuration differs from that of bfloat16: otherwise the code is the same.
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
                if ragged:
                    found.append(_split_variant(operand, pointer, width, batch, Config(**config), False, 0, counted=True))
    for width in (128, 256, 512):
        found.append(_merge_variant(width))
    return found


def _split_variant(
    operand: str, pointer: str, width: int, batch: str, config: Config, even: bool, part: int, *, counted: bool = False
) -> Variant:
    columns = block_d(width)
    kind = " counted" if counted else "" if even else " ragged"
    name = f"infonce {operand} D{width} B{batch}{kind}" + (" high" if part else "")
    return Variant(
        name=name,
        kernel=_split_kernel,
        types=dict(
            q_ptr=pointer,
            k_ptr=pointer,
            queue_ptr=pointer,
            m_ptr="*fp32",
            l_ptr="*fp32",
            rank_ptr="*i32",
            acc_ptr="*fp32",
            n_rows="i32",
            n_queue="i32",
            chunk="i32",
            dim="i32",
            stride_qb="i32",
            stride_kb="i32",
            stride_nk="i32",
            scale="fp32",
        )
        | ({"count_ptr": "*i64"} if counted else {}),
        constants=({} if counted else {"count_ptr": None})
        | dict(
            stride_qd=1,
            stride_kd=1,
            stride_nd=1,
            PART=part,
            PARTS=triton.cdiv(width, columns),
            WITH_DQ=True,
            WITH_RANK=part == 0,
            EVEN_K=even,
            COUNTED=counted,
            EVEN_D=even or counted,
            PRECISION=operand if operand == "tf32" else "ieee",
            UPCAST=False,
            BLOCK_B=config.rows,
            BLOCK_K=config.cols,
            BLOCK_D=columns,
            STAGES=config.stages,
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
            q_ptr="*bf16",
            k_ptr="*bf16",
            m_ptr="*fp32",
            l_ptr="*fp32",
            rank_ptr="*i32",
            acc_ptr="*fp32",
            loss_ptr="*fp32",
            dq_ptr="*fp32",
            rank_out_ptr="*i64",
            n_rows="i32",
            n_splits="i32",
            dim="i32",
            stride_qb="i32",
            stride_kb="i32",
            scale="fp32",
            inverse_temperature="fp32",
        ),
        constants=dict(
            stride_qd=1,
            stride_kd=1,
            OPERAND=tl.bfloat16,
            PARTS=triton.cdiv(width, block_d(width)),
            WITH_DQ=True,
            WITH_RANK=True,
            BLOCK_S=MERGE_SPLITS,
            BLOCK_D=max(32, triton.next_power_of_2(width)),
            PART_D=block_d(width),
        ),
        aligned=("n_rows", "dim", "stride_qb", "stride_kb"),
        warps=4,
        stages=3,
        kind="small",
    )


def candidates(key: str, committed: Config) -> Iterator[Config]:
    """The configurations that a sweep tries for the split kernel."""
    return map(Config._make, itertools.product((16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3, 4)))


def workload(key: str, operand: str, width: int, batch: int, device: str) -> Workload:
    """The loss and dq of ``batch`` queries, at most 128, against a queue of 65536 rows."""
    batch = {16: 16, 64: 64}.get(batch, 128)
    draws = (torch.randn(rows, width, device=device) for rows in (batch, batch, 65536))
    q, k, queue = (F.normalize(draw, dim=1).to(operand_dtype(operand)) for draw in draws)
    precision = operand if operand == "tf32" else "ieee"
    arguments = dict(q=q.requires_grad_(), k=k, queue=queue, temperature=0.2, precision=precision)
    return Workload("queue_infonce", arguments)
