"""Two processes with half the batch each equal one with all of it: values, and gradients of the sum of their losses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from error_budget import upstream

import kernels

WORLD = 2
MINMAX = (None, "image", "batch")


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "feature": torch.relu(draw(4, 20, 3, 3)), "weight": draw(5, 20) * 0.3, "image": draw(4, 3, 8, 8),
        "colours": draw(5, 3), "gamma": 1 + 0.2 * draw(5), "beta": 0.5 + 0.1 * draw(5),
    }  # fmt: skip


def share(tensor: torch.Tensor, rank: int | None) -> torch.Tensor:
    return tensor if rank is None else tensor.chunk(WORLD)[rank]


def run(rank: int | None, minmax: str | None, impl: str, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    """Everything that both ops return and their gradients, for one share of the batch or (rank None) all of it."""
    given = tensors()
    feature = share(given["feature"], rank).clone().requires_grad_()
    weight, colours, gamma, beta = (given[name].requires_grad_() for name in ("weight", "colours", "gamma", "beta"))
    out = kernels.maxout(feature, weight, gamma, beta, minmax=minmax, group=group, impl=impl)
    image = share(given["image"], rank)
    twin = kernels.maxout_image(image, colours, gamma, beta, cell=4, minmax=minmax, group=group, impl=impl)
    loss = 0.0
    for seed, part in enumerate((out.mask, out.pooled, twin.mask)):
        grad = upstream(torch.empty(len(given["image"]), *part.shape[1:]), seed)
        loss = loss + (part * share(grad, rank).to(part)).sum()
    by_image = [out.mask, out.pooled, twin.mask, *torch.autograd.grad(loss, feature, retain_graph=True)]
    by_parameter = torch.autograd.grad(loss, (weight, colours, gamma, beta))
    return [*(part.detach() for part in by_image), out.mean, out.var, twin.mean, twin.var, *by_parameter]


def work(rank: int, folder: str, impl: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    try:
        results = {minmax: run(rank, minmax, impl, dist.group.WORLD) for minmax in MINMAX}
        torch.save(results, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


# gloo's processes hold CPU tensors, which the kernels take under the interpreter only
@pytest.mark.parametrize("impl", ["torch"] if torch.cuda.is_available() else ["torch", "triton"])
def test_two_processes_equal_one(impl, tmp_path):
    mp.spawn(work, (str(tmp_path), impl), nprocs=WORLD)
    shares = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    for minmax in MINMAX:
        whole = run(None, minmax, "torch", None)
        parts = list(zip(*(results[minmax] for results in shares), strict=True))
        for place, (expected, got) in enumerate(zip(whole, parts, strict=True)):
            if place < 4:  # split by image
                got = torch.cat(got)
            elif place < 8:  # the same in every process
                assert torch.equal(*got)
                got = got[0]
            else:  # parameters: shares that add up
                got = sum(got)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5, msg=f"{minmax}, output {place}")


def test_reference_refuses_a_group(tmp_path):
    class Two:
        group_name = "two"

        def size(self):
            return 2

    given = tensors()
    with pytest.raises(ValueError, match="knows one process"):
        kernels.maxout(given["feature"], given["weight"], given["gamma"], given["beta"], group=Two(), impl="reference")
    with pytest.raises(ValueError, match="one process"):
        kernels.maxout_image(given["image"], given["colours"], given["gamma"], given["beta"], cell=4, group=Two(),
                             pool="mean")  # fmt: skip
