"""Queue InfoNCE against MoCo's own lines, a tuned eager form and its compiled form.

Bytes: the queue once, q, k and dq. Operations: 4 B K D, two products of [B, D] with the queue.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

import kernels
from bench.timing import CUDA, DEVICE, GUARDS, alternate, close, compiled, guard, measure, modes, peak_extra_bytes

TEMPERATURE = 0.2
SHAPES = [(128, 65536, 128), (128, 65536, 256), (1024, 262144, 128)] if CUDA else [(128, 65536, 128)]
PROVIDERS = ["eager", "tuned", "compile", "ours"] if CUDA else ["eager", "tuned", "ours"]
"""``compile`` makes CPU steps slower and takes longer to build than all the rest here: it is measured on GPUs."""
DTYPE = torch.bfloat16 if CUDA else torch.float32


def moco(q, k, queue):
    """What MoCo's training loop does, queue copied, positive in front, cross-entropy against zeros."""
    positive = torch.einsum("nc,nc->n", q, k)[:, None]
    negative = torch.einsum("nc,kc->nk", q, queue.clone().detach())
    logits = torch.cat([positive, negative], dim=1).float() / TEMPERATURE
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


def tuned(q, k, queue):
    """The best that a few eager lines do: no copy, no concatenation."""
    positive = (q * k).sum(1).float() / TEMPERATURE
    negative = (q @ queue.T).float() / TEMPERATURE
    return (torch.logaddexp(positive, negative.logsumexp(1)) - positive).mean()


def ours(q, k, queue):
    return kernels.queue_infonce(q, k, queue, temperature=TEMPERATURE)


def provider(name: str):
    return {"eager": moco, "tuned": tuned, "ours": ours}.get(name) or compiled(tuned)


def inputs(batch: int, size: int, dim: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    rows = (F.normalize(torch.randn(count, dim, device=DEVICE), dim=1).to(DTYPE) for count in (batch, batch, size))
    q, k, queue = rows
    return q.requires_grad_(), k, queue


@pytest.mark.parametrize("mode", ["forward", "backward", "both"])
@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("shape", SHAPES, ids="B{0[0]}-K{0[1]}-D{0[2]}".format)
def test_infonce(benchmark, shape, name, mode):
    batch, size, dim = shape
    q, k, queue = inputs(*shape)
    function = provider(name)
    got = function(q, k, queue)
    want = kernels.reference.infonce(q.float(), k.float(), queue.float(), temperature=TEMPERATURE)
    tolerance = 1e-5 if torch.float32 == DTYPE else 2e-2
    close(name, [got, *torch.autograd.grad(got, q)], [want, *torch.autograd.grad(want, q)], tolerance)
    element = queue.element_size()
    measure(
        benchmark,
        modes(functools.partial(function, q, k, queue), [q])[mode],
        moved=(size + 3 * batch) * dim * element if mode != "backward" else 3 * batch * dim * element,
        flop=4 * batch * size * dim if mode == "both" else 2 * batch * size * dim if mode == "forward" else 0,
        replay=mode != "backward",
    )


def test_infonce_guard(benchmark):
    q, k, queue = inputs(*SHAPES[0])
    sides = {name: modes(functools.partial(provider(name), q, k, queue), [q])["both"] for name in PROVIDERS}

    def ratios() -> dict[str, float]:
        seconds = alternate(sides)
        memory = {name: peak_extra_bytes(sides[name]) for name in ("eager", "ours")}
        found = {
            "over_eager": seconds["eager"] / seconds["ours"],
            "memory_under_eager": memory["eager"] / memory["ours"],
        }
        if CUDA:
            found["over_compile"] = seconds["compile"] / seconds["ours"]
        return found

    guard(benchmark, "infonce", ratios, GUARDS["infonce"]["cuda" if CUDA else "cpu"])
    benchmark.pedantic(sides["ours"], rounds=1)
