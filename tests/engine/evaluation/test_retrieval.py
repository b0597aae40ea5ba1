"""Retrieval against a brute-force oracle and torchmetrics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchmetrics.retrieval import RetrievalHitRate, RetrievalMAP

from engine.evaluation import ranking
from engine.evaluation.retrieval import retrieval


def brute_force(features: Tensor, labels: Tensor) -> tuple[float, float, float, int]:
    """Rank-1, rank-5, mAP and the number of images left out, one query and one rank at a time."""
    unit = features.double() / features.double().norm(dim=1, keepdim=True).clamp_min(1e-12)
    hits_1, hits_5, precisions, excluded = [], [], [], 0
    for query in range(len(unit)):
        others = [i for i in range(len(unit)) if i != query]
        wanted = sum(bool(labels[i] == labels[query]) for i in others)
        if not wanted:
            excluded += 1
            continue
        others.sort(key=lambda i: (-float(unit[query] @ unit[i]), i))
        correct = [bool(labels[i] == labels[query]) for i in others]
        hits_1.append(correct[0])
        hits_5.append(any(correct[:5]))
        found = [sum(correct[: k + 1]) / (k + 1) for k in range(len(others)) if correct[k]]
        precisions.append(sum(found) / wanted)
    return float(np.mean(hits_1)), float(np.mean(hits_5)), float(np.mean(precisions)), excluded


def clustered(n: int, classes: int, dim: int, seed: int, noise: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    centers = torch.randn(classes, dim, generator=generator)
    return centers[labels] + noise * torch.randn(n, dim, generator=generator), labels


@settings(max_examples=25, deadline=None)
@given(n=st.integers(2, 40), classes=st.integers(1, 12), dim=st.integers(2, 9), seed=st.integers(0, 10**6))
def test_equal_to_brute_force(n: int, classes: int, dim: int, seed: int):
    features, labels = clustered(n, classes, dim, seed)
    if labels.unique(return_counts=True)[1].max() == 1:
        return
    result = retrieval(features, labels)
    rank1, rank5, mean_precision, excluded = brute_force(features, labels)
    assert (result.rank1, result.rank5, result.excluded) == (pytest.approx(rank1), pytest.approx(rank5), excluded)
    assert result.mAP == pytest.approx(mean_precision, abs=1e-12)
    assert result.queries == n - excluded


def test_equal_to_torchmetrics():
    features, labels = clustered(120, 9, 32, 3, noise=3.0)
    unit = nn.functional.normalize(features.double(), dim=1)
    pair = ~torch.eye(120, dtype=torch.bool)
    scores = (2 + unit @ unit.T)[pair]  # torchmetrics drops what is relevant but scored at or below 0
    target = (labels[:, None] == labels)[pair]
    query = torch.arange(120)[:, None].expand(120, 120)[pair]
    result = retrieval(features, labels)
    assert result.rank1 == pytest.approx(RetrievalHitRate(top_k=1)(scores, target, query).item(), abs=1e-6)
    assert result.rank5 == pytest.approx(RetrievalHitRate(top_k=5)(scores, target, query).item(), abs=1e-6)
    assert result.mAP == pytest.approx(RetrievalMAP()(scores, target, query).item(), abs=1e-6)
    assert 0.1 < result.mAP < 0.9


def test_by_hand():
    # On a line of angles 0, 10, 30, 70 degrees: 0 and 30 are of one class, 10 and 70 of another, 180 is alone.
    angle = torch.deg2rad(torch.tensor([0.0, 10.0, 30.0, 70.0, 180.0]))
    result = retrieval(torch.stack([angle.cos(), angle.sin()], 1), [7, 3, 7, 3, 9])
    # Rank of the one wanted image: 2, 3, 2, 2.
    assert result == (0.0, 1.0, pytest.approx((1 / 2 + 1 / 3 + 1 / 2 + 1 / 2) / 4), 4, 1)


def test_images_alone_in_their_class_still_distract():
    features = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.9, 0.1]])
    assert retrieval(features, [0, 0, 1])[:3] == (0.0, 1.0, 0.5)


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch):
    features, labels = clustered(101, 7, 16, 5)
    whole = retrieval(features, labels)
    for rows in (1, 3, 64):
        monkeypatch.setattr(ranking, "_BLOCK_BYTES", rows * 101 * ranking._ENTRY_BYTES)
        blocked = retrieval(features, labels)
        assert blocked[:2] == whole[:2] and blocked.mAP == pytest.approx(whole.mAP, abs=1e-12)


def test_ties_go_to_the_first_image():
    # All similarities are equal: the ranking is the file order without the query.
    labels = torch.tensor([0, 1, 1, 0, 1, 2, 2])
    constant = torch.ones(7, 4)
    assert retrieval(constant, labels)[:3] == pytest.approx(brute_force(constant, labels)[:3], abs=1e-12)
    # The same with rows of zeros, and with the similarities 0 and -0.
    assert retrieval(torch.zeros(7, 4), labels) == retrieval(constant, labels)
    signed = torch.eye(7) * torch.tensor([1.0, -1, 1, -1, 1, -1, 1])[:, None]
    assert retrieval(signed, labels) == retrieval(constant, labels)


def test_length_of_rows_and_names_of_labels_do_not_matter():
    features, labels = clustered(60, 6, 8, 1)
    result = retrieval(features, labels)
    assert retrieval(features * 2.0 ** torch.randint(-3, 4, (60, 1)), labels) == result
    assert retrieval(features, (-1000 * labels - 5).tolist()) == result


def test_products_are_float32_whatever_is_set_outside():
    # Differences of 1e-5 decide: bf16 products would tie them.
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(20).repeat_interleave(2)
    features = 1 + 1e-2 * torch.randn(20, 64, generator=generator).repeat_interleave(2, 0)
    features += 1e-3 * torch.randn(40, 64, generator=generator)
    assert retrieval(features, labels).rank1 == 1
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert retrieval(features, labels).rank1 == 1
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("features", "labels", "words"),
    [
        (torch.zeros(3), [0, 0, 0], "features: expected"),
        (torch.zeros(3, 2, dtype=torch.int64), [0, 0, 0], "features: expected"),
        (torch.zeros(3, 2), [0, 0], "labels: expected"),
        (torch.zeros(3, 2), [0.0, 0.0, 0.0], "labels: expected"),
        (torch.tensor([[1.0, float("nan")], [1, 0]]), [0, 0], "not finite"),
        (torch.zeros(3, 2), [0, 1, 2], "no class has two images"),
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), "no class has two images"),
    ],
)
def test_unusable_input(features: Tensor, labels: Tensor | list[int], words: str):
    with pytest.raises(ValueError, match=words):
        retrieval(features, labels)


def test_extra_memory_does_not_grow_with_n(monkeypatch: pytest.MonkeyPatch):
    """Counts the bytes that torch allocates while a full similarity matrix would be 16 times the block."""
    monkeypatch.setattr(ranking, "_BLOCK_BYTES", 2**20)
    features, labels = clustered(2048, 100, 4, 0)
    retrieval(features[:64], labels[:64])  # loads what is loaded once
    peaks = {}
    for n in (1024, 2048):
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profile:
            retrieval(features[:n], labels[:n])
        live = peak = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                live += event.nbytes()
                peak = max(peak, live)
        peaks[n] = peak
    assert peaks[2048] < 4 * 2**20 < 2048 * 2048 * 4
    assert peaks[2048] < 1.5 * peaks[1024]
