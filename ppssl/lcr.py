"""LCR: MoCo v2 whose attention mask has to find, with little capacity, what the contrast attends to in every image.

    L = L_con + beta * KL(softmax(cam) || softmax(A)),    cam = relu(sum_c F_c * dL_con/dF_c)         (CVPR 2023)

The mask A is the maximum over 32 projections of the feature map; with so little capacity it can only keep the rationale that many
images share. Retrieval uses gap(A * F). The variant ``published`` computes what the authors' code computes: a softmax over rows of
gradients of size 1e-5, a cam that is itself pulled towards the mask (F in it carries gradient), and a batch-norm that is updated
three times per step, once for the map of the key. ``guided`` computes what the text aims at. They differ in named switches only
(``LCRSettings.variants``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ppssl.encoder import BaseTrunk, FeatureNet, MaskBranch, global_average_pool
from ppssl.guidance import contrast_gradients, scale_cam, spatial_kl
from ppssl.method import NO_CONTEXT, Batch, Output, StepContext, register
from ppssl.moco import MoCo
from ppssl.ops import gradcam
from ppssl.settings import LCRSettings, variant
from ppssl.span import span
from ppssl.teacher import Teacher


@register("lcr")
class LCR(MoCo):
    """LCR around ``network`` (trunk and mask branch).

    settings: its sections ``method``, ``iadm`` and ``lcr``, the published variant's where None; ``iadm.weight`` (beta) 0 is MoCo
    with an untrained mask. contrast: what ``MoCo`` takes. Where it is symmetric the rationale is that of the first direction, of
    ``x_q``: the switch changes the contrast alone.
    """

    def __init__(self, network: FeatureNet, head: nn.Module, *, settings: LCRSettings | None = None, **contrast: Any):
        super().__init__(network, head, **contrast)
        if network.mask is None:
            raise ValueError("LCR needs a network with a mask branch: LCR.build_network(settings, trunk)")
        self.mask, self.settings = network.mask, settings or variant("lcr")
        if self.settings.iadm.weight and network.trunk.constant[-1:] == network.trunk.sources[-1:]:
            self.needs_image_grad = ("x_q",)  # F is of a frozen trunk: only so it has a gradient

    @classmethod
    def from_settings(cls, settings: LCRSettings, network: FeatureNet, teacher: Teacher | None = None) -> LCR:
        return cls(network, settings=settings, **cls.contrast_arguments(settings, network))

    @classmethod
    def build_network(cls, settings: LCRSettings, trunk: BaseTrunk) -> FeatureNet:
        width, minmax = settings.method.maxout_width, settings.method.minmax
        return FeatureNet(trunk, MaskBranch(trunk.channels, width, minmax=minmax, groups=settings.bn.groups))

    @property
    def network(self) -> FeatureNet:
        return FeatureNet(self.encoder_q.trunk, self.mask)

    def forward(self, batch: Batch, context: StepContext = NO_CONTEXT) -> Output:
        with span("query_fwd"):
            feature = self.encoder_q.trunk(batch.x_q)  # F [B, C, h, w]
            q = self.encoder_q.project(global_average_pool(feature))
        key_encoder = self.encoder_q if self.encoder_k is None else self.encoder_k
        with span("key_fwd"), torch.set_grad_enabled(self.encoder_k is None and torch.is_grad_enabled()):
            key_feature = key_encoder.trunk(self.shuffled(batch.x_k))
            k = self.in_order(key_encoder.project(global_average_pool(key_feature)))

        # L_con: the query against its key and the queue
        losses, rank = self.contrast(q, k, batch.index)
        contrast, keys = self.both_directions(losses, k, batch)
        iadm = self.settings.iadm
        if not iadm.weight:
            return Output(contrast, {"contrast": contrast.detach()}, keys, self.statistics(rank, q, k))

        # the mask A, and with it the batch-norm's running statistics
        with span("losses"):
            if self.settings.lcr.updates == "three":
                with torch.no_grad():
                    self.mask(feature), self.mask(key_feature)
            mask, _ = self.mask(feature)  # [B, h, w]

        # the rationale: where the contrast looks, fitted by the mask
        with span("cam"):
            cam = self.cam(losses, feature, context)
        with span("losses"):
            rationale = spatial_kl(cam, mask, iadm)
            if iadm.reduction == "sum":
                rationale = rationale / context.share
        total = contrast + iadm.weight * rationale
        terms = {"contrast": contrast.detach(), "rationale": rationale.detach()}
        return Output(total, terms, keys, self.statistics(rank, q, k))

    def cam(self, losses: Tensor, feature: Tensor, context: StepContext = NO_CONTEXT) -> Tensor:
        """relu(+-sum_c F_c * dL_con/dF_c) [B, h, w] float32; the derivative is a constant, F is one only if ``lcr.detach``."""
        iadm = self.settings.iadm
        (gradient,) = contrast_gradients(losses, [feature], of=iadm.cam_loss, context=context)
        act = feature.detach() if self.settings.lcr.detach else feature
        sign = 1 if iadm.sign == "plus" else -1
        return scale_cam(gradcam(act, gradient, size=tuple(feature.shape[2:]), sign=sign), iadm.cam_scale)

    def attention(self, images: Tensor) -> dict[str, Tensor]:
        """``mask``: A, by which the feature is pooled; ``cam``: the rationale that it is fitted to, whatever ``iadm.weight``."""
        feature = self.encoder_q.trunk(images.detach().requires_grad_())  # of a frozen trunk too, F has a gradient
        losses = self.mirror_losses(self.encoder_q.project(global_average_pool(feature)), images)
        return {"mask": self.mask(feature).mask.detach(), "cam": self.cam(losses, feature).detach()}
