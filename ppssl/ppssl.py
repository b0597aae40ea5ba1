"""PP-SSL: MoCo v2 whose attention mask is taught by text (AIS) and by its own image gradient (IADM).

    L = L_con + beta * L_IADM + alpha * L_AIS                                            (arXiv 2412.00134)

L_AIS learns of the teacher what ``ais.target`` says: its softmax over descriptions (published), its embedding of the image, or
which images of a batch it finds alike. The last two are not of the paper.

The variant ``published`` computes what the authors' code computes; ``guided`` what the paper's text aims at. They differ in named
switches only (``PPSSLSettings.variants``), and each switch can be set alone. In ``published``, the CAM is a softmax over rows
of seven gradients of size 1e-5, so its target is uniform to three digits, and the fitted mask comes from the image alone, so
IADM sends no gradient into the encoder. In ``guided`` the fitted mask is the encoder's own, and the contrasted feature is the
one that is kept, gap(A * F), on both sides: k = l2(g_k(gap(A_k * F_k))) with a momentum copy of the mask branch. Its defaults
were chosen on tuning seeds of the synthetic dataset (bench/results/methods/choice.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppssl.encoder import BaseTrunk, FeatureNet, ImageMaskBranch, MaskBranch, Masked, global_average_pool, masked_average_pool
from ppssl.guidance import contrast_gradients, relational_kl, scale_cam, spatial_kl
from ppssl.method import NO_CONTEXT, Batch, Output, StepContext, register
from ppssl.moco import MoCo
from ppssl.momentum import key_copy, parameter_pairs
from ppssl.ops import gradcam
from ppssl.settings import PPSSLSettings, variant
from ppssl.span import span
from ppssl.teacher import Teacher


@register("ppssl")
class PPSSL(MoCo):
    """PP-SSL around ``network`` (trunk and mask branch).

    text_features: [P, E] embeddings of the descriptions, None with ``ais.weight`` 0 or another ``ais.target`` than text. settings:
    its sections ``method``, ``ais``, ``iadm`` and ``teacher``, the published variant's where None; ``ais.weight`` (alpha) 0 turns
    the distillation off, ``iadm.weight`` (beta) 0 the GradCAM guidance. embed: images -> [B, E] unit rows, needed where
    ``teacher.view`` is ``query`` (a ``clean`` one is ``batch.teacher``). teacher_logit_scale: the teacher's own. teacher_dim: E,
    for the target image. contrast: what ``MoCo`` takes. Where it is symmetric, CAM, masks and distillation are those of the first
    direction, of ``x_q``: the switch changes the contrast alone.
    """

    def __init__(
        self,
        network: FeatureNet,
        head: nn.Module,
        text_features: Tensor | None,
        *,
        settings: PPSSLSettings | None = None,
        embed: Callable[[Tensor], Tensor] | None = None,
        teacher_logit_scale: float = 100.0,
        teacher_dim: int | None = None,
        **contrast: Any,
    ):
        super().__init__(network, head, **contrast)
        self.settings = settings = settings or variant("ppssl")
        method, ais, iadm = settings.method, settings.ais, settings.iadm
        if network.mask is None:
            raise ValueError("PP-SSL needs a network with a mask branch: PPSSL.build_network(settings, trunk)")
        network.trunk.watch(iadm.sources)
        self.mask = network.mask
        channels, width = self.mask.conv.in_channels, self.mask.conv.out_channels
        by_text = ais.weight != 0 and ais.target == "text"
        by_image = ais.weight != 0 and ais.target == "image"
        if by_text and text_features is None:
            raise ValueError("ais.target: text needs the embeddings of descriptions (text_features)")
        if by_image and teacher_dim is None:
            raise ValueError("ais.target: image needs the width of the teacher's embedding (teacher_dim)")
        self.to_text = nn.Linear(channels, text_features.shape[1]) if by_text else None
        self.to_image = nn.Linear(channels, teacher_dim) if by_image else None
        shared = self.mask.bn if iadm.image_bn == "shared" else None
        self.image_mask = ImageMaskBranch(width, shared, minmax=method.minmax, pool=iadm.pool) if iadm.mask == "image" else None
        self.register_buffer("text_features", F.normalize(text_features.float(), dim=1) if by_text else None)
        self.embed, self.teacher_logit_scale = embed, teacher_logit_scale
        self.mask_k = key_copy(self.mask) if method.contrast_mask and self.encoder_k is not None else None

        guides = iadm.weight != 0
        self.needs_clean = guides and iadm.image == "clean"
        if guides and {"image", *network.trunk.constant} & set(iadm.sources):
            self.needs_image_grad = ("x_clean",) if iadm.image == "clean" else ("x_q",)
        self.needs_teacher_embeddings = ais.weight != 0 and settings.teacher.view == "clean"
        if ais.weight != 0 and settings.teacher.view == "query" and embed is None:
            raise ValueError("teacher.view: query needs the teacher's image encoder (embed=teacher.embed)")

    @classmethod
    def from_settings(cls, settings: PPSSLSettings, network: FeatureNet, teacher: Teacher | None = None) -> PPSSL:
        if teacher is None and settings.uses_teacher:
            raise ValueError("method.name: ppssl needs a teacher unless ais.weight is 0")
        return cls(
            network,
            text_features=teacher.text_features if teacher else None,
            settings=settings,
            embed=teacher.embed if teacher else None,
            teacher_logit_scale=teacher.logit_scale if teacher else 1.0,
            teacher_dim=teacher.dim if teacher else None,
            **cls.contrast_arguments(settings, network),
        )

    @classmethod
    def build_network(cls, settings: PPSSLSettings, trunk: BaseTrunk) -> FeatureNet:
        width, minmax = settings.method.maxout_width, settings.method.minmax
        return FeatureNet(trunk, MaskBranch(trunk.channels, width, minmax=minmax, groups=settings.bn.groups))

    @property
    def network(self) -> FeatureNet:
        return FeatureNet(self.encoder_q.trunk, self.mask)

    @property
    def output(self) -> str:
        """The name of F among the trunk's maps."""
        return self.encoder_q.trunk.sources[-1]

    def ema_pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        pairs = super().ema_pairs()
        if self.mask_k is not None:
            pairs = tuple(a + b for a, b in zip(pairs, parameter_pairs(self.mask, self.mask_k), strict=True))
        return pairs

    def embed_key(self, x_k: Tensor) -> Tensor:
        if self.mask_k is None:
            return super().embed_key(x_k)
        return self.encoder_k.project(self.mask_k(self.encoder_k.trunk(x_k)).pooled)

    def embed_query(self, x_q: Tensor) -> Tensor:
        if not self.settings.method.contrast_mask:
            return super().embed_query(x_q)
        feature = self.encoder_q.trunk(x_q)
        return self.encoder_q.project(self.contrasted(feature, self.masked(feature).mask))

    def masked(self, feature: Tensor) -> Masked:
        """A and gap(A * F) of F. Where ``method.mask_reach`` is ``branch``, A is made of a constant F."""
        if self.settings.method.mask_reach == "trunk":
            return self.mask(feature)
        mask, _ = self.mask(feature.detach())
        return Masked(mask, masked_average_pool(feature, mask))

    def contrasted(self, feature: Tensor, mask: Tensor) -> Tensor:
        """What of F is contrasted: gap(F), or gap(A * F), to which A is a constant: the contrast alone would draw the mask to
        whatever two views share, the background too."""
        return masked_average_pool(feature, mask.detach()) if self.settings.method.contrast_mask else global_average_pool(feature)

    def forward(self, batch: Batch, context: StepContext = NO_CONTEXT) -> Output:
        iadm, ais = self.settings.iadm, self.settings.ais
        with span("query_fwd"):
            maps = self.encoder_q.trunk.maps(batch.x_q)
            feature = maps[self.output]  # F [B, C, h, w]
            mask, pooled = self.masked(feature)  # A [B, h, w], gap(F') [B, C]

        # L_con: the query against its key and the queue
        k = self.keys(batch.x_k)
        q = self.encoder_q.project(self.contrasted(feature, mask))
        losses, rank = self.contrast(q, k, batch.index)
        contrast, keys = self.both_directions(losses, k, batch)
        total, terms = contrast, {"contrast": contrast.detach()}

        # L_IADM: the mask is drawn to where the contrast looks
        if iadm.weight:
            seen, seen_maps, seen_mask, seen_losses = batch.x_q, maps, mask, losses
            if iadm.image == "clean":
                seen = batch.x_clean
                seen_maps = self.encoder_q.trunk.maps(seen)
                seen_mask, _ = self.masked(seen_maps[self.output])
                q_clean = self.encoder_q.project(self.contrasted(seen_maps[self.output], seen_mask))
                seen_losses, _ = self.contrast(q_clean, k, batch.index)
            with span("cam"):
                cam = self.cam(seen_losses, {"image": seen} | seen_maps, seen_mask.shape[1:], context)
            with span("losses"):
                cell = seen.shape[-1] // seen_mask.shape[-1]
                fitted = seen_mask if self.image_mask is None else self.image_mask(seen, cell=cell)
                guidance = spatial_kl(cam, fitted, iadm)
                if iadm.reduction == "sum":
                    guidance = guidance / context.share
            total = total + iadm.weight * guidance
            terms["iadm"] = guidance.detach()

        # L_AIS: the masked feature is to tell the descriptions, or the images, apart as the teacher does
        if ais.weight:
            with span("losses"):
                distillation = self.ais(pooled, batch)
            total = total + ais.weight * self.warmup(context) * distillation
            terms["ais"] = distillation.detach()

        return Output(total, terms, keys, self.statistics(rank, q, k))

    def cam(self, losses: Tensor, activations: dict[str, Tensor], size: Sequence[int], context: StepContext = NO_CONTEXT) -> Tensor:
        """relu(+-x * dL_con/dx) of every source, pooled to ``size`` and averaged: [B, h, w] float32, without gradient."""
        iadm = self.settings.iadm
        sources = [activations[name] for name in iadm.sources]
        gradients = contrast_gradients(losses, sources, of=iadm.cam_loss, context=context)
        sign = 1 if iadm.sign == "plus" else -1
        cam = 0.0
        for x, g in zip(sources, gradients, strict=True):
            one = gradcam(x.detach(), g, size=tuple(size), pool=iadm.pool, sign=sign)
            cam = cam + scale_cam(one, iadm.cam_scale) / len(sources)
        return cam.detach()

    def attention(self, images: Tensor) -> dict[str, Tensor]:
        """``mask``: A, by which the feature is pooled; ``cam``: what IADM fits it to, whatever ``iadm.weight``."""
        x = images.detach().requires_grad_()
        maps = self.encoder_q.trunk.maps(x)
        mask, _ = self.mask(maps[self.output])
        q = self.encoder_q.project(self.contrasted(maps[self.output], mask))
        losses = self.mirror_losses(q, images)
        return {"mask": mask.detach(), "cam": self.cam(losses, {"image": x} | maps, mask.shape[1:])}

    def ais(self, pooled: Tensor, batch: Batch) -> Tensor:
        """What ``ais.target`` says of the features gap(A * F) [B, C] and the teacher's embeddings of the same images [B, E]."""
        embedding = self.embed(batch.x_q) if self.settings.teacher.view == "query" else batch.teacher
        if self.settings.ais.target == "relations":  # of the feature that is kept, without a layer between
            return relational_kl(pooled, embedding, self.settings.ais.temperature, self.group)
        return (self.image_distance if self.settings.ais.target == "image" else self.text_kl)(pooled, embedding)

    def text_kl(self, pooled: Tensor, embedding: Tensor) -> Tensor:
        """sum_b KL(softmax(z_t / tau) || softmax(z_s / tau)) / (P * B), in float32 with autocast off: logits are x 100."""
        with torch.autocast(pooled.device.type, enabled=False):
            student = F.normalize(self.to_text(F.normalize(pooled.float(), dim=1)), dim=1)  # s [B, E]
            teacher = F.normalize(embedding.float(), dim=1)
            z_s = self.settings.ais.scale * student @ self.text_features.T  # [B, P]
            z_t = self.teacher_logit_scale * teacher @ self.text_features.T
            tau = self.settings.ais.temperature
            # log_softmax, not log(clamp(softmax)): the clamp has no gradient once saturated
            kl = F.kl_div(F.log_softmax(z_s / tau, 1), F.log_softmax(z_t / tau, 1), log_target=True, reduction="sum")
        return kl / z_s.numel()

    def image_distance(self, pooled: Tensor, embedding: Tensor) -> Tensor:
        """mean_b[ 1 - cos(W l2(pooled_b) + b, embedding_b) ]: a linear layer whatever the widths, since the two spaces have no axis
        in common; it is left behind with the head. In float32 with autocast off."""
        with torch.autocast(pooled.device.type, enabled=False):
            student = self.to_image(F.normalize(pooled.float(), dim=1))
            return (1 - F.cosine_similarity(student, embedding.float(), dim=1)).mean()

    def warmup(self, context: StepContext) -> Tensor | float:
        """Factor on alpha: rises linearly to 1 over the first ``ais.warmup`` of the run."""
        if not self.settings.ais.warmup or context.progress is None:
            return 1.0
        return (context.progress / self.settings.ais.warmup).clamp(max=1.0)
