"""Leave-one-out retrieval: rank-1, rank-5 and mAP of a set of features, in blocks of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Rows are taken in blocks of about this much scratch; smaller ones make the matrix product re-pack its right side more.
_BLOCK_BYTES = 128 * 2**20
# Scratch per entry of a block: the similarity and a temporary of its size, or the similarity and the 64-bit key.
_ENTRY_BYTES = 12


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
    labels = torch.as_tensor(labels, device=features.device)
    if features.ndim != 2 or not features.is_floating_point():
        raise ValueError(f"features: expected floating point [N, D], got {features.dtype} {list(features.shape)}")
    if labels.shape != features.shape[:1] or labels.is_floating_point():
        raise ValueError(f"labels: expected integers [{len(features)}], got {labels.dtype} {list(labels.shape)}")
    unit = F.normalize(features.float(), dim=1)
    if not torch.isfinite(unit).all():
        raise ValueError("features: not finite; the network that made them has diverged")
    _, group, sizes = torch.unique(labels, return_inverse=True, return_counts=True)
    queries = torch.nonzero(sizes[group] > 1).flatten()
    if not len(queries):
        raise ValueError(f"labels: no class has two images (of {len(labels)}), so that there is nothing to retrieve")
    members = torch.argsort(group, stable=True)  # images by class; a class is one stretch of it
    starts = sizes.cumsum(0) - sizes

    found_1 = found_5 = torch.zeros((), dtype=torch.int64, device=unit.device)
    precision_sum = torch.zeros((), dtype=torch.float64, device=unit.device)
    rows = max(1, _BLOCK_BYTES // (_ENTRY_BYTES * len(unit)))
    with _full_precision(unit.device.type):
        for query in queries.split(rows):
            keys = _ranking_keys(unit[query].neg_() @ unit.T)
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


def _ranking_keys(distance: Tensor) -> Tensor:
    """[b, N] float32, negated similarities (spent as scratch) -> int64 keys that rise with distance, then with column.
    IEEE floats compare like their bits once the magnitude bits of negative ones are flipped; the column fills the low
    half. In place where it can be: fresh memory costs more here than the arithmetic."""
    bits = distance.add_(0.0).view(torch.int32)  # -0.0 + 0.0 = 0.0
    bits ^= (bits >> 31).bitwise_and_(0x7FFFFFFF)
    keys = bits.long()
    keys <<= 32
    keys += torch.arange(keys.shape[1], device=keys.device)
    return keys


def _sort_rows(keys: Tensor) -> Tensor:
    """Sorts each row, in place where it can: numpy's vectorised sort is several times faster than torch's on a CPU."""
    if keys.device.type != "cpu":
        return keys.sort(dim=1).values
    keys.numpy().sort(axis=1)
    return keys


@contextmanager
def _full_precision(device_type: str) -> Iterator[None]:
    """Matrix products in float32 proper, whatever autocast or TF32 setting is in force outside."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
