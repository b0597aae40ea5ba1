"""Linear probes on frozen features: the papers' SGD, and softmax regression solved to its optimum for many penalties."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.evaluation.ranking import full_precision

PENALTIES = tuple(10 ** (-2 - 0.6 * i) for i in range(10))
"""Strengths that are tried, strongest first, in units of the features' mean squared distance from their mean."""
# Settings that are solved side by side; the next batch starts from the last solution of the one before. More at a time means more
# work from a bad start, fewer means smaller products (bench/RECORDS.md).
_SIDE_BY_SIDE = 2


class Probe(NamedTuple):
    """A linear classifier, ``features @ weight + bias``."""

    weight: Tensor
    """[D, C] float32."""
    bias: Tensor
    """[C] float32."""

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Share of the rows whose largest score is their class."""
        with full_precision(features.device.type):
            return float(((features.float() @ self.weight + self.bias).argmax(1) == labels).double().mean())


class Fit(NamedTuple):
    """A probe of which the penalty has been chosen, and how."""

    probe: Probe
    penalty: float
    """The chosen entry of ``penalties``."""
    held_out: tuple[float, ...]
    """Accuracy on the held-out part of the training set, for every penalty."""
    iterations: int
    """Of L-BFGS, over both fits."""
    converged: bool
    """False when the final fit hit its limit of iterations: the result is then not the optimum."""


def sgd(
    features: Tensor,
    labels: Tensor,
    classes: int,
    *,
    seed: int = 0,
    epochs: int = 100,
    lr: float = 30.0,
    batch_size: int = 256,
    progress: Callable[[int], None] = lambda epoch: None,
) -> Probe:
    """The probe of MoCo, LCR and LearnMat: SGD on softmax cross-entropy, momentum 0.9, no weight decay, the rate times 0.1 after
    60 % and 80 % of the epochs, weights from N(0, 0.01^2), the last epoch kept. They augment the training images of the probe
    (crop and flip); this one sees every image as the frozen feature of its clean crop.

    features: [N, D] floating point; labels: [N] int64 in [0, classes). ``progress`` is called with every epoch that is done.
    The order and the starting weights are a function of ``seed``. Raises ``FloatingPointError`` when it diverges.
    """
    generator = torch.Generator().manual_seed(seed)
    device = features.device
    features = features.float()
    layer = nn.Linear(features.shape[1], classes, device="meta").to_empty(device=device)
    with torch.no_grad():
        layer.weight.copy_(0.01 * torch.randn(layer.weight.shape, generator=generator))
        layer.bias.zero_()
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr, momentum=0.9, fused=True)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [round(0.6 * epochs), round(0.8 * epochs)], gamma=0.1)
    with full_precision(device.type), torch.enable_grad():
        for epoch in range(epochs):
            for index in torch.randperm(len(features), generator=generator).to(device).split(batch_size):
                loss = F.cross_entropy(layer(features[index]), labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
            progress(epoch + 1)
    if not torch.isfinite(layer.weight).all():
        raise FloatingPointError(f"the linear probe diverged at learning rate {lr}; the features may not be finite")
    return Probe(layer.weight.detach().T.contiguous(), layer.bias.detach())


def convex(
    features: Tensor,
    labels: Tensor,
    classes: int,
    *,
    seed: int = 0,
    penalties: Sequence[float] = PENALTIES,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Fit:
    """L2-regularized softmax regression for all ``penalties``: a fifth of every class is held out, the penalty with the best
    accuracy there is chosen (the stronger of equals) and fitted again on everything, in float64, from where the first fit ended.
    The test split has no part in it.

    features: [N, D] floating point; labels: [N] int64 in [0, classes). The penalty is lambda / 2 * |W|^2 beside the *mean* loss,
    lambda = penalty * mean |x - mean(x)|^2; scikit-learn's C is 1 / (N * lambda). The bias is not penalised. The result does not
    depend on the features' scale or offset. ``progress`` hears how many of the penalties are done.

    Raises ``ValueError`` when no class has two images to hold one out of.
    """
    fitted, held = split(labels, seed)
    basis = Basis.of(features)
    design = basis.transform(features)
    with full_precision(features.device.type):
        tried = path(design[fitted].float(), labels[fitted], classes, penalties, progress=progress)
        scores = (design[held].float() @ tried.weights.flatten(1)).unflatten(1, tried.weights.shape[1:])
        right = (scores.argmax(2) == labels[held][:, None]).double().mean(0)
        best = int(right.argmax())  # the first of equals
        final = minimise(design, labels, classes, [penalties[best]], start=tried.weights[:, best : best + 1].double())
    return Fit(
        basis.probe(final.weights[:, 0]),
        penalties[best],
        tuple(right.tolist()),
        tried.iterations + final.iterations,
        final.converged,
    )


def path(
    design: Tensor,
    labels: Tensor,
    classes: int,
    penalties: Sequence[float],
    *,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Minimum:
    """``minimise`` for penalties in falling order, a few side by side, each batch from the last solution of the one before, to an
    accuracy of 1e-5, which is enough to choose by and which float32 can reach."""
    found: list[Minimum] = []
    for first in range(0, len(penalties), _SIDE_BY_SIDE):
        some = penalties[first : first + _SIDE_BY_SIDE]
        start = found[-1].weights[:, -1:].repeat(1, len(some), 1) if found else None
        found.append(minimise(design, labels, classes, some, start=start, tolerance=1e-5))
        progress(first + len(some), len(penalties))
    weights = torch.cat([part.weights for part in found], 1)
    return Minimum(weights, sum(part.iterations for part in found), all(part.converged for part in found))


def split(labels: Tensor, seed: int, share: float = 0.2) -> tuple[Tensor, Tensor]:
    """(fitted, held out) positions in order: of every class of n >= 2 images max(1, floor(share * n)) are held out, the single
    image of a class never. Raises ``ValueError`` when that leaves nothing held out."""
    position = shuffled_position(labels, seed)
    sizes = torch.bincount(labels)[labels]
    held = (sizes > 1) & (position < (share * sizes).floor().clamp(min=1))
    if not held.any():
        raise ValueError("labels: no class has two images, so that none can be held out to choose the penalty on")
    return torch.nonzero(~held).flatten(), torch.nonzero(held).flatten()


def fraction(labels: Tensor, percent: float, seed: int) -> Tensor:
    """Positions, in order, of ``percent`` % of the images of every class (rounded, at least one); a smaller fraction of the same
    seed is part of a larger one. labels: [N] int64 from 0."""
    share = torch.bincount(labels)[labels].double() * percent / 100
    return torch.nonzero(shuffled_position(labels, seed) < (share + 0.5).floor().clamp(min=1)).flatten()


def shuffled_position(labels: Tensor, seed: int) -> Tensor:
    """[N] int64: every image's place, from 0, in a random order of its class."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    order = order[torch.argsort(labels[order], stable=True)]
    counts = torch.bincount(labels)
    first = (counts.cumsum(0) - counts)[labels[order]]
    position = torch.empty_like(order)
    position[order] = torch.arange(len(order), device=labels.device) - first
    return position


