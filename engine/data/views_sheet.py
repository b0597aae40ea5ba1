"""``python -m engine.check --cfg X --out views.png``: originals and views side by side, as every loader that runs here makes
them from the same values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engine.config import Config
from engine.data import catalog, contact_sheet, sampler, views
from engine.data.loaders import choose
from ppssl.method import Batch
from ppssl.timm_trunk import IMAGENET, ImageInput, image_input

IMAGES = 5
"""Rows of the sheet: the first images of the run's order."""


class Backend(NamedTuple):
    """One way of making views."""

    title: str
    settings: dict[str, str]
    """Of ``data.*``."""


def backends(device: torch.device) -> list[Backend]:
    """What runs on this machine; torchvision first, since the others are measured against it."""
    found = [Backend("torchvision", {"loader": "torch", "resident": "off", "aug": "parity"})]
    if choose.dali_problem() is None:
        found += [
            Backend("DALI", {"loader": "dali", "resident": "off", "aug": "parity"}),
            Backend("DALI's own colour", {"loader": "dali", "resident": "off", "aug": "dali"}),
        ]
    if device.type == "cuda":
        found.append(Backend("nvJPEG", {"loader": "nvjpeg", "resident": "off", "aug": "parity"}))
    places = ("host", "device") if device.type == "cuda" else ("host",)
    return found + [Backend(f"resident, {where}", {"loader": "auto", "resident": where, "aug": "parity"}) for where in places]


def draw(images: catalog.ImageList, cfg: Config, device: torch.device) -> Image.Image:
    """The sheet: a row per image; the original, then the query and the key view of every backend. Under a view stands how far it
    is from torchvision's, in levels of 0..255 in the mean, and the largest distance of a pixel; under torchvision's, the values."""
    count = min(IMAGES, len(images))
    chosen = sampler.epoch_order(cfg.seed, 0, len(images))[:count]
    names = tuple(images.names[i] for i in chosen)
    some = replace(images, names=names, labels=None, sizes=images.sizes[chosen], plain=images.plain[chosen])
    cfg = replace(cfg, batch_size=count)
    order = sampler.epoch_order(cfg.seed, 0, count)
    values = [views.view_values(cfg.seed, 0, order, view, some.sizes[order], cfg.data.image_size) for view in (0, 1)]
    how = image_input(cfg.encoder.arch, cfg.encoder.weights)
    made: dict[str, tuple[Tensor, ...]] = {}
    for backend in backends(device):
        own = replace(cfg, data=replace(cfg.data, **backend.settings))
        loader = choose.build_loader(some, own, device, with_clean=True)
        try:
            batch = next(iter(loader.batches(0, 1)))
        finally:
            loader.close()
        made[backend.title] = tuple(levels(x, how) for x in (batch.x_q, batch.x_k, batch.x_clean))
    theirs = made["torchvision"]
    tiles = []
    for b in range(count):
        tiles.append(contact_sheet.Tile(theirs[2][b].round().byte().numpy(), "original\n" + Path(some.names[order[b]]).name))
        for title, ours in made.items():
            for view, name in enumerate(("query", "key")):
                if title == "torchvision":
                    note = describe(values[view], b, some.sizes[order[b]])
                else:
                    difference = (ours[view][b] - theirs[view][b]).abs()
                    note = f"{difference.mean():.1f} levels, at most {difference.max():.0f}"
                tiles.append(contact_sheet.Tile(ours[view][b].round().byte().numpy(), f"{title}: {name}\n{note}"))
    title = f"{cfg.data.name}: the same values executed by every loader that runs here ({device})"
    return contact_sheet.draw(tiles, columns=1 + 2 * len(made), side=160, title=title)


def of_batch(batch: Batch, how: ImageInput = IMAGENET) -> Image.Image:
    """The views of the first images of a batch as the networks get them, a row per image: clean where the method asks for it,
    query, key."""
    shown = {"clean": batch.x_clean, "query": batch.x_q, "key": batch.x_k}
    made = {name: levels(x[:IMAGES].detach(), how).round().byte().numpy() for name, x in shown.items() if x is not None}
    tiles = [contact_sheet.Tile(pixels[b], name) for b in range(len(made["query"])) for name, pixels in made.items()]
    side = min(160, batch.x_q.shape[-1])
    return contact_sheet.draw(tiles, columns=len(made), side=side)


def levels(x: Tensor, how: ImageInput = IMAGENET) -> Tensor:
    """Normalized [B, 3, S, S] -> [B, S, S, 3] in 0..255 on the CPU."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (how.mean, how.std))
    return ((x.cpu().float() * std + mean) * 255).clamp(0, 255).permute(0, 2, 3, 1)


def describe(values: views.ViewValues, b: int, size: np.ndarray) -> str:
    """The values of image ``b`` on two lines: the crop's share of the area and what else happens; the jitter in its order, by the
    initials of brightness, contrast, saturation and hue."""
    words = [f"{values.crop[b, 2:].prod() / size.prod():.0%}"]
    if values.flip[b]:
        words.append("flip")
    if values.grey[b]:
        words.append("grey")
    if values.blur_sigma[b] > 0:
        words.append(f"blur {values.blur_sigma[b]:.1f}")
    jitter = [f"{'bcsh'[op]}{values.factors[b, op]:.2f}" for op in values.order[b]] if values.jitter[b] else ["no jitter"]
    return ", ".join(words) + "\n" + " ".join(jitter)
