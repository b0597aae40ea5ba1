"""Image data for training and evaluation: which loader runs, and the un-augmented batches of an image list.

Importing this package imports neither torch nor DALI; both come with the first loader that is built.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import torch

    from engine.config import Config
    from engine.data.catalog import ImageList
    from engine.data.sampler import Share
    from ppssl.method import Batch

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Of RGB in [0, 1]."""


class Loader(Protocol):
    """Executes the order of sampler.py and the view values of views.py; holds no state that a checkpoint would need."""

    name: str
    """What the run log says, e.g. ``dali (cpu)``."""
    steps_per_epoch: int

    def batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        """Batches of the steps ``start_step <= s < stop_step``, counted from the start of the run. Images are
        normalised by IMAGENET_MEAN and IMAGENET_STD, channels_last on the device: float32 on a CPU, float16 on CUDA."""
        ...

    def close(self) -> None:
        """Ends threads and worker processes; the loader is of no use afterwards."""
        ...


def cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def build_loader(
    images: ImageList, cfg: Config, device: torch.device | str, *, with_original: bool = False, cache_dir: Path | None = None,
    share: Share | None = None,
) -> Loader:  # fmt: skip
    """The loader that ``data.resident`` and ``data.loader`` name for a training list.

    images: every file of an epoch; epochs drop the last partial batch.
    share: what this process executes of every batch; None is all of it.
    with_original: batches also carry ``x_o``, the un-augmented image (short side resized, centre crop).
    cache_dir: where resident data keeps its decoded images; None keeps them in memory only.
    An explicit ``data.loader`` is never replaced by another. ``auto`` is resident data where memory allows it, else DALI where it
    is importable.
    Raises ValueError for a list smaller than a batch and for settings that exclude each other, ImportError for
    ``data.loader=dali`` without DALI, catalog.BrokenFile where resident data meets a file that no longer decodes.
    """
    import torch

    from engine.data.sampler import ALL, steps_per_epoch

    share = share or ALL
    steps_per_epoch(len(images), cfg.batch_size)
    choice, device = cfg.data.loader, torch.device(device)
    if cfg.data.resident != "off":
        from engine.data import resident

        loader = resident.build(images, cfg, device, with_original=with_original, cache_dir=cache_dir, share=share)
        if loader is not None:
            return loader
    if choice == "auto":
        choice = "dali" if dali_problem() is None else "torch"
    if choice == "dali":
        problem = dali_problem()
        if problem is not None:
            raise ImportError(
                f"data.loader=dali: {problem}; install nvidia-dali-cuda130 (Linux) or use data.loader=torch"
            )
        from engine.data.dali import DaliLoader

        return DaliLoader(images, cfg, device, with_original=with_original, share=share)
    if cfg.data.aug == "dali":
        raise ValueError(
            f"data.aug=dali needs DALI, but data.loader={cfg.data.loader} gives the torchvision loader here; "
            "use data.aug=parity"
        )
    from engine.data.torch_loader import TorchLoader

    return TorchLoader(images, cfg, device, with_original=with_original, share=share)


def clean_batches(
    images: ImageList,
    *,
    resize: int,
    crop: int,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    interpolation: Literal["bilinear", "bicubic"] = "bilinear",
    batch_size: int = 128,
    workers: int | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Un-augmented images in file order: short side resized (PIL, antialiased), centre crop, normalised.

    workers: processes that decode; None takes the machine's cores, 0 decodes in this process.
    Yields (x float32 [b, 3, crop, crop] channels_last on ``device``, index int64 [b]); the last batch may be smaller.
    Raises ValueError where ``crop`` exceeds ``resize``, BrokenFile naming a file that no longer opens.
    """
    from engine.data.torch_loader import iterate_clean

    return iterate_clean(
        images,
        resize=resize,
        crop=crop,
        mean=mean,
        std=std,
        interpolation=interpolation,
        batch_size=batch_size,
        workers=cores() if workers is None else workers,
        device=device,
    )


def dali_problem() -> str | None:
    """None where DALI is importable, else why not."""
    try:
        import nvidia.dali  # noqa: F401
    except (ImportError, OSError) as error:
        return f"nvidia.dali cannot be imported ({error})"
    return None
