"""What loaders share in executing view values: the values as tensors, threads that share out a batch, work ahead of time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from queue import Full, Queue
from typing import TypeVar

import numpy as np
import torch

from engine.data import views
from ppssl.ops import ViewValues

T = TypeVar("T")
_ALIGNED = 16
"""Bytes; what the kernels take the first element of a tensor to be aligned to."""


def to_tensors(values: Sequence[views.ViewValues], device: torch.device) -> ViewValues:
    """The rows of several views one after the other, as the fused ops take them."""
    columns = [torch.from_numpy(np.concatenate(column)) for column in zip(*values, strict=True)]
    return ViewValues(*(columns if device.type == "cpu" else in_one_copy(columns, device, pin=device.type == "cuda")))


def in_one_copy(tensors: Sequence[torch.Tensor], device: torch.device, *, pin: bool) -> list[torch.Tensor]:
    """``tensors`` of the host on ``device``, as views of one buffer that is copied at once. pin: from page-locked memory, so that
    the host does not wait."""
    sizes = [tensor.nbytes for tensor in tensors]
    starts = [sum(-(-size // _ALIGNED) * _ALIGNED for size in sizes[:i]) for i in range(len(sizes) + 1)]
    buffer = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=pin)
    parts = list(zip(tensors, starts[:-1], sizes, strict=True))
    for tensor, start, size in parts:
        buffer[start : start + size].copy_(tensor.contiguous().view(-1).view(torch.uint8))
    there = buffer.to(device, non_blocking=True)
    return [there[start : start + size].view(tensor.dtype).view(tensor.shape) for tensor, start, size in parts]


def rows(values: ViewValues, part: slice) -> ViewValues:
    """Some rows of the values, without a copy."""
    return ViewValues(*(column[part] for column in values))


class Threads:
    """Threads that share out the rows of a batch. Each runs torch operators without threads of its own, so that an image's
    pixels do not depend on how many there are."""

    def __init__(self, workers: int):
        self.workers = workers
        kept = torch.get_num_threads()
        started = threading.Barrier(workers)

        def start() -> None:
            torch.get_num_threads()  # a thread takes the process's setting at its first use, and would undo the next line
            torch.set_num_threads(1)
            started.wait()

        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="views")
        for future in [self._pool.submit(start) for _ in range(workers)]:
            future.result()
        torch.set_num_threads(kept)  # the setting is a thread's own, but threads that start later copy the last one made

    def share(self, work: Callable[[slice], object], count: int) -> None:
        """``work`` on slices that make up ``range(count)``, more of them than threads, since images differ in cost."""
        length = max(1, count // (4 * self.workers))
        list(self._pool.map(work, [slice(first, first + length) for first in range(0, count, length)]))

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def ahead(items: Iterator[T], depth: int) -> Iterator[T]:
    """The same items, made up to ``depth`` ahead in a thread; its exceptions arrive here, closing this ends it."""
    queue: Queue = Queue(depth)
    stop = threading.Event()

    def put(kind: str, item: object) -> bool:
        while not stop.is_set():
            try:
                queue.put((kind, item), timeout=0.1)
                return True
            except Full:
                continue
        return False

    def produce() -> None:
        try:
            with closing(items):
                for item in items:
                    if not put("item", item):
                        return
            put("end", None)
        except BaseException as error:  # handed to the consumer, whatever it is
            put("error", error)

    thread = threading.Thread(target=produce, name="data", daemon=True)
    thread.start()
    try:
        while True:
            kind, item = queue.get()
            if kind == "error":
                raise item
            if kind == "end":
                return
            yield item
    finally:
        stop.set()
        thread.join()
