"""Retrieval in blocks of rows: a set of features among themselves, leave-one-out, and queries in a gallery."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.evaluation.ranking import block_rows, checked, full_precision, ranking_keys


class Retrieval(NamedTuple):
    """Fractions in [0, 1] over the queries."""

    rank1: float
    """Queries whose nearest other image is of their class."""
    rank5: float
    """Queries with an image of their class among the five nearest."""
    mAP: float
    """Mean over queries of the average precision of the full ranking."""
    queries: int
    excluded: int
    """Images that are alone in their class: no query, but they stay in everybody's ranking."""


class Matching(NamedTuple):
    """Fractions in [0, 1], means over the queries; R is how many images of the gallery are of the query's class."""

    recall: dict[int, float]
    """{k: queries with an image of their class among the k nearest}, Recall@K of metric learning."""
    r_precision: float
    """The share of the R nearest that is of the query's class."""
    map_at_r: float
    """sum over i = 1 ... R of precision at i where the i-th is of the class, else 0, over R."""
    mAP: float
    """Mean average precision of the full ranking."""
    queries: int
    excluded: int
    """Queries without an image of their class in the gallery."""


@torch.no_grad()
def retrieval(features: Tensor, labels: Tensor | Sequence[int]) -> Retrieval:
    """Leave-one-out retrieval: every image asks for the others of its class, by cosine similarity.

    features: [N, D] floating point, any device, rows of any length; labels: [N] integers.
    Similarities are float32. Ties (equal to the last bit) are won by the image that comes first, so that the result is
    a function of the values and their order alone. Works in blocks of rows, so that beside one float32 copy of
    ``features`` the extra memory hardly grows with N (25,000 x 2048: 0.5 GiB with the copy; more only where one class
    holds most of the images).

    Raises:
        ValueError: wrong shapes, a non-finite feature, or no class with two images.
    """
    unit, labels = checked(features, labels)
    itself = torch.arange(len(unit), device=unit.device)
    found_1 = found_5 = torch.zeros((), dtype=torch.int64, device=unit.device)
    precision_sum = torch.zeros((), dtype=torch.float64, device=unit.device)
    n = 0
    for rank, relevant in _ranks(unit, labels, unit, labels, torch.stack([itself, itself], 1)):
        n += len(rank)
        found_1 = found_1 + (rank[:, 0] <= 1).sum()
        found_5 = found_5 + (rank[:, 0] <= 5).sum()
        precision_sum += _precisions(rank, relevant).sum()
    if not n:
        raise ValueError(f"labels: no class has two images (of {len(labels)}), so that there is nothing to retrieve")
    return Retrieval(int(found_1) / n, int(found_5) / n, float(precision_sum) / n, n, len(labels) - n)


@torch.no_grad()
def matching(
    query: Tensor,
    query_labels: Tensor | Sequence[int],
    gallery: Tensor,
    gallery_labels: Tensor | Sequence[int],
    *,
    same: Tensor | None = None,
    k: Sequence[int] = (1, 2, 4, 8),
) -> Matching:
    """Every query asks for the images of its class in the gallery, by cosine similarity.

    R-precision and MAP@R: Musgrave et al., "A Metric Learning Reality Check", ECCV 2020 (arXiv 2003.08505), section 2.3, as
    pytorch-metric-learning computes them; Recall@K: Oh Song et al., CVPR 2016 (arXiv 1511.06452), section 5.

    query: [Q, D] and gallery: [N, D] floating point on one device, rows of any length; labels: [Q] and [N] integers. same: [P, 2]
    (query, image of the gallery) pairs that are one photo, which is left out of that query's ranking; for the test set against
    itself, every (i, i). Similarities are float32, ties are won by the image that comes first; works in blocks as ``retrieval``.

    Raises ``ValueError`` for wrong shapes, a non-finite feature, a k below 1, or no query with an image of its class.
    """
    query, query_labels = checked(query, query_labels)
    gallery, gallery_labels = checked(gallery, gallery_labels)
    if not k or min(k) < 1:
        raise ValueError(f"k: got {list(k)}; every k must be at least 1")
    if query.shape[1] != gallery.shape[1]:
        raise ValueError(f"query {list(query.shape)} and gallery {list(gallery.shape)}: rows need one length")
    same = torch.zeros(0, 2, dtype=torch.int64) if same is None else same
    hits = torch.zeros(len(k), dtype=torch.int64, device=query.device)
    sums = torch.zeros(3, dtype=torch.float64, device=query.device)
    n = 0
    for rank, relevant in _ranks(query, query_labels, gallery, gallery_labels, same.to(query.device)):
        n += len(rank)
        hits += torch.stack([(rank[:, 0] <= number).sum() for number in k])
        among = rank <= relevant[:, None]
        precisions = _precisions(rank, relevant)
        sums += torch.stack([(among.sum(1) / relevant.double()).sum(), precisions[among].sum(), precisions.sum()])
    if not n:
        raise ValueError(f"labels: none of {len(query_labels)} queries has another image of its class in the gallery")
    recall = {number: hit / n for number, hit in zip(k, hits.tolist(), strict=True)}
    r_precision, map_at_r, mean = (sums / n).tolist()
    return Matching(recall, r_precision, map_at_r, mean, n, len(query_labels) - n)


