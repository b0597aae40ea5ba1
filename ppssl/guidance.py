"""GradCAM guidance as LCR and PP-SSL share it: gradients of the contrast, the scaling of a map, and how far a mask is from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ppssl.method import StepContext
from ppssl.ops import gather, rank, world_size
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
    """KL(softmax(cam / c) || softmax(mask / t)), [B, h, w] each: per row of cells and summed (published), or over all cells and
    averaged over the batch (guided). t is ``iadm.temperature``, c ``iadm.cam_temperature`` or t where that is None. A CAM that is
    zero everywhere is a uniform target."""
    cam, mask = cam.float() / (iadm.cam_temperature or iadm.temperature), mask.float() / iadm.temperature
    if iadm.softmax == "cells":
        cam, mask = cam.flatten(1), mask.flatten(1)
    kl = F.kl_div(F.log_softmax(mask, -1), F.softmax(cam, -1), reduction="sum")
    return kl / len(cam) if iadm.reduction == "mean" else kl


def relational_kl(student: Tensor, teacher: Tensor, temperature: float, group: str = "") -> Tensor:
    """How differently two networks see which images of the global batch are alike: the mean over images of
    ``KL(softmax(T_i / temperature) || softmax(S_i / temperature))``, S_i and T_i the cosines of image i with every other image (as
    SEED, Fang et al. 2021, arXiv 2101.04731, with the batch in the place of its queue).

    student: [b, C], teacher: [b, E], rows of this process's images of the ``group``; only the student gets a gradient. Float32 at
    least, with autocast off. Raises ``ValueError`` for a global batch of fewer than three images, in which nothing can be ranked.
    """
    with torch.autocast(student.device.type, enabled=False):
        size = len(student) * world_size(group)
        if size < 3:
            raise ValueError(f"ais.target: relations need at least 3 images in a batch, got {size}; use a larger batch_size")
        place = rank(group) * len(student) + torch.arange(len(student), device=student.device)
        others = torch.arange(size - 1, device=student.device).repeat(len(student), 1)
        others = others + (others >= place[:, None])  # [b, B - 1]: every column but the image's own
        log_p = []
        for rows in (student, teacher.detach()):
            rows = F.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=1)
            log_p.append(F.log_softmax((rows @ gather(rows, group).T).gather(1, others) / temperature, 1))
        return F.kl_div(*log_p, log_target=True, reduction="batchmean")