class Basis(NamedTuple):
    """Coordinates in which the features are centered, of mean squared length 1 and uncorrelated."""

    mean: Tensor
    """[D] float64."""
    axes: Tensor
    """[D, R] float64, orthonormal columns over the scale; R is the rank."""

    @classmethod
    def of(cls, features: Tensor) -> Basis:
        """The principal axes of [N, D]. Directions in which the features do not vary are left out: there the optimum is 0, so that
        few images of many dimensions cost what their number asks for."""
        x = features.double()
        mean = x.mean(0)
        x = x - mean
        scale = x.square().sum(1).mean().sqrt()
        if not scale > 0:  # also NaN
            raise ValueError("features: they are all equal or not finite; the network that made them has collapsed or diverged")
        x = x / scale
        wide = x.shape[1] > x.shape[0]
        values, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
        kept = values > values[-1] * 1e-10
        values, vectors = values[kept], vectors[:, kept]
        axes = x.T @ (vectors / values.sqrt()) if wide else vectors
        return cls(mean, axes / scale)

    def transform(self, features: Tensor) -> Tensor:
        """[N, D] -> [N, R + 1] float64; the last column is 1."""
        x = (features.double() - self.mean) @ self.axes
        return torch.cat([x, torch.ones_like(x[:, :1])], 1)

    def probe(self, weights: Tensor) -> Probe:
        """The classifier on the original features of ``weights`` [R + 1, C]."""
        weight = self.axes @ weights[:-1].double()
        return Probe(weight.float(), (weights[-1] - self.mean @ weight).float())


class Minimum(NamedTuple):
    """What ``minimise`` found."""

    weights: Tensor
    """[P, S, C]."""
    iterations: int
    converged: bool


