"""The DALI loader: one pipeline that decodes each image once and executes the values of both views.

Order and randomness are fed in by step number, so the pipeline holds no state worth saving and starts at any step.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, pipeline_def, types
from torch import Tensor

from engine.config import Config
from engine.console import printable, say
from engine.data.catalog import ImageList
from engine.data.loaders.execute import Threads, ahead, rows, to_tensors
from engine.data.machine import HARDWARE_DECODER_SHARE, cores
from engine.data.sampler import ALL, Shard, batch_at, steps_per_epoch
from engine.data.views import ViewValues, center_crop, resized, view_values
from engine.errors import BrokenFile
from ppssl.method import Batch
from ppssl.ops import recolour
from ppssl.timm_trunk import ImageInput, image_input

MEMORY_SHARE = 0.2
"""Of the free memory of a GPU: what decoded batches in flight may take."""
_PREFETCH = 2
"""Batches made ahead, where memory allows it."""


class DaliLoader:
    """Loader over DALI, on a CPU or with decoding on the GPU.

    ``data.aug=parity``: DALI decodes, crops, resizes and flips; the fused op does the rest by torchvision's formulas, on a
    CPU with ``data.workers`` threads. ``data.aug=dali``: DALI's own color operators, which differ in hue, contrast and
    order. Files that are not ``plain`` are decoded by PIL and handed over, so that every loader sees the same pictures.
    """

    def __init__(self, images: ImageList, cfg: Config, device: torch.device, *, with_clean: bool = False, shard: Shard = ALL):
        self.steps_per_epoch = steps_per_epoch(len(images), cfg.batch_size)
        self._images, self._cfg, self._with_clean, self._shard = images, cfg, with_clean, shard
        self._input = image_input(cfg.encoder.arch, cfg.encoder.weights)
        self._device = torch.device(device)
        self._gpu = self._device.type == "cuda"
        if self._gpu and self._device.index is None:
            self._device = torch.device("cuda", torch.cuda.current_device())
        self.name = f"dali ({'gpu' if self._gpu else 'cpu'})"
        self._workers = max(1, cores() if cfg.data.workers is None else cfg.data.workers)
        self._dali_color = cfg.data.aug == "dali"
        self._threads = None if self._gpu or self._dali_color else Threads(self._workers)
        self._depth = _PREFETCH
        self._decode: dict = {"device": "cpu"}
        if self._gpu:
            height, width = np.quantile(images.sizes, 0.99, axis=0, method="higher").tolist()
            self._decode = {
                "device": "mixed",
                "hw_decoder_load": HARDWARE_DECODER_SHARE,
                "preallocate_height_hint": height,
                "preallocate_width_hint": width,
            }
            batch = 3 * int(np.sort(images.sizes.astype(np.int64).prod(1))[-(cfg.batch_size // shard.processes) :].sum())
            room = int(MEMORY_SHARE * torch.cuda.mem_get_info(self._device)[0])
            self._depth = depth_within(batch, room)
            if self._depth < _PREFETCH:
                say(f"dali: up to {batch / 1e9:.1f} GB a decoded batch, room for {room / 1e9:.1f} GB: prefetch {self._depth}")
        self._pipeline = None
        self._next = -1  # the step that the pipeline yields next

    def batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        steps = self._steps(start_step, stop_step)
        # On a GPU the pipeline itself runs ahead and color is queued on the consumer's stream; on a CPU color is
        # work.
        return steps if self._gpu else ahead(steps, _PREFETCH)

    def close(self) -> None:
        self._pipeline = None
        if self._threads is not None:
            self._threads.close()

    def _steps(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        if self._pipeline is None or self._next != start_step:
            self._pipeline = self._build(start_step)
            self._next = start_step
        for step in range(start_step, stop_step):
            pipeline, self._pipeline = self._pipeline, None  # an interrupted run leaves nothing half consumed behind
            index, values = self._values(step)
            position, *outputs = self._run(pipeline, step)
            if not np.array_equal(position.numpy(), index):
                raise RuntimeError(f"DALI gave images {position.tolist()} where step {step} has {index.tolist()}")
            original = outputs.pop().permute(0, 3, 1, 2) if self._with_clean else None
            if self._dali_color:
                x_q, x_k = (view.permute(0, 3, 1, 2) for view in outputs)
            elif self._gpu:
                x_q, x_k = (
                    recolour(o, to_tensors([v], self._device), mean=self._input.mean, std=self._input.std, dtype=torch.float16)
                    for o, v in zip(outputs, values, strict=True)
                )
            else:
                x_q, x_k = (self._color(o, v) for o, v in zip(outputs, values, strict=True))
            self._pipeline, self._next = pipeline, step + 1
            yield Batch(
                x_q=x_q, x_k=x_k, index=torch.from_numpy(index.copy()).to(self._device, non_blocking=True), x_clean=original
            )

    def _run(self, pipeline, step: int) -> list[Tensor]:
        """One iteration's outputs as tensors that share DALI's memory (and keep it)."""
        try:
            outputs = pipeline.run(torch.cuda.current_stream(self._device)) if self._gpu else pipeline.run()
        except RuntimeError as error:
            # DALI does not say which file it was
            ahead = [i for later in range(step, step + self._depth + 1) for i in self._values(later)[0].tolist()]
            for i in ahead:
                self._images.read(i)
            paths = [self._images.path(i) for i in ahead if self._images.plain[i]]
            failed = next((path for path, pixels in zip(paths, decoded(paths, self._decode), strict=False) if pixels is None), None)
            if failed is None:
                raise
            raise BrokenFile(
                f"{printable(str(failed))}: DALI cannot decode it, though PIL can; save it again, or use data.loader=torch"
            ) from error
        return [torch.from_dlpack(output.as_tensor()) for output in outputs]

    def _values(self, step: int) -> tuple[np.ndarray, tuple[ViewValues, ViewValues]]:
        epoch, index = batch_at(self._cfg.seed, step, len(self._images), self._cfg.batch_size, self._shard)
        sizes = self._images.sizes[index]
        query, key = (view_values(self._cfg.seed, epoch, index, view, sizes, self._cfg.data.image_size) for view in (0, 1))
        return index, (query, key)

    def _color(self, pixels: Tensor, values: ViewValues) -> Tensor:
        """Color of one view on a CPU: uint8 [B, S, S, 3] -> [B, 3, S, S] channels_last."""
        values = to_tensors([values], self._device)
        out = torch.empty(pixels.shape, dtype=torch.float32).permute(0, 3, 1, 2)

        def work(part: slice) -> None:
            recolour(pixels[part], rows(values, part), mean=self._input.mean, std=self._input.std, out=out[part])

        self._threads.share(work, len(pixels))
        return out

    def _build(self, start_step: int) -> Pipeline:
        images, side = self._images, self._cfg.data.image_size
        paths = [np.frombuffer(os.fsencode(images.path(i)), np.uint8) for i in range(len(images))]
        all_plain = bool(images.plain.all())
        nothing = np.zeros((1, 1, 3), np.uint8)

        def feed(iteration: int) -> list:
            index, values = self._values(start_step + iteration)
            fed: list = [index, [paths[i] for i in index]]
            if not all_plain:
                plain = images.plain[index]
                pixels = [nothing if p else np.asarray(images.read(i)) for i, p in zip(index, plain, strict=True)]
                fed += [plain, pixels]
            for view in values:
                fed += _boxes(view) + (_twists(view) if self._dali_color else [])
            return fed + (_centers(images.sizes[index], side, self._input) if self._with_clean else [])

        pipeline = _pipeline(
            feed,
            side,
            all_plain,
            self._dali_color,
            self._with_clean,
            self._input,
            self._decode,
            batch_size=self._cfg.batch_size // self._shard.processes,
            num_threads=self._workers,
            device_id=self._device.index if self._gpu else None,
            prefetch_queue_depth=self._depth,
        )
        pipeline.build()
        return pipeline


@pipeline_def(enable_conditionals=True)
def _pipeline(feed, side: int, all_plain: bool, dali_color: bool, with_clean: bool, how: ImageInput, decode: dict):
    """Positions [B] on the host, as they were fed; query view, key view and, if asked for, the original, each [B, side, side, 3]:
    uint8 views where color is still to come, else normalized, float32 on a CPU and float16 on a GPU."""
    gpu = decode["device"] == "mixed"
    view_inputs = 11 if dali_color else 4
    count = (1 if all_plain else 3) + 2 * view_inputs + (2 if with_clean else 0)
    position, *fed = fn.external_source(source=feed, num_outputs=1 + count, batch=True)
    if all_plain or fed[1]:  # noqa: SIM108  DALI follows statements only
        image = _image(fed[0], decode)
    else:
        image = fn.reshape(fed[2].gpu() if gpu else fed[2], layout="HWC")
    outputs = [position]
    for view in range(2):
        first = (1 if all_plain else 3) + view * view_inputs
        # cut out first: a resize of the box alone would look across its borders, which torchvision's does not
        pixels = fn.slice(image, fed[first], fed[first + 1], axes=[0, 1])
        pixels = _resize(pixels, side, fed[first + 2], fed[first + 3], roi_relative=True)
        if dali_color:
            pixels = _recolor(pixels, *fed[first + 4 : first + view_inputs])
            pixels = _normalize(pixels, gpu, how)
        outputs.append(pixels)
    if with_clean:
        outputs.append(_normalize(_resize(image, side, fed[-2], fed[-1], filter=_FILTERS[how.interpolation]), gpu, how))
    return tuple(outputs)


def _image(path, decode: dict):
    return fn.decoders.image(fn.io.file.read(path), output_type=types.RGB, **decode)


@pipeline_def(batch_size=1, num_threads=1, prefetch_queue_depth=1)
def _one_by_one(paths: Iterator[Path], decode: dict):
    named = (np.frombuffer(os.fsencode(path), np.uint8) for path in paths)
    return _image(fn.external_source(source=named, batch=False), decode)


def decoded(paths: Sequence[Path], decode: dict) -> Iterator[np.ndarray | None]:
    """uint8 [height, width, 3] of each file as the loader's decoder reads it, None for one that it does not."""
    device = torch.cuda.current_device() if decode["device"] == "mixed" else None
    pipeline = None
    for i in range(len(paths)):
        if pipeline is None:
            pipeline = _one_by_one(iter(paths[i:]), decode, device_id=device)
            pipeline.build()
        try:
            (output,) = pipeline.run()
            yield np.array((output.as_cpu() if device is not None else output).at(0))
        except RuntimeError:  # after which a pipeline is of no use
            pipeline = None
            yield None


