"""One step: momentum first, gradients of the parameters only, SGD, enqueue; a step that is not finite changes nothing."""

import copy
import math

import pytest
import small_methods
import torch
from torch import nn

from engine.config import OptimConfig
from engine.training import optim, precision
from engine.training.step import Step
from ppssl.encoder import FeatureNet, Trunk, projection_head
from ppssl.method import Batch, Method, Output, StepContext
from ppssl.moco import MoCo

CPU = torch.device("cpu")


class Toy(Method):
    """A linear model with a momentum twin whose loss is the sum of its outputs over the images."""

    needs_image_grad = ("x_q",)

    def __init__(self) -> None:
        super().__init__()
        self.online = nn.Linear(3, 1, bias=False)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        nn.init.zeros_(self.target.weight)
        self.pushed: list[torch.Tensor] = []
        self.factor = 1.0

    def ema_pairs(self):
        return list(self.online.parameters()), list(self.target.parameters())

    def forward(self, batch: Batch, context: StepContext) -> Output:
        assert batch.x_q.is_leaf and batch.x_q.requires_grad
        self.target_seen = self.target.weight.clone()
        total = self.factor * self.online(batch.x_q.mean((2, 3))).sum()
        (image_gradient,) = torch.autograd.grad(total, batch.x_q, retain_graph=True)
        return Output(total, {"sum": total.detach()}, image_gradient.mean((1, 2, 3), keepdim=True)[:, :, 0, 0], {})

    def enqueue(self, keys: torch.Tensor, index: torch.Tensor, skip: torch.Tensor | None = None) -> None:
        self.pushed.append(keys)


def build(method: Method, **options) -> Step:
    optimizer = optim.sgd(method.online.parameters(), lr=1.0, momentum=0.9, weight_decay=0.1)
    return Step(
        method, optimizer, lr=lambda s: 0.5 / (s + 1), decay=0.9, precision=precision.resolve(None, CPU), total_steps=4, **options
    )


def batch() -> Batch:
    images = torch.arange(24, dtype=torch.float32).view(2, 3, 2, 2)
    return Batch(images, images, torch.arange(2))


def test_order_and_arithmetic_of_a_step() -> None:
    torch.manual_seed(0)
    method = Toy()
    step, start = build(method), method.online.weight.detach().clone()
    output = step(batch())
    assert torch.allclose(method.target_seen, 0.1 * start)  # the target moved before the forward pass, by 1 - decay
    gradient = batch().x_q.mean((2, 3)).sum(0, keepdim=True)
    assert torch.allclose(method.online.weight, start - 0.5 * (gradient + 0.1 * start))  # lr(0) = 0.5, weight decay 0.1
    assert float(output.stats["grad_norm"]) == pytest.approx(float(gradient.norm()))
    assert len(method.pushed) == 1 and step.steps_done == 1 and float(step.context.progress) == 0.0
    step(batch())
    assert float(step.context.progress) == 0.25 and step.optimizer.param_groups[0]["lr"] == 0.25
    assert method.online.weight.grad is None


