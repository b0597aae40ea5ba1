"""Where a trained network looks, compared with where the bird is: its outline in a synthetic image, its box in a photo of CUB."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from engine.config import Config
from engine.data import contact_sheet
from engine.data.catalog import ImageList
from engine.data.loaders.clean_batches import clean_batches
from engine.data.loaders.torch_loader import clean_view
from engine.evaluation import MAP_NAMES, attention_maps, overlay
from engine.evaluation.features import extract
from engine.evaluation.retrieval import retrieval
from engine.files import write_atomically
from engine.pretrained.weights_file import load_weights, save_weights
from engine.synthetic import dataset
from ppssl.encoder import masked_average_pool
from ppssl.method import Method
from ppssl.timm_trunk import IMAGENET, image_input

BOXES = "bounding_boxes.txt"
"""Of CUB-200-2011: number of the photo, x, y, width, height."""
LONGER_SIDE = 500
"""Of its photos, in pixels."""
EVERY = 5
"""The maps of every fifth test image are looked at."""


def coverage(images: ImageList, cfg: Config, cache: Path) -> Tensor | None:
    """[N, S, S] in [0, 1]: how much of each pixel of the clean views is bird, or inside its box, kept in ``cache``; None where
    neither is known."""
    name, draw = outlines(images)
    if draw is None:
        return None
    how, side = image_input(cfg.encoder.arch, cfg.encoder.weights), cfg.data.image_size
    shape = f"{side}" if how == IMAGENET else f"{side}-{how.resize(side)}"
    path = cache / f"{name}-{images.fingerprint[:16]}-{shape}.safetensors"
    if not path.is_file():
        views = [clean_view(one, how.resize(side), side, Image.Resampling.BILINEAR) for one in draw()]
        save_weights(path, {"coverage": torch.from_numpy(np.stack([np.asarray(view) for view in views]))}, {})
    return load_weights(path)["coverage"].float() / 255


def outlines(images: ImageList) -> tuple[str, Callable[[], list[Image.Image]] | None]:
    """What is known of where the birds are, ``silhouettes`` or ``boxes``, and what draws it as 8-bit images of the photos' size."""
    if (images.root / dataset.STAMP).is_file():
        return "silhouettes", lambda: dataset.silhouettes(images.root, images.names)
    if (images.root / BOXES).is_file():
        return "boxes", lambda: boxes(images)
    return "", None


def boxes(images: ImageList) -> list[Image.Image]:
    """The boxes of CUB-200-2011's photos, white on black.

    They are in pixels of the published photos, whose longer side is 500 in all but a few. A copy of smaller photos is known by
    boxes that do not fit: then every box is scaled by its photo's longer side. Raises ``ValueError`` for a photo without a box.
    """

    def rows(file: str) -> dict[str, list[str]]:
        lines = (images.root / file).read_text(encoding="utf-8").splitlines()
        return {number: rest for number, *rest in map(str.split, lines)}

    by_number = rows(BOXES)
    found = {f"images/{name}": by_number.get(number) for number, (name,) in rows("images.txt").items()}
    if unknown := [name for name in images.names if not found.get(name)]:
        raise ValueError(f"{images.root / BOXES} has no box of {unknown[0]}")
    values = np.array([found[name] for name in images.names], float)  # x, y, width, height
    size = images.sizes[:, ::-1].astype(float)
    if ((values[:, :2] + values[:, 2:]) > size + 1).any():
        values *= size.max(1, keepdims=True) / LONGER_SIDE
    drawn = []
    for (x, y, width, height), (w, h) in zip(values, images.sizes[:, ::-1].tolist(), strict=True):
        picture = Image.new("L", (w, h))
        ImageDraw.Draw(picture).rectangle((x, y, x + width - 1, y + height - 1), fill=255)
        drawn.append(picture)
    return drawn


