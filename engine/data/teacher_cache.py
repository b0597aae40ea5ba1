"""The teacher's embedding of every clean image, computed once and kept on disk: then it costs nothing per step."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from engine.console import bar, say
from engine.data.catalog import ImageList
from engine.data.loaders.clean_batches import clean_batches
from engine.files import read_metadata, write_atomically
from ppssl.teacher import PooledTrunk, Teacher


def embeddings(
    teacher: Teacher,
    images: ImageList,
    *,
    device: torch.device,
    cache_dir: Path | None,
    workers: int | None = None,
    batch_size: int = 128,
) -> Tensor:
    """[N, E] float16 unit rows on ``device``: the teacher's view of ``images``, clean, with the teacher's own resize, crop
    and normalization, in list order.

    Kept in ``cache_dir`` (None: nowhere) under a key made of the files' names, sizes and mtimes, the teacher's weights and its
    preprocessing: change any of them and it is computed anew.
    """
    key = cache_key(teacher, images)
    path = cache_dir / "teacher" / f"{key}.safetensors" if cache_dir else None
    if path is not None and path.is_file():
        stored = _load(path, (len(images), teacher.dim))
        if stored is not None:
            return torch.from_numpy(stored).to(device)
        say(f"warning: {path} is damaged; the teacher looks at the images again")
    result = np.zeros((len(images), teacher.dim), np.float16)
    with bar() as progress:
        task = progress.add_task(f"{teacher.name} looks at every image once", total=len(images))
        for x, index in clean_batches(
            images,
            resize=teacher.image_size,
            crop=teacher.image_size,
            mean=teacher.mean,
            std=teacher.std,
            interpolation="bicubic",
            batch_size=batch_size,
            workers=workers,
            device=device,
        ):
            result[index.cpu().numpy()] = teacher.embed(x).half().cpu().numpy()
            progress.advance(task, len(index))
    if path is not None:
        metadata = {"sha256": hashlib.sha256(result.data).hexdigest()}
        write_atomically(path, lambda temporary: save_file({"rows": result}, temporary, metadata))
        path.with_suffix(".npy").unlink(missing_ok=True)  # of former versions, without a checksum
    return torch.from_numpy(result).to(device)


def embeddings_of(teacher: Teacher, images: ImageList, index: np.ndarray, *, device: torch.device) -> Tensor:
    """[len(index), E] float16: the same rows for some images only, uncached (a dry run needs one batch)."""
    some = dataclasses.replace(
        images,
        names=tuple(images.names[i] for i in index),
        labels=None if images.labels is None else images.labels[index],
        sizes=images.sizes[index],
    )
    return embeddings(teacher, some, device=device, cache_dir=None, workers=0)


def cache_key(teacher: Teacher, images: ImageList) -> str:
    """Hexadecimal key of everything the embeddings depend on."""
    digest = hashlib.sha256(images.fingerprint.encode())
    digest.update(json.dumps([teacher.image_size, list(teacher.mean), list(teacher.std), "bicubic"]).encode())
    if isinstance(teacher.visual, PooledTrunk):  # the same tensors give other embeddings with another stride or pooling
        digest.update(teacher.visual.trunk.arch.encode())
    for name, tensor in teacher.visual.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _load(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """The stored rows, or None for a file that is not what was written."""
    try:
        metadata, stored = read_metadata(path), load_file(path)["rows"]
    except Exception:  # safetensors raises a type of its own for anything that is not its format
        return None
    whole = stored.shape == shape and stored.dtype == np.float16 and np.isfinite(stored).all()
    return stored if whole and metadata.get("sha256") == hashlib.sha256(stored.data).hexdigest() else None
