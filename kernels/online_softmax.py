"""The online softmax in parts: what some rows of a queue contribute to the softmax of each query, and how parts are merged.

For query i and a set of rows with scores ``s_j = q_i . row_j / T``, a part holds three quantities. Their names are those of
FlashAttention (Dao et al. 2022, arXiv 2205.14135); the idea goes back to Milakov and Gimelshein (2018):

    m_i = max_j s_j,    l_i = sum_j exp(s_j - m_i),    acc_i = sum_j exp(s_j - m_i) row_j

Merge. For disjoint sets 1..S, with ``m = max_s m_s``:

    sum_j exp(s_j - m) = sum_s exp(m_s - m) l_s,     sum_j exp(s_j - m) row_j = sum_s exp(m_s - m) acc_s

since ``exp(s_j - m) = exp(s_j - m_s) exp(m_s - m)``. No exponent is positive, so nothing overflows.

Finish. Let ``s_+ = q_i . k_i / T`` be the score of the positive, which no part contains, and ``m = max(m_i, s_+)``. With
``l = exp(m_i - m) l_i`` and ``e = exp(s_+ - m)``, the probability of the positive is ``p = e / (l + e)`` and

    loss = -log p = log(1 + l)                  where m = s_+ (then e = 1): log1p keeps a small loss exact
                  = (m - s_+) + log(l + e)      otherwise

The derivative of the loss with respect to a score is ``p_j - [j = +]``. With ``acc = exp(m_i - m) acc_i`` follows

    dloss/dq = (1 / T) (sum_j p_j row_j + (p - 1) k)
             = (1 / T) (acc / (l + e) + (e / (l + e) - 1) k)
             = (acc - l k) / ((l + e) T)

The last line has no ``1 - p``, which would suffer from cancellation where p is close to 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Partial(NamedTuple):
    """What some rows of the queue contribute to the softmax of each query, relative to their maximum ``m_i``."""

    m_i: Tensor
    """[B] largest score, divided by the temperature; in the chunked path at least the score of the positive."""
    l_i: Tensor
    """[B] sum of exp(score - m_i)."""
    rank: Tensor
    """[B] int64 number of rows that score above the positive, or [0]."""
    acc: Tensor
    """[B, D] sum of exp(score - m_i) * row, or [0, D]."""


def merge(parts: Partial) -> Partial:
    """The partial of all rows, from the partials of S disjoint sets of rows stacked along a first axis."""
    m_i = parts.m_i.amax(0)
    alpha = torch.exp(parts.m_i - m_i)
    acc = torch.einsum("sb,sbd->bd", alpha, parts.acc) if parts.acc.shape[1] else parts.acc[0]
    return Partial(m_i, (parts.l_i * alpha).sum(0), parts.rank.sum(0), acc)


def finish(part: Partial, q: Tensor, k: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dloss/dq or [0, D], rank or [0]) from the partial of all rows and the positive. Overwrites ``part.acc``."""
    positive = (q / temperature * k).sum(1)
    m_i = torch.maximum(part.m_i, positive)
    alpha = torch.exp(part.m_i - m_i)
    l_i = part.l_i * alpha
    whole = l_i + torch.exp(positive - m_i)  # l + e
    loss = torch.where(m_i == positive, torch.log1p(l_i), (m_i - positive) + torch.log(whole))
    dq = part.acc
    if len(dq):
        dq = dq.mul_(alpha[:, None]).addcmul_(l_i[:, None], k, value=-1).div_((whole * temperature)[:, None])
    return loss, dq, part.rank
