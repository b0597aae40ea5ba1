"""The resident loader: the whole set decoded once and kept on the device or in host memory; views are made from it by the fused
op, so that no epoch but the first decodes anything."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.config import Config
from engine.console import say
from engine.data.catalog import ImageList
from engine.data.loaders.decoded import Decoded, decode, kept_sizes, total_bytes
from engine.data.loaders.execute import Threads, ahead, rows, to_tensors
from engine.data.loaders.staged import Staged, normalized, original_pixels
from engine.data.machine import cores, free_host_bytes
from engine.data.sampler import ALL, Shard, batch_at, steps_per_epoch
from engine.data.views import ViewValues, view_values
from ppssl.method import Batch
from ppssl.ops import augment
from ppssl.timm_trunk import build_trunk, image_input

DEVICE_SHARE, HOST_SHARE, CPU_SHARE = 0.4, 0.5, 0.25
"""Of the memory that is free, what the set may take: on a GPU, in host memory, and there when nobody asked and training is on the
CPU too."""
SHORT_SIDES = (2.0, 1.5, 256 / 224)
"""Short sides, in sides of a view, to which a set is brought down that was asked for and does not fit as it is."""
_PREFETCH = 2
_BLOCK = 1 << 28
"""Bytes of a block of pinned memory: torch rounds each up to a power of two."""


class Plan(NamedTuple):
    """Where a set is kept."""

    where: str
    """device, host or off."""
    short_side: int | None
    """Bound of the kept images' short side; None keeps them as they are."""
    why: str


def plan(images: ImageList, cfg: Config, device: torch.device) -> Plan:
    """What ``data.resident`` comes to on this machine, by the memory that is free now.

    ``auto`` keeps images as they are or not at all: the device first, then the host, then off; on a CPU it leaves the memory that
    training takes. ``device`` and ``host`` are
    obeyed, if need be with a bounded short side, which changes what a crop contains and is therefore part of the loader's name.
    Raises ValueError where they cannot be.
    """
    asked, gpu = cfg.data.resident, device.type == "cuda"
    if asked == "off":
        return Plan("off", None, "data.resident=off")
    if cfg.data.aug == "dali" or cfg.data.loader != "auto":
        reason = "data.aug=dali wants DALI's operators" if cfg.data.aug == "dali" else f"data.loader={cfg.data.loader} streams"
        if asked == "auto":
            return Plan("off", None, reason)
        remedy = "data.aug=parity" if cfg.data.aug == "dali" else "data.loader=auto"
        raise ValueError(f"data.resident={asked}: {reason}; use {remedy}, or data.resident=off")
    if asked == "device" and not gpu:
        raise ValueError("data.resident=device: there is no GPU; use data.resident=host")
    share = HOST_SHARE if gpu or asked == "host" else CPU_SHARE
    if gpu:
        share /= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # pinned memory is a process's own
    free = free_host_bytes()
    room = {"host": int(share * free)}
    if not gpu and asked == "auto":
        room["host"] = max(0, min(room["host"], free - training_bytes(cfg)))
    if gpu:
        room["device"] = int(DEVICE_SHARE * torch.cuda.mem_get_info(device)[0])
    whole = total_bytes(images.sizes)
    if asked == "auto":
        for where in ("device", "host") if gpu else ("host",):
            if whole <= room[where]:
                return Plan(where, None, f"{_gb(whole)} decoded, room for {_gb(room[where])}")
            say(f"data.resident=auto: {_gb(whole)} of decoded images do not fit on the {where} (room for {_gb(room[where])})")
        return Plan("off", None, "no memory holds the decoded images")
    for bound in (None, *(round(share * cfg.data.image_size) for share in SHORT_SIDES)):
        size = total_bytes(kept_sizes(images, bound))
        if size <= room[asked]:
            return Plan(asked, bound, f"{_gb(size)} decoded, room for {_gb(room[asked])}")
    raise ValueError(
        f"data.resident={asked}: even with a short side of {bound} px the decoded images take {_gb(size)}, and there is room for "
        f"{_gb(room[asked])}; use data.resident=off"
    )