def relative_mass_on_bird(maps: Tensor, covered: Tensor) -> float:
    """Mean over images of (fraction of a map's mass that lies on the bird) / (fraction of the image that is bird): 1 is chance,
    more is concentrated on the bird. maps [N, h, w] non-negative; one that is zero everywhere counts as 1; covered [N, S, S]."""
    bird = F.adaptive_avg_pool2d(covered[:, None], maps.shape[1:])[:, 0]
    mass, area = maps.sum((1, 2)), bird.mean((1, 2))
    on = torch.where(mass > 0, (maps * bird).sum((1, 2)) / mass.clamp_min(1e-30), area)
    return float((on / area)[area > 0].mean())


class SilhouettePool(nn.Module):
    """l2 of F averaged over the cells by how much of each is bird: the feature of this trunk with a perfect mask. Images come in
    the order of ``covered`` [N, S, S], once."""

    def __init__(self, trunk: nn.Module, covered: Tensor):
        super().__init__()
        self.trunk, self.covered, self.seen = trunk, covered, 0

    def forward(self, images: Tensor) -> Tensor:
        feature = self.trunk(images)
        mine = self.covered[self.seen : self.seen + len(images)].to(feature.device)
        self.seen += len(images)
        weight = F.adaptive_avg_pool2d(mine[:, None], feature.shape[2:])[:, 0]
        return F.normalize(masked_average_pool(feature, weight).float(), dim=1)


def picture(cells: Sequence[tuple[str, Path]], title: str, path: Path) -> None:
    """Writes a sheet of the run folders ``(name, folder)``: one row per watched image, as it is and under every map of every cell
    after its last epoch."""
    kept = [(name, found) for name, folder in cells if (found := attention_maps.read(folder)) is not None]
    if not kept:
        return
    tiles: list[contact_sheet.Tile] = []
    columns = 1 + sum(len(found.looks[-1].maps) for _, found in kept)
    for i, file in enumerate(kept[0][1].names):
        tiles.append(contact_sheet.Tile(kept[0][1].pictures[i], Path(file).stem))
        for name, found in kept:
            for kind in sorted(found.looks[-1].maps, reverse=True):  # mask, feature map, CAM, as in a report
                tiles.append(
                    contact_sheet.Tile(overlay(found.pictures[i], found.looks[-1].maps[kind][i]), f"{name}\n{MAP_NAMES[kind]}")
                )
    drawn = contact_sheet.draw(tiles, columns=columns, side=96, title=title)
    write_atomically(path, lambda temporary: drawn.save(temporary, "JPEG", quality=88))


def look(method: Method, cfg: Config, images: ImageList, labels: Tensor, device: torch.device, cache: Path) -> dict[str, Any]:
    """``silhouette_rank1`` or ``box_rank1`` (``SilhouettePool``), and ``relative_mass_on_bird`` of the maps, as
    ``feature_on_bird``, ``mask_on_bird`` and ``cam_on_bird``; empty where ``coverage`` is not known."""
    covered = coverage(images, cfg, cache)
    if covered is None:
        return {}
    features = extract(SilhouettePool(method.network.trunk, covered), images, cfg, device)
    measure = "box_rank1" if outlines(images)[0] == "boxes" else "silhouette_rank1"
    found = {measure: retrieval(features, labels).rank1}
    how = image_input(cfg.encoder.arch, cfg.encoder.weights)
    maps: dict[str, list[Tensor]] = {}
    views = clean_batches(
        images, resize=how.resize(cfg.data.image_size), crop=cfg.data.image_size, mean=how.mean, std=how.std,
        interpolation=how.interpolation, batch_size=cfg.eval.batch_size, workers=cfg.data.workers, device=device,
    )  # fmt: skip
    for x, index in views:
        for name, values in attention_maps.attention(method, x[index % EVERY == 0]).items():
            maps.setdefault(name, []).append(values.cpu())
    return found | {f"{name}_on_bird": relative_mass_on_bird(torch.cat(parts), covered[::EVERY]) for name, parts in maps.items()}
