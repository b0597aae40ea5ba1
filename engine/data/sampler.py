"""The order of the images: pure functions of (seed, epoch), so that resuming is an integer."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from engine.data.views import ORDER_STREAM, philox4x32, seed_key


class Shard(NamedTuple):
    """Which part of every batch one of several processes executes: equal stretches in the order of the ranks."""

    rank: int
    processes: int


ALL = Shard(0, 1)


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Whole batches in ``n`` images; the last partial batch is dropped. Raises ValueError when there is none."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if n < batch_size:
        raise ValueError(
            f"{n} readable training images do not fill one batch of batch_size={batch_size}; "
            f"set batch_size to at most {n} or add images"
        )
    return n // batch_size


def epoch_order(seed: int, epoch: int, n: int) -> npt.NDArray[np.int64]:
    """Permutation [n] of one epoch: positions sorted by a 64-bit Philox word each. Read-only."""
    return _order(int(seed), int(epoch), int(n))


def batch_at(seed: int, step: int, n: int, batch_size: int, shard: Shard = ALL) -> tuple[int, npt.NDArray[np.int64]]:
    """(epoch, positions [batch_size]) of global step ``step`` (from 0, counted over all epochs); of them those of ``shard``."""
    if step < 0:
        raise ValueError(f"step={step} must not be negative")
    epoch, step_in_epoch = divmod(step, steps_per_epoch(n, batch_size))
    each = batch_size // shard.processes
    first = step_in_epoch * batch_size + shard.rank * each
    return epoch, epoch_order(seed, epoch, n)[first : first + each]


@lru_cache(maxsize=4)  # batch_at asks for the same epoch at every step
def _order(seed: int, epoch: int, n: int) -> npt.NDArray[np.int64]:
    counter = np.zeros((n, 4), np.uint32)
    counter[:, 1] = ORDER_STREAM
    counter[:, 2] = np.arange(n)
    counter[:, 3] = epoch
    words = philox4x32(counter, seed_key(seed)).astype(np.uint64)
    order = np.argsort(words[:, 0] << np.uint64(32) | words[:, 1], kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order
