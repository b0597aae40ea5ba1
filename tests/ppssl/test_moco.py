"""MoCo v2: the loss, the key network, the queue; and a method as a library."""

import copy
import itertools
from decimal import Decimal, localcontext

import pytest
import torch
import torch.nn.functional as F

from engine import Trainer
from engine.config import OptimConfig
from engine.evaluation.attention_maps import attention
from kernels import reference
from ppssl import METHODS, Batch, MoCo
from ppssl.batch_norm import shuffle, unshuffle
from ppssl.encoder import FeatureNet, Trunk, projection_head
from ppssl.moco import batch_infonce, contrast_accuracy, joint_infonce, ties
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


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """What computes in float32 at least keeps float64."""
    monkeypatch.setattr(torch.Tensor, "float", lambda t: t if t.dtype == torch.float64 else t.to(torch.float32))


def views(size: int = 4, seed: int = 3) -> Batch:
    x = torch.randn(2, size, 3, 32, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Batch(x[0], x[1], torch.arange(size))


def plain_contrast(method: MoCo, given: Batch, negatives: str, symmetric: bool, filled: int | None = None) -> torch.Tensor:
    """L_con written out, one image and one negative after the other, each view a pass of its own."""
    both = method.encoder_k is None

    def rows(encoder: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
        return F.normalize(encoder.head(encoder.trunk(images).mean((2, 3))), dim=1)

    def direction(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        q = rows(method.encoder_q, images)
        k = rows(method.encoder_q, others) if both else rows(method.encoder_k, others).detach()
        losses = []
        for i in range(len(q)):
            scores = [torch.dot(q[i], k[i])]
            if negatives != "queue":
                scores += [torch.dot(q[i], k[j]) for j in range(len(k)) if j != i]
            if negatives != "batch":
                scores += [torch.dot(q[i], row) for row in method.queue.rows[:filled]]
            losses.append(torch.logsumexp(torch.stack(scores) / 0.2, 0) - scores[0] / 0.2)
        return torch.stack(losses).mean()

    loss = direction(given.x_q, given.x_k)
    return (loss + direction(given.x_k, given.x_q)) / 2 if symmetric else loss


@pytest.mark.parametrize(
    ("negatives", "symmetric", "gradient"),
    list(itertools.product(("queue", "batch", "both"), (False, True), (False, True))),
)
@pytest.mark.usefixtures("exact")
def test_negatives_directions_and_gradient_are_what_they_say(negatives: str, symmetric: bool, gradient: bool) -> None:
    method = build(negatives=negatives, symmetric=symmetric, keys_with_gradient=gradient).double().train()
    if not gradient:  # as if it had moved
        with torch.no_grad():
            for parameter in method.encoder_k.parameters():
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    twin, given = copy.deepcopy(method), views()
    output, expected = method(given), plain_contrast(twin, given, negatives, symmetric)
    torch.testing.assert_close(output.total, expected, rtol=1e-10, atol=0)
    trained = method.trained_parameters()
    assert len(trained) == len(list(method.encoder_q.parameters()))
    for mine, theirs in zip(
        torch.autograd.grad(output.total, trained), torch.autograd.grad(expected, twin.trained_parameters()), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-12)
    # each pass moves the running statistics of its network: the views of one do not share them
    for (name, mine), theirs in zip(method.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12, msg=name)
    assert (method.encoder_k is None) == gradient and (len(method.ema_pairs()[0]) == 0) == gradient
    if negatives == "batch":
        assert output.keys is None and not any(name.startswith("queue") for name in method.state_dict())
        return
    assert output.keys.shape == (8 if symmetric else 4, 6) and not output.keys.requires_grad
    method.enqueue(output.keys, given.index)
    assert torch.equal(method.queue.rows[: len(output.keys)], output.keys) and int(method.queue.pointer) == len(output.keys)


def test_the_batch_s_negatives_are_those_of_the_reference_with_its_own_row_left_out() -> None:
    q, k = (F.normalize(torch.randn(7, 5, dtype=torch.float64), dim=1).requires_grad_() for _ in range(2))
    losses, rank = batch_infonce(q, k, 0.1)
    index = torch.arange(7)
    expected, expected_rank = reference.infonce(
        q, k, k, temperature=0.1, reduction="none", return_rank=True, exclude=(index, index)
    )
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(rank, expected_rank)
    assert torch.autograd.gradcheck(lambda q, k: batch_infonce(q, k, 0.1)[0], (q, k))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert batch_infonce(q.float(), k.float(), 0.1)[0].dtype == torch.float32


@pytest.mark.parametrize("scale", [1e-6, 1.0, 60.0, 3000.0])
def test_two_sets_of_negatives_are_joined_without_overflow_or_cancellation(scale: float) -> None:
    a, b = scale * torch.rand(2, 50, generator=torch.Generator().manual_seed(0)).double()
    a[0], b[1], a[2] = 0.0, 0.0, b[2]  # no negative on one side; both alike
    with localcontext(prec=60):
        exps = [(Decimal(x).exp(), Decimal(y).exp()) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
        exact = [(x + y - 1).ln() for x, y in exps]
        slopes = [x / (x + y - 1) for x, y in exps]
    for dtype, bound in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        given = a.to(dtype).requires_grad_()
        found = joint_infonce(given, b.to(dtype))
        (slope,) = torch.autograd.grad(found.sum(), given)
        torch.testing.assert_close(found.double(), torch.tensor([float(x) for x in exact], dtype=torch.float64), rtol=bound, atol=0)
        torch.testing.assert_close(
            slope.double(), torch.tensor([float(x) for x in slopes], dtype=torch.float64), rtol=4 * bound, atol=1e-12
        )


@pytest.mark.parametrize("negatives", ["queue", "both"])
@pytest.mark.usefixtures("exact")
def test_a_queue_that_starts_empty_counts_what_was_put_in(negatives: str) -> None:
    method = build(negatives=negatives, empty_queue=True).double().train()
    for step, filled in enumerate((0, 4, 8, 12, 12)):
        given = views(seed=step)
        assert int(method.queue.count) == filled
        expected = plain_contrast(copy.deepcopy(method), given, negatives, symmetric=False, filled=filled)
        output = method(given)
        torch.testing.assert_close(output.total, expected, rtol=1e-10, atol=1e-14)
        if filled == 0 and negatives == "queue":  # nothing to tell apart
            assert float(output.total.detach()) == 0 and all(
                float(g.abs().max()) == 0 for g in torch.autograd.grad(output.total, method.trained_parameters(), retain_graph=True)
            )
        method.enqueue(output.keys, given.index, torch.tensor(True))  # a step that is skipped
        assert int(method.queue.count) == filled
        method.enqueue(output.keys, given.index, torch.tensor(False))
    other = build(negatives=negatives, empty_queue=True)
    other.load_state_dict(method.state_dict())
    assert int(other.queue.count) == 12 and build().queue.count is None and "queue.filled" not in build().state_dict()


@pytest.mark.usefixtures("exact")
def test_keys_with_gradient_are_shuffled_among_parts_of_the_batch_and_reached_by_it() -> None:
    method = build(negatives="batch", keys_with_gradient=True, bn_groups=2).double().train()
    twin, given = copy.deepcopy(method), views()
    output = method(given)
    q = twin.embed_query(given.x_q)
    k = unshuffle(twin.embed_query(shuffle(given.x_k, 2, "")), 2, "")
    expected = F.cross_entropy(q @ k.T / 0.2, torch.arange(4))
    assert torch.allclose(output.total, expected, rtol=1e-10)
    mine, theirs = (torch.autograd.grad(loss, m.trained_parameters()) for loss, m in ((output.total, method), (expected, twin)))
    assert all(torch.allclose(a, b, rtol=1e-7, atol=1e-12) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("options", [{"negatives": "batch"}, {"negatives": "both", "symmetric": True, "keys_with_gradient": True}])
def test_what_the_queue_of_both_views_remembers_and_maps_leave_the_method_alone(options: dict) -> None:
    method = build(exclude_same_image=True, **options).train()
    images = torch.randn(3, 3, 32, 32)
    before = copy.deepcopy(method.state_dict())
    maps = attention(method, images)
    assert maps["cam"].shape == (3, 2, 2) and float(maps["cam"].max()) > 0 and not maps["cam"].requires_grad
    assert all(torch.equal(before[name], tensor) for name, tensor in method.state_dict().items())
    method.renumber(torch.tensor([0, -1]))
    if method.queue is not None:
        method.enqueue(torch.zeros(6, 6), torch.tensor([7, 8, 9]))
        assert method.queue.index.tolist() == [7, 8, 9, 7, 8, 9] + [-1] * 6


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
