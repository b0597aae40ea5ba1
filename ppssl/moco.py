"""MoCo v2 (He et al. 2020, arXiv 1911.05722; Chen et al. 2020, arXiv 2003.04297): contrast against a queue of momentum keys."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppssl.batch_norm import distribute_batch_norm, group_batch_norm, parts_here, shuffle, unshuffle
from ppssl.encoder import Encoder, FeatureNet, ImageMaskBranch, MaskBranch, global_average_pool, projection_head
from ppssl.method import NO_CONTEXT, Batch, Method, Output, StepContext, register, spread
from ppssl.momentum import KeyQueue, key_copy, parameter_pairs
from ppssl.ops import gather, gradcam, queue_infonce, rank
from ppssl.settings import MoCoSettings
from ppssl.span import span
from ppssl.teacher import Teacher


@register("moco")
class MoCo(Method):
    """``L = mean_b[ lse(q.k / T, q.queue / T) - q.k / T ]`` with ``q = l2(g(gap(f(x_q))))`` and ``k`` the momentum network's.

    ``network`` holds the trunk; ``head`` maps its ``channels`` to D = ``dim``. exclude_same_image: the sum over the queue excludes
    keys of the query's image from earlier epochs (about K / N of them among N images), which are no negatives. bn_groups: parts of
    the global batch with separate batch statistics; the key network sees other parts than the query network (shuffled BN).

    negatives: the ``queue``; the keys of the other images of the global ``batch``, as MoCo v3 has it, and then ``queue`` is None;
    or ``both``. empty_queue: the random rows that the queue starts with do not count. symmetric: ``L_con`` is the mean of two
    directions, ``x_q`` against ``x_k`` and ``x_k`` against ``x_q``, each view a pass of its own with its own batch statistics (MoCo
    v3 takes their sum), and the keys of both views enter the queue. keys_with_gradient: keys are made by the query network and the
    loss is differentiated through them too, as in SimCLR, and then ``encoder_k`` is None; the rows of a queue are constants.
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
        negatives: Literal["queue", "batch", "both"] = "queue",
        empty_queue: bool = False,
        symmetric: bool = False,
        keys_with_gradient: bool = False,
    ):
        super().__init__()
        self.bn_groups = bn_groups
        self.negatives, self.symmetric = negatives, symmetric
        group_batch_norm(network.trunk, bn_groups)
        group_batch_norm(head, bn_groups)
        self.encoder_q = Encoder(network.trunk, head)
        self.encoder_k = None if keys_with_gradient else key_copy(self.encoder_q)
        self.queue = None
        if negatives != "batch":
            self.queue = KeyQueue(queue_size, dim, queue_dtype, remember=exclude_same_image, empty=empty_queue)
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
            negatives=settings.contrast.negatives,
            empty_queue=settings.queue.start == "empty",
            symmetric=settings.contrast.symmetric,
            keys_with_gradient=settings.contrast.gradient == "both",
        )

    @property
    def network(self) -> FeatureNet:
        return FeatureNet(self.encoder_q.trunk)

    def ema_pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        return ([], []) if self.encoder_k is None else parameter_pairs(self.encoder_q, self.encoder_k)

    def distribute(self, group: str, *, sync_bn: bool, shard_queue: bool) -> None:
        parts_here(self.bn_groups, group, sync=sync_bn)  # refuses what does not divide
        self.group = group
        for encoder in (self.encoder_q, self.encoder_k):
            if encoder is not None:
                distribute_batch_norm(encoder, group, sync=sync_bn)
        for module in self.modules():
            if isinstance(module, (MaskBranch, ImageMaskBranch)):
                module.distribute(group, sync=sync_bn)
        if shard_queue and self.queue is not None:
            self.queue.shard(group)

    @torch.no_grad()
    def enqueue(self, keys: Tensor, index: Tensor, skip: Tensor | None = None) -> None:
        with span("enqueue"):
            # of both directions one after the other: rows are then in the same order whatever the number of processes
            views = [gather(view, self.group) for view in keys.split(len(index))]
            self.queue.push(torch.cat(views), gather(index, self.group).repeat(len(views)), skip)

    @torch.no_grad()
    def renumber(self, places: Tensor) -> None:
        if self.queue is not None and self.queue.index is not None:
            self.queue.index.copy_(places.to(self.queue.index.device)[self.queue.index])

    def keys(self, x_k: Tensor) -> Tensor:
        """[B, 3, S, S] -> unit rows [B, D] of the key network, constants; of the query network where keys carry gradient."""
        with span("key_fwd"):
            if self.encoder_k is None:
                return self.in_order(self.embed_query(self.shuffled(x_k)))
            with torch.no_grad():
                return self.in_order(self.embed_key(self.shuffled(x_k)))

    def shuffled(self, x_k: Tensor) -> Tensor:
        """The images as the key network gets them: in other parts of the batch than their queries, where parts have batch
        statistics of their own."""
        return shuffle(x_k, self.bn_groups, self.group) if self.bn_groups > 1 and self.encoder_q.training else x_k

    def in_order(self, rows: Tensor) -> Tensor:
        """What the key network made of ``shuffled`` images, [B, D], in the order of the queries."""
        return unshuffle(rows, self.bn_groups, self.group) if self.bn_groups > 1 and self.encoder_q.training else rows

    def embed_query(self, x_q: Tensor) -> Tensor:
        """The query network, [B, 3, S, S] -> unit rows [B, D]: q = l2(g(gap(f(x_q))))."""
        return self.encoder_q.project(global_average_pool(self.encoder_q.trunk(x_q)))

    def embed_key(self, x_k: Tensor) -> Tensor:
        """The key network itself, [B, 3, S, S] -> unit rows [B, D]: k = l2(g_k(gap(f_k(x_k))))."""
        return self.encoder_k(x_k)

    def contrast(self, q: Tensor, k: Tensor, index: Tensor, group: str | None = None) -> tuple[Tensor, Tensor]:
        """InfoNCE per sample [B] and the rank of the positive among all logits [B] (0 is first); ``index`` [B] the images.

        group: the processes whose images are each other's negatives; None takes those that share the batch.
        """
        with span("infonce"):
            found = []
            if self.queue is not None:
                found.append(queue_infonce(
                    q, k, self.queue.held, temperature=self.temperature, reduction="none", return_rank=True,
                    exclude=self.queue.same_image(index), group=self.queue.group, count=self.queue.count,
                ))  # fmt: skip
            if self.negatives != "queue":
                found.append(batch_infonce(q, k, self.temperature, self.group if group is None else group))
            if len(found) == 1:
                return found[0]
            (losses, place), (batch_losses, batch_place) = found
            return joint_infonce(losses, batch_losses), place + batch_place

    def forward(self, batch: Batch, context: StepContext = NO_CONTEXT) -> Output:
        with span("query_fwd"):
            q = self.embed_query(batch.x_q)
        k = self.keys(batch.x_k)
        losses, rank = self.contrast(q, k, batch.index)
        total, keys = self.both_directions(losses, k, batch)
        return Output(total, {"contrast": total.detach()}, keys, self.statistics(rank, q, k))

    def both_directions(self, losses: Tensor, k: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """L_con and what enters the queue, from the losses [B] of ``x_q`` against the keys ``k`` [B, D] of ``x_k``: their mean and
        the keys; where it is symmetric, averaged with those of ``x_k`` against the keys of ``x_q``, and all keys [2B, D]."""
        loss, keys = losses.mean(), k.detach()
        if self.symmetric:
            with span("query_fwd"):
                q = self.embed_query(batch.x_k)
            other = self.keys(batch.x_q.detach())
            loss = (loss + self.contrast(q, other, batch.index)[0].mean()) / 2
            keys = torch.cat([keys, other.detach()])
        return loss, None if self.queue is None else keys

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
        """InfoNCE [B] of the images' queries against the keys of their mirror images; no row of the queue is their own. Every
        process has the same images: where the batch gives the negatives, they are each other's within one process."""
        nobody = torch.full((len(q),), -2, device=q.device)
        return self.contrast(q, self.keys(images.flip(3)), nobody, group="")[0]


def batch_infonce(q: Tensor, k: Tensor, temperature: float, group: str = "") -> tuple[Tensor, Tensor]:
    """InfoNCE [b] of each query against its key and the keys of the other images of the global batch, and how many of these score
    strictly above the positive [b]: ``lse_j(q_i.k_j / T) - q_i.k_i / T``, j over all B images.

    q, k: [b, D], this process's of the ``group``. Gradients reach both. The logits [b, B] are no larger than SimCLR's; a queue goes
    through ``queue_infonce``, which holds none.
    """
    with torch.autocast(q.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), torch.float32)
        logits = q.to(dtype) @ gather(k.to(dtype), group).T / temperature
    place = rank(group) * len(q) + torch.arange(len(q), device=q.device)
    above = (logits > logits.gather(1, place[:, None])).sum(1)
    return F.cross_entropy(logits, place, reduction="none"), above


def joint_infonce(a: Tensor, b: Tensor) -> Tensor:
    """The InfoNCE [B] against two sets of negatives together, from those against each of them with the same positive.

    With ``A`` and ``C`` the sums of exp(score - positive) over the sets, ``a = log(1 + A)`` and ``b = log(1 + C)``, so that
    ``log(1 + A + C) = log(e^a + e^b - 1) = high + log1p(e^(low - high) (1 - e^-low))``: no exponent is positive and a small loss is
    exact.
    """
    high, low = torch.maximum(a, b), torch.minimum(a, b)
    return high + torch.log1p(torch.exp(low - high) * -torch.expm1(-low))


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
