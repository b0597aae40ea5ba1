"""MoCo v2 (He et al. 2020, arXiv 1911.05722; Chen et al. 2020, arXiv 2003.04297): contrast against a queue of momentum keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ppssl.batch_norm import distribute_batch_norm, group_batch_norm, parts_here, shuffle, unshuffle
from ppssl.encoder import Encoder, FeatureNet, ImageMaskBranch, MaskBranch, global_average_pool, projection_head
from ppssl.method import NO_CONTEXT, Batch, Method, Output, StepContext, register, spread
from ppssl.momentum import KeyQueue, key_copy, parameter_pairs
from ppssl.ops import gather, gradcam, queue_infonce
from ppssl.settings import MoCoSettings
from ppssl.span import span
from ppssl.teacher import Teacher


@register("moco")
class MoCo(Method):
    """``L = mean_b[ lse(q.k / T, q.queue / T) - q.k / T ]`` with ``q = l2(g(gap(f(x_q))))`` and ``k`` the momentum network's.

    ``network`` holds the trunk; ``head`` maps its ``channels`` to D = ``dim``. exclude_same_image: the sum over the queue excludes
    keys of the query's image from earlier epochs (about K / N of them among N images), which are no negatives. bn_groups: parts of
    the global batch with separate batch statistics; the key network sees other parts than the query network (shuffled BN).
    """

    def __init__(
        self,
        network: FeatureNet,
        head: nn.Module,
        *,
        dim: int,
        queue_size: int = 65536,
        queue_dtype: torch.dtype = torch.float32,
        temperature: float = 0.2,
        exclude_same_image: bool = False,
        bn_groups: int = 1,
    ):
        super().__init__()
        self.bn_groups = bn_groups
        group_batch_norm(network.trunk, bn_groups)
        group_batch_norm(head, bn_groups)
        self.encoder_q = Encoder(network.trunk, head)
        self.encoder_k = key_copy(self.encoder_q)
        self.queue = KeyQueue(queue_size, dim, queue_dtype, remember=exclude_same_image)
        self.temperature = temperature

    @classmethod
    def from_settings(cls, settings: MoCoSettings, network: FeatureNet, teacher: Teacher | None = None) -> MoCo:
        return cls(network, **cls.contrast_arguments(settings, network))

    @staticmethod
    def contrast_arguments(settings: MoCoSettings, network: FeatureNet) -> dict[str, Any]:
        """The keyword arguments that every method with a queue shares. ``queue.dtype`` has been resolved by the engine."""
        return dict(
            head=projection_head(settings.encoder.head, network.trunk.channels, settings.encoder.dim),
            dim=settings.encoder.dim,
            queue_size=settings.queue.size,
            queue_dtype=getattr(torch, settings.queue.dtype),
            temperature=settings.contrast.temperature,
            exclude_same_image=settings.queue.exclude_same_image,
            bn_groups=settings.bn.groups,
        )

    @property
    def network(self) -> FeatureNet:
        return FeatureNet(self.encoder_q.trunk)

    def ema_pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        return parameter_pairs(self.encoder_q, self.encoder_k)

    def distribute(self, group: str, *, sync_bn: bool, shard_queue: bool) -> None:
        parts_here(self.bn_groups, group, sync=sync_bn)  # refuses what does not divide
        self.group = group
        for encoder in (self.encoder_q, self.encoder_k):
            distribute_batch_norm(encoder, group, sync=sync_bn)
        for module in self.modules():
            if isinstance(module, (MaskBranch, ImageMaskBranch)):
                module.distribute(group, sync=sync_bn)
        if shard_queue:
            self.queue.shard(group)

    @torch.no_grad()
    def enqueue(self, keys: Tensor, index: Tensor, skip: Tensor | None = None) -> None:
        with span("enqueue"):
            self.queue.push(gather(keys, self.group), gather(index, self.group), skip)

    @torch.no_grad()
    def renumber(self, places: Tensor) -> None:
        if self.queue.index is not None:
            self.queue.index.copy_(places.to(self.queue.index.device)[self.queue.index])

    @torch.no_grad()
    def keys(self, x_k: Tensor) -> Tensor:
        """[B, 3, S, S] -> unit rows [B, D] of the key network."""
        with span("key_fwd"):
            return self.in_order(self.embed_key(self.shuffled(x_k)))

    def shuffled(self, x_k: Tensor) -> Tensor:
        """The images as the key network gets them: in other parts of the batch than their queries, where parts have batch
        statistics of their own."""
        return shuffle(x_k, self.bn_groups, self.group) if self.bn_groups > 1 and self.encoder_k.training else x_k

    def in_order(self, rows: Tensor) -> Tensor:
        """What the key network made of ``shuffled`` images, [B, D], in the order of the queries."""
        return unshuffle(rows, self.bn_groups, self.group) if self.bn_groups > 1 and self.encoder_k.training else rows

    def embed_key(self, x_k: Tensor) -> Tensor:
        """The key network itself, [B, 3, S, S] -> unit rows [B, D]: k = l2(g_k(gap(f_k(x_k))))."""
        return self.encoder_k(x_k)

    def contrast(self, q: Tensor, k: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """InfoNCE per sample [B] and the rank of the positive among all logits [B] (0 is first); ``index`` [B] the images."""
        with span("infonce"):
            return queue_infonce(
                q, k, self.queue.held, temperature=self.temperature, reduction="none", return_rank=True,
                exclude=self.queue.same_image(index), group=self.queue.group,
            )  # fmt: skip

    def forward(self, batch: Batch, context: StepContext = NO_CONTEXT) -> Output:
        with span("query_fwd"):
            q = self.encoder_q.project(global_average_pool(self.encoder_q.trunk(batch.x_q)))
        k = self.keys(batch.x_k)
        losses, rank = self.contrast(q, k, batch.index)
        total = losses.mean()
        return Output(total, {"contrast": total.detach()}, k, self.statistics(rank, q, k))

    def statistics(self, rank: Tensor, q: Tensor, k: Tensor) -> dict[str, Tensor]:
        """``Output.stats`` of queries and keys [B, D] and of the ranks of their positives [B]."""
        return contrast_accuracy(rank, ties(q, k)) | spread(q, self.group)

    def attention(self, images: Tensor) -> dict[str, Tensor]:
        """``cam``: relu(-x * dL/dx) of each image's own loss against its mirror image, averaged over the cells of the map: what
        supports the agreement. MoCo itself has no use for it."""
        x = images.detach().requires_grad_()
        feature = self.encoder_q.trunk(x)
        losses = self.mirror_losses(self.encoder_q.project(global_average_pool(feature)), images)
        (gradient,) = torch.autograd.grad(losses.sum(), x)
        return {"cam": gradcam(x.detach(), gradient, size=tuple(feature.shape[2:]), pool="mean", sign=-1)}

    def mirror_losses(self, q: Tensor, images: Tensor) -> Tensor:
        """InfoNCE [B] of the images' queries against the keys of their mirror images; no row of the queue is their own."""
        nobody = torch.full((len(q),), -2, device=q.device)
        return self.contrast(q, self.keys(images.flip(3)), nobody)[0]


TIE = 1e-6
"""Cosines that differ by less are equal: several roundings of float32."""


@torch.no_grad()
def ties(q: Tensor, k: Tensor) -> Tensor:
    """How many keys of other images of the batch score as the positive does, for each query: [B, D] and [B, D] unit rows -> [B]."""
    with torch.autocast(q.device.type, enabled=False):
        cosine = q.detach() @ k.detach().T
    return ((cosine - cosine.diagonal()[:, None]).abs() <= TIE).sum(1) - 1  # the positive equals itself


def contrast_accuracy(rank: Tensor, ties: Tensor) -> dict[str, Tensor]:
    """Shares of queries whose positive is the first, or among the first five, of all logits. What ties with it stands before it, so
    that a constant feature hits nothing; ``contrast_ties`` is the share of queries with a tie.

    rank [B]: the negatives that score above the positive; ties [B].
    """
    place = rank + ties
    found = {"contrast_top1": place < 1, "contrast_top5": place < 5, "contrast_ties": ties > 0}
    return {name: hit.float().mean() for name, hit in found.items()}
