"""GradCAM guidance as LCR and PP-SSL share it: gradients of the contrast, the scaling of a map, and how far a mask is from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ppssl.method import StepContext
from ppssl.settings import IadmConfig


def contrast_gradients(losses: Tensor, by: Sequence[Tensor], *, of: Literal["sum", "mean"], context: StepContext) -> list[Tensor]:
    """d(losses)/d(x) for each x of ``by``, without a graph of their own, in the type of x; float32 where fp16 losses are scaled.

    losses: [B]. of: ``sum``, every sample's own gradient, or ``mean``, that of the mean over the global batch.
    """
    loss = losses.sum() if of == "sum" else losses.mean() * context.share
    scale = context.loss_scale
    scaled = loss if scale is None else loss * scale
    # only data gradients: asking for these inputs alone leaves every weight gradient out of this pass
    gradients = torch.autograd.grad(scaled, list(by), retain_graph=True)
    return [g if scale is None else g.float() / scale for g in gradients]


def scale_cam(cam: Tensor, how: str) -> Tensor:
    """[B, h, w] as it is (``none``), or divided by the maximum of each image (``max``)."""
    return cam if how == "none" else cam / cam.amax((1, 2), keepdim=True).clamp_min(torch.finfo(cam.dtype).tiny)


def spatial_kl(cam: Tensor, mask: Tensor, iadm: IadmConfig) -> Tensor:
    """KL(softmax(cam / t) || softmax(mask / t)), [B, h, w] each: per row of cells and summed (published), or over all cells and
    averaged over the batch (guided). A CAM that is zero everywhere is a uniform target."""
    cam, mask = cam.float() / iadm.temperature, mask.float() / iadm.temperature
    if iadm.softmax == "cells":
        cam, mask = cam.flatten(1), mask.flatten(1)
    kl = F.kl_div(F.log_softmax(mask, -1), F.softmax(cam, -1), reduction="sum")
    return kl / len(cam) if iadm.reduction == "mean" else kl
