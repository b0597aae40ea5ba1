"""Which loader runs."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.config import Config
from engine.data.catalog import ImageList
from engine.data.loaders import resident_loader
from engine.data.loaders.interface import Loader
from engine.data.loaders.torch_loader import TorchLoader
from engine.data.sampler import ALL, Shard, steps_per_epoch


def build_loader(
    images: ImageList, cfg: Config, device: torch.device | str, *, with_clean: bool = False, cache_dir: Path | None = None,
    shard: Shard | None = None,
) -> Loader:  # fmt: skip
    """The loader that ``data.resident`` and ``data.loader`` name for a training list.

    images: every file of an epoch; epochs drop the last partial batch.
    shard: what this process executes of every batch; None is all of it.
    with_clean: batches also carry ``x_clean``, the clean image (short side resized, center crop).
    cache_dir: where resident data keeps its decoded images; None keeps them in memory only.
    An explicit ``data.loader`` is never replaced by another. ``auto`` is resident data where memory allows it, else DALI where it
    is importable, else torchvision's; not nvJPEG, which no GPU has measured yet.
    Raises ValueError for a list smaller than a batch and for settings that exclude each other, ImportError for
    ``data.loader=dali`` without DALI and ``data.loader=nvjpeg`` without a GPU or nvJPEG, catalog.BrokenFile where resident data
    meets a file that no longer decodes.
    """
    shard = shard or ALL
    steps_per_epoch(len(images), cfg.batch_size)
    choice, device = cfg.data.loader, torch.device(device)
    if cfg.data.resident != "off":
        loader = resident_loader.build(images, cfg, device, with_clean=with_clean, cache_dir=cache_dir, shard=shard)
        if loader is not None:
            return loader
    if choice == "auto":
        choice = "dali" if dali_problem() is None else "torch"
    if choice == "dali":
        problem = dali_problem()
        if problem is not None:
            raise ImportError(f"data.loader=dali: {problem}; install nvidia-dali-cuda130 (Linux) or use data.loader=torch")
        from engine.data.loaders.dali_loader import DaliLoader  # DALI may be missing

        return DaliLoader(images, cfg, device, with_clean=with_clean, shard=shard)
    if choice == "nvjpeg" and cfg.data.aug != "dali":
        from engine.data.loaders.nvjpeg_loader import NvjpegLoader  # torchvision.io loads its codecs

        return NvjpegLoader(images, cfg, device, with_clean=with_clean, shard=shard)
    if cfg.data.aug == "dali":
        name = "nvJPEG" if choice == "nvjpeg" else "torchvision"
        raise ValueError(
            f"data.aug=dali needs DALI, but data.loader={cfg.data.loader} gives the {name} loader here; use data.aug=parity"
        )
    return TorchLoader(images, cfg, device, with_clean=with_clean, shard=shard)


def dali_problem() -> str | None:
    """None where DALI is importable, else why not."""
    try:
        import nvidia.dali  # noqa: F401
    except (ImportError, OSError) as error:
        return f"nvidia.dali cannot be imported ({error})"
    return None
