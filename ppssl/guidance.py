"""GradCAM guidance as LCR and PP-SSL share it: gradients of the contrast, the scaling of a map, and how far a mask is from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Comparison(Protocol):
    """The switches that both methods' forms have; engine/config/schema.py explains each under ``iadm.``."""

    temperature: float
    softmax: str
    reduction: str


def contrast_gradients(
    losses: Tensor, by: Sequence[Tensor], *, of: str, loss_scale: Tensor | None, processes: int = 1
) -> list[Tensor]:
    """d(losses)/d(x) for each x of ``by``, float32, without a graph of their own.

    losses: [B]. of: ``sum``, every sample's own gradient, or ``mean``, that divided by the B of all ``processes``. loss_scale:
    ``Method.loss_scale``.
    """
    loss = losses.sum() if of == "sum" else losses.mean() / processes
    scale = 1.0 if loss_scale is None else loss_scale
    # only data gradients: asking for these inputs alone leaves every weight gradient out of this pass
    return [g.float() / scale for g in torch.autograd.grad(loss * scale, list(by), retain_graph=True)]


def scale_cam(cam: Tensor, how: str) -> Tensor:
    """[B, h, w] as it is (``none``), or divided by the maximum of each image (``max``)."""
    return cam if how == "none" else cam / cam.amax((1, 2), keepdim=True).clamp_min(torch.finfo(cam.dtype).tiny)


def spatial_kl(cam: Tensor, mask: Tensor, form: Comparison) -> Tensor:
    """KL(softmax(cam / t) || softmax(mask / t)), [B, h, w] each: per row of cells and summed (published), or over all cells and
    averaged over the batch (guided). A CAM that is zero everywhere is a uniform target."""
    cam, mask = cam.float() / form.temperature, mask.float() / form.temperature
    if form.softmax == "cells":
        cam, mask = cam.flatten(1), mask.flatten(1)
    kl = F.kl_div(F.log_softmax(mask, -1), F.softmax(cam, -1), reduction="sum")
    return kl / len(cam) if form.reduction == "mean" else kl
