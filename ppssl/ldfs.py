"""LDFS: MoCo v2 that also contrasts images drawn by a decoder, in which what does not discriminate has been altered.

    L = L_con + alpha * L_R + nu * L_Cp                                                   (ECCV 2024, called OLDFS by PP-SSL)

Of the pooled feature y = gap(f(x)), a dimension does not discriminate when it hardly varies over recent images, or when the
contrast hardly depends on it (its GradCAM importance). y' is y with noise on those dimensions alone. A decoder draws x^ from y and
x^' from y'; it is taught by L_R = mean |Dec(y) - x|^2, and L_Cp is the same contrast with the query from x^' and the key from x^:
what was altered is not to matter. Retrieval uses gap(F).

The authors did not publish alpha, nu, the share of dimensions, the noise, the warm-up or the decoder: those here are ours. So are
these readings: the drawn images are data (L_Cp teaches the encoder, L_R alone the decoder), and until the warm-up is over, while
the decoder still draws nothing, L_Cp has no weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppssl.encoder import FeatureNet, global_average_pool
from ppssl.guidance import contrast_gradients
from ppssl.method import NO_CONTEXT, Batch, Output, StepContext, register
from ppssl.moco import MoCo
from ppssl.settings import LDFSSettings
from ppssl.span import span
from ppssl.teacher import Teacher

_MOMENTUM = 0.1  # of the running statistics of y, as batch-norm's


@register("ldfs")
class LDFS(MoCo):
    """LDFS around ``network``, for images of ``side`` x ``side`` pixels.

    reconstruction (alpha), pair (nu): weights of L_R and L_Cp. share: of the dimensions, by each of the two criteria. noise: in
    standard deviations of the dimension. warmup: share of the run before L_Cp counts.
    """

    def __init__(
        self,
        network: FeatureNet,
        head: nn.Module,
        *,
        side: int,
        reconstruction: float = 0.05,
        pair: float = 0.5,
        share: float = 0.2,
        noise: float = 1.0,
        warmup: float = 0.2,
        **contrast: Any,
    ):
        super().__init__(network, head, **contrast)
        channels = network.trunk.channels
        self.decoder = Decoder(channels, side, network.trunk.stride)
        self.register_buffer("variance", torch.zeros(channels))
        self.register_buffer("importance", torch.zeros(channels))
        self.reconstruction, self.pair, self.share, self.noise, self.warmup = reconstruction, pair, share, noise, warmup

    @classmethod
    def from_settings(cls, settings: LDFSSettings, network: FeatureNet, teacher: Teacher | None = None) -> LDFS:
        return cls(
            network,
            side=settings.image_size,
            reconstruction=settings.ldfs.reconstruction,
            pair=settings.ldfs.pair,
            share=settings.ldfs.share,
            noise=settings.ldfs.noise,
            warmup=settings.ldfs.warmup,
            **cls.contrast_arguments(settings, network) | {"negatives": "queue", "symmetric": False, "keys_with_gradient": False},
        )

    def distribute(self, group: str, *, sync_bn: bool, shard_queue: bool) -> None:
        raise NotImplementedError("method.name: ldfs runs in one process only: its noise and its statistics are the batch's")

    def forward(self, batch: Batch, context: StepContext = NO_CONTEXT) -> Output:
        with span("query_fwd"):
            y = global_average_pool(self.encoder_q.trunk(batch.x_q)).float()  # [B, C]
            q = self.encoder_q.project(y)

        # L_con: the query against its key and the queue
        k = self.keys(batch.x_k)
        losses, rank = self.contrast(q, k, batch.index)
        contrast = losses.mean()

        # L_R: the feature says what the image looks like
        with span("losses"):
            drawn = self.decoder(y).float()  # x^ [B, 3, S, S]
            reconstruction = F.mse_loss(drawn, batch.x_q.float())
        with span("cam"):
            self.observe(y, losses, context)

        # L_Cp: what does not discriminate may change; batch-norm's running statistics are those of real images
        with real_statistics(self.encoder_q, self.encoder_k, self.decoder):
            with torch.no_grad():
                altered = self.decoder(self.perturb(y)).float()  # x^' [B, 3, S, S]
            with span("query_fwd"):
                q_drawn = self.encoder_q(altered)
            pair_losses, _ = self.contrast(q_drawn, self.keys(drawn.detach()), batch.index)
        pair = pair_losses.mean()

        total = contrast + self.reconstruction * reconstruction + self.pair * self.warmed_up(context) * pair
        terms = {"contrast": contrast.detach(), "reconstruction": reconstruction.detach(), "pair": pair.detach()}
        return Output(total, terms, k, self.statistics(rank, q, k))

    def observe(self, y: Tensor, losses: Tensor, context: StepContext = NO_CONTEXT) -> None:
        """Moves the running variance of each dimension and its importance: mean over images of |gap(dL/dF) * y|, L an image's own
        contrast. Through the pooling, gap(dL/dF) is dL/dy over the number of cells, a factor that no order depends on."""
        (gradient,) = contrast_gradients(losses, [y], of="sum", context=context)
        with torch.no_grad():
            self.variance.lerp_(y.var(0), _MOMENTUM)
            self.importance.lerp_((gradient * y).abs().mean(0), _MOMENTUM)

    def not_discriminative(self) -> Tensor:
        """[C] booleans: among the lowest ``share`` by variance, or by importance."""
        count = round(self.share * len(self.variance))
        if not count:
            return torch.zeros_like(self.variance, dtype=torch.bool)
        limits = [values.sort().values[count - 1] for values in (self.variance, self.importance)]
        return (self.variance <= limits[0]) | (self.importance <= limits[1])

    def perturb(self, y: Tensor) -> Tensor:
        """y' [B, C]: noise, scaled by each dimension's own deviation, on the dimensions that do not discriminate."""
        deviation = self.noise * self.variance.sqrt() * self.not_discriminative()
        return y + deviation * torch.randn_like(y)

    def warmed_up(self, context: StepContext) -> Tensor | float:
        """Factor on nu: 0 during the first ``warmup`` of the run, then 1."""
        if not self.warmup or context.progress is None:
            return 1.0
        return (context.progress >= self.warmup).float()


class Decoder(nn.Module):
    """y [B, C] -> image [B, 3, side, side], normalized like the trunk's input: a map of the trunk's size, then doublings with a
    residual block each, whose width halves from C / 16 (at least 32) down to 16."""

    def __init__(self, channels: int, side: int, stride: int):
        super().__init__()
        doublings = stride.bit_length() - 1
        if side % stride or 1 << doublings != stride:
            raise ValueError(f"data.image_size: {side} is not a multiple of {stride}, the trunk's stride (a power of two)")
        width = max(32, channels // 16)
        self.map = nn.ConvTranspose2d(channels, width, side // stride, bias=False)
        stages: list[nn.Module] = []
        for _ in range(doublings - 1):
            narrower = max(16, width // 2)
            stages += [nn.Upsample(scale_factor=2), _Residual(width, narrower)]
            width = narrower
        # the finest doubling is the dearest: one convolution
        self.stages = nn.Sequential(*stages, nn.Upsample(scale_factor=2), nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, y: Tensor) -> Tensor:
        return self.stages(self.map(y[:, :, None, None]))


class _Residual(nn.Module):
    """relu(bn(conv3(relu(bn(conv3(x))))) + conv1(x)), [B, channels, h, w] -> [B, out, h, w]."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.shortcut = nn.Conv2d(channels, out, 1, bias=False)
        self.body = nn.Sequential(
            nn.Conv2d(channels, out, 3, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(inplace=True),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            nn.BatchNorm2d(out),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


@contextmanager
def real_statistics(*networks: nn.Module) -> Iterator[None]:
    """Inside, batch-norm in training mode normalizes by the batch as always but leaves its running statistics where they are."""
    norms = [m for network in networks for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