def minimise(
    design: Tensor,
    labels: Tensor,
    classes: int,
    penalties: Sequence[float],
    *,
    start: Tensor | None = None,
    tolerance: float = 1e-6,
    limit: int = 300,
    memory: int = 10,
) -> Minimum:
    """For every penalty p_s the W_s that minimises f_s(W) = mean_i [lse(a_i W) - (a_i W)_{y_i}] + p_s / 2 * |W without last row|^2.

    design: [N, P] rows a_i, float64 for a ``tolerance`` below 1e-5, columns about uncorrelated, the last all ones; labels: [N]
    int64 in [0, classes); start: [P, S, C]. L-BFGS (Nocedal & Wright, "Numerical Optimization", algorithm 7.4) for all settings in
    step: the weights of all lie side by side, so that an iteration is two matrix products, whatever their number. The scores are
    linear in the weights, hence the line search needs no product of its own. The initial inverse Hessian of the recursion is the
    diagonal one of the present curvature, mean of p (1 - p), exact for uncorrelated columns and even weights. A setting is
    settled, and leaves, when the predicted rest of the descent is below ``tolerance`` times its value.
    """
    n, width, device = len(design), design.shape[1], design.device
    penalty = torch.tensor(penalties, dtype=design.dtype, device=device)[:, None].repeat(width, 1, 1)
    penalty[-1] = 0
    curvature = design.square().mean(0)[:, None, None]
    target = F.one_hot(labels, classes).to(design.dtype)[:, None]
    result = design.new_zeros(width, len(penalties), classes) if start is None else start.clone()

    def scores(weights: Tensor) -> Tensor:
        return (design @ weights.flatten(1)).unflatten(1, weights.shape[1:])

    def value(z: Tensor, weights: Tensor) -> Tensor:
        return (torch.logsumexp(z, 2) - (z * target).sum(2)).mean(0) + 0.5 * _dot(penalty * weights, weights)

    active = torch.arange(len(penalties), device=device)
    weights, history, before = result, [], None
    z = scores(weights)
    f = value(z, weights)
    for iteration in range(limit):
        probability = torch.softmax(z, 2)
        spread = (probability.mean(0) - probability.square().mean(0)).clamp_min(1e-12)
        gradient = (design.T @ (probability - target).flatten(1)).unflatten(1, weights.shape[1:]) / n + penalty * weights
        if before is not None:
            step, change = before[0], gradient - before[1]
            product = _dot(step, change)
            history = [*history[-(memory - 1) :], (step, change, torch.where(product > 0, 1 / product, 0.0))]
        direction = _two_loops(gradient, history, 1 / (curvature * spread + penalty))
        slope = _dot(gradient, direction)
        going = -slope > 2 * tolerance * f
        if not going.all():
            result[:, active[~going]] = weights[:, ~going]
            if not going.any():
                return Minimum(result, iteration, True)
            keep = torch.nonzero(going).flatten()
            active, f, slope, penalty = active[keep], f[keep], slope[keep], penalty[:, keep]
            weights, direction, gradient, z = weights[:, keep], direction[:, keep], gradient[:, keep], z[:, keep]
            history = [(s[:, keep], y[:, keep], rho[keep]) for s, y, rho in history]
        along = scores(direction)
        length = _line_search(z, along, target, _dot(penalty * weights, direction), _dot(penalty * direction, direction))
        before = (length[:, None] * direction, gradient)
        weights = weights + before[0]
        z = torch.addcmul(z, along, length[:, None])
        f = value(z, weights)
    result[:, active] = weights
    return Minimum(result, limit, False)


def _line_search(z: Tensor, along: Tensor, target: Tensor, linear: Tensor, quadratic: Tensor, rounds: int = 20) -> Tensor:
    """[S] lengths t > 0 at which the slope of mean [lse(z + t a) - (z + t a)_y] + linear t + quadratic t^2 / 2 is at most a tenth
    of that at 0, where it is negative. z, along [N, S, C]. Newton's method inside a bracket: the slope rises, as the function is
    convex. After ``rounds`` the last t on the falling side is good enough."""
    low = torch.zeros_like(linear)
    high = torch.full_like(linear, torch.inf)
    length, at_zero = low.clone(), None
    for _ in range(rounds):
        probability = torch.softmax(torch.addcmul(z, along, length[:, None]), 2)
        mean = (probability * along).sum(2)
        slope = (mean - (target * along).sum(2)).mean(0) + linear + quadratic * length
        bend = ((probability * along.square()).sum(2) - mean.square()).mean(0) + quadratic
        at_zero = slope if at_zero is None else at_zero
        done = slope.abs() <= -0.1 * at_zero
        if done.all():
            return length
        low, high = torch.where(slope < 0, length, low), torch.where(slope < 0, high, length)
        newton = length - slope / bend
        middle = torch.where(high.isinf(), 2 * length + 1, (low + high) / 2)
        length = torch.where(done, length, torch.where((newton > low) & (newton < high), newton, middle))
    return torch.where(low > 0, low, length)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """[P, S, C] x 2 -> [S] float64: the inner product of every setting."""
    return (a * b).sum((0, 2))


def _two_loops(gradient: Tensor, history: list[tuple[Tensor, Tensor, Tensor]], inverse: Tensor) -> Tensor:
    """The direction -H g of L-BFGS from steps, changes of the gradient and 1 / their product, for every setting."""
    q, alphas = gradient.clone(), []
    for step, change, rho in reversed(history):
        alphas.append(rho * _dot(step, q))
        q.addcmul_(change, -alphas[-1][:, None])
    q *= inverse
    for (step, change, rho), alpha in zip(history, reversed(alphas), strict=True):
        q.addcmul_(step, (alpha - rho * _dot(change, q))[:, None])
    return q.neg_()
