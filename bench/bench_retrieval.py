"""Retrieval on CPU: the blocked ranking over the usual loop (one query, one argsort, at a time), one thread.

The goal, 5,794 x 2048 features under 5 s on two cores, depends on the machine: seconds are recorded, the ratio guarded.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.timing import GUARDS, all_cores, alternate, guard
from engine.evaluation.retrieval import Retrieval, retrieval


def features(n: int, dim: int, classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    centers = torch.randn(classes, dim, generator=generator)
    return 0.3 * centers[labels] + torch.randn(n, dim, generator=generator), labels


def loop(x: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """Rank-1, rank-5 and mAP by one matrix-vector product and one argsort per query."""
    unit = torch.nn.functional.normalize(x, dim=1)
    rank1 = rank5 = precision = 0.0
    position = torch.arange(1, len(x))
    for query in range(len(x)):
        similarity = unit @ unit[query]
        similarity[query] = -2
        order = similarity.argsort(descending=True, stable=True)[:-1]
        correct = labels[order] == labels[query]
        rank1 += float(correct[0])
        rank5 += float(correct[:5].any())
        precision += float((correct.cumsum(0) / position)[correct].double().mean())
    return rank1 / len(x), rank5 / len(x), precision / len(x)


def test_blocked_over_loop(benchmark):
    x, labels = features(1000, 2048, 40)
    assert retrieval(x, labels)[:3] == pytest.approx(loop(x, labels), abs=1e-6)

    def ratios() -> dict[str, float]:
        seconds = alternate({"loop": lambda: loop(x, labels), "blocked": lambda: retrieval(x, labels)})
        return {"blocked_over_loop": seconds["loop"] / seconds["blocked"]}

    guard(benchmark, "retrieval", ratios, GUARDS["retrieval"])
    benchmark(retrieval, x, labels)


def test_cub_sized(benchmark):
    x, labels = features(5794, 2048, 200)
    with all_cores():
        result = benchmark.pedantic(retrieval, (x, labels), rounds=1, warmup_rounds=1)
    assert isinstance(result, Retrieval) and result.queries == 5794
    benchmark.extra_info["goal_seconds_on_2_cores"] = GUARDS["retrieval"]["cub_sized"]["goal_seconds"]
