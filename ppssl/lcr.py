"""LCR: MoCo v2 whose attention mask has to find, with little capacity, what the contrast attends to in every image.

    L = L_con + beta * KL(softmax(cam) || softmax(A)),    cam = relu(sum_c F_c * dL_con/dF_c)         (CVPR 2023)

The mask A is the maximum over 32 projections of the feature map; being so small it can only keep the rationale that many images
share. Retrieval uses gap(A * F). The form ``published`` computes what the authors' code computes: a softmax over rows of
gradients of size 1e-5, a cam that is itself pulled towards the mask (F in it carries gradient), and a batch-norm that moves three
times a step, once for the key's map. ``guided`` computes what the text aims at. They differ in named switches only (``FORMS``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ppssl.encoder import FeatureNet, MaskBranch, Trunk, global_average_pool
from ppssl.guidance import contrast_gradients, scale_cam, spatial_kl
from ppssl.method import Batch, Output, register
from ppssl.moco import MoCo, contrast_accuracy
from ppssl.ops import gradcam, world
from ppssl.span import span
from ppssl.teacher import Teacher


@dataclass(frozen=True)
class Form:
    """The switches in which the two forms differ; engine/config/schema.py explains each, the last two under ``lcr.``, ``minmax`` under
    ``method.`` and the others under ``iadm.``."""

    minmax: str
    weight: float
    sign: str
    temperature: float
    softmax: str
    cam_scale: str
    cam_loss: str
    reduction: str
    detach: bool
    updates: str


FORMS = {
    "published": Form(
        minmax="batch", weight=0.01, sign="plus", temperature=1.0, softmax="rows", cam_scale="none", cam_loss="mean",
        reduction="sum", detach=False, updates="three",
    ),
    "guided": Form(
        minmax="image", weight=1.28, sign="minus", temperature=0.4, softmax="cells", cam_scale="max", cam_loss="sum",
        reduction="mean", detach=True, updates="one",
    ),
}  # fmt: skip


def form_from_config(cfg: Any) -> Form:
    """``method.form`` with the switches that the config sets."""
    switches = {name: getattr(cfg.iadm, name) for name in ("weight", "sign", "temperature", "softmax", "cam_scale", "cam_loss")}
    switches |= {"reduction": cfg.iadm.reduction, "minmax": cfg.method.minmax, "detach": cfg.lcr.detach, "updates": cfg.lcr.updates}
    return replace(FORMS[cfg.method.form], **{name: value for name, value in switches.items() if value is not None})


@register("lcr")
class LCR(MoCo):
    """LCR around ``network`` (trunk and mask branch); ``form.weight`` (beta) 0 is MoCo with an untrained mask."""

    def __init__(self, network: FeatureNet, head: nn.Module, *, form: Form = FORMS["published"], **contrast: Any):
        super().__init__(network, head, **contrast)
        if network.mask is None:
            raise ValueError("LCR needs a network with a mask branch: LCR.build_network(cfg, trunk)")
        self.mask, self.form = network.mask, form

    @classmethod
    def from_config(cls, cfg: Any, network: FeatureNet, teacher: Teacher | None = None) -> LCR:
        return cls(network, form=form_from_config(cfg), **cls.contrast_arguments(cfg, network))

    @classmethod
    def build_network(cls, cfg: Any, trunk: Trunk) -> FeatureNet:
        minmax = form_from_config(cfg).minmax
        return FeatureNet(trunk, MaskBranch(trunk.channels, cfg.method.maxout_width, minmax=minmax, groups=cfg.bn.groups))

    @property
    def network(self) -> FeatureNet:
        return FeatureNet(self.encoder_q.trunk, self.mask)

    def forward(self, batch: Batch) -> Output:
        with span("query_fwd"):
            feature = self.encoder_q.trunk(batch.x_q)  # F [B, C, h, w]
            q = self.encoder_q.project(global_average_pool(feature))
        with span("key_fwd"), torch.no_grad():
            key_feature = self.encoder_k.trunk(batch.x_k)
            k = self.encoder_k.project(global_average_pool(key_feature))

        # L_con: the query against its key and the queue
        losses, rank = self.contrast(q, k, batch.index)
        contrast = losses.mean()
        if not self.form.weight:
            return Output(contrast, {"contrast": contrast.detach()}, k, contrast_accuracy(rank))

        # the mask A, and with it the batch-norm's running statistics
        with span("losses"):
            if self.form.updates == "three":
                with torch.no_grad():
                    self.mask(feature), self.mask(key_feature)
            mask, _ = self.mask(feature)  # [B, h, w]

        # the rationale: where the contrast looks, fitted by the mask
        with span("cam"):
            cam = self.cam(losses, feature)
        with span("losses"):
            rationale = spatial_kl(cam, mask, self.form)
            if self.form.reduction == "sum":
                rationale = rationale * world(self.group)  # the engine averages over the processes
        total = contrast + self.form.weight * rationale
        terms = {"contrast": contrast.detach(), "rationale": rationale.detach()}
        return Output(total, terms, k, contrast_accuracy(rank))

    def cam(self, losses: Tensor, feature: Tensor) -> Tensor:
        """relu(+-sum_c F_c * dL_con/dF_c) [B, h, w] float32; the derivative is a constant, F is one only if ``form.detach``."""
        (gradient,) = contrast_gradients(
            losses, [feature], of=self.form.cam_loss, loss_scale=self.loss_scale, processes=world(self.group)
        )
        act = feature.detach() if self.form.detach else feature
        sign = 1 if self.form.sign == "plus" else -1
        return scale_cam(gradcam(act, gradient, size=tuple(feature.shape[2:]), sign=sign), self.form.cam_scale)

    def attention(self, images: Tensor) -> dict[str, Tensor]:
        """``mask``: A, by which the feature is pooled; ``cam``: the rationale it is drawn to, in this form, whatever its weight."""
        feature = self.encoder_q.trunk(images)
        losses = self.mirror_losses(self.encoder_q.project(global_average_pool(feature)), images)
        return {"mask": self.mask(feature).mask.detach(), "cam": self.cam(losses, feature).detach()}
