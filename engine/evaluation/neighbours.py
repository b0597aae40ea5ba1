"""What features say about their images: nearest neighbours, per-class accuracy, confused classes, near-duplicates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.evaluation.ranking import distances, full_precision, ranking_keys

_BLOCK = 1024
"""Rows of the similarity matrix held at a time."""
_STORED = 2**20
"""Numbers of stored features that are float32 at a time: 4 MiB, which a core's cache holds or nearly so."""


class Neighbours(NamedTuple):
    """The nearest other images of every image."""

    index: np.ndarray
    """[N, k] positions, nearest first."""
    cosine: np.ndarray
    """[N, k] float32."""


class ClassScore(NamedTuple):
    """1-NN accuracy of one class, leave-one-out."""

    label: int
    accuracy: float
    images: int


class Confusion(NamedTuple):
    """Two classes whose images take each other for nearest."""

    first: int
    second: int
    times: int
    of: int
    """Images of both classes."""
    example: tuple[int, int]
    """The image and its neighbour of the other class that are most alike."""


def nearest(features: Tensor, k: int) -> Neighbours:
    """The ``k`` most similar other images by cosine; features [N, D], N > 1; fewer where there are not so many.

    Raises ``ValueError`` for fewer than two rows, or a feature that is not finite.
    """
    unit = _unit(features)
    k = min(k, len(unit) - 1)
    index, cosine = [], []
    for start, similarity in _blocks(unit):
        similarity[torch.arange(len(similarity)), torch.arange(start, start + len(similarity))] = -torch.inf
        top = similarity.topk(k, dim=1)
        index.append(top.indices)
        cosine.append(top.values)
    return Neighbours(torch.cat(index).numpy(), torch.cat(cosine).numpy())


def mean_cosine(features: Tensor) -> float:
    """Mean cosine of two different rows of features [N, D], N > 1."""
    unit = _unit(features).double()
    total = unit.sum(0)
    return float((total @ total - unit.square().sum()) / (len(unit) * (len(unit) - 1)))


@torch.no_grad()
def most_similar(query: Tensor, features: Tensor, k: int) -> Neighbours:
    """For every row of ``query`` [Q, D] the ``k`` most similar rows of ``features`` [N, D] by cosine; fewer where there are not so
    many. Of equal ones the first comes first.

    Exact: products are float32, whatever floating-point type ``features`` has, in blocks of its rows, so that a float16 file of any
    length needs no float32 copy. Raises ``ValueError`` for wrong shapes and for a feature that is not finite.
    """
    if features.ndim != 2 or query.ndim != 2 or query.shape[1] != features.shape[1] or not len(features):
        raise ValueError(f"query {list(query.shape)} and features {list(features.shape)}: expected rows of one length")
    asked = F.normalize(query.float().cpu(), dim=1).neg_().split(_BLOCK)
    best = [torch.zeros(len(part), 0, dtype=torch.int64) for part in asked]
    length = max(1, _STORED // features.shape[1])
    with full_precision("cpu"):
        for start in range(0, len(features), length):
            block = features[start : start + length].cpu().float()
            norm = torch.linalg.vector_norm(block, dim=1).clamp_(min=1e-12)
            for i, part in enumerate(asked):
                distance = (part @ block.T).div_(norm)
                if not torch.isfinite(distance).all():
                    raise ValueError("features: not finite; the network that made them has diverged")
                keys = ranking_keys(distance).add_(start)
                near = keys.topk(min(k, keys.shape[1]), dim=1, largest=False, sorted=False).values
                near = torch.cat([best[i], near], 1)
                best[i] = near.topk(min(k, near.shape[1]), dim=1, largest=False).values
    found = torch.cat(best)
    return Neighbours((found & 0xFFFFFFFF).numpy(), distances(found).neg_().numpy())


def near_duplicates(features: Tensor, threshold: float, most: int) -> tuple[list[tuple[int, int, float]], int]:
    """Pairs (i, j, cosine), i < j, whose cosine is at least ``threshold``: the ``most`` alike first, and how many there are."""
    pairs: list[tuple[float, int, int]] = []
    count = 0
    for start, similarity in _blocks(_unit(features)):
        rows, columns = torch.nonzero(torch.triu(similarity >= threshold, diagonal=start + 1), as_tuple=True)
        count += len(rows)
        values = similarity[rows, columns]
        best = values.topk(min(most, len(values))).indices
        found = zip(values[best].tolist(), (rows[best] + start).tolist(), columns[best].tolist(), strict=True)
        pairs = sorted([*pairs, *found], key=lambda p: (-p[0], p[1], p[2]))[:most]
    return [(i, j, cosine) for cosine, i, j in pairs], count


def class_scores(neighbours: Neighbours, labels: np.ndarray) -> list[ClassScore]:
    """1-NN accuracy of every class with two or more images, worst first."""
    hit = labels[neighbours.index[:, 0]] == labels
    scores = []
    for label, size in zip(*np.unique(labels, return_counts=True), strict=True):
        if size > 1:
            scores.append(ClassScore(int(label), float(hit[labels == label].mean()), int(size)))
    return sorted(scores, key=lambda s: (s.accuracy, s.label))


def confusions(neighbours: Neighbours, labels: np.ndarray, most: int) -> list[Confusion]:
    """The pairs of classes that take each other most often for nearest, most confused (by share of their images) first."""
    other = labels[neighbours.index[:, 0]]
    size = np.bincount(labels)
    wrong = np.flatnonzero((other != labels) & (size[labels] > 1))
    found: dict[tuple[int, int], list[int]] = {}
    for i in wrong.tolist():
        found.setdefault((min(labels[i], other[i]), max(labels[i], other[i])), []).append(i)
    pairs = []
    for (a, b), images in found.items():
        example = max(images, key=lambda i: (neighbours.cosine[i, 0], -i))
        of = int(size[a] + size[b])
        pairs.append(Confusion(int(a), int(b), len(images), of, (example, int(neighbours.index[example, 0]))))
    return sorted(pairs, key=lambda c: (-c.times / c.of, c.first, c.second))[:most]


def _unit(features: Tensor) -> Tensor:
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features: expected [N, D] with at least two rows, got {list(features.shape)}")
    unit = F.normalize(features.detach().float().cpu(), dim=1)
    if not torch.isfinite(unit).all():
        raise ValueError("features: not finite; the network that made them has diverged")
    return unit


def _blocks(unit: Tensor) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(unit), _BLOCK):
        yield start, unit[start : start + _BLOCK] @ unit.T
