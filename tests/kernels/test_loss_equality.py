"""``queue_infonce`` is the contrastive loss of MoCo, solo-learn and lightly: each formula is written out here from its description,
and values and gradients agree in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ppssl import queue_infonce

Loss = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def moco(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """MoCo, algorithm 1 of arXiv 1911.05722: cross entropy over [q.k | q.queue] / T with the positive at place 0, batch mean."""
    positive = torch.einsum("nc,nc->n", q, k)[:, None]
    negative = torch.einsum("nc,kc->nk", q, queue)
    logits = torch.cat([positive, negative], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))


def solo_learn(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """solo-learn's MoCo V2+ loss, one of its two directions: the same cross entropy on rows normalized inside it, with the queue
    as [D, K]."""
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    columns = queue.T.contiguous()
    logits = torch.hstack([(q * k).sum(-1, keepdim=True), q @ columns]) / temperature
    return -F.log_softmax(logits, dim=1)[:, 0].mean()


def lightly(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """lightly's NTXentLoss with a memory bank: rows normalized inside it, negatives from the bank alone, and
    l_i = -log( exp(sim(q_i, k_i) / T) / (exp(sim(q_i, k_i) / T) + sum_j exp(sim(q_i, bank_j) / T)) )."""
    q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    positive = ((q * k).sum(1) / temperature).exp()
    negative = (q @ queue.T / temperature).exp().sum(1)
    return -(positive / (positive + negative)).log().mean()


def inputs(batch: int, rows: int, dim: int, *, unit: bool) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch + rows + dim)
    q, k, queue = (torch.randn(n, dim, dtype=torch.float64, generator=generator) for n in (batch, batch, rows))
    if unit:
        q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    return q.requires_grad_(), k.requires_grad_(), F.normalize(queue, dim=1)


def fused(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    return queue_infonce(q, k, queue, temperature=temperature)


def fused_on_normalised_rows(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """The two libraries normalize inside the loss; here that is the caller's line."""
    return queue_infonce(F.normalize(q, dim=1), F.normalize(k, dim=1), queue, temperature=temperature)


@pytest.mark.parametrize("temperature", [0.2, 0.07])
@pytest.mark.parametrize(("batch", "rows", "dim"), [(8, 64, 16), (5, 1000, 7), (1, 1, 1)])
@pytest.mark.parametrize(("theirs", "ours"), [
    pytest.param(moco, fused, id="moco"),
    pytest.param(solo_learn, fused_on_normalised_rows, id="solo-learn"),
    pytest.param(lightly, fused_on_normalised_rows, id="lightly"),
])  # fmt: skip
def test_values_and_gradients(theirs: Loss, ours: Loss, batch: int, rows: int, dim: int, temperature: float) -> None:
    q, k, queue = inputs(batch, rows, dim, unit=theirs is moco)
    expected = theirs(q, k, queue, temperature)
    found = ours(q, k, queue, temperature)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad(expected, (q, k))
    given = torch.autograd.grad(found, (q, k))
    for mine, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


def test_a_moco_step_with_the_loss_replaced() -> None:
    """The replacement that README shows, on a network: the same parameters after a step of SGD, and the same top-1 accuracy."""
    torch.manual_seed(0)
    x, k, queue = torch.randn(16, 12, dtype=torch.float64), *inputs(16, 100, 6, unit=True)[1:]
    columns = queue.T.contiguous()  # MoCo keeps its queue as [D, K]
    after, hits = [], []
    for replaced in (False, True):
        torch.manual_seed(1)
        net = torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.ReLU(), torch.nn.Linear(20, 6)).double()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        q = F.normalize(net(x), dim=1)
        if replaced:
            loss, rank = queue_infonce(q, k.detach(), columns.T, temperature=0.2, return_rank=True)
            hits.append((rank == 0).double().mean())
        else:
            logits = torch.cat([(q * k.detach()).sum(1, keepdim=True), q @ columns], dim=1) / 0.2
            loss = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))
            hits.append((logits.argmax(1) == 0).double().mean())
        loss.backward()
        optimizer.step()
        after.append([p.detach().clone() for p in net.parameters()])
    for mine, other in zip(*after, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)
    assert hits[0] == hits[1]
