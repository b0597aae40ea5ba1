"""MoCo v2 as lightly's documentation writes it, on a trunk and photos of ours: what ours is compared with.

docs.lightly.ai/examples/moco.html: two views by ``MoCoV2Transform`` in the workers of a ``DataLoader``, ``MoCoProjectionHead``,
``NTXentLoss`` with a memory bank, ``update_momentum`` before every step. Optimizer, learning rate, decay and sizes are those of the
config, so that the two sides differ in the library alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from engine import build
from engine.config import Config, ConfigError, OptimConfig
from engine.data.catalog import ImageList
from engine.training import precision
from engine.training.optim import learning_rate
from ppssl.encoder import BaseTrunk, global_average_pool
from ppssl.timm_trunk import image_input


class Photos(Dataset):
    """The photos of a list under a transform, opened by PIL."""

    def __init__(self, images: ImageList, transform) -> None:
        self.paths = [str(images.path(i)) for i in range(len(images))]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> list[Tensor]:
        with Image.open(self.paths[i]) as image:
            return self.transform(image.convert("RGB"))


class LightlyMoCo(nn.Module):
    """Trunk and head, and the copies that follow them."""

    def __init__(self, trunk: BaseTrunk, dim: int):
        super().__init__()
        from lightly.models.modules import MoCoProjectionHead  # heavy, and an extra
        from lightly.models.utils import deactivate_requires_grad

        self.trunk, self.head = trunk, MoCoProjectionHead(trunk.channels, trunk.channels, dim)
        self.trunk_momentum, self.head_momentum = copy.deepcopy(self.trunk), copy.deepcopy(self.head)
        for follower in (self.trunk_momentum, self.head_momentum):
            deactivate_requires_grad(follower)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, D] queries."""
        return self.head(global_average_pool(self.trunk(images)))

    @torch.no_grad()
    def keys(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, D]."""
        return self.head_momentum(global_average_pool(self.trunk_momentum(images)))


def data_loader(images: ImageList, cfg: Config, workers: int) -> DataLoader:
    """Batches ``[queries, keys]`` of ``cfg.batch_size``, shuffled, the last smaller one left out."""
    from lightly.transforms.moco_transform import MoCoV2Transform  # heavy, and an extra

    how = image_input(cfg.encoder.arch, cfg.encoder.weights)
    transform = MoCoV2Transform(input_size=cfg.data.image_size, normalize={"mean": [*how.mean], "std": [*how.std]})
    order = torch.Generator().manual_seed(cfg.seed)
    return DataLoader(
        Photos(images, transform), cfg.batch_size, shuffle=True, drop_last=True, num_workers=workers,
        persistent_workers=workers > 0, generator=order,
    )  # fmt: skip


class Training:
    """The loop's body: a step at a time."""

    def __init__(self, cfg: Config, images: ImageList, device: torch.device, workers: int):
        from lightly.loss import NTXentLoss  # heavy, and an extra

        trunk = build.initial_network(cfg).trunk
        self.cfg, self.device, self.amp = cfg, device, precision.resolve(cfg.amp, device)
        self.model = LightlyMoCo(trunk, cfg.encoder.dim).to(device)
        self.loader = data_loader(images, cfg, workers)
        self.criterion = NTXentLoss(temperature=cfg.contrast.temperature, memory_bank_size=(cfg.queue.size, cfg.encoder.dim)).to(
            device
        )
        self.total = cfg.epochs * len(self.loader)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = optimizer(trained, cfg.optim)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.factor)
        self.steps = 0

    def factor(self, step: int) -> float:
        """Of the learning rate: schedule and warm-up of ``cfg.optim``."""
        optim = self.cfg.optim
        warmup = round(optim.warmup * len(self.loader))
        return learning_rate(step, self.total, peak=1.0, schedule=optim.schedule, warmup=warmup)

    def step(self, batch: list[Tensor]) -> Tensor:
        """Trains on ``[queries, keys]`` and returns the loss."""
        from lightly.models.utils import update_momentum

        x_q, x_k = (views.to(self.device) for views in batch)
        update_momentum(self.model.trunk, self.model.trunk_momentum, m=self.cfg.ema.decay)
        update_momentum(self.model.head, self.model.head_momentum, m=self.cfg.ema.decay)
        with self.amp.autocast():
            q, k = self.model(x_q), self.model.keys(x_k)
        loss = self.criterion(q.float(), k.float())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.steps += 1
        return loss.detach()

    def batches(self) -> Iterator[list[Tensor]]:
        """Of all epochs."""
        for _ in range(self.cfg.epochs):
            yield from self.loader


def optimizer(parameters: list[nn.Parameter], optim: OptimConfig) -> torch.optim.Optimizer:
    """torch's own, with what ``optim`` says. Raises ``ConfigError`` for what the comparison has no counterpart of."""
    if optim.name == "adamw":
        return torch.optim.AdamW(parameters, optim.lr, optim.betas, optim.eps, optim.weight_decay, fused=True)
    if optim.name != "sgd":
        raise ConfigError(f"optim.name: got {optim.name!r}, the comparison with lightly has sgd and adamw")
    return torch.optim.SGD(parameters, optim.lr, optim.momentum, weight_decay=optim.weight_decay, fused=True)


def train(cfg: Config, images: ImageList, device: torch.device) -> tuple[BaseTrunk, int]:
    """A whole run: the trained trunk and the number of steps. Raises ``FloatingPointError`` where it diverges."""
    torch.manual_seed(cfg.seed)
    training = Training(cfg, images, device, cfg.data.workers or 0)
    torch.manual_seed(cfg.seed)  # of the views, whatever the weights have drawn
    loss = torch.zeros(())
    for batch in training.batches():
        loss = training.step(batch)
    if not torch.isfinite(loss):
        raise FloatingPointError(f"step {training.steps}: the loss of lightly's MoCo is not finite")
    return training.model.trunk, training.steps
