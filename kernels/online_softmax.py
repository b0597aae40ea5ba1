"""The online softmax in parts: what some rows of a queue add to the softmax of every query, and how parts become the whole.

For query i and a set of rows with scores ``s_j = q_i . row_j / T``, a part holds, as FlashAttention's authors write them
(Dao et al. 2022, arXiv 2205.14135; the idea is Milakov and Gimelshein 2018):

    m_i = max_j s_j,    l_i = sum_j exp(s_j - m_i),    acc_i = sum_j exp(s_j - m_i) row_j

Merge. For disjoint sets 1..S, with ``m = max_s m_s``:

    sum_j exp(s_j - m) = sum_s exp(m_s - m) l_s,     sum_j exp(s_j - m) row_j = sum_s exp(m_s - m) acc_s

since ``exp(s_j - m) = exp(s_j - m_s) exp(m_s - m)``. No exponent is positive, so nothing overflows.

Finish. Let ``s_+ = q_i . k_i / T`` be the score of the positive, which is in no part, and ``m = max(m_i, s_+)``. With
``l = exp(m_i - m) l_i`` and ``e = exp(s_+ - m)``, the probability of the positive is ``p = e / (l + e)`` and

    loss = -log p = log(1 + l)                  where m = s_+ (then e = 1): log1p keeps a small loss exact
                  = (m - s_+) + log(l + e)      otherwise

The derivative of the loss by the scores is ``p_j - [j = +]``, so that with ``acc = exp(m_i - m) acc_i``

    dloss/dq = (1 / T) (sum_j p_j row_j + (p - 1) k)
             = (1 / T) (acc / (l + e) + (e / (l + e) - 1) k)
             = (acc - l k) / ((l + e) T)

The last line has no ``1 - p``, which would cancel where the positive wins.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Partial(NamedTuple):
    """What some rows of the queue add to the softmax of every query, relative to their own maximum ``m_i``."""

    m_i: Tensor
    """[B] largest score (natural units, / temperature); at least the positive's in the chunked path."""
    l_i: Tensor
    """[B] sum of exp(score - m_i)."""
    rank: Tensor
    """[B] int64 rows above the positive, or [0]."""
    acc: Tensor
    """[B, D] sum of exp(score - m_i) * row, or [0, D]."""


def merge(parts: Partial) -> Partial:
    """The partial of all rows from those of S disjoint parts, stacked along a first axis."""
    m_i = parts.m_i.amax(0)
    alpha = torch.exp(parts.m_i - m_i)
    acc = torch.einsum("sb,sbd->bd", alpha, parts.acc) if parts.acc.shape[1] else parts.acc[0]
    return Partial(m_i, (parts.l_i * alpha).sum(0), parts.rank.sum(0), acc)


def finish(part: Partial, q: Tensor, k: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dloss/dq or [0, D], rank or [0]): the partial of all rows with the positive added."""
    positive = (q / temperature * k).sum(1)
    m_i = torch.maximum(part.m_i, positive)
    alpha = torch.exp(part.m_i - m_i)
    l_i = part.l_i * alpha
    whole = l_i + torch.exp(positive - m_i)  # l + e
    loss = torch.where(m_i == positive, torch.log1p(l_i), (m_i - positive) + torch.log(whole))
    dq = part.acc
    if len(dq):
        # in place: the partial is spent
        dq = dq.mul_(alpha[:, None]).addcmul_(l_i[:, None], k, value=-1).div_((whole * temperature)[:, None])
    return loss, dq, part.rank
