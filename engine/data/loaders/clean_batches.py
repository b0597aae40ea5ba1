"""Clean (not augmented) batches of an image list, for evaluation and for the teacher.

Threads decode: PIL releases the interpreter lock while it decodes and resizes, and threads need no shared memory, of which a
container has 64 MiB unless it is told otherwise.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from engine.data.catalog import ImageList
from engine.data.loaders.interface import IMAGENET_MEAN, IMAGENET_STD
from engine.data.loaders.torch_loader import FILTERS, Normalize, clean_view
from engine.data.machine import cores

T = TypeVar("T")
_AHEAD = 2
"""Batches that are decoded while one is used."""


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
) -> Iterator[tuple[Tensor, Tensor]]:
    """Clean images in file order: short side resized (PIL, antialiased), center crop, normalized.

    workers: threads that decode; None takes the machine's cores, 0 decodes in the calling thread.
    Yields (x float32 [b, 3, crop, crop] channels_last on ``device``, index int64 [b]); the last batch may be smaller.
    Raises ``ValueError`` where ``crop`` exceeds ``resize``, ``BrokenFile`` naming a file that no longer opens.
    """
    if crop > resize:
        raise ValueError(f"crop={crop} exceeds resize={resize}; a center crop cannot be larger than the resized image")
    if interpolation not in FILTERS:
        raise ValueError(f"interpolation={interpolation!r}; known are {', '.join(FILTERS)}")
    normalize = Normalize(mean, std, torch.device(device), torch.float32)

    def decode(i: int) -> np.ndarray:
        return np.asarray(clean_view(images.read(i), resize, crop, FILTERS[interpolation]))

    batches = [range(first, min(first + batch_size, len(images))) for first in range(0, len(images), batch_size)]
    for index, pixels in decoded_batches(decode, batches, workers):
        yield normalize(torch.from_numpy(np.stack(pixels))), torch.arange(index.start, index.stop, device=device)


def decoded_batches(
    decode: Callable[[int], T], batches: Sequence[range], workers: int | None = None
) -> Iterator[tuple[range, list[T]]]:
    """(positions, what ``decode`` makes of each) of every batch, in order; following ones are decoded meanwhile.

    workers: threads; None takes the machine's cores, 0 decodes in the calling thread.
    """
    if workers == 0:
        for index in batches:
            yield index, [decode(i) for i in index]
        return
    with ThreadPoolExecutor(cores() if workers is None else workers, thread_name_prefix="decode") as pool:
        under_way: deque[list[Future]] = deque()
        try:
            for number, index in enumerate(batches):
                for following in batches[number + len(under_way) : number + 1 + _AHEAD]:
                    under_way.append([pool.submit(decode, i) for i in following])
                yield index, [future.result() for future in under_way.popleft()]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
