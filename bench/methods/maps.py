"""Where a trained network looks, compared with where the bird of a synthetic image is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from engine.config import Config
from engine.data import contact_sheet
from engine.data.catalog import ImageList
from engine.data.loaders.clean_batches import clean_batches
from engine.data.loaders.torch_loader import clean_view
from engine.data.views import clean_resize
from engine.evaluation import MAP_NAMES, attention_maps, overlay
from engine.evaluation.features import extract
from engine.evaluation.retrieval import retrieval
from engine.files import write_atomically
from engine.pretrained.weights_file import load_weights, save_weights
from engine.synthetic import dataset
from ppssl.encoder import masked_average_pool
from ppssl.method import Method

EVERY = 5
"""The maps of every fifth test image are looked at."""


def coverage(images: ImageList, image_size: int, cache: Path) -> Tensor | None:
    """[N, S, S] in [0, 1]: how much of each pixel of the clean views is bird, kept in ``cache``; None where the images are not
    those of a synthetic dataset."""
    path = cache / f"silhouettes-{images.fingerprint[:16]}-{image_size}.safetensors"
    if not path.is_file():
        try:
            drawn = dataset.silhouettes(images.root, images.names)
        except ValueError:
            return None
        views = [clean_view(one, clean_resize(image_size), image_size, Image.Resampling.BILINEAR) for one in drawn]
        save_weights(path, {"coverage": torch.from_numpy(np.stack([np.asarray(view) for view in views]))}, {})
    return load_weights(path)["coverage"].float() / 255


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
    """``silhouette_rank1`` (``SilhouettePool``), and ``relative_mass_on_bird`` of the maps, as ``feature_on_bird``,
    ``mask_on_bird`` and ``cam_on_bird``; empty where the images are not synthetic."""
    covered = coverage(images, cfg.data.image_size, cache)
    if covered is None:
        return {}
    features = extract(SilhouettePool(method.network.trunk, covered), images, cfg, device)
    found = {"silhouette_rank1": retrieval(features, labels).rank1}
    maps: dict[str, list[Tensor]] = {}
    views = clean_batches(
        images, resize=clean_resize(cfg.data.image_size), crop=cfg.data.image_size, batch_size=cfg.eval.batch_size,
        workers=cfg.data.workers, device=device,
    )  # fmt: skip
    for x, index in views:
        for name, values in attention_maps.attention(method, x[index % EVERY == 0]).items():
            maps.setdefault(name, []).append(values.cpu())
    return found | {f"{name}_on_bird": relative_mass_on_bird(torch.cat(parts), covered[::EVERY]) for name, parts in maps.items()}
