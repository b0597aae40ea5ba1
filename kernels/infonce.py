"""InfoNCE against a queue: ``loss_i = lse(q_i.k_i / T, q_i.queue_j / T) - q_i.k_i / T`` in one pass over the queue.

The logits [B, 1 + K] are never in memory. The forward pass computes ``dq`` together with the loss. The backward pass only
scales it, so the queue may be overwritten in place between the two, and nothing of size K is saved. With the probability
of the positive ``p_i = exp(-loss_i)``, ``dloss_i/dk_i = (p_i - 1) q_i / T``. Sums, maxima and exponentials are float32
(float64 for float64 inputs), whatever the dtype of the operands, and under autocast too.

There are two paths: ``infonce_triton.py`` on CUDA, and the chunked one below, whose [B, rows] block stays in the cache.

With a ``group``, every process holds a shard of the queue. It gathers the queries of all processes, computes their
partial sums over its shard, sends each process the partials of that process's queries, and merges what it receives. This
is exactly the softmax over all rows, and costs one all-gather of the queries and one all-to-all of the partials, both
independent of K.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from kernels import reference
from kernels.group import all_to_all, gather, group_name, world_size
from kernels.online_softmax import Partial, finish, merge
from kernels.selection import check_floating, choose, refuse_double_backward

CHUNK_ELEMENTS = 1 << 17
"""How many logits the chunked path holds at a time (512 KiB of float32: half of a common L2 cache)."""
MAX_DIM = 512
"""Widest embedding of the Triton kernel."""


def queue_infonce(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    *,
    temperature: float,
    reduction: Literal["mean", "sum", "none"] = "mean",
    return_rank: bool = False,
    impl: Literal["auto", "triton", "chunked", "reference"] = "auto",
    precision: Literal["ieee", "tf32"] = "ieee",
    exclude: tuple[Tensor, Tensor] | None = None,
    group: dist.ProcessGroup | str | None = None,
    count: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """InfoNCE of MoCo (He et al. 2020, eq. 1) against a queue of negatives, without the matrix of logits.

    Args:
        q: [B, D] queries, or [V, B, D] for V stacked queries that read the queue once. 16-bit floats, float32 or
            float64. Rows are used as they are: normalize them first if you want cosine similarities.
        k: [B, D] keys of the positives; with stacked queries [B, D] (shared) or [V, B, D].
        queue: [K, D] negatives, any K >= 1 and any strides. It never receives a gradient. The Triton path rounds q and
            k to the dtype of the queue for the products.
        temperature: T > 0.
        reduction: over the batch axis; ``"mean"`` and ``"sum"`` give a scalar, or [V] for stacked queries.
        return_rank: also return, for each query, the number of queue rows that score strictly above its positive
            (top-1 hit: rank == 0, top-5: rank < 5). Rounding decides exact ties.
        impl: ``"auto"`` is Triton on CUDA and the chunked pass elsewhere.
        precision: how the Triton path multiplies float32 operands.
        exclude: (index [B], queue_index [K]) int64. Where queue_index[j] == index[i], queue row j is not a negative of
            query i and is not counted in its rank. ``impl="auto"`` then takes the chunked path, on a GPU too.
        group: processes that each hold one shard of the queue (``queue`` is this process's shard, of any length) and the
            same number of queries. Each gets the loss, gradients and ranks of its queries against the whole queue.
        count: 0-d int64 on the queue's device: only the first ``count`` rows of the queue (with a group, of this process's
            shard) are negatives. It is read on the device, so a queue that fills up needs no other shapes and no other graph.
            0 is no negative: the loss and its gradient are 0.

    Returns:
        loss, or (loss, rank): loss is float32 (float64 for float64 inputs), rank is int64, one per query. Gradients flow
        to q and k. Results are deterministic. A NaN in a query, a key or any queue row gives NaN.

    Raises:
        TypeError: an argument is not a floating tensor, temperature is not a number, or exclude or count is not int64.
        ValueError: wrong rank, shape or device, empty batch or queue, temperature not positive, unknown option, or a group
            with ``impl="reference"``.
        RuntimeError: second derivatives (``create_graph=True``) of a fused path.
    """
    _check(q, k, queue, temperature, reduction, precision)
    if exclude is not None:
        _check_exclude(exclude, q, queue)
    if count is not None:
        _check_count(count, queue)
    unsupported = f"D must be at most {MAX_DIM}, got {q.shape[-1]}" if q.shape[-1] > MAX_DIM else None
    widest = torch.promote_types(torch.promote_types(q.dtype, k.dtype), queue.dtype)
    unsupported = "float64 is not supported" if widest == torch.float64 else unsupported
    unsupported = unsupported if exclude is None else "the kernel does not exclude rows"
    chosen = choose("queue_infonce", impl, queue, fast="chunked", unsupported=unsupported)
    name = group_name(group)
    if chosen == "reference":
        if name:
            raise ValueError("queue_infonce: impl='reference' knows one process; use impl='chunked' with a group")
        with torch.autocast(q.device.type, enabled=False):
            return reference.infonce(
                q, k, queue, temperature=temperature, reduction=reduction, return_rank=return_rank, exclude=exclude, count=count
            )
    shape = q.shape[:-1]
    index, queue_index = (None, None) if exclude is None else (exclude[0].expand(shape).reshape(-1), exclude[1])
    with_dq = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    loss, _, rank = torch.ops.ppssl.infonce(
        q.reshape(-1, q.shape[-1]),
        k.expand(q.shape).reshape(-1, q.shape[-1]),
        queue.detach(),
        float(temperature),
        with_dq,
        return_rank,
        chosen,
        precision,
        name,
        index,
        queue_index,
        count,
    )
    loss = loss.view(shape)
    if reduction != "none":
        loss = loss.mean(-1) if reduction == "mean" else loss.sum(-1)
    return (loss, rank.view(shape)) if return_rank else loss


@torch.no_grad()
def enqueue(queue: Tensor, pointer: Tensor, keys: Tensor, skip: Tensor | None = None) -> None:
    """Write ``keys`` into the ring buffer at ``pointer`` and advance it, in place and without a host sync.

    Safe under CUDA graphs and ``torch.compile``: the pointer is read on the device.

    Args:
        queue: [K, D].
        pointer: 0-d int64 tensor in [0, K), on the queue's device.
        keys: [B, D] for any B, cast to the queue's dtype. With B > K the last K keys remain, in the slots where writing
            one key at a time would have left them.
        skip: 0-d bool tensor; where it is true nothing changes.

    Raises:
        TypeError: pointer is not int64, or queue or keys are not floating.
        ValueError: wrong rank, width or device.
    """
    check_floating("enqueue", queue=queue, keys=keys)
    if queue.dim() != 2 or keys.dim() != 2 or queue.shape[1] != keys.shape[1] or queue.shape[0] == 0:
        raise ValueError(f"enqueue: want queue [K, D] and keys [B, D], got {list(queue.shape)} and {list(keys.shape)}")
    if pointer.dtype != torch.int64:
        raise TypeError(f"enqueue: pointer must be int64, got {pointer.dtype}")
    if pointer.dim() != 0 or pointer.device != queue.device:
        raise ValueError(f"enqueue: pointer must be a 0-d tensor on {queue.device}, got {list(pointer.shape)} on {pointer.device}")
    size, count = queue.shape[0], keys.shape[0]
    kept = min(size, count)
    slots = (pointer + torch.arange(count - kept, count, device=queue.device)) % size
    rows = keys[count - kept :].to(queue.dtype)
    if skip is not None:
        rows = torch.where(skip, queue[slots], rows)
        count = count * ~skip
    queue.index_copy_(0, slots, rows)
    pointer.add_(count).remainder_(size)


def _check(q: Tensor, k: Tensor, queue: Tensor, temperature: float, reduction: str, precision: str) -> None:
    check_floating("queue_infonce", q=q, k=k, queue=queue)
    if q.dim() not in (2, 3) or 0 in q.shape:
        raise ValueError(f"queue_infonce: q must be a non-empty [B, D] or [V, B, D], got {list(q.shape)}")
    if k.shape != q.shape and k.shape != q.shape[1:]:
        raise ValueError(f"queue_infonce: k must have the shape of q {list(q.shape)}, got {list(k.shape)}")
    if queue.dim() != 2 or queue.shape[0] == 0 or queue.shape[1] != q.shape[-1]:
        raise ValueError(f"queue_infonce: queue must be [K, {q.shape[-1]}] with K >= 1, got {list(queue.shape)}")
    if isinstance(temperature, (bool, str, Tensor)) or not hasattr(temperature, "__float__"):
        raise TypeError(f"queue_infonce: temperature must be a number, got {type(temperature).__name__}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"queue_infonce: temperature must be positive and finite, got {temperature}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"queue_infonce: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if precision not in ("ieee", "tf32"):
        raise ValueError(f"queue_infonce: precision must be 'ieee' or 'tf32', got {precision!r}")


def _check_exclude(exclude: tuple[Tensor, Tensor], q: Tensor, queue: Tensor) -> None:
    index, queue_index = exclude
    if index.dtype != torch.int64 or queue_index.dtype != torch.int64:
        raise TypeError(f"queue_infonce: exclude must be int64, got {index.dtype} and {queue_index.dtype}")
    if index.shape != q.shape[-2:-1] or queue_index.shape != queue.shape[:1]:
        raise ValueError(
            f"queue_infonce: exclude must be ([{q.shape[-2]}], [{queue.shape[0]}]), got {list(index.shape)} and "
            f"{list(queue_index.shape)}"
        )


def _check_count(count: Tensor, queue: Tensor) -> None:
    if not isinstance(count, Tensor) or count.dtype != torch.int64:
        raise TypeError(f"queue_infonce: count must be an int64 tensor, got {getattr(count, 'dtype', type(count).__name__)}")
    if count.dim() != 0 or count.device != queue.device:
        raise ValueError(f"queue_infonce: count must be 0-d on {queue.device}, got {list(count.shape)} on {count.device}")


@torch.library.custom_op("ppssl::infonce", mutates_args=())
def _infonce(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    temperature: float,
    with_dq: bool,
    with_rank: bool,
    impl: str,
    precision: str,
    group: str = "",
    index: Tensor | None = None,
    queue_index: Tensor | None = None,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [B], dloss/dq [B, D] or [0, D], rank [B] int64 or [0])."""
    if impl == "triton":
        from kernels import infonce_triton  # here, because triton may not be installed

        if not group:
            return infonce_triton.forward(q, k, queue, temperature, with_dq, with_rank, precision, count)
        q, k = (x.to(queue.dtype).float() for x in (q, k))  # what the kernel multiplies
    with torch.autocast(q.device.type, enabled=False):
        dtype = _compute_dtype(q, k, queue)
        q, k = q.to(dtype), k.to(dtype)
        if not group:
            part = partial(q, k, queue, temperature, with_dq, with_rank, index, queue_index, count)
            return finish(part, q, k, temperature)
        every_q, every_k = gather(torch.cat([q, k], 1), group).chunk(2, 1)
        if impl == "triton":
            part = infonce_triton.partial(every_q, every_k, queue, temperature, with_dq, with_rank, precision, count)
        else:
            every_index = None if index is None else gather(index, group)
            part = partial(every_q, every_k, queue, temperature, with_dq, with_rank, every_index, queue_index, count)
        return finish(merge(_send_home(part, group)), q, k, temperature)


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


