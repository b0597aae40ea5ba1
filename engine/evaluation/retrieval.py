"""Leave-one-out retrieval: rank-1, rank-5 and mAP of a set of features, in blocks of rows."""

from __future__ import annotations

from collections.abc import Sequence
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
    _, group, sizes = torch.unique(labels, return_inverse=True, return_counts=True)
    queries = torch.nonzero(sizes[group] > 1).flatten()
    if not len(queries):
        raise ValueError(f"labels: no class has two images (of {len(labels)}), so that there is nothing to retrieve")
    members = torch.argsort(group, stable=True)  # images by class; a class is one stretch of it
    starts = sizes.cumsum(0) - sizes

    found_1 = found_5 = torch.zeros((), dtype=torch.int64, device=unit.device)
    precision_sum = torch.zeros((), dtype=torch.float64, device=unit.device)
    with full_precision(unit.device.type):
        for query in queries.split(block_rows(len(unit))):
            keys = ranking_keys(unit[query].neg_() @ unit.T)
            # The query's class, as columns: padded to the largest class of the block, itself taken out.
            slot = torch.arange(int(sizes[group[query]].max()), device=unit.device)
            same = members[(starts[group[query]][:, None] + slot).clamp(max=len(unit) - 1)]
            absent = (slot >= sizes[group[query]][:, None]) | (same == query[:, None])
            wanted = keys.gather(1, same).masked_fill_(absent, _LAST)
            keys.scatter_(1, query[:, None], _LAST)

            # Position of every wanted image among all others, from 1, nearest first; absent ones are sorted behind.
            rank = (torch.searchsorted(_sort_rows(keys), wanted) + 1).masked_fill_(absent, _LAST).sort(dim=1).values
            found_1 = found_1 + (rank[:, 0] <= 1).sum()
            found_5 = found_5 + (rank[:, 0] <= 5).sum()
            hits = (slot + 1).double() / rank  # the i-th found one: precision i / rank
            relevant = (sizes[group[query]] - 1)[:, None]
            precision_sum += (hits.masked_fill_(slot >= relevant, 0) / relevant).sum()
    n = len(queries)
    return Retrieval(int(found_1) / n, int(found_5) / n, float(precision_sum) / n, n, len(labels) - n)


_LAST = torch.iinfo(torch.int64).max


def _sort_rows(keys: Tensor) -> Tensor:
    """Sorts each row, in place where it can: numpy's vectorised sort is several times faster than torch's on a CPU."""
    if keys.device.type != "cpu":
        return keys.sort(dim=1).values
    keys.numpy().sort(axis=1)
    return keys
