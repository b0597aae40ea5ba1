"""The torchvision loader: PIL and torchvision execute the view values in worker processes; runs on any machine."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import functional as F

from engine.config import Config
from engine.data.catalog import ImageList
from engine.data.loaders.interface import IMAGENET_MEAN, IMAGENET_STD
from engine.data.machine import cores
from engine.data.sampler import ALL, Shard, batch_at, steps_per_epoch
from engine.data.views import ViewValues, center_crop, clean_resize, resized, view_values
from engine.errors import BrokenFile
from ppssl.method import Batch


def clean_view(image: Image.Image, resize: int, crop: int, filter: Image.Resampling) -> Image.Image:
    """Short side to ``resize`` (antialiased), center square of side ``crop``."""
    height, width = resized((image.height, image.width), resize)
    top, left = center_crop((height, width), crop)
    return image.resize((width, height), filter).crop((left, top, left + crop, top + crop))


def execute_view(image: Image.Image, values: ViewValues, b: int, side: int) -> Image.Image:
    """Row ``b`` of ``values`` applied to one upright RGB image by torchvision's PIL operators and PIL's Gaussian blur,
    which is what MoCo v2 runs. Returns a ``side`` x ``side`` image."""
    top, left, height, width = values.crop[b].tolist()
    view = image.crop((left, top, left + width, top + height)).resize((side, side), Image.Resampling.BILINEAR)
    if values.jitter[b]:
        factors = values.factors[b].tolist()
        for op in values.order[b].tolist():
            view = _JITTER[op](view, factors[op])
    if values.grey[b]:
        view = F.to_grayscale(view, 3)
    if values.blur_sigma[b] > 0:
        view = view.filter(ImageFilter.GaussianBlur(float(values.blur_sigma[b])))
    return F.hflip(view) if values.flip[b] else view


_JITTER = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


class Normalize:
    """uint8 [B, H, W, 3] on any device -> (x / 255 - mean) / std: [B, 3, H, W] channels_last of ``dtype`` on
    ``device``."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device, dtype: torch.dtype):
        self._scale = 1 / (255 * torch.tensor(std, dtype=torch.float32, device=device))
        self._shift = -torch.tensor(mean, dtype=torch.float32, device=device) * 255 * self._scale
        self._device, self._dtype = device, dtype

    def __call__(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(self._device, non_blocking=True)
        b, h, w, c = pixels.shape
        rows = pixels.reshape(b, h, w * c)  # a long last dimension instead of 3 keeps the CPU's vector units busy
        x = torch.mul(rows, self._scale.repeat(w)).add_(self._shift.repeat(w))
        return x.to(self._dtype).view(b, h, w, c).permute(0, 3, 1, 2)


class TorchLoader:
    """Loader over torch's DataLoader: one step's batch is the work of one worker, batches come in the order of the
    steps.

    ``data.workers`` processes (None: the machine's cores; 0: this process) live until ``close``. They hand over 8-bit
    pixels, which are normalized here on the device.
    """

    def __init__(self, images: ImageList, cfg: Config, device: torch.device, *, with_clean: bool = False, shard: Shard = ALL):
        self.steps_per_epoch = steps_per_epoch(len(images), cfg.batch_size)
        workers = cores() if cfg.data.workers is None else cfg.data.workers
        self.name = f"torch ({workers} workers)"
        self._device = torch.device(device)
        dtype = torch.float16 if self._device.type == "cuda" else torch.float32
        self._normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD, self._device, dtype)
        self._steps = _Steps()
        self._loader = DataLoader(
            _StepDataset(images, cfg.seed, cfg.batch_size, cfg.data.image_size, with_clean, shard),
            batch_size=None,
            sampler=self._steps,
            num_workers=workers,
            prefetch_factor=2 if workers else None,
            persistent_workers=workers > 0,
            worker_init_fn=_leave_interrupts,
            generator=torch.Generator(),  # for the seed that it hands to workers: a run's own state stays as it is
            pin_memory=self._device.type == "cuda",
        )

    def batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        if self._loader is None:
            raise RuntimeError("the loader is closed")
        self._steps.range = range(start_step, stop_step)
        for x_q, x_k, x_clean, index in _checked(self._loader):
            yield Batch(
                x_q=self._normalize(x_q),
                x_k=self._normalize(x_k),
                index=index.to(self._device, non_blocking=True),
                x_clean=None if x_clean is None else self._normalize(x_clean),
            )

    def close(self) -> None:
        self._loader = None  # its last reference: DataLoader ends persistent workers when it goes


def _checked(items: Iterable[tuple | str]) -> Iterator[tuple]:
    """Workers hand a broken file over as a message: DataLoader would bury the file's name under the worker's
    traceback."""
    for item in items:
        if isinstance(item, str):
            raise BrokenFile(item)
        yield item


def _leave_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal, SLURM's SIGUSR1 every process of a job; the run decides when its workers end,
    after the step it is in."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):  # not on Windows
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


class _Steps(Sampler[int]):
    """The steps of the next iteration; DataLoader keeps its workers while this changes."""

    range = range(0)

    def __iter__(self) -> Iterator[int]:
        return iter(self.range)

    def __len__(self) -> int:
        return len(self.range)


class _StepDataset(Dataset):
    """Step -> (x_q, x_k, x_clean | None, index): uint8 [B, S, S, 3] and int64 [B], or what is wrong with a file; a pure
    function of the step."""

    def __init__(self, images: ImageList, seed: int, batch_size: int, side: int, with_clean: bool, shard: Shard):
        self.images, self.seed, self.batch_size, self.side = images, seed, batch_size, side
        self.with_clean, self.shard = with_clean, shard

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor] | str:
        try:
            return self._batch(step)
        except BrokenFile as error:
            return str(error)

    def _batch(self, step: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        epoch, index = batch_at(self.seed, step, len(self.images), self.batch_size, self.shard)
        sizes = self.images.sizes[index]
        values = [view_values(self.seed, epoch, index, view, sizes, self.side) for view in (0, 1)]
        shape = (3 if self.with_clean else 2, len(index), self.side, self.side, 3)
        pixels = np.empty(shape, np.uint8)
        for b, i in enumerate(index.tolist()):
            image = self.images.read(i)
            for view in (0, 1):
                pixels[view, b] = np.asarray(execute_view(image, values[view], b, self.side))
            if self.with_clean:
                resize = clean_resize(self.side)
                pixels[2, b] = np.asarray(clean_view(image, resize, self.side, Image.Resampling.BILINEAR))
        views = torch.from_numpy(pixels)
        return views[0], views[1], views[2] if self.with_clean else None, torch.from_numpy(index.copy())