def training_bytes(cfg: Config) -> int:
    """Memory that a step of ``cfg`` takes beside the images: weights, gradients, momentum and the key network's copy, and what the
    trunk keeps for its backward pass, by a pass over shapes alone. A tensor that several operators keep counts several times, which
    leaves room for what a method adds."""
    with torch.device("meta"):
        trunk, pair = build_trunk(cfg.encoder.arch), torch.empty(2, 3, cfg.data.image_size, cfg.data.image_size)
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += 0 if isinstance(tensor, torch.nn.Parameter) else tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        trunk(pair)
    return 4 * sum(p.nbytes for p in trunk.parameters()) + kept * cfg.batch_size // len(pair)


def build(
    images: ImageList, cfg: Config, device: torch.device, *, with_clean: bool = False, cache_dir: Path | None = None,
    shard: Shard = ALL,
) -> ResidentLoader | None:  # fmt: skip
    """The resident loader that ``data.resident`` asks for, None for off. Memory that is short all the same makes ``auto`` go down
    one level. Raises as ``plan`` does, BrokenFile naming a file that no longer decodes."""
    found = plan(images, cfg, device)
    if found.where == "off":
        return None
    size = "" if found.short_side is None else f", short side at most {found.short_side} px: crops contain less detail"
    say(f"data.resident={cfg.data.resident}: the decoded set is kept on the {found.where} ({found.why}{size})")
    below = {"device": "host", "host": "off"}
    while found.where != "off":
        try:
            decoded = decode(images, short_side=found.short_side, cache_dir=cache_dir, workers=cfg.data.workers)
            return ResidentLoader(images, decoded, found, cfg, device, with_clean=with_clean, shard=shard)
        except (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError) as error:
            if cfg.data.resident != "auto":
                raise
            found = found._replace(where=below[found.where])
            say(f"data.resident=auto: not enough memory after all ({str(error).partition(chr(10))[0]}); now {found.where}")
    return None