_FILTERS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}


def _resize(image, side: int, start, end, filter=types.INTERP_LINEAR, **options):
    """What lies between two corners of an image, antialiased, to ``side`` x ``side``."""
    return fn.resize(
        image,
        size=[side, side],
        roi_start=start,
        roi_end=end,
        interp_type=filter,
        antialias=True,
        **options,
    )


def _recolor(pixels, twist, brightness, contrast, saturation, hue, blur, sigma):
    if twist:
        pixels = fn.color_twist(pixels, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)
    if blur:
        pixels = fn.gaussian_blur(pixels, sigma=sigma)
    return pixels


def _normalize(pixels, gpu: bool, how: ImageInput):
    return fn.crop_mirror_normalize(
        pixels,
        dtype=types.FLOAT16 if gpu else types.FLOAT,
        output_layout="HWC",
        mean=[255 * m for m in how.mean],
        std=[255 * s for s in how.std],
    )


def depth_within(batch: int, room: int) -> int:
    """Batches to make ahead: as many decoded ones, of at most ``batch`` bytes, as ``room`` holds; one at the least."""
    return max(1, min(_PREFETCH, room // batch))


def _boxes(values: ViewValues) -> list[np.ndarray]:
    """Start and shape (y, x) of the crops, int32 [B, 2], and the corners between which a crop is resized, as shares of
    it: DALI's resize mirrors for nothing where the end lies left of the start."""
    flip = values.flip.astype(np.float32)
    zero = np.zeros_like(flip)
    near, far = np.stack((zero, flip), 1), np.stack((zero + 1, 1 - flip), 1)
    return [np.ascontiguousarray(values.crop[:, :2]), np.ascontiguousarray(values.crop[:, 2:]), near, far]


def _twists(values: ViewValues) -> list[np.ndarray]:
    """What ``_recolor`` takes, [B] each. A gray image is one without saturation."""
    brightness, contrast, saturation, hue = np.ascontiguousarray(values.factors.T)
    saturation = np.where(values.grey, np.float32(0), saturation)
    blur = values.blur_sigma > 0
    return [values.jitter | values.grey, brightness, contrast, saturation, hue * 360, blur, values.blur_sigma]


def _centers(sizes: np.ndarray, side: int, how: ImageInput) -> list[np.ndarray]:
    """Start and end (y, x) [B, 2], in pixels of the source, of the center crop of the resized image."""
    boxes = []
    for height, width in sizes.tolist():
        new_height, new_width = resized((height, width), how.resize(side))
        top, left = center_crop((new_height, new_width), side)
        y, x = height / new_height, width / new_width
        boxes.append((top * y, left * x, (top + side) * y, (left + side) * x))
    start, end = np.split(np.array(boxes, np.float32), 2, axis=1)
    return [np.ascontiguousarray(start), np.ascontiguousarray(end)]
