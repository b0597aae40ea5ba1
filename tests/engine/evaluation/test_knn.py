"""Weighted kNN against a vote counted one image at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.evaluation import ranking
from engine.evaluation.knn import knn


def brute_force(bank: Tensor, known: Tensor, x: Tensor, labels: Tensor, k: int, temperature: float) -> tuple[float, float]:
    """Top-1 and top-5, one test image and one vote at a time."""
    unit = [side.double() / side.double().norm(dim=1, keepdim=True).clamp_min(1e-12) for side in (bank, x)]
    top1 = top5 = 0
    for image in range(len(x)):
        similarity = [float(unit[1][image] @ row) for row in unit[0]]
        votes: dict[int, float] = {}
        for j in sorted(range(len(bank)), key=lambda j: (-similarity[j], j))[:k]:  # noqa: B023
            votes[int(known[j])] = votes.get(int(known[j]), 0.0) + math.exp(similarity[j] / temperature)
        ranked = sorted(votes, key=lambda c: (-votes[c], c))
        top1 += ranked[0] == int(labels[image])
        top5 += int(labels[image]) in ranked[:5]
    return top1 / len(x), top5 / len(x)


def clustered(n: int, classes: int, dim: int, generator: torch.Generator, centers: Tensor) -> tuple[Tensor, Tensor]:
    labels = torch.randint(classes, (n,), generator=generator)
    return centers[labels] + 1.5 * torch.randn(n, dim, generator=generator), labels


def sides(m: int, n: int, classes: int, dim: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, dim, generator=generator)
    return *clustered(m, classes, dim, generator, centers), *clustered(n, classes, dim, generator, centers)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 9), st.integers(2, 9), st.integers(1, 40), st.integers(0, 10**6))
def test_equal_to_a_vote_by_hand(m: int, n: int, classes: int, dim: int, k: int, seed: int):
    bank, known, x, labels = sides(m, n, classes, dim, seed)
    (result,) = knn(bank, known, x, labels, k=[k], temperature=0.3)
    assert result.k == min(k, m)
    assert (result.top1, result.top5) == pytest.approx(brute_force(bank, known, x, labels, k, 0.3))


def test_several_k_are_one_ranking():
    bank, known, x, labels = sides(300, 50, 12, 16, 0)
    together = knn(bank, known, x, labels, k=[1, 20, 200, 1000])
    assert [r.k for r in together] == [1, 20, 200, 300]
    assert together == [knn(bank, known, x, labels, k=[k])[0] for k in (1, 20, 200, 1000)]
    assert len({r.top1 for r in together}) > 1  # k matters here
    nearest = (torch.nn.functional.normalize(x, dim=1) @ torch.nn.functional.normalize(bank, dim=1).T).argmax(1)
    assert together[0].top1 == pytest.approx(float((known[nearest] == labels).double().mean()))


def test_blocks_names_and_lengths_do_not_matter(monkeypatch: pytest.MonkeyPatch):
    bank, known, x, labels = sides(64, 37, 5, 8, 1)
    whole = knn(bank, known, x, labels)
    assert knn(bank * 4, known * 7 - 3, x / 8, (labels * 7 - 3).tolist()) == whole
    monkeypatch.setattr(ranking, "_BLOCK_BYTES", 5 * 64 * ranking._ENTRY_BYTES)
    assert knn(bank, known, x, labels) == whole


def test_ties_go_to_the_first_image_and_the_smaller_label():
    bank, known = torch.ones(4, 3), [2, 1, 1, 0]
    assert knn(bank, known, torch.ones(1, 3), [2], k=[1])[0].top1 == 1
    assert knn(bank, known, torch.ones(1, 3), [1], k=[2])[0].top1 == 1
    assert knn(bank, known, torch.ones(1, 3), [1], k=[4])[0].top1 == 1


def test_a_class_without_votes_is_no_hit():
    # Two classes have votes, five others none: top 5 must not fill up with them.
    bank, known = torch.eye(7), list(range(7))
    assert knn(bank, known, torch.eye(7)[:1], [6], k=[2])[0].top5 == 0
    # A label that the bank does not have is never right.
    assert knn(bank, known, torch.eye(7)[:2], [0, 99], k=[7])[0][1:] == (0.5, 0.5)


@pytest.mark.parametrize(
    ("bank", "x", "k", "words"),
    [
        (torch.zeros(0, 2), torch.ones(1, 2), [1], "both need rows"),
        (torch.ones(2, 2), torch.ones(1, 3), [1], "of one length"),
        (torch.ones(2, 2), torch.ones(1, 2), [0], "every k"),
        (torch.ones(2, 2), torch.tensor([[1.0, float("nan")]]), [1], "not finite"),
    ],
)
def test_unusable_input(bank: Tensor, x: Tensor, k: list[int], words: str):
    with pytest.raises(ValueError, match=words):
        knn(bank, torch.zeros(len(bank), dtype=torch.int64), x, torch.zeros(len(x), dtype=torch.int64), k=k)
