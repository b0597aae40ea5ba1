"""Retrieval on CPU: the blocked ranking over the usual loop (one query, one argsort, at a time), one thread.

The goal, 5,794 x 2048 features under 5 s on two cores, depends on the machine: seconds are recorded, the ratio guarded.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from engine.protocols.retrieval import Retrieval, retrieval

ROUNDS = 9
GUARDS = yaml.safe_load((Path(__file__).parent / "guards.yaml").read_text())["retrieval"]


def features(n: int, dim: int, classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, dim, generator=generator)
    return 0.3 * centres[labels] + torch.randn(n, dim, generator=generator), labels


def loop(x: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """Rank-1, rank-5 and mAP by one matrix-vector product and one argsort a query."""
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


def test_blocked_over_loop(benchmark, one_thread):
    x, labels = features(1000, 2048, 40)
    assert retrieval(x, labels)[:3] == pytest.approx(loop(x, labels), abs=1e-6)

    def ratio() -> float:
        turns = [(seconds(lambda: loop(x, labels)), seconds(lambda: retrieval(x, labels))) for _ in range(ROUNDS)]
        return min(turn[0] for turn in turns) / min(turn[1] for turn in turns)

    bound = GUARDS["blocked_over_loop"]["bound"]
    measured = ratio()
    if measured < bound:  # once more: other programs may have had the cores
        measured = ratio()
    benchmark.extra_info["blocked_over_loop"] = round(measured, 2)
    benchmark(retrieval, x, labels)
    assert measured >= bound


def test_cub_sized(benchmark):
    x, labels = features(5794, 2048, 200)
    result = benchmark.pedantic(retrieval, (x, labels), rounds=1, warmup_rounds=1)
    assert isinstance(result, Retrieval) and result.queries == 5794
    benchmark.extra_info["goal_seconds_on_2_cores"] = GUARDS["cub_sized"]["goal_seconds"]
