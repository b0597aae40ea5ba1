"""How far a fused op may be from the truth: twice as far as eager code in its dtype, plus a few units of rounding."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within_budget(name: str, ours: Tensor, eager: Tensor, truth: Tensor, units: float = 4.0) -> None:
    """``max |ours - truth| <= 2 max |eager - truth| + units * eps * max |truth|``, eps of ``ours``'s own dtype.

    ``truth`` is the float64 result on the same inputs, ``eager`` the reference in their own dtype.
    """
    assert ours.shape == truth.shape, f"{name}: shape {list(ours.shape)}, want {list(truth.shape)}"
    assert torch.isfinite(ours).all(), f"{name}: not finite"
    eps = torch.finfo(ours.dtype).eps if ours.is_floating_point() else 0.0
    truth, ours, eager = truth.double().cpu(), ours.double().cpu(), eager.double().cpu()
    error = (ours - truth).abs().max().item()
    budget = 2 * (eager - truth).abs().max().item() + units * eps * truth.abs().max().item()
    assert error <= budget, f"{name}: error {error:.3e} over the budget {budget:.3e}"


def upstream(like: Tensor, seed: int) -> Tensor:
    """A random upstream gradient: a sum of ones would hide most mistakes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64)