@_infonce.register_fake
def _(q, k, queue, temperature, with_dq, with_rank, impl, precision, group="", index=None, queue_index=None, count=None):
    batch, dim = q.shape
    dtype = _compute_dtype(q, k, queue)
    return (
        q.new_empty(batch, dtype=dtype),
        q.new_empty((batch if with_dq else 0, dim), dtype=dtype),
        q.new_empty(batch if with_rank else 0, dtype=torch.int64),
    )


def _setup_context(ctx, inputs, output):
    q, k, _, temperature, *_ = inputs
    loss, dq, rank = output
    ctx.mark_non_differentiable(dq, rank)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, loss, dq)
    ctx.temperature = temperature
    ctx.dtypes = q.dtype, k.dtype


def _backward(ctx, grad_loss, grad_dq, grad_rank):
    refuse_double_backward("queue_infonce")
    q, loss, dq = ctx.saved_tensors
    grad_q = grad_k = None
    if grad_loss is not None:
        if ctx.needs_input_grad[0]:
            grad_q = (grad_loss[:, None] * dq).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            weight = grad_loss * torch.expm1(-loss) / ctx.temperature
            grad_k = (weight[:, None] * q).to(ctx.dtypes[1])
    return (
        grad_q,
        grad_k,
        None,  # queue
        None,  # temperature
        None,  # with_dq
        None,  # with_rank
        None,  # impl
        None,  # precision
        None,  # group
        None,  # index
        None,  # queue_index
        None,  # count
    )