class ResidentLoader:
    """Loader over a decoded set. On a CPU ``data.workers`` threads make the views, ahead of the loop. On a GPU one fused op
    makes both views of a batch; only values cross over, and with ``host`` the batch's images, from pinned memory."""

    def __init__(
        self, images: ImageList, decoded: Decoded, where: Plan, cfg: Config, device: torch.device, *, with_clean: bool = False,
        shard: Shard = ALL,
    ):  # fmt: skip
        self.steps_per_epoch = steps_per_epoch(len(images), cfg.batch_size)
        self._images, self._decoded, self._cfg, self._with_clean = images, decoded, cfg, with_clean
        self._shard, self._input = shard, image_input(cfg.encoder.arch, cfg.encoder.weights)
        self._gpu = device.type == "cuda"
        if self._gpu and device.index is None:  # the thread that works ahead has a current device of its own
            device = torch.device("cuda", torch.cuda.current_device())
        self._device = device
        bound = "" if where.short_side is None else f", short side {where.short_side}"
        self.name = f"resident ({where.where}{bound})"
        self._on_device = self._gpu and where.where == "device"
        self._threads = None if self._gpu else Threads(max(1, cores() if cfg.data.workers is None else cfg.data.workers))
        self._closed, self._blocks = False, None
        if self._gpu:  # all of it is read now
            with ThreadPoolExecutor(cfg.data.workers or cores()) as pool:
                list(pool.map(decoded.check, range(len(images))))
        self._pixels = torch.from_numpy(decoded.pixels)
        if self._on_device:
            self._pixels = self._pixels.to(device)
        elif self._gpu:
            self._blocks = [block.pin_memory() for block in self._pixels.split(_BLOCK)]

    def batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        if self._closed:
            raise RuntimeError("the loader is closed")
        steps = range(start_step, stop_step)
        return self._on_gpu(steps) if self._gpu else ahead((self._made(step) for step in steps), _PREFETCH)

    def close(self) -> None:
        self._closed = True
        self._pixels = self._blocks = self._decoded = None
        if self._threads is not None:
            self._threads.close()

    def _made(self, step: int) -> Batch:
        """One batch on a CPU."""
        index, values, offsets, sizes = self._inputs(step)
        side, count = self._cfg.data.image_size, len(index)
        views = torch.empty((2 * count, side, side, 3)).permute(0, 3, 1, 2)

        def check(part: slice) -> None:
            for i in index[part].tolist():
                self._decoded.check(i)

        self._threads.share(check, count)

        def make(part: slice) -> None:
            augment(
                self._pixels, offsets[part], sizes[part], rows(values, part), out=views[part],
                side=side, mean=self._input.mean, std=self._input.std,
            )  # fmt: skip

        self._threads.share(make, 2 * count)
        original = None
        if self._with_clean:
            pixels = torch.empty((count, side, side, 3), dtype=torch.uint8)

            def shrink(part: slice) -> None:
                for b in range(count)[part]:
                    pixels[b] = original_pixels(torch.from_numpy(self._decoded.image(index[b])), side, self._input)

            self._threads.share(shrink, count)
            original = normalized(pixels, torch.float32, self._input)
        return Batch(x_q=views[:count], x_k=views[count:], index=torch.from_numpy(index.copy()), x_clean=original)

    def _on_gpu(self, steps: range) -> Iterator[Batch]:
        for staged in ahead(self._staged(steps), _PREFETCH):
            yield staged.batch(self._cfg.data.image_size, self._input, with_clean=self._with_clean)

    def _staged(self, steps: range) -> Iterator[Staged]:
        """What a step's op takes, brought to the GPU on a stream of its own."""
        stream = torch.cuda.Stream(self._device)
        for step in steps:
            index, values, offsets, sizes = self._inputs(step)
            with torch.cuda.stream(stream):
                pixels = self._pixels
                if not self._on_device:
                    offsets, pixels = self._gathered(index)
                host = list(zip(offsets[: len(index)].tolist(), sizes[: len(index)].tolist(), strict=True))
                sent = [t.to(self._device, non_blocking=True) for t in (torch.from_numpy(index.copy()), offsets, sizes)]
                values = type(values)(*(column.to(self._device, non_blocking=True) for column in values))
                ready = torch.cuda.Event()
                ready.record(stream)
            yield Staged(sent[0], values, sent[1], sent[2], pixels, host, ready)

    def _gathered(self, index: np.ndarray) -> tuple[Tensor, Tensor]:
        """The batch's images one after the other on the GPU, and where they begin there, for both views."""
        lengths = 3 * self._decoded.sizes[index].astype(np.int64).prod(1)
        ends = np.cumsum(lengths)
        pixels = torch.empty(int(ends[-1]), dtype=torch.uint8, device=self._device)
        for i, length, end in zip(index.tolist(), lengths.tolist(), ends.tolist(), strict=True):
            first, place = int(self._decoded.offsets[i]), end - length
            while place < end:  # an image may lie in two blocks
                block, start = divmod(first, _BLOCK)
                part = self._blocks[block][start : start + end - place]
                pixels[place : place + len(part)].copy_(part, non_blocking=True)
                first, place = first + len(part), place + len(part)
        return torch.from_numpy(np.tile(ends - lengths, 2)), pixels

    def _inputs(self, step: int) -> tuple[np.ndarray, object, Tensor, Tensor]:
        """Positions [B], and for the query views followed by the key views [2B]: values, offsets, sizes."""
        epoch, index = batch_at(self._cfg.seed, step, len(self._images), self._cfg.batch_size, self._shard)
        listed, kept = self._images.sizes[index], self._decoded.sizes[index]
        side = self._cfg.data.image_size
        values = [_fitted(view_values(self._cfg.seed, epoch, index, view, listed, side), listed, kept) for view in (0, 1)]
        offsets, sizes = np.tile(self._decoded.offsets[index], 2), np.tile(kept, (2, 1))
        return index, to_tensors(values, torch.device("cpu")), torch.from_numpy(offsets), torch.from_numpy(sizes)


def _fitted(values: ViewValues, listed: np.ndarray, kept: np.ndarray) -> ViewValues:
    """The same boxes in images that are kept smaller than they are listed: corners scaled and rounded, a pixel at least."""
    if np.array_equal(listed, kept):
        return values
    scale = kept / listed
    start = np.minimum(np.rint(values.crop[:, :2] * scale), kept - 1)
    end = np.clip(np.rint((values.crop[:, :2] + values.crop[:, 2:]) * scale), start + 1, kept)
    return values._replace(crop=np.concatenate((start, end - start), 1).astype(np.int32))


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
