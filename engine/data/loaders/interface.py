"""What a loader is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from ppssl.method import Batch
from ppssl.timm_trunk import IMAGENET

IMAGENET_MEAN, IMAGENET_STD = IMAGENET.mean, IMAGENET.std
"""Of RGB in [0, 1]."""


class Loader(Protocol):
    """Executes the order of sampler.py and the view values of views.py; holds no state that a checkpoint would need."""

    name: str
    """What the run log says, e.g. ``dali (cpu)``."""
    steps_per_epoch: int

    def batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        """Batches of the steps ``start_step <= s < stop_step``, counted from the start of the run. Images are
        normalized as the trunk takes them (``image_input``), channels_last on the device: float32 on a CPU, float16 on CUDA."""
        ...

    def close(self) -> None:
        """Ends threads and worker processes; the loader is of no use afterwards."""
        ...
