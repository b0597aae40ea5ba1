"""Weighted k-nearest-neighbor classification: labelled training features vote on every test image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.evaluation.ranking import block_rows, checked, full_precision, ranking_keys

K = (10, 20, 100, 200)
"""Numbers of neighbors that are reported; the last is the protocol's own."""
TEMPERATURE = 0.07


class Knn(NamedTuple):
    """Fractions in [0, 1] over the test images."""

    k: int
    """Neighbours that voted; at most the size of the bank."""
    top1: float
    top5: float
    """The image's class among the five with most votes (among those that have any)."""


@torch.no_grad()
def knn(
    bank: Tensor,
    bank_labels: Tensor | Sequence[int],
    features: Tensor,
    labels: Tensor | Sequence[int],
    *,
    k: Sequence[int] = K,
    temperature: float = TEMPERATURE,
) -> list[Knn]:
    """The k images of the bank that are nearest by cosine similarity s vote for their class with weight exp(s / T), for every
    number in ``k`` (from one ranking). Formula: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance
    Discrimination", CVPR 2018 (arXiv 1805.01978), section 3.4, with its k = 200 and T = 0.07.

    bank: [M, D] floating point, rows of any length; bank_labels: [M] integers; features: [N, D]; labels: [N]. A k above M counts
    as M. Equal similarities are won by the image that comes first in the bank, equal votes by the smaller label. Similarities are
    float32, votes float64; works in blocks of rows of about 128 MiB.

    Raises ``ValueError`` for wrong shapes, an empty side, a non-finite feature, or a k below 1.
    """
    bank, bank_labels = checked(bank, bank_labels)
    features, labels = checked(features, labels)
    if not len(bank) or not len(features) or bank.shape[1] != features.shape[1]:
        raise ValueError(f"bank {list(bank.shape)} and features {list(features.shape)}: both need rows, of one length")
    if not k or min(k) < 1 or temperature <= 0:
        raise ValueError(f"k: got {list(k)} at temperature {temperature}; every k must be at least 1, the temperature above 0")
    counts = sorted({min(number, len(bank)) for number in k})
    names, group = torch.unique(bank_labels, return_inverse=True)
    right = torch.zeros(len(counts), 2, dtype=torch.int64, device=bank.device)
    with full_precision(bank.device.type):
        for rows, wanted in zip(*(side.split(block_rows(len(bank))) for side in (features, labels)), strict=True):
            similarity = rows @ bank.T
            nearest = ranking_keys(-similarity).topk(counts[-1], largest=False, sorted=True).values & 0xFFFFFFFF
            weight = ((similarity.gather(1, nearest).double() - 1) / temperature).exp_()  # s <= 1: nothing overflows
            votes = torch.zeros(len(rows), len(names), dtype=torch.float64, device=bank.device)
            for i, (done, count) in enumerate(zip([0, *counts], counts, strict=False)):
                votes.scatter_add_(1, group[nearest[:, done:count]], weight[:, done:count])
                ranked = votes.sort(dim=1, descending=True, stable=True)
                hit = (names[ranked.indices[:, :5]] == wanted[:, None]) & (ranked.values[:, :5] > 0)
                right[i] += torch.stack([hit[:, 0].sum(), hit.sum()])
    return [
        Knn(count, top1 / len(features), top5 / len(features)) for count, (top1, top5) in zip(counts, right.tolist(), strict=True)
    ]
