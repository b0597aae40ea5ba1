"""One step: momentum first, gradients of the parameters only, SGD, enqueue, and a watch on what is not finite."""

import copy

import pytest
import torch
from torch import nn

from engine import optim, precision
from engine.step import Step
from ppssl.method import Batch, Method, Output

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

    def forward(self, batch: Batch) -> Output:
        assert batch.x_q.is_leaf and batch.x_q.requires_grad
        self.target_seen = self.target.weight.clone()
        total = self.factor * self.online(batch.x_q.mean((2, 3))).sum()
        (image_gradient,) = torch.autograd.grad(total, batch.x_q, retain_graph=True)
        return Output(total, {"sum": total.detach()}, image_gradient.mean((1, 2, 3), keepdim=True)[:, :, 0, 0], {})

    def enqueue(self, keys: torch.Tensor, index: torch.Tensor) -> None:
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
    assert len(method.pushed) == 1 and step.step == 1 and float(method.progress) == 0.0
    step(batch())
    assert float(method.progress) == 0.25 and step.optimizer.param_groups[0]["lr"] == 0.25
    assert method.online.weight.grad is None


def test_the_first_bad_step_is_kept_with_its_terms() -> None:
    method = Toy()
    step = build(method)
    for factor in (1.0, float("inf"), 1.0):
        method.factor = factor
        step(batch())
    with pytest.raises(FloatingPointError, match=r"step 1: .*sum -?(inf|nan)"):
        step.raise_if_bad()


def test_a_good_run_raises_nothing() -> None:
    step = build(Toy())
    step(batch())
    step.raise_if_bad()
    assert int(step.first_bad) == -1


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
    assert other.step == 2 and torch.equal(method.online.weight, other_method.online.weight)


def test_half_precision_images_become_float32_without_autocast() -> None:
    method = Toy()
    given = batch()
    output = build(method)(given._replace(x_q=given.x_q.half()))
    assert output.total.dtype == torch.float32
