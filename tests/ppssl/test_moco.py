"""MoCo v2: the loss, the key network, the queue; and a method as a library."""

import copy

import pytest
import torch
import torch.nn.functional as F

from engine import Trainer
from engine.config import OptimConfig
from ppssl import METHODS, Batch, MoCo
from ppssl.encoder import FeatureNet, Trunk, projection_head
from ppssl.moco import contrast_accuracy, ties
from ppssl.momentum import KeyQueue, key_copy, parameter_pairs


def build(queue_size: int = 12, **options) -> MoCo:
    torch.manual_seed(0)
    trunk = Trunk("resnet18_w8_s16")
    head = projection_head("mlp2", trunk.channels, 6)
    return MoCo(FeatureNet(trunk), head, dim=6, queue_size=queue_size, temperature=0.2, **options)


class Noise:
    """A loader of noise images: any object with these two names is a loader."""

    steps_per_epoch = 5

    def batches(self, start_step: int, stop_step: int):
        for step in range(start_step, stop_step):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(2, 8, 3, 32, 32, generator=generator)
            yield Batch(x[0], x[1], torch.arange(8))


def test_the_loss_is_cross_entropy_over_the_key_and_the_queue() -> None:
    method = build().train()
    x_q, x_k = torch.randn(2, 4, 3, 32, 32)
    twin = copy.deepcopy(method)
    output = method(Batch(x_q, x_k, torch.arange(4)))
    q = F.normalize(twin.encoder_q.head(twin.encoder_q.trunk(x_q).mean((2, 3))), dim=1)
    with torch.no_grad():
        k = F.normalize(twin.encoder_k.head(twin.encoder_k.trunk(x_k).mean((2, 3))), dim=1)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ twin.queue.rows.T], 1) / 0.2
    expected = F.cross_entropy(logits, torch.zeros(4, dtype=torch.long))
    assert torch.allclose(output.total, expected, rtol=1e-5) and torch.allclose(output.keys, k, atol=1e-6)
    assert float(output.stats["contrast_top1"]) == float((logits.argmax(1) == 0).float().mean())
    assert not any(p.requires_grad for p in method.encoder_k.parameters())


def test_what_ties_with_the_positive_is_no_hit() -> None:
    method = build().train()
    black = torch.zeros(4, 3, 32, 32)
    method.queue.rows.copy_(-method.keys(black)[0])  # no negative scores above the positive
    output = method(Batch(black, black, torch.arange(4)))
    stats = {name: float(value) for name, value in output.stats.items()}
    assert stats["contrast_ties"] == 1 and stats["contrast_top1"] == 0 and stats["contrast_top5"] == 1 and stats["spread"] < 1e-5
    rank, tied = torch.tensor([0, 0, 1, 3, 5]), torch.tensor([0, 1, 0, 2, 0])
    assert {name: float(v) for name, v in contrast_accuracy(rank, tied).items()} == pytest.approx(
        {"contrast_top1": 0.2, "contrast_top5": 0.6, "contrast_ties": 0.4}
    )


def test_ties_are_other_images_keys_that_score_the_same() -> None:
    k = F.normalize(torch.randn(6, 16), dim=1)
    q = F.normalize(k + 0.1 * torch.randn(6, 16), dim=1)
    assert ties(q, k).tolist() == [0] * 6
    k[4] = k[1]
    assert ties(q, k).tolist() == [0, 1, 0, 0, 1, 0]


def test_key_copy_and_pairs() -> None:
    method = build()
    online, target = method.ema_pairs()
    assert len(online) == len(list(method.encoder_q.parameters())) and all(
        torch.equal(a, b) for a, b in zip(online, target, strict=True)
    )
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(online, target, strict=True))
    assert parameter_pairs(method.encoder_q, key_copy(method.encoder_q))[1][0].requires_grad is False


