"""A queue in parts equals the whole one: loss, gradients and ranks, whatever the parts, in one process and in several."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels.infonce import Partial, finish, merge, partial

T = 0.2


def unit_rows(*shape: int, seed: int) -> torch.Tensor:
    draw = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(draw, dim=-1)


def whole(q: torch.Tensor, k: torch.Tensor, queue: torch.Tensor, temperature: float = T) -> tuple[torch.Tensor, ...]:
    """The specification: (loss, dq, rank) of the unsharded op's eager reference."""
    q = q.clone().requires_grad_()
    loss, rank = kernels.queue_infonce(q, k, queue, temperature=temperature, reduction="none", return_rank=True, impl="reference")
    return loss.detach(), torch.autograd.grad(loss.sum(), q)[0], rank


@settings(max_examples=60, deadline=None)
@given(
    processes=st.integers(1, 4),
    size=st.integers(4, 90),
    batch=st.integers(1, 5),
    dim=st.integers(1, 9),
    temperature=st.sampled_from((0.01, 0.2, 5.0)),
    seed=st.integers(0, 2**16),
    aligned=st.booleans(),
)
def test_partials_of_any_parts_merge_to_the_whole(processes, size, batch, dim, temperature, seed, aligned):
    q, k, queue = (unit_rows(n, dim, seed=seed + i) for i, n in enumerate((batch, batch, size)))
    if aligned:  # the positive far above every negative, where 1 - p would cancel
        k = q.clone()
    edges = [process * size // processes for process in range(processes + 1)]
    shards = [queue[first:last] for first, last in zip(edges, edges[1:], strict=False)]
    parts = [partial(q, k, shard, temperature, True, True) for shard in shards]
    got = finish(merge(Partial(*map(torch.stack, zip(*parts, strict=True)))), q, k, temperature)
    for mine, expected in zip(got, whole(q, k, queue, temperature), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-11, atol=2e-14 / temperature)


WORLD, B, K, D = 2, 3, 37, 24  # 37 rows: parts of 18 and 19


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    queue = unit_rows(K, D, seed=2)[rank * K // WORLD : (rank + 1) * K // WORLD]
    results = {}
    for impl, dtype in (("chunked", torch.float64), ("triton", torch.float32)):
        q = unit_rows(WORLD * B, D, seed=0).chunk(WORLD)[rank].to(dtype).requires_grad_()
        k = unit_rows(WORLD * B, D, seed=1).chunk(WORLD)[rank].to(dtype).requires_grad_()
        loss, ranks = kernels.queue_infonce(
            q, k, queue.to(dtype), temperature=T, reduction="none", return_rank=True, group=dist.group.WORLD, impl=impl
        )
        dq, dk = torch.autograd.grad(loss.sum(), (q, k))
        with torch.no_grad():
            silent = kernels.queue_infonce(q, k, queue.to(dtype), temperature=T, group=dist.group.WORLD, impl=impl)
            # of the whole queue the first 25 rows count: all of the first part, 7 of the second; then 10: none of the second
            counted = [
                kernels.queue_infonce(
                    q, k, queue.to(dtype), temperature=T, reduction="none", group=dist.group.WORLD, impl=impl,
                    count=torch.tensor(count - rank * K // WORLD).clamp(0, len(queue)),
                )
                for count in (25, 10)
            ]  # fmt: skip
        results[impl] = loss.detach(), dq, ranks, dk, silent[None], *counted
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(torch.cuda.is_available(), reason="gloo's processes hold CPU tensors: Triton takes them interpreted only")
def test_processes_that_hold_a_part_each_equal_one(tmp_path):
    mp.spawn(work, (str(tmp_path),), nprocs=WORLD)
    shares = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    q, k, queue = unit_rows(WORLD * B, D, seed=0), unit_rows(WORLD * B, D, seed=1), unit_rows(K, D, seed=2)
    expected = list(whole(q, k, queue))
    k.requires_grad_()
    expected.append(torch.autograd.grad(kernels.queue_infonce(q, k, queue, temperature=T, reduction="sum", impl="reference"), k)[0])
    for impl, tolerance in (("chunked", 1e-11), ("triton", 2e-5)):
        *got, silent, many, few = [torch.cat(parts) for parts in zip(*(share[impl] for share in shares), strict=True)]
        for mine, true in zip(got, expected, strict=True):
            torch.testing.assert_close(mine, true.to(mine.dtype), rtol=tolerance, atol=tolerance / 10)
        for mine, count in ((many, 25), (few, 10)):
            true = whole(q, k.detach(), queue[:count])[0].to(mine.dtype)
            torch.testing.assert_close(mine, true, rtol=tolerance, atol=tolerance / 10)
        torch.testing.assert_close(silent.mean(), expected[0].mean().to(silent.dtype), rtol=tolerance, atol=0)


def test_the_reference_refuses_a_group():
    q = unit_rows(2, 3, seed=0)
    with pytest.raises(ValueError, match="knows one process"):
        kernels.queue_infonce(q, q, q, temperature=T, group="several", impl="reference")