def _ranks(
    query: Tensor, query_labels: Tensor, gallery: Tensor, gallery_labels: Tensor, same: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """For blocks of the queries that have an image of their class in the gallery: (rank [b, m] of each such image from 1, nearest
    first, _LAST behind them; how many there are [b]). Features are unit rows, ``same`` as in ``matching``."""
    _, group = torch.unique(torch.cat([query_labels, gallery_labels]), return_inverse=True)
    of_query, of_gallery = group[: len(query)], group[len(query) :]
    sizes = torch.bincount(of_gallery, minlength=int(group.max()) + 1 if len(group) else 0)
    members = torch.argsort(of_gallery, stable=True)  # images by class; a class is one stretch of it
    starts = sizes.cumsum(0) - sizes
    left_out = same[of_query[same[:, 0]] == of_gallery[same[:, 1]], 0]
    relevant = sizes[of_query] - torch.bincount(left_out, minlength=len(query))
    row = torch.full((len(query),), -1, device=query.device)  # of a query in its block
    with full_precision(query.device.type):
        for block in torch.nonzero(relevant > 0).flatten().split(block_rows(len(gallery))):
            if not len(block):
                continue
            keys = ranking_keys(query[block].neg() @ gallery.T)
            row[block] = torch.arange(len(block), device=query.device)
            here = same[row[same[:, 0]] >= 0]
            keys[row[here[:, 0]], here[:, 1]] = _LAST
            row[block] = -1
            # The query's class, as columns: padded to the largest class of the block, the photo itself taken out.
            slot = torch.arange(int(sizes[of_query[block]].max()), device=query.device)
            wanted = keys.gather(1, members[(starts[of_query[block]][:, None] + slot).clamp(max=len(gallery) - 1)])
            absent = (slot >= sizes[of_query[block]][:, None]) | (wanted == _LAST)
            wanted.masked_fill_(absent, _LAST)
            # Position of every wanted image among all others, from 1, nearest first; absent ones are sorted behind.
            yield (torch.searchsorted(_sort_rows(keys), wanted) + 1).masked_fill_(absent, _LAST).sort(dim=1).values, relevant[block]


def _precisions(rank: Tensor, relevant: Tensor) -> Tensor:
    """[b, m] float64: i / (rank of the i-th image) / relevant, the addends of the average precision; 0 where there is none."""
    slot = torch.arange(rank.shape[1], device=rank.device)
    hits = (slot + 1).double() / rank
    return hits.masked_fill_(slot >= relevant[:, None], 0) / relevant[:, None]


_LAST = torch.iinfo(torch.int64).max


def _sort_rows(keys: Tensor) -> Tensor:
    """Sorts each row, in place where it can: numpy's vectorised sort is several times faster than torch's on a CPU."""
    if keys.device.type != "cpu":
        return keys.sort(dim=1).values
    keys.numpy().sort(axis=1)
    return keys