@pytest.mark.parametrize(
    "options", [{}, {"whole": True}, {"compile": "step", "backend": "aot_eager"}], ids=["eager", "graph", "step"]
)
def test_the_key_network_slows_down_by_the_schedule_and_does_so_after_a_checkpoint(options: dict) -> None:
    torch._dynamo.reset()
    method, step = contrast(decay_schedule="cosine", **options)
    for number in range(3):
        online, target = (copy.deepcopy(m.state_dict()) for m in (method.encoder_q, method.encoder_k))
        step(images(number))
        weight = 0.1 * (1 + math.cos(math.pi * number / 9)) / 2
        for name, parameter in method.encoder_k.named_parameters():
            assert torch.allclose(parameter, target[name] + weight * (online[name] - target[name]), atol=1e-6), name
    other_method, other = contrast(decay_schedule="cosine", **options)
    other_method.load_state_dict(copy.deepcopy(method.state_dict()))
    other.load_state_dict(copy.deepcopy(step.state_dict()))
    for s in (step, other):
        s(images(3))
    for (name, a), b in zip(method.state_dict().items(), other_method.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    torch._dynamo.reset()


SWITCHES = {"negatives": "both", "empty_queue": True, "symmetric": True}


@pytest.mark.parametrize("gradient", [False, True], ids=["query", "both"])
def test_a_scaled_loss_trains_both_directions_as_an_unscaled_one(gradient: bool) -> None:
    states = []
    for exact in (precision.resolve(None, CPU), precision.Precision(CPU, None, True, "float32, scaled as fp16 is")):
        method, step = contrast(precision=exact, keys_with_gradient=gradient, **SWITCHES)
        for seed in (1, 2, 3):
            step(images(seed))
        states.append(method.state_dict())
    assert int(states[0]["queue.filled"]) == 10 and int(states[0]["queue.pointer"]) == 4
    for (name, a), b in zip(states[0].items(), states[1].values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("gradient", [False, True], ids=["query", "both"])
def test_a_queue_that_is_filling_goes_on_to_the_bit_and_a_bad_step_fills_nothing(gradient: bool) -> None:
    method, step = contrast(keys_with_gradient=gradient, **(SWITCHES | {"symmetric": False}))
    for seed in (1, -1):
        step(images(seed))
    assert int(method.queue.filled) == 4
    other_method, other = contrast(keys_with_gradient=gradient, **(SWITCHES | {"symmetric": False}))
    other_method.load_state_dict(copy.deepcopy(method.state_dict()))
    other.load_state_dict(copy.deepcopy(step.state_dict()))
    for s in (step, other):
        for seed in (2, 3):
            s(images(seed))
    assert int(other_method.queue.filled) == 10
    for (name, a), b in zip(method.state_dict().items(), other_method.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_streak_is_named_by_its_first_step_and_holds_everything_still() -> None:
    torch.manual_seed(0)
    method = Toy()
    step = build(method, max_bad_steps=2)
    for factor, expected in ((1.0, None), (float("inf"), None), (1.0, None), (float("nan"), None), (float("inf"), 3)):
        method.factor = factor
        output = step(batch())
        assert float(output.stats["skipped"]) == (factor != 1.0)
        assert (step.guard.streak() and step.guard.streak().step) == expected
    weight = method.online.weight.detach().clone()
    method.factor = 1.0
    assert float(step(batch()).stats["skipped"]) == 1.0  # refused until somebody has looked
    assert torch.equal(method.online.weight, weight) and torch.isfinite(weight).all() and int(step.guard.skipped) == 4
    streak = step.guard.streak()
    assert streak.index.tolist() == [0, 1] and set(streak.terms) == {"sum", "total", "grad_norm"}
    assert streak.terms["total"] != streak.terms["total"]  # the first one's: nan


class Contrast(MoCo):
    """MoCo whose loss is multiplied by ``factor``."""

    factor = 1.0

    def forward(self, batch: Batch, context: StepContext) -> Output:
        output = super().forward(batch)
        return output._replace(total=output.total * self.factor)


def contrast(**options) -> tuple[Contrast, Step]:
    torch.manual_seed(0)
    trunk = Trunk("resnet10_w8_s16")
    how = {name: options.pop(name) for name in ("negatives", "empty_queue", "symmetric", "keys_with_gradient") if name in options}
    method = Contrast(FeatureNet(trunk), projection_head("mlp3_bn", trunk.channels, 4), dim=4, queue_size=10, **how).train()
    kind = OptimConfig(name=options.pop("name", "sgd"), lr=0.1, weight_decay=0.1, decay_norms=options.pop("decay_norms", True))
    optimizer = optim.build(method, kind)
    whole = options.pop("whole", False)
    exact = precision.resolve(None, CPU)
    step = Step(method, optimizer, lr=lambda s: 0.1, decay=0.9, precision=options.pop("precision", exact), total_steps=9, **options)
    if whole:  # what a CUDA graph replays, as it is
        step.run = step._whole
    return method, step


def images(seed: int) -> Batch:
    x = torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    if seed < 0:  # a picture of nothing but infinities
        x[0, 1] = float("inf")
    return Batch(x[0], x[1], torch.arange(4))


@pytest.mark.parametrize(
    ("options", "bad_at"),
    [
        ({}, 0),
        ({}, 1),
        ({"whole": True}, 0),
        ({"compile": "encoder", "backend": "aot_eager"}, 1),
        ({"compile": "step", "backend": "aot_eager"}, 0),
        ({"name": "adamw"}, 0),
        ({"name": "adamw", "clip": 0.5, "decay_norms": False}, 1),
        ({"name": "adamw", "whole": True}, 0),
        ({"name": "adamw", "compile": "step", "backend": "aot_eager"}, 1),
        ({"name": "lars"}, 0),
        ({"name": "lars", "decay_norms": False, "whole": True}, 1),
        ({"name": "lars", "clip": 0.5, "compile": "step", "backend": "aot_eager"}, 0),
    ],
    ids=[
        "eager, first",
        "eager",
        "graph",
        "encoder",
        "step",
        "adamw, first",
        "adamw, clipped",
        "adamw, graph",
        "adamw, step",
        "lars, first",
        "lars, graph",
        "lars, step",
    ],
)
def test_a_run_with_a_bad_step_is_the_run_without_it(options: dict, bad_at: int) -> None:
    """Weights, momentum, key network, queue and both networks' batch-norm statistics: nothing remembers the bad step."""
    torch._dynamo.reset()
    method, step = contrast(**options)
    start = copy.deepcopy((method.state_dict(), step.state_dict()))
    results = []
    for seeds in ([1, 2, 3], [*[1, 2, 3][:bad_at], -1, *[1, 2, 3][bad_at:]]):
        method.load_state_dict(start[0])
        step.load_state_dict(start[1])
        skipped = [float(step(images(seed)).stats["skipped"]) for seed in seeds]
        assert skipped == [float(seed < 0) for seed in seeds] and step.guard.streak() is None
        results.append(
            copy.deepcopy((method.state_dict(), [b.clone() for tensors in step.update.states.values() for b in tensors]))
        )
    (clean, momenta), (other, other_momenta) = results
    assert [name for name in clean if not torch.equal(clean[name], other[name])] == []
    assert all(map(torch.equal, momenta, other_momenta)) and int(step.guard.skipped) == 1 and int(method.queue.pointer) == 2
    torch._dynamo.reset()


def test_a_gradient_that_is_not_finite_is_as_bad_as_a_loss() -> None:
    method, step = contrast()
    before = copy.deepcopy(method.state_dict())
    method.encoder_q.head[0].weight.register_hook(lambda g: g * float("inf"))
    output = step(images(1))
    assert torch.isfinite(output.total) and float(output.stats["skipped"]) == 1.0
    assert torch.equal(before["encoder_q.head.0.weight"], method.encoder_q.head[0].weight)


@pytest.mark.parametrize("options", [{}, {"name": "adamw", "clip": 1.0}, {"name": "lars"}], ids=str)
def test_with_scaled_losses_the_scaler_answers_for_gradients_and_the_guard_for_losses(options: dict) -> None:
    method, step = contrast(precision=precision.Precision(CPU, None, True, "float32, scaled as fp16 is"), **options)
    step(images(1))
    scale, weight = step.scaler.get_scale(), method.encoder_q.head[0].weight.detach().clone()
    assert float(step(images(-1)).stats["skipped"]) == 1.0  # the loss
    assert torch.equal(method.encoder_q.head[0].weight, weight) and int(method.queue.pointer) == 4
    hook = method.encoder_q.head[0].weight.register_hook(lambda g: g * float("inf"))
    assert float(step(images(2)).stats["skipped"]) == 0.0  # an overflow is what the scale is found by
    assert torch.equal(method.encoder_q.head[0].weight, weight) and step.scaler.get_scale() == scale / 4
    hook.remove()
    step(images(3))
    assert not torch.equal(method.encoder_q.head[0].weight, weight)
    assert all(torch.isfinite(t).all() for t in method.state_dict().values())


def test_a_checkpoint_after_a_bad_step_does_not_move_the_key_network_twice() -> None:
    method, step = contrast()
    for seed in (1, -1):
        step(images(seed))
    other_method, other = contrast()
    other_method.load_state_dict(copy.deepcopy(method.state_dict()))
    other.load_state_dict(copy.deepcopy(step.state_dict()))
    for s in (step, other):
        s(images(2))
    for (name, a), b in zip(method.state_dict().items(), other_method.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert int(other.guard.skipped) == 1


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
@pytest.mark.parametrize("whole", [False, True], ids=["eager", "graph"])
def test_a_checkpoint_continues_to_the_bit_and_the_paths_read_each_other_s(name: str, whole: bool) -> None:
    method, step = contrast(name=name, whole=whole, decay_norms=False)
    step(images(1))
    kept = copy.deepcopy((method.state_dict(), step.state_dict()))
    step(images(2))
    other_method, other = contrast(name=name, whole=whole, decay_norms=False)
    other_method.load_state_dict(kept[0])
    other.load_state_dict(kept[1])
    other(images(2))
    third_method, third = contrast(name=name, whole=not whole, decay_norms=False)
    third_method.load_state_dict(kept[0])
    third.load_state_dict(kept[1])
    third(images(2))
    for key, tensor in method.state_dict().items():
        assert torch.equal(tensor, other_method.state_dict()[key]), key
        torch.testing.assert_close(third_method.state_dict()[key], tensor, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_of_before_groups_had_rates_still_loads() -> None:
    """It holds one group with what ``torch.optim.SGD`` itself keeps."""
    method, step = contrast()
    step(images(1))
    kept = copy.deepcopy((method.state_dict(), step.state_dict()))
    for group in kept[1]["optimizer"]["param_groups"]:
        del group["lr_scale"], group["decays"]
    step(images(2))
    other_method, other = contrast()
    other_method.load_state_dict(kept[0])
    other.load_state_dict(kept[1])
    other(images(2))
    assert all(map(torch.equal, method.state_dict().values(), other_method.state_dict().values()))
    assert other.optimizer.param_groups[0]["lr_scale"] == 1.0


def test_a_clipped_step_reports_the_whole_gradient_and_moves_by_the_clipped_one() -> None:
    moved, norms = [], []
    for clip in (None, 1e-3):
        torch.manual_seed(0)
        method = Toy()
        step, start = build(method, clip=clip), method.online.weight.detach().clone()
        norms.append(float(step(batch()).stats["grad_norm"]))
        moved.append((start - method.online.weight.detach()) / 0.5 - 0.1 * start)  # without rate and weight decay: the gradient
    assert norms[0] == norms[1] > 1 and torch.allclose(moved[1], moved[0] * 1e-3 / norms[0], rtol=1e-3)


def test_state_round_trip_continues_to_the_bit() -> None:
    torch.manual_seed(0)
    method = Toy()
    step = build(method)
    step(batch())
    other_method = Toy()
    other_method.load_state_dict(copy.deepcopy(method.state_dict()))
    other = build(other_method)
    other.load_state_dict(copy.deepcopy(step.state_dict()))
    step(batch())
    other(batch())
    assert other.steps_done == 2 and torch.equal(method.online.weight, other_method.online.weight)


def test_a_run_with_the_fused_batch_norm_continues_to_the_bit() -> None:
    """Batch statistics of parts, both derivatives of a forward pass, and the key network's copy."""

    def fused() -> Method:
        torch.manual_seed(0)
        trunk = Trunk("resnet10_w8_s16")
        trunk.fuse_batch_norm()
        return small_methods.build_by_name("lcr", trunk, 32)

    method = fused()
    assert all(block.fused for encoder in (method.encoder_q, method.encoder_k) for block in encoder.trunk.layer1)
    step = small_methods.step_of(method)
    step(small_methods.batch(side=32))
    other_method = fused()
    other = small_methods.step_of(other_method)
    other_method.load_state_dict(copy.deepcopy(method.state_dict()))
    other.load_state_dict(copy.deepcopy(step.state_dict()))
    for s in (step, other):
        s(small_methods.batch(side=32, seed=1))
    for (name, a), b in zip(method.state_dict().items(), other_method.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_half_precision_images_become_float32_without_autocast() -> None:
    method = Toy()
    given = batch()
    output = build(method)(given._replace(x_q=given.x_q.half()))
    assert output.total.dtype == torch.float32
