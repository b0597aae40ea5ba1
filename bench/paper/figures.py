"""The pictures of the paper's figures: attention masks of several runs side by side, and a measure against a setting."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch.nn import functional as F

from bench.paper.exhibits import Cell, Exhibit, Outcome
from engine import build, files
from engine.console import say
from engine.data import IMAGENET_MEAN, IMAGENET_STD, contact_sheet
from engine.files import write_atomically
from ppssl.encoder import FeatureNet

IMAGES = 8
"""Test images in a picture of masks, each of another class."""


def draw(exhibit: Exhibit, ran: list[Cell], found: dict[tuple[str, str], Outcome], out: Path) -> None:
    """Writes the picture of a figure whose cells ``ran``, and says where it is."""
    for data in exhibit.data:
        path = out / f"{exhibit.key.replace(' ', '')}_{data}.png"
        here = [cell for cell in ran if cell.data == data]
        if not here:
            say(f"no picture of {exhibit.key} on {data}: none of its runs is there")
            continue
        if exhibit.picture == "masks":
            masks(exhibit, [cell for cell in here if cell.config.seed == 0], path)
        else:
            curve(exhibit, data, found, path)
        say(f"written: {path}")


def masks(exhibit: Exhibit, here: list[Cell], path: Path) -> None:
    """One row per image: as it is, then under the mask of every run. All images of a run are in one batch, since variant
    ``published`` scales the mask over it."""
    images = build.data(here[0].config, cache_dir=files.cache_folder()).test
    _, first = np.unique(images.labels, return_index=True)
    chosen = first[np.linspace(0, len(first) - 1, min(IMAGES, len(first))).round().astype(int)]
    columns, shown = [], None
    for cell in here:
        network = build.load(cell.folder)
        batch = torch.stack([network.transform(images.path(i)) for i in chosen])
        shown = visible(batch)
        columns.append(overlay(shown, mask_of(network, batch)))
    tiles = []
    for row, i in enumerate(chosen):
        tiles.append(contact_sheet.Tile(shown[row], images.classes[images.labels[i]]))
        tiles += [contact_sheet.Tile(column[row], cell.row.name) for column, cell in zip(columns, here, strict=True)]
    title = f"{exhibit.title}; {here[0].data}, seed 0"
    contact_sheet.write(contact_sheet.draw(tiles, columns=1 + len(here), side=160, title=title), path)


@torch.no_grad()
def mask_of(network: FeatureNet, batch: torch.Tensor) -> torch.Tensor:
    """[B, h, w] in [0, 1]. Raises ``ValueError`` for a network without a mask."""
    if network.mask is None:
        raise ValueError("this network has no mask to show")
    return network.mask(network.trunk(batch)).mask


def visible(batch: torch.Tensor) -> np.ndarray:
    """Normalized [B, 3, S, S] -> uint8 [B, S, S, 3]."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return ((batch * std + mean).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def overlay(pixels: np.ndarray, mask: torch.Tensor) -> np.ndarray:
    """The images, gray, under their masks as a color: uint8 [B, S, S, 3]."""
    large = F.interpolate(mask[:, None], size=pixels.shape[1:3], mode="bilinear", align_corners=False)[:, 0].numpy()
    color = matplotlib.colormaps["inferno"](large)[..., :3]
    gray = pixels.mean(-1, keepdims=True) / 255
    return ((0.45 * gray + 0.55 * color) * 255).round().astype(np.uint8)


def curve(exhibit: Exhibit, data: str, found: dict[tuple[str, str], Outcome], path: Path) -> None:
    """The first measure of every row, mean and standard deviation over the seeds, against the number the row is named by."""
    from matplotlib.figure import Figure

    measure = exhibit.measures[0]
    points = []
    for row in exhibit.rows:
        outcome = found.get((row.name, data))
        values = [100 * m[measure] for m in outcome.measures] if outcome else []
        if values:
            points.append((float(row.name), statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0))
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.add_subplot()
    x, mean, deviation = zip(*points, strict=True)
    axes.errorbar(x, mean, yerr=deviation, marker="o", capsize=3, color="#1f5fa8")
    axes.set(xlabel=exhibit.title.lower(), ylabel=f"{measure}, %", title=f"{data}, last epoch", xticks=x)
    axes.grid(alpha=0.3)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))
