"""PP-SSL: MoCo v2 whose attention mask is taught by text (AIS) and by its own image gradient (IADM).

    L = L_con + beta * L_IADM + alpha * L_AIS                                            (arXiv 2412.00134)

The form ``published`` computes what the authors' code computes; ``guided`` what the paper's text aims at. They differ in named
switches only (``FORMS``), and each switch can be turned alone. In ``published``, the CAM is a softmax over rows of seven
gradients of size 1e-5, so its target is uniform to three digits, and the fitted mask comes from the image alone, so IADM sends
no gradient into the encoder. In ``guided`` the fitted mask is the encoder's own, and what is contrasted is the feature that is
kept, gap(A * F), on both sides: k = l2(g_k(gap(A_k * F_k))) with a momentum copy of the mask branch. Its defaults were chosen on
tuning seeds of the demo world (bench/results/methods/choice.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppssl.encoder import LAYERS, FeatureNet, ImageMaskBranch, MaskBranch, Masked, Trunk, global_average_pool, masked_average_pool
from ppssl.guidance import contrast_gradients, scale_cam, spatial_kl
from ppssl.method import Batch, Output, register
from ppssl.moco import MoCo, contrast_accuracy
from ppssl.momentum import key_copy, parameter_pairs
from ppssl.ops import gradcam, world
from ppssl.span import span
from ppssl.teacher import Teacher


@dataclass(frozen=True)
class Form:
    """The switches in which the two forms differ; engine/config/schema.py explains each under the same name."""

    minmax: str  # of the mask: over the batch, or per image
    contrast_mask: bool
    mask_reach: str
    iadm_weight: float
    sign: str
    temperature: float
    softmax: str
    cam_scale: str
    cam_loss: str
    pool: str
    mask: str
    image_bn: str
    reduction: str
    teacher_view: str

    def override(self, **switches: Any) -> Form:
        """This form with every switch that is not None replaced."""
        return replace(self, **{name: value for name, value in switches.items() if value is not None})


FORMS = {
    "published": Form(
        minmax="batch", contrast_mask=False, mask_reach="trunk", iadm_weight=0.01, sign="plus", temperature=1.0, softmax="rows",
        cam_scale="none", cam_loss="mean", pool="max", mask="image", image_bn="shared", reduction="sum", teacher_view="query",
    ),
    # 1.28 = 0.01 x the published batch of 128: the weight of one image is kept and no longer depends on the batch
    "guided": Form(
        minmax="image", contrast_mask=True, mask_reach="trunk", iadm_weight=1.28, sign="minus", temperature=0.4, softmax="cells",
        cam_scale="max", cam_loss="sum", pool="mean", mask="feature", image_bn="own", reduction="mean", teacher_view="clean",
    ),
}  # fmt: skip


def form_from_config(cfg: Any) -> Form:
    """``method.form`` with the switches that the config sets."""
    names = ("sign", "temperature", "softmax", "cam_scale", "cam_loss", "pool", "mask", "image_bn", "reduction")
    return FORMS[cfg.method.form].override(
        minmax=cfg.method.minmax,
        contrast_mask=cfg.method.contrast_mask,
        mask_reach=cfg.method.mask_reach,
        iadm_weight=cfg.iadm.weight,
        teacher_view=cfg.teacher.view,
        **{name: getattr(cfg.iadm, name) for name in names},
    )


@register("ppssl")
class PPSSL(MoCo):
    """PP-SSL around ``network`` (trunk and mask branch).

    text_features: [P, E] the descriptions' embeddings, None with ais_weight 0; teacher_logit_scale: the teacher's own; embed:
    images -> [B, E] unit rows, needed when the form's ``teacher_view`` is ``query`` (a ``clean`` one is ``batch.teacher``).
    ais_weight (alpha) 0 turns the text guidance off, ``form.iadm_weight`` (beta) 0 the GradCAM guidance.
    """

    def __init__(
        self,
        network: FeatureNet,
        head: nn.Module,
        text_features: Tensor | None,
        *,
        form: Form = FORMS["published"],
        embed: Callable[[Tensor], Tensor] | None = None,
        teacher_logit_scale: float = 100.0,
        ais_weight: float = 1.2,
        ais_temperature: float = 1.0,
        ais_scale: float = 100.0,
        ais_warmup: float = 0.0,
        sources: tuple[str, ...] = ("image",),
        cam_image: str = "query",
        **contrast: Any,
    ):
        super().__init__(network, head, **contrast)
        if network.mask is None:
            raise ValueError("PP-SSL needs a network with a mask branch: PPSSL.build_network(cfg, trunk)")
        if unknown := [s for s in sources if s not in ("image", *LAYERS)]:
            raise ValueError(f"iadm.sources: {unknown[0]!r} is not known; use image, {', '.join(LAYERS)}")
        self.mask = network.mask
        channels, width = self.mask.conv.in_channels, self.mask.conv.out_channels
        self.to_text = nn.Linear(channels, text_features.shape[1]) if ais_weight else None
        shared = self.mask.bn if form.image_bn == "shared" else None
        self.image_mask = ImageMaskBranch(width, shared, minmax=form.minmax, pool=form.pool) if form.mask == "image" else None
        self.register_buffer("text_features", F.normalize(text_features.float(), dim=1) if ais_weight else None)
        self.form, self.embed, self.teacher_logit_scale = form, embed, teacher_logit_scale
        self.ais_weight, self.ais_temperature, self.ais_scale, self.ais_warmup = ais_weight, ais_temperature, ais_scale, ais_warmup
        self.sources, self.cam_image = tuple(sources), cam_image
        self.mask_k = key_copy(self.mask) if form.contrast_mask else None

        guides = form.iadm_weight != 0
        self.needs_original = guides and cam_image == "orig"
        if guides and "image" in self.sources:
            self.needs_image_grad = ("x_o",) if cam_image == "orig" else ("x_q",)
        self.needs_teacher_embeddings = ais_weight != 0 and form.teacher_view == "clean"
        if ais_weight != 0 and form.teacher_view == "query" and embed is None:
            raise ValueError("teacher.view: query needs the teacher's image encoder (embed=teacher.embed)")

    @classmethod
    def from_config(cls, cfg: Any, network: FeatureNet, teacher: Teacher | None = None) -> PPSSL:
        if teacher is None and cfg.ais.weight:
            raise ValueError("method.name: ppssl needs a teacher unless ais.weight is 0")
        return cls(
            network,
            text_features=teacher.text_features if teacher else None,
            form=form_from_config(cfg),
            embed=teacher.embed if teacher else None,
            teacher_logit_scale=teacher.logit_scale if teacher else 1.0,
            ais_weight=cfg.ais.weight,
            ais_temperature=cfg.ais.temperature,
            ais_scale=cfg.ais.scale,
            ais_warmup=cfg.ais.warmup,
            sources=cfg.iadm.sources,
            cam_image=cfg.iadm.image,
            **cls.contrast_arguments(cfg, network),
        )

    @classmethod
    def build_network(cls, cfg: Any, trunk: Trunk) -> FeatureNet:
        minmax = form_from_config(cfg).minmax
        return FeatureNet(trunk, MaskBranch(trunk.channels, cfg.method.maxout_width, minmax=minmax, groups=cfg.bn.groups))

    @property
    def network(self) -> FeatureNet:
        return FeatureNet(self.encoder_q.trunk, self.mask)

    def ema_pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        pairs = super().ema_pairs()
        if self.mask_k is not None:
            pairs = tuple(a + b for a, b in zip(pairs, parameter_pairs(self.mask, self.mask_k), strict=True))
        return pairs

    def embed_key(self, x_k: Tensor) -> Tensor:
        if self.mask_k is None:
            return super().embed_key(x_k)
        return self.encoder_k.project(self.mask_k(self.encoder_k.trunk(x_k)).pooled)

    def masked(self, feature: Tensor) -> Masked:
        """A and gap(A * F) of F. Where the form's ``mask_reach`` is ``branch``, A is made of a constant F."""
        if self.form.mask_reach == "trunk":
            return self.mask(feature)
        mask, _ = self.mask(feature.detach())
        return Masked(mask, masked_average_pool(feature, mask))

    def contrasted(self, feature: Tensor, mask: Tensor) -> Tensor:
        """What of F is contrasted: gap(F), or gap(A * F), to which A is a constant: the contrast alone would draw the mask to
        whatever two views share, the background too."""
        return masked_average_pool(feature, mask.detach()) if self.form.contrast_mask else global_average_pool(feature)

    def forward(self, batch: Batch) -> Output:
        with span("query_fwd"):
            maps = self.encoder_q.trunk.maps(batch.x_q)
            feature = maps["layer4"]  # F [B, C, h, w]
            mask, pooled = self.masked(feature)  # A [B, h, w], gap(F') [B, C]

        # L_con: the query against its key and the queue
        k = self.keys(batch.x_k)
        q = self.encoder_q.project(self.contrasted(feature, mask))
        losses, rank = self.contrast(q, k, batch.index)
        contrast = losses.mean()
        total, terms = contrast, {"contrast": contrast.detach()}

        # L_IADM: the mask is drawn to where the contrast looks
        if self.form.iadm_weight:
            seen, seen_maps, seen_mask, seen_losses = batch.x_q, maps, mask, losses
            if self.cam_image == "orig":
                seen = batch.x_o
                seen_maps = self.encoder_q.trunk.maps(seen)
                seen_mask, _ = self.masked(seen_maps["layer4"])
                q_o = self.encoder_q.project(self.contrasted(seen_maps["layer4"], seen_mask))
                seen_losses, _ = self.contrast(q_o, k, batch.index)
            with span("cam"):
                cam = self.cam(seen_losses, {"image": seen} | seen_maps, size=seen_mask.shape[1:])
            with span("losses"):
                cell = seen.shape[-1] // seen_mask.shape[-1]
                fitted = seen_mask if self.image_mask is None else self.image_mask(seen, cell=cell)
                iadm = spatial_kl(cam, fitted, self.form)
                if self.form.reduction == "sum":
                    iadm = iadm * world(self.group)  # the engine averages over the processes
            total = total + self.form.iadm_weight * iadm
            terms["iadm"] = iadm.detach()

        # L_AIS: the masked feature is to tell the descriptions apart as the teacher does
        if self.ais_weight:
            with span("losses"):
                ais = self.ais(pooled, batch)
            total = total + self.ais_weight * self.warmup() * ais
            terms["ais"] = ais.detach()

        return Output(total, terms, k, contrast_accuracy(rank))

    def cam(self, losses: Tensor, activations: dict[str, Tensor], size: tuple[int, int]) -> Tensor:
        """relu(+-x * dL_con/dx) of every source, pooled to ``size`` and averaged: [B, h, w] float32, without gradient."""
        sources = [activations[name] for name in self.sources]
        gradients = contrast_gradients(
            losses, sources, of=self.form.cam_loss, loss_scale=self.loss_scale, processes=world(self.group)
        )
        sign = 1 if self.form.sign == "plus" else -1
        cam = 0.0
        for x, g in zip(sources, gradients, strict=True):
            one = gradcam(x.detach(), g, size=tuple(size), pool=self.form.pool, sign=sign)
            cam = cam + scale_cam(one, self.form.cam_scale) / len(sources)
        return cam.detach()

    def attention(self, images: Tensor) -> dict[str, Tensor]:
        """``mask``: A, by which the feature is pooled; ``cam``: what IADM would draw it to, in this form, whatever its weight."""
        x = images.detach().requires_grad_()
        maps = self.encoder_q.trunk.maps(x)
        mask, _ = self.mask(maps["layer4"])
        q = self.encoder_q.project(self.contrasted(maps["layer4"], mask))
        losses = self.mirror_losses(q, images)
        return {"mask": mask.detach(), "cam": self.cam(losses, {"image": x} | maps, size=mask.shape[1:])}

    def ais(self, pooled: Tensor, batch: Batch) -> Tensor:
        """sum_b KL(softmax(z_t / tau) || softmax(z_s / tau)) / (P * B), in float32 with autocast off: logits are x 100."""
        embedding = self.embed(batch.x_q) if self.form.teacher_view == "query" else batch.teacher
        with torch.autocast(pooled.device.type, enabled=False):
            student = F.normalize(self.to_text(F.normalize(pooled.float(), dim=1)), dim=1)  # s [B, E]
            teacher = F.normalize(embedding.float(), dim=1)
            z_s = self.ais_scale * student @ self.text_features.T  # [B, P]
            z_t = self.teacher_logit_scale * teacher @ self.text_features.T
            tau = self.ais_temperature
            # log_softmax, not log(clamp(softmax)): the clamp has no gradient once saturated
            kl = F.kl_div(F.log_softmax(z_s / tau, 1), F.log_softmax(z_t / tau, 1), log_target=True, reduction="sum")
        return kl / z_s.numel()

    def warmup(self) -> Tensor | float:
        """Factor on alpha: rises linearly to 1 over the first ``ais_warmup`` of the run."""
        if not self.ais_warmup or self.progress is None:
            return 1.0
        return (self.progress / self.ais_warmup).clamp(max=1.0)
