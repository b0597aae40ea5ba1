"""The fast linear probe on CPU: one path over ten penalties against scikit-learn's LogisticRegression at each, one thread.

CUB's size (5,994 x 2048, 200 classes) is a time on a given machine, not a ratio: recorded in RECORDS.md, not guarded.
Run: pytest bench/bench_linear.py --benchmark-only
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F

from engine.protocols import linear

ROUNDS = 5
GUARDS = yaml.safe_load((Path(__file__).parent / "guards.yaml").read_text())["linear"]


def features(n: int, dim: int, classes: int, noise: float = 6.0) -> tuple[Tensor, Tensor]:
    """Unit rows off the origin with a falling spectrum, like pooled features."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, dim + 1).float() ** -0.6
    labels = torch.randint(classes, (n,), generator=generator)
    centres = torch.randn(classes, dim, generator=generator) * spectrum
    x = centres[labels] + noise * torch.randn(n, dim, generator=generator) * spectrum + spectrum.norm() / 2
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


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def test_path_over_scikit_learn(benchmark, one_thread):
    from threadpoolctl import threadpool_limits

    x, y = features(1000, 256, 20)
    basis = linear.Basis.of(x)
    with threadpool_limits(1):
        mine, other = ours(x, y, 20), theirs(x, y)
        probe = basis.probe(mine.weights[:, -1])
        agree = (torch.from_numpy(other.predict(x.numpy())) == (x @ probe.weight + probe.bias).argmax(1)).double().mean()
        assert mine.converged and agree > 0.99

        def ratio() -> float:
            turns = [(seconds(lambda: theirs(x, y)), seconds(lambda: ours(x, y, 20))) for _ in range(ROUNDS)]
            return min(turn[0] for turn in turns) / min(turn[1] for turn in turns)

        bound = GUARDS["path_over_scikit_learn"]["bound"]
        measured = ratio()
        if measured < bound:  # once more: other programs may have had the cores
            measured = ratio()
        benchmark.extra_info["path_over_scikit_learn"] = round(measured, 2)
        benchmark(ours, x, y, 20)
    assert measured >= bound


def test_cub_sized(benchmark):
    x, y = features(5994, 2048, 200)
    fit = benchmark.pedantic(linear.convex, (x, y, 200), rounds=1)
    assert fit.converged
    benchmark.extra_info["goal_seconds_on_2_cores"] = GUARDS["cub_sized"]["goal_seconds"]
