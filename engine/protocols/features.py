"""Features of an image list under a network: what every protocol judges."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine import precision
from engine.config import Config
from engine.data import clean_batches
from engine.data.catalog import ImageList
from engine.data.views import clean_resize


@torch.no_grad()
def extract(network: nn.Module, images: ImageList, cfg: Config, device: torch.device) -> Tensor:
    """[N, C] float32 features on ``device``: short side 256/224 of ``data.image_size``, centre crop, under the run's
    ``amp``, modules in eval mode meanwhile. In file order at ``eval.batch_size``: in form ``published`` the mask is
    scaled over the batch, so that both are part of the result.

    Raises ``BrokenFile`` naming a file that no longer opens.
    """
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    rows: list[Tensor] = []
    try:
        with precision.resolve(cfg.amp, device).autocast():
            for x, _ in clean_batches(
                images,
                resize=clean_resize(cfg.data.image_size),
                crop=cfg.data.image_size,
                batch_size=cfg.eval.batch_size,
                workers=cfg.data.workers,
                device=device,
            ):
                rows.append(network(x).float())
    finally:
        for module, training in modes:
            module.training = training
    return torch.cat(rows)
