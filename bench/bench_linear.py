"""The fast linear probe on CPU: one path over ten penalties against scikit-learn's LogisticRegression at each, one thread.

CUB's size (5,994 x 2048, 200 classes) is a time on a given machine, not a ratio: recorded in RECORDS.md, not guarded.
Run: pytest bench/bench_linear.py --benchmark-only
"""

from __future__ import annotations

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F

from bench.timing import GUARDS, all_cores, alternate, guard
from engine.evaluation import linear


def features(n: int, dim: int, classes: int, noise: float = 6.0) -> tuple[Tensor, Tensor]:
    """Unit rows off the origin with a falling spectrum, like pooled features."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, dim + 1).float() ** -0.6
    labels = torch.randint(classes, (n,), generator=generator)
    centers = torch.randn(classes, dim, generator=generator) * spectrum
    x = centers[labels] + noise * torch.randn(n, dim, generator=generator) * spectrum + spectrum.norm() / 2
    return F.normalize(x, dim=1), labels


def ours(x: Tensor, y: Tensor, classes: int) -> linear.Minimum:
    return linear.path(linear.Basis.of(x).transform(x).float(), y, classes, linear.PENALTIES)


def theirs(x: Tensor, y: Tensor) -> LogisticRegression:
    """One warm-started model over the same grid, at the tolerance at which its weak penalties are as accurate as ours."""
    scale = float((x - x.mean(0)).square().sum(1).mean())
    model = LogisticRegression(warm_start=True, tol=1e-6, max_iter=5000)
    for penalty in linear.PENALTIES:
        model.set_params(C=1 / (len(x) * penalty * scale)).fit(x.numpy(), y.numpy())
    return model


def test_path_over_scikit_learn(benchmark):
    from threadpoolctl import threadpool_limits

    x, y = features(1000, 256, 20)
    basis = linear.Basis.of(x)
    with threadpool_limits(1):
        mine, other = ours(x, y, 20), theirs(x, y)
        probe = basis.probe(mine.weights[:, -1])
        agree = (torch.from_numpy(other.predict(x.numpy())) == (x @ probe.weight + probe.bias).argmax(1)).double().mean()
        assert mine.converged and agree > 0.99

        def ratios() -> dict[str, float]:
            seconds = alternate({"theirs": lambda: theirs(x, y), "ours": lambda: ours(x, y, 20)}, rounds=3)
            return {"path_over_scikit_learn": seconds["theirs"] / seconds["ours"]}

        guard(benchmark, "linear", ratios, GUARDS["linear"])
        benchmark(ours, x, y, 20)


def test_cub_sized(benchmark):
    x, y = features(5994, 2048, 200)
    with all_cores():
        fit = benchmark.pedantic(linear.convex, (x, y, 200), rounds=1)
    assert fit.converged
    benchmark.extra_info["goal_seconds_on_2_cores"] = GUARDS["linear"]["cub_sized"]["goal_seconds"]
