"""The nvJPEG loader: torchvision decodes a step's JPEGs on the GPU, each once, and the fused op makes both views from them.

For machines with a GPU and without DALI. Files that are no plain JPEGs are decoded by PIL, so that every loader sees the same
pictures; so are those that nvJPEG refuses.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import decode_jpeg

from engine.config import Config
from engine.console import printable, say
from engine.data.catalog import ImageList
from engine.data.image_file import examine, signature
from engine.data.loaders.execute import ahead, to_tensors
from engine.data.loaders.staged import Staged
from engine.data.machine import cores
from engine.data.sampler import ALL, Shard, batch_at, steps_per_epoch
from engine.data.views import view_values
from engine.errors import BrokenFile
from ppssl.method import Batch
from ppssl.timm_trunk import image_input

_PREFETCH = 2
_OUT_OF = (torch.OutOfMemoryError, torch.AcceleratorError)
"""What is no fault of a file."""


class NvjpegLoader:
    """Loader over nvJPEG. ``data.workers`` threads read files; decoding and views run on the device, decoding on a stream of its
    own and ahead of the loop. Raises ``ImportError`` where torchvision has no nvJPEG."""

    def __init__(self, images: ImageList, cfg: Config, device: torch.device, *, with_clean: bool = False, shard: Shard = ALL):
        self.steps_per_epoch = steps_per_epoch(len(images), cfg.batch_size)
        self.name = "nvjpeg"
        self._images, self._cfg, self._with_clean, self._shard = images, cfg, with_clean, shard
        self._input = image_input(cfg.encoder.arch, cfg.encoder.weights)
        self._gpu = device.type == "cuda"
        if self._gpu and device.index is None:  # the thread that works ahead has a current device of its own
            device = torch.device("cuda", torch.cuda.current_device())
        self._device = device
        if why := problem(device):
            raise ImportError(f"data.loader=nvjpeg: {why}; use data.loader=dali or torch")
        self._said = False
        self._readers = ThreadPoolExecutor(max(1, cores() if cfg.data.workers is None else cfg.data.workers), "read")

    def batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        if self._readers is None:
            raise RuntimeError("the loader is closed")
        side = self._cfg.data.image_size
        for staged in ahead(self._staged(range(start_step, stop_step)), _PREFETCH):
            yield staged.batch(side, self._input, with_clean=self._with_clean)

    def close(self) -> None:
        if self._readers is not None:
            self._readers.shutdown(cancel_futures=True)
        self._readers = None

    def _staged(self, steps: range) -> Iterator[Staged]:
        stream = torch.cuda.Stream(self._device) if self._gpu else None
        side, seed = self._cfg.data.image_size, self._cfg.seed
        for step in steps:
            epoch, index = batch_at(seed, step, len(self._images), self._cfg.batch_size, self._shard)
            sizes = self._images.sizes[index]
            values = [view_values(seed, epoch, index, view, sizes, side) for view in (0, 1)]
            lengths = 3 * sizes.astype(np.int64).prod(1)
            offsets = np.cumsum(lengths) - lengths
            read = list(self._readers.map(self._read, index.tolist()))
            with torch.cuda.stream(stream):
                pixels = torch.empty(int(lengths.sum()), dtype=torch.uint8, device=self._device)
                for i, offset, (height, width), image in zip(
                    index.tolist(), offsets.tolist(), sizes.tolist(), self._decoded(index.tolist(), read), strict=True
                ):
                    if image.shape[:2] != (height + self._images.cut, width):
                        raise BrokenFile(self._changed(i, image))
                    pixels[offset : offset + 3 * height * width].view(height, width, 3).copy_(image[:height], non_blocking=True)
                where = (index.copy(), np.tile(offsets, 2), np.tile(sizes, (2, 1)))
                sent = [torch.from_numpy(t).to(self._device, non_blocking=True) for t in where]
                rows = to_tensors(values, self._device)
                ready = torch.cuda.Event() if self._gpu else None
                if ready is not None:
                    ready.record(stream)
            host = list(zip(offsets.tolist(), sizes.tolist(), strict=True))
            yield Staged(sent[0], rows, sent[1], sent[2], pixels, host, ready)

    def _read(self, i: int) -> tuple[Tensor, int] | Tensor:
        """The bytes of a plain JPEG and the orientation that its EXIF block gives it, or the pixels [H, W, 3] of any other file."""
        if self._images.plain[i]:
            try:
                data = self._images.path(i).read_bytes()
            except OSError:
                data = b""  # PIL's reader says what is the matter
            turn = examine(data, "JPEG").turn if signature(data) == "JPEG" else None
            if turn is not None:
                return torch.frombuffer(bytearray(data), dtype=torch.uint8), turn
        return self._by_pil(i)

    def _by_pil(self, i: int) -> Tensor:
        image = torch.from_numpy(np.array(self._images.read(i)))
        # as high as the file's, whose rows below the image are cut off later
        image = torch.nn.functional.pad(image, (0, 0, 0, 0, 0, self._images.cut))
        return image.pin_memory() if self._gpu else image

    def _decoded(self, index: list[int], read: list[tuple[Tensor, int] | Tensor]) -> Iterator[Tensor]:
        """Upright images, uint8 [H, W, 3], on the device or in pinned memory."""
        coded = [item[0] for item in read if isinstance(item, tuple)]
        try:
            planes = decode_jpeg(coded, mode="RGB", device=self._device) if coded else []
        except _OUT_OF:
            raise
        except RuntimeError:  # one of them; nothing of the others came back
            planes = [self._alone(data) for data in coded]
        decoded = iter(planes)
        for i, item in zip(index, read, strict=True):
            plane = next(decoded) if isinstance(item, tuple) else None
            if plane is not None:
                yield upright(plane, item[1]).permute(1, 2, 0)
            elif isinstance(item, Tensor):
                yield item
            else:
                if not self._said:
                    say(f"nvjpeg does not decode {printable(self._images.names[i])}: PIL does, and any others like it")
                    self._said = True
                yield self._by_pil(i)

    def _alone(self, data: Tensor) -> Tensor | None:
        try:
            return decode_jpeg([data], mode="RGB", device=self._device)[0]
        except _OUT_OF:
            raise
        except RuntimeError:
            return None

    def _changed(self, i: int, image: Tensor) -> str:
        height, width = self._images.sizes[i].tolist()
        return (
            f"{printable(str(self._images.path(i)))}: it has {image.shape[1]} x {image.shape[0]} pixels now instead of {width} x "
            f"{height + self._images.cut}; restore or remove the file and resume"
        )


def problem(device: torch.device) -> str | None:
    """Why torchvision does not decode on ``device``, or None: a small JPEG is decoded there."""
    if device.type != "cuda":
        return f"nvJPEG needs a CUDA GPU, the device is {device}"
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (90, 120, 150)).save(file, "JPEG")
    data = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
    try:
        decode_jpeg([data], mode="RGB", device=device)
    except RuntimeError as error:
        return f"torchvision cannot decode on {device} ({str(error).partition(chr(10))[0]})"
    return None


def upright(planes: Tensor, turn: int) -> Tensor:
    """[C, h, w] as stored -> [C, H, W] as shown, by its EXIF orientation 1 to 8 (Exif 2.32, table 6)."""
    if turn >= 5:
        planes = planes.transpose(1, 2)
    flips = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}.get(turn, ())
    return planes.flip(flips) if flips else planes
