"""Features of an image list under a network: what every protocol evaluates; made once and kept in the run folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.config import Config
from engine.console import bar, say
from engine.data import ImageList, clean_batches, keep_freed_memory
from engine.files import inside, read_metadata
from engine.pretrained import Run, weights_file
from engine.training import gather_rows, precision
from ppssl.ops import rank, world_size
from ppssl.timm_trunk import IMAGENET, image_input

_VERSION = 1
"""Of what a kept file holds and of how an image becomes a feature; another one makes all features anew."""


@torch.no_grad()
def extract(network: nn.Module, images: ImageList, cfg: Config, device: torch.device, group: str = "") -> Tensor:
    """[N, C] float32 features on ``device``: of the clean images as the trunk takes them (``image_input``), under the run's
    ``amp``, modules in eval mode meanwhile. In file order at ``eval.batch_size``: in variant ``published`` the mask is
    scaled over the batch, so that both are part of the result. The processes of ``group`` do some batches each, and all
    get all features.

    Raises ``BrokenFile`` naming a file that no longer opens.
    """
    each = -(-len(images) // (cfg.eval.batch_size * world_size(group))) * cfg.eval.batch_size  # whole batches
    first = rank(group) * each
    mine = replace(images, names=images.names[first : first + each]) if group else images
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    keep_freed_memory(device)
    how = image_input(cfg.encoder.arch, cfg.encoder.weights)
    rows: list[Tensor] = []
    try:
        with precision.resolve(cfg.amp, device).autocast():
            for x, _ in clean_batches(
                mine,
                resize=how.resize(cfg.data.image_size),
                crop=cfg.data.image_size,
                mean=how.mean,
                std=how.std,
                interpolation=how.interpolation,
                batch_size=cfg.eval.batch_size,
                workers=cfg.data.workers,
                device=device,
            ):
                rows.append(network(x).float())
            if not rows:  # more processes than batches: this one brings nothing, in the width of the others
                side = cfg.data.image_size
                rows.append(network(torch.zeros(1, 3, side, side, device=device))[:0].float())
    finally:
        for module, training in modes:
            module.training = training
    return gather_rows(torch.cat(rows), len(images), each, group)


def of_run(run: Run, images: ImageList, split: str, folder: Path, device: torch.device) -> Tensor:
    """``extract`` of a run's (or any other) network on ``images``, kept as ``folder``/features/``split``.safetensors and read
    from there while nothing that it depends on has changed: weights, method, image list, image size, batch size, precision.

    A kept file that is of something else or damaged is regenerated, and said so when it is damaged; a folder that cannot be written
    to is said so, and nothing kept.
    """

    def compute() -> Tensor:
        with bar() as progress:
            task = progress.add_task(f"features of the {split} images", total=len(images))
            counter = run.network.register_forward_hook(lambda module, x, rows: progress.advance(task, len(rows)))
            try:
                return extract(run.network, images, run.config, device)
            finally:
                counter.remove()

    path, wanted = folder / "features" / f"{split}.safetensors", key(run.network, images, run.config, device)
    try:
        inside(folder, path)
    except OSError as error:
        say(f"{error}; the features are not kept")
        return compute().to(device)
    return kept(path, wanted, compute).to(device)


def key(network: nn.Module, images: ImageList, cfg: Config, device: torch.device) -> str:
    """sha256 of everything that ``extract`` depends on, beside the code."""
    plain = {
        "version": _VERSION,
        "weights": content_hash(network.state_dict()),
        "network": [type(network).__qualname__, cfg.encoder.arch, asdict(cfg.method)],
        "images": [images.fingerprint, len(images)],
        "image_size": cfg.data.image_size,
        "batch_size": cfg.eval.batch_size,
        "precision": [device.type, str(precision.resolve(cfg.amp, device).dtype)],
    }
    how = image_input(cfg.encoder.arch, cfg.encoder.weights)
    if how != IMAGENET:  # in no key of a ResNet's features: those that are kept stay good
        plain["input"] = how._asdict()
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def content_hash(tensors: dict[str, Tensor]) -> str:
    """sha256 over names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def kept(path: Path, key: str, compute: Callable[[], Tensor]) -> Tensor:
    """The tensor in ``path`` if it was kept under ``key``, else ``compute()``, which then replaces the file."""
    if path.is_file():
        try:
            tensors, metadata = weights_file.load_weights(path), read_metadata(path)
            if metadata.get("key") == key:
                if metadata.get("content") == content_hash(tensors):
                    return tensors["features"]
                raise ValueError(f"{path} is damaged")
        except ValueError as error:
            say(f"{error}; the features are regenerated")
    features = compute()
    tensors = {"features": features.detach().cpu()}
    try:
        weights_file.save_weights(path, tensors, {"key": key, "content": content_hash(tensors)})
    except OSError as error:
        say(f"{path}: the features are not kept ({error})")
    return features