_infonce.register_autograd(_backward, setup_context=_setup_context)


def partial(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    temperature: float,
    with_dq: bool,
    with_rank: bool,
    index: Tensor | None = None,
    queue_index: Tensor | None = None,
    count: Tensor | None = None,
) -> Partial:
    """The online softmax (Milakov and Gimelshein 2018) over blocks of queue rows; extra memory independent of K."""
    dtype = q.dtype
    batch, dim = q.shape
    size = queue.shape[0]
    rows = min(size, max(64, CHUNK_ELEMENTS // batch))
    scaled = q / temperature
    positive = (scaled * k).sum(1)
    # The positive is the first reference point, and stays out of the sums: 1 - p would cancel if it were in them.
    m_i = positive.clone()
    l_i = torch.zeros_like(positive)
    acc = torch.zeros((batch if with_dq else 0, dim), dtype=dtype, device=q.device)
    rank = torch.zeros(batch if with_rank else 0, dtype=torch.int64, device=q.device)
    buffer = torch.empty(batch * rows, dtype=dtype, device=q.device)
    above = torch.empty(batch * rows if with_rank else 0, dtype=dtype, device=q.device)
    for start in range(0, size, rows):
        block = queue[start : start + rows].to(dtype)
        shape = batch, block.shape[0]
        logits = torch.mm(scaled, block.T, out=buffer[: shape[0] * shape[1]].view(shape))
        if index is not None:
            logits.masked_fill_(index[:, None] == queue_index[start : start + rows], float("-inf"))
        if count is not None:
            logits.masked_fill_(torch.arange(start, start + shape[1], device=q.device) >= count, float("-inf"))
        if with_rank:
            # Ones and zeros in the dtype of the logits: summing booleans would convert them to int64 first.
            rank += torch.gt(logits, positive[:, None], out=above[: shape[0] * shape[1]].view(shape)).sum(1).long()
        new_m_i = torch.maximum(m_i, logits.amax(1))
        alpha = torch.exp(m_i - new_m_i)
        weights = logits.sub_(new_m_i[:, None]).exp_()
        l_i = l_i.mul_(alpha).add_(weights.sum(1))
        if with_dq:
            acc.mul_(alpha[:, None]).addmm_(weights, block)
        m_i = new_m_i
    return Partial(m_i, l_i, rank, acc)


def _send_home(part: Partial, group: str) -> Partial:
    """Given the partials of all queries over this process's shard, returns those of its queries over every shard, stacked.

    One all-to-all: the ranks travel as the bits of a float of the same width.
    """
    dtype, processes = part.m_i.dtype, world_size(group)
    integers = torch.int64 if dtype == torch.float64 else torch.int32
    columns = [part.m_i[:, None], part.l_i[:, None]]
    if len(part.rank):
        columns.append(part.rank.to(integers)[:, None].view(dtype))
    if len(part.acc):
        columns.append(part.acc)
    packed = torch.cat(columns, 1)
    share = [len(packed) // processes] * processes
    received = all_to_all(packed, share, share, group).view(processes, share[0], -1)
    m_i, l_i, rest = received[..., 0], received[..., 1], received[..., 2:]
    rank = torch.zeros((processes, 0), dtype=torch.int64, device=m_i.device)
    if len(part.rank):
        rank, rest = rest[..., :1].contiguous().view(integers)[..., 0].long(), rest[..., 1:]
    return Partial(m_i, l_i, rank, rest if len(part.acc) else part.acc.expand(processes, 0, -1))