def test_queue_is_a_ring_of_the_last_keys() -> None:
    torch.manual_seed(0)
    queue = KeyQueue(5, 2)
    assert torch.allclose(queue.rows.norm(dim=1), torch.ones(5))
    keys = torch.arange(14, dtype=torch.float32).view(7, 2)
    queue.push(keys[:3], torch.arange(3))
    assert torch.equal(queue.rows[:3], keys[:3]) and int(queue.pointer) == 3
    queue.push(keys[3:], torch.arange(4))  # wraps around
    assert torch.equal(queue.rows, torch.cat([keys[5:7], keys[2:5]])) and int(queue.pointer) == 2
    assert set(queue.state_dict()) == {"rows", "pointer"}  # a resumed run keeps its negatives


def test_a_queue_that_remembers_whose_keys_it_holds() -> None:
    queue = KeyQueue(5, 2, remember=True)
    assert queue.index.tolist() == [-1] * 5 and "index" in queue.state_dict()
    queue.push(torch.zeros(3, 2), torch.tensor([7, 8, 9]))
    queue.push(torch.zeros(4, 2), torch.tensor([1, 2, 3, 4]))
    assert queue.index.tolist() == [3, 4, 9, 1, 2] and int(queue.pointer) == 2
    queue.push(torch.zeros(12, 2), torch.arange(12))  # more than it holds: the last five stay, where one by one left them
    assert queue.index.tolist() == [8, 9, 10, 11, 7]


def test_exclude_same_image_takes_stale_keys_of_the_same_image_out_of_the_sum() -> None:
    method, plain = build(exclude_same_image=True).train(), build().train()
    x_q, x_k = torch.randn(2, 4, 3, 32, 32)
    batch = Batch(x_q, x_k, torch.tensor([5, 6, 7, 8]))
    twin = copy.deepcopy(method)
    assert torch.equal(method(batch).total, plain(batch).total)  # nothing is remembered yet
    for m in (twin, plain):
        m.load_state_dict({n: t for n, t in method.state_dict().items() if n != "queue.index"}, strict=False)
        m.enqueue(m.keys(x_k), batch.index)
    q = F.normalize(copy.deepcopy(twin).encoder_q(x_q), dim=1).detach()
    losses, rank = twin.contrast(q, twin.keys(x_k), batch.index)
    k = twin.keys(x_k)
    for i in range(4):
        others = [j for j in range(12) if j != i]  # row i is this image's key of the step before
        logits = torch.cat([(q[i] * k[i]).sum()[None], twin.queue.rows[others] @ q[i]]) / 0.2
        assert torch.allclose(losses[i], torch.logsumexp(logits, 0) - logits[0], rtol=1e-4)
    assert twin(batch).total < plain(batch).total


def test_what_the_queue_remembers_follows_the_images_to_another_list() -> None:
    method = build(exclude_same_image=True)
    method.enqueue(torch.zeros(4, 6), torch.tensor([0, 3, 1, 2]))
    method.renumber(torch.tensor([2, -1, 0, 1, -1]))  # image 1 is gone, the others have moved
    assert method.queue.index.tolist() == [2, 1, -1, 0] + [-1] * 8
    build().renumber(torch.tensor([0, -1]))  # nothing is remembered


def test_a_method_trains_as_a_library_without_files() -> None:
    method = build(queue_size=16)
    before = copy.deepcopy(method.state_dict())
    epochs = []
    summary = Trainer(
        method, Noise(), epochs=2, optim=OptimConfig(lr=0.1), ema_decay=0.5, hooks=[lambda t: epochs.append(t.epoch)]
    ).fit()
    assert summary.steps == 10 and epochs == [1, 2]
    after = method.state_dict()
    for name in ("encoder_q.trunk.conv1.weight", "encoder_k.trunk.conv1.weight", "queue.rows", "encoder_k.trunk.bn1.running_mean"):
        assert not torch.equal(before[name], after[name]), name
    assert int(after["queue.pointer"]) == 80 % 16
    assert METHODS["moco"] is MoCo
