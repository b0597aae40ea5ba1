"""Cosine similarities in float32 proper, and the order that they put images in: what retrieval and kNN share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

# Rows are taken in blocks of about this much scratch; smaller ones make the matrix product re-pack its right side more.
_BLOCK_BYTES = 128 * 2**20
# Scratch per entry of a block: the similarity and a temporary of its size, or the similarity and the 64-bit key.
_ENTRY_BYTES = 12


def checked(features: Tensor, labels: Tensor | Sequence[int]) -> tuple[Tensor, Tensor]:
    """(unit rows [N, D] float32, labels [N] on the same device) of floating-point features and integer labels.

    Raises ``ValueError`` for wrong shapes or types and for a feature that is not finite.
    """
    labels = torch.as_tensor(labels, device=features.device)
    if features.ndim != 2 or not features.is_floating_point():
        raise ValueError(f"features: expected floating point [N, D], got {features.dtype} {list(features.shape)}")
    if labels.shape != features.shape[:1] or labels.is_floating_point():
        raise ValueError(f"labels: expected integers [{len(features)}], got {labels.dtype} {list(labels.shape)}")
    unit = F.normalize(features.float(), dim=1)
    if not torch.isfinite(unit).all():
        raise ValueError("features: not finite; the network that made them has diverged")
    return unit, labels


def block_rows(columns: int) -> int:
    """Rows of a block of the similarity matrix that has ``columns`` columns."""
    return max(1, _BLOCK_BYTES // (_ENTRY_BYTES * max(1, columns)))


def ranking_keys(distance: Tensor) -> Tensor:
    """[b, N] float32, negated similarities (spent as scratch) -> int64 keys that rise with distance, then with column.
    IEEE floats compare like their bits once the magnitude bits of negative ones are flipped; the column fills the low
    half. In place where it can be: fresh memory costs more here than the arithmetic."""
    bits = distance.add_(0.0).view(torch.int32)  # -0.0 + 0.0 = 0.0
    bits ^= (bits >> 31).bitwise_and_(0x7FFFFFFF)
    keys = bits.long()
    keys <<= 32
    keys += torch.arange(keys.shape[1], device=keys.device)
    return keys


def distances(keys: Tensor) -> Tensor:
    """The negated similarities, float32, from which ``ranking_keys`` made ``keys``."""
    bits = (keys >> 32).int()
    bits ^= (bits >> 31).bitwise_and_(0x7FFFFFFF)
    return bits.view(torch.float32)


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Matrix products in float32 proper, whatever autocast or TF32 setting is in force outside."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
