"""BYOL (Grill et al. 2020, arXiv 2006.07733): a predictor on the online network guesses the momentum network's embedding of the
other view; no negatives, no queue."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppssl.batch_norm import distribute_batch_norm, group_batch_norm
from ppssl.encoder import Encoder, FeatureNet, global_average_pool, projection_head
from ppssl.method import NO_CONTEXT, Batch, Method, Output, StepContext, register, spread
from ppssl.momentum import key_copy, parameter_pairs
from ppssl.settings import BYOLSettings
from ppssl.span import span
from ppssl.teacher import Teacher


@register("byol")
class BYOL(Method):
    """``L = mean_b[ 2 - 2 cos(p(z_q), t_k) ] + mean_b[ 2 - 2 cos(p(z_k), t_q) ]``: z of the online network, t of the momentum one.

    ``network`` holds the trunk; ``head`` maps its ``channels`` to D = ``dim``; the predictor p is Linear-BN-ReLU-Linear, as wide
    inside as the trunk's output. What keeps it from a constant answer is the predictor and a slow target (``ema.decay`` near 1).
    """

    def __init__(self, network: FeatureNet, head: nn.Module, *, dim: int):
        super().__init__()
        self.online = Encoder(network.trunk, head)
        self.target = key_copy(self.online)
        hidden = network.trunk.channels
        self.predictor = nn.Sequential(
            nn.Linear(dim, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, dim)
        )

    @classmethod
    def from_settings(cls, settings: BYOLSettings, network: FeatureNet, teacher: Teacher | None = None) -> BYOL:
        group_batch_norm(network.trunk, settings.bn.groups)
        head = projection_head(settings.encoder.head, network.trunk.channels, settings.encoder.dim)
        method = cls(network, group_batch_norm(head, settings.bn.groups), dim=settings.encoder.dim)
        group_batch_norm(method.predictor, settings.bn.groups)
        return method

    @property
    def network(self) -> FeatureNet:
        return FeatureNet(self.online.trunk)

    def ema_pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        return parameter_pairs(self.online, self.target)

    def distribute(self, group: str, *, sync_bn: bool, shard_queue: bool) -> None:
        self.group = group
        distribute_batch_norm(self, group, sync=sync_bn)

    def forward(self, batch: Batch, context: StepContext = NO_CONTEXT) -> Output:
        with span("key_fwd"), torch.no_grad():
            t_q, t_k = self.target(batch.x_q), self.target(batch.x_k)  # unit rows [B, D]
        with span("query_fwd"):
            p_q, p_k = self.predict(batch.x_q), self.predict(batch.x_k)
        with span("losses"):
            cosine = ((p_q * t_k).sum(1) + (p_k * t_q).sum(1)).mean() / 2
            total = 4 - 4 * cosine
        # a spread of the targets that falls to 0 is the constant answer
        return Output(total, {"prediction": total.detach()}, stats={"cosine": cosine.detach()} | spread(t_k, self.group))

    def predict(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] -> unit rows [B, D] float32."""
        projection = self.online.head(global_average_pool(self.online.trunk(images)))
        return F.normalize(self.predictor(projection).float(), dim=1)
