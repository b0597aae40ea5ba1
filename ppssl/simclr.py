"""SimCLR (Chen et al. 2020, arXiv 2002.05709): every view against its twin among the other views of the batch; no key network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppssl.batch_norm import distribute_batch_norm, group_batch_norm
from ppssl.encoder import Encoder, FeatureNet, projection_head
from ppssl.method import NO_CONTEXT, Batch, Method, Output, StepContext, register, spread
from ppssl.moco import contrast_accuracy, ties
from ppssl.ops import gather
from ppssl.settings import SimCLRSettings
from ppssl.span import span
from ppssl.teacher import Teacher


@register("simclr")
class SimCLR(Method):
    """``L = mean over the 2B views v of [ lse over u != v (z_v.z_u / T) - z_v.z_twin(v) / T ]`` (NT-Xent), z = l2(g(gap(f(x)))).

    Negatives are the views of the batch. ``network`` holds the trunk; ``head`` maps its ``channels`` to the embedding.
    """

    def __init__(self, network: FeatureNet, head: nn.Module, *, temperature: float = 0.2):
        super().__init__()
        self.encoder = Encoder(network.trunk, head)
        self.temperature = temperature

    @classmethod
    def from_settings(cls, settings: SimCLRSettings, network: FeatureNet, teacher: Teacher | None = None) -> SimCLR:
        group_batch_norm(network.trunk, settings.bn.groups)
        head = projection_head(settings.encoder.head, network.trunk.channels, settings.encoder.dim)
        return cls(network, head, temperature=settings.contrast.temperature)

    @property
    def network(self) -> FeatureNet:
        return FeatureNet(self.encoder.trunk)

    def distribute(self, group: str, *, sync_bn: bool, shard_queue: bool) -> None:
        if not sync_bn:
            raise ValueError("bn.sync: simclr has both views in one batch-norm; over several processes it needs bn.sync=true")
        self.group = group
        distribute_batch_norm(self, group, sync=True)

    def forward(self, batch: Batch, context: StepContext = NO_CONTEXT) -> Output:
        with span("query_fwd"):
            z = self.encoder(torch.cat([batch.x_q, batch.x_k]))  # [2B, D], both views share their batch statistics
        with span("losses"):
            a, b = (gather(views, self.group) for views in z.chunk(2))  # the negatives are the global batch's
            every = torch.cat([a, b])
            losses, rank = nt_xent(every, self.temperature)
            total = losses.mean()
        accuracy = contrast_accuracy(rank, torch.cat([ties(a, b), ties(b, a)]))
        return Output(total, {"contrast": total.detach()}, stats=accuracy | spread(every))


def nt_xent(z: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Loss [2B] of each row of ``z`` [2B, D], whose twin is the row B further on (modulo 2B), and how many other rows score
    strictly above the twin [2B]."""
    with torch.autocast(z.device.type, enabled=False):
        logits = z @ z.T / temperature
    row = torch.arange(len(z), device=z.device)
    logits = logits.masked_fill(row[:, None] == row, float("-inf"))
    twin = (row + len(z) // 2) % len(z)
    rank = (logits > logits.gather(1, twin[:, None])).sum(1)
    return F.cross_entropy(logits, twin, reduction="none"), rank
