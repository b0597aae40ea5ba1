"""The linear probes: the convex one against scikit-learn, the papers' one against SGD by hand, fractions and held-out parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F

from engine.evaluation import linear
from engine.evaluation.linear import Basis, Probe, convex, fraction, minimise, path, sgd, split


def world(n: int, dim: int, classes: int, *, seed: int = 0, noise: float = 3.0) -> tuple[Tensor, Tensor]:
    """Unit rows off the origin with a falling spectrum, like pooled features; classes overlap."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, dim + 1).float() ** -0.6
    centers = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99)) * spectrum
    labels = torch.randint(classes, (n,), generator=generator)
    x = centers[labels] + noise * torch.randn(n, dim, generator=generator) * spectrum + spectrum.norm() / 2
    return F.normalize(x, dim=1), labels


def strength(features: Tensor, penalty: float) -> float:
    """lambda beside the mean loss, in the features' own units."""
    x = features.double()
    return penalty * float((x - x.mean(0)).square().sum(1).mean())


def objective(weight: Tensor, bias: Tensor, features: Tensor, labels: Tensor, lam: float) -> float:
    scores = features.double() @ weight.double() + bias.double()
    return float(F.cross_entropy(scores, labels) + lam / 2 * weight.double().square().sum())


def scikit(features: Tensor, labels: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    model = LogisticRegression(C=1 / (len(features) * lam), tol=1e-7, max_iter=5000)
    model.fit(features.double().numpy(), labels.numpy())
    return torch.from_numpy(model.coef_.T), torch.from_numpy(model.intercept_)


def test_as_good_as_scikit_learns_best_on_the_same_grid():
    """1,000 x 256 x 20: both choose on the same held-out fifth, both fit everything again, both meet 2,000 new images."""
    (x, y), (new, truth) = world(1000, 256, 20, noise=4.0), world(2000, 256, 20, seed=1, noise=4.0)
    fit = convex(x, y, 20)
    fitted, held = split(y, 0)
    accuracies = []
    for penalty in linear.PENALTIES:
        weight, bias = scikit(x[fitted], y[fitted], strength(x, penalty))
        accuracies.append(float(((x[held].double() @ weight + bias).argmax(1) == y[held]).double().mean()))
    best = int(np.argmax(accuracies))
    assert fit.converged and 0 < best < len(linear.PENALTIES) - 1  # the grid has the optimum inside
    assert fit.held_out == pytest.approx(accuracies, abs=1.1 / len(held))
    weight, bias = scikit(x, y, strength(x, linear.PENALTIES[best]))
    theirs = float(((new.double() @ weight + bias).argmax(1) == truth).double().mean())
    assert abs(fit.probe.accuracy(new, truth) - theirs) <= 0.003
    # The same minimum of the same objective, at the penalty that was chosen here.
    lam = strength(x, fit.penalty)
    weight, bias = scikit(x, y, lam)
    ours = objective(fit.probe.weight, fit.probe.bias, x, y, lam)
    assert ours == pytest.approx(objective(weight, bias, x, y, lam), rel=2e-6)


@pytest.mark.parametrize(("n", "dim"), [(60, 200), (200, 12)])
def test_every_setting_of_a_path_is_the_minimum(n: int, dim: int):
    x, y = world(n, dim, 5)
    basis = Basis.of(x)
    design = basis.transform(x)
    assert design.shape[1] <= min(n - 1, dim) + 1  # no dimension without data
    penalties = [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6]
    found = path(design, y, 5, penalties)
    exact = minimise(design, y, 5, penalties, tolerance=1e-12)
    assert found.converged and exact.converged
    for i, penalty in enumerate(penalties):
        probe, close = basis.probe(exact.weights[:, i]), basis.probe(found.weights[:, i])
        lam = strength(x, penalty)
        weight, bias = probe.weight.double().requires_grad_(), probe.bias.double().requires_grad_()
        loss = F.cross_entropy(x.double() @ weight + bias, y) + lam / 2 * weight.square().sum()
        for gradient in torch.autograd.grad(loss, (weight, bias)):
            assert float(gradient.abs().max()) < 1e-6
        assert objective(close.weight, close.bias, x, y, lam) == pytest.approx(float(loss.detach()), rel=1e-4)


def test_scale_and_offset_of_the_features_do_not_matter():
    x, y = world(300, 24, 6)
    fit, moved = convex(x, y, 6), convex(37 * x + 5, y, 6)
    assert moved.held_out == fit.held_out and moved.penalty == fit.penalty
    new = world(100, 24, 6, seed=1)[0].double()
    scores = new @ fit.probe.weight.double() + fit.probe.bias
    again = (37 * new + 5) @ moved.probe.weight.double() + moved.probe.bias
    assert torch.allclose(scores.log_softmax(1), again.log_softmax(1), atol=1e-2)


def test_separable_classes_and_classes_without_images():
    y = torch.arange(40) % 4 * 2  # of eight classes, four have no image
    x = torch.eye(8)[y] + 0.01 * torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    fit = convex(x, y, 8)
    assert fit.converged and fit.probe.accuracy(x, y) == 1 and fit.probe.weight.shape == (8, 8)
    assert fit.penalty == linear.PENALTIES[0]  # of equals the strongest


@pytest.mark.parametrize("x", [torch.ones(10, 3), torch.full((10, 3), float("nan"))])
def test_features_without_information(x: Tensor):
    with pytest.raises(ValueError, match="collapsed or diverged"):
        convex(x, torch.arange(10) % 2, 2)


def test_sgd_is_the_papers():
    """Against the update rule written out, at 10 epochs: rate 30 until epoch 6, 3 until 8, 0.3; momentum 0.9."""
    x, y = world(60, 7, 3)
    probe = sgd(x, y, 3, seed=5, epochs=10, batch_size=25)
    generator = torch.Generator().manual_seed(5)
    weight = 0.01 * torch.randn(3, 7, generator=generator).double()
    bias, x64 = torch.zeros(3).double(), x.double()
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for epoch in range(10):
        lr = 30 * 0.1 ** ((epoch >= 6) + (epoch >= 8))
        for index in torch.randperm(60, generator=generator).split(25):
            error = (x64[index] @ weight.T + bias).softmax(1)
            error[torch.arange(len(index)), y[index]] -= 1
            for tensor, v, gradient in zip((weight, bias), velocity, (error.T @ x64[index], error.sum(0)), strict=True):
                v.mul_(0.9).add_(gradient / len(index))
                tensor -= lr * v
    assert torch.allclose(probe.weight.double(), weight.T, rtol=1e-3, atol=1e-3)
    assert torch.allclose(probe.bias.double(), bias, rtol=1e-3, atol=1e-3)


def test_sgd_learns_and_says_when_it_diverges():
    (x, y), (new, truth) = world(500, 32, 5, noise=1.0), world(500, 32, 5, seed=1, noise=1.0)
    seen: list[int] = []
    probe = sgd(x, y, 5, epochs=20, progress=seen.append)
    assert seen == list(range(1, 21)) and probe.accuracy(new, truth) > 0.6
    with pytest.raises(FloatingPointError, match="learning rate"):
        sgd(torch.full_like(x, float("inf")), y, 5, epochs=1)


def test_fractions_are_drawn_per_class_and_nested():
    labels = torch.tensor([0] * 30 + [1] * 5 + [3] * 1 + [2] * 11)
    labels = labels[torch.randperm(47, generator=torch.Generator().manual_seed(0))]
    fifth, half, whole = (fraction(labels, percent, 0) for percent in (20, 50, 100))
    assert torch.bincount(labels[fifth]).tolist() == [6, 1, 2, 1]  # at least one
    assert torch.bincount(labels[half]).tolist() == [15, 3, 6, 1]
    assert torch.equal(whole, torch.arange(47))
    assert set(fifth.tolist()) < set(half.tolist())
    assert torch.equal(fifth, fraction(labels, 20, 0)) and not torch.equal(fifth, fraction(labels, 20, 1))


def test_the_held_out_part():
    labels = torch.tensor([0] * 30 + [1] * 2 + [2] * 1 + [3] * 9)
    fitted, held = split(labels, 3)
    assert sorted([*fitted.tolist(), *held.tolist()]) == list(range(42))
    assert torch.bincount(labels[held], minlength=4).tolist() == [6, 1, 0, 1]  # never the only one of a class
    with pytest.raises(ValueError, match="no class has two images"):
        split(torch.arange(5), 0)


def test_accuracy_in_float32_proper():
    probe = Probe(torch.eye(2) * 1.0, torch.tensor([0.0, 1e-4]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert probe.accuracy(torch.tensor([[1.0, 1.0], [1.001, 1.0]]), torch.tensor([1, 0])) == 1
