"""Nearest neighbours, per-class accuracy, confusions and near-duplicates against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.evaluation import neighbours
from engine.evaluation.neighbours import class_scores, confusions, mean_cosine, most_similar, near_duplicates, nearest


def features(count: int, dim: int = 6) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(3)) * torch.arange(1.0, count + 1)[:, None]


@pytest.mark.parametrize("block", [1024, 7])
def test_neighbours_and_pairs_are_those_of_the_whole_matrix(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_BLOCK", block)
    x = features(40)
    unit = x / x.norm(dim=1, keepdim=True)
    cosine = (unit @ unit.T).numpy()
    near = nearest(x, 5)
    assert mean_cosine(x) == pytest.approx(float(cosine[~np.eye(40, dtype=bool)].mean()), abs=1e-6)
    alone = cosine - 9 * np.eye(40, dtype=np.float32)
    assert np.array_equal(near.index, np.argsort(-alone, axis=1)[:, :5])
    assert np.allclose(near.cosine, np.take_along_axis(cosine, near.index, 1), atol=1e-6)

    wanted = [(i, j, cosine[i, j]) for i in range(40) for j in range(i + 1, 40) if cosine[i, j] >= 0.7]
    pairs, count = near_duplicates(x, 0.7, 4)
    assert count == len(wanted) > 4
    best = sorted(wanted, key=lambda p: -p[2])[:4]
    assert [p[:2] for p in pairs] == [p[:2] for p in best] and np.allclose([p[2] for p in pairs], [p[2] for p in best])


def test_a_query_finds_itself_first() -> None:
    x = features(12)
    near = most_similar(3 * x[[4, 9]], x, 3)
    assert near.index[:, 0].tolist() == [4, 9] and np.allclose(near.cosine[:, 0], 1) and near.index.shape == (2, 3)
    assert most_similar(x[:1], x, 50).index.shape == (1, 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_hundred_thousand_stored_features_against_the_whole_product(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    stored = torch.nn.functional.normalize(torch.randn(100_000, 256, generator=generator), dim=1).to(dtype)
    query = torch.randn(3, 256, generator=generator)
    near = most_similar(query, stored, 10)
    unit = [(x.double() / x.double().norm(dim=1, keepdim=True)) for x in (query, stored)]
    cosine = (unit[0] @ unit[1].T).numpy()
    order = np.argsort(-cosine, axis=1, kind="stable")[:, :11]
    best = np.take_along_axis(cosine, order, 1)
    assert np.abs(near.cosine - best[:, :10]).max() < 1e-6 and (np.diff(near.cosine) <= 0).all()
    apart = (np.diff(best) < -1e-6).all(1)  # where float32 cannot confuse neighbors, the order is that of float64
    assert apart.any() and np.array_equal(near.index[apart], order[apart, :10])


def test_equal_features_are_found_in_order_and_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = features(7).repeat(3, 1)
    monkeypatch.setattr(neighbours, "_STORED", 4 * 6)
    near = most_similar(x[:2], x, 4)
    assert near.index[:, :3].tolist() == [[0, 7, 14], [1, 8, 15]]
    with pytest.raises(ValueError, match="one length"):
        most_similar(x[:, :2], x, 1)
    x[20] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        most_similar(x[:1], x, 1)


def test_scores_and_confusions_of_a_case_done_by_hand() -> None:
    # angles on a circle: 0 and 1 are each other's nearest, so are 2 and 3, so are 4 and 5; 6 is alone in its class
    angles = torch.tensor([0, 4, 40, 45, 90, 97, 200]) / 57.3
    near = nearest(torch.stack([angles.cos(), angles.sin()], 1), 2)
    labels = np.array([0, 0, 0, 1, 1, 2, 3])
    labels[5] = 1
    scores = class_scores(near, labels)
    assert [(s.label, s.images) for s in scores] == [(0, 3), (1, 3)]  # a class of one image is left out
    assert [round(s.accuracy, 4) for s in scores] == [0.6667, 0.6667]
    (pair,) = confusions(near, labels, 5)
    assert pair[:4] == (0, 1, 2, 6) and set(pair.example) == {2, 3}


def test_features_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match="at least two rows"):
        nearest(torch.randn(1, 4), 2)
    with pytest.raises(ValueError, match="not finite"):
        nearest(torch.tensor([[1.0, 2.0], [float("nan"), 1.0]]), 2)
