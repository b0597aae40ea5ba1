"""The torchvision loader: PIL and torchvision execute the view values in worker processes; runs on any machine."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from torchvision.transforms import functional as F

from engine.config import Config
from engine.console import say
from engine.data.catalog import ImageList
from engine.data.machine import cores
from engine.data.sampler import ALL, Shard, batch_at, steps_per_epoch
from engine.data.views import ViewValues, center_crop, resized, view_values
from engine.errors import BrokenFile, WorkerDied
from ppssl.method import Batch
from ppssl.timm_trunk import ImageInput, image_input

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
"""PIL's by the names of ``ImageInput``."""


def input_view(image: Image.Image, how: ImageInput, side: int) -> Image.Image:
    """The clean view of an image as a network of that input sees it, ``side`` x ``side``."""
    return clean_view(image, how.resize(side), side, FILTERS[how.interpolation])


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


_SECONDS_TO_DIE = 1
"""That a worker whose pipe broke takes to end, at most."""
_GUARD = "where processes are spawned, a script must train below `if __name__ == '__main__':`"
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
        how = image_input(cfg.encoder.arch, cfg.encoder.weights)
        self._normalize = Normalize(how.mean, how.std, self._device, dtype)
        self._steps, self._piped = _Steps(), False
        self._loader = DataLoader(
            _StepDataset(images, cfg.seed, cfg.batch_size, cfg.data.image_size, how if with_clean else None, shard),
            batch_size=None,
            collate_fn=_as_it_is,
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
        for pixels, index in _checked(self._loader):
            if isinstance(pixels, np.ndarray):
                if not self._piped:
                    say("data.loader=torch: shared memory (/dev/shm) is short; batches go through a pipe, which is slower")
                pixels, self._piped = torch.from_numpy(pixels), True
            x_q, x_k, *clean = map(self._normalize, pixels)
            index = torch.from_numpy(index).to(self._device, non_blocking=True)
            yield Batch(x_q=x_q, x_k=x_k, index=index, x_clean=clean[0] if clean else None)

    def close(self) -> None:
        self._loader = None  # its last reference: DataLoader ends persistent workers when it goes


def _checked(loader: DataLoader) -> Iterator[tuple[Tensor | np.ndarray, np.ndarray]]:
    """What the workers hand over. Raises BrokenFile for what they hand over as a message, since DataLoader would bury the file's
    name under the worker's traceback, and WorkerDied for one that ended."""
    if loader.num_workers and getattr(multiprocessing.current_process(), "_inheriting", False):
        raise SystemExit(f"error: a process that was only to load images began to train: {_GUARD}")
    items = _started(loader)
    while True:
        try:
            item = next(items, None)
        except (RuntimeError, OSError, EOFError):  # a worker's end has many faces: the pipe's, the queue's, torch's own
            for worker in getattr(items, "_workers", ()):
                worker.join(_SECONDS_TO_DIE)
                if worker.exitcode is not None:
                    raise WorkerDied(_death(worker.pid, worker.exitcode)) from None
            raise
        if item is None:
            return
        if isinstance(item, str):
            raise BrokenFile(item)
        yield item


def _started(loader: DataLoader) -> Iterator:
    """The loader's iterator. DataLoader has a worker's death raise wherever the main thread happens to be; without its handler
    it is found within seconds where the batch is waited for, and nowhere else."""
    watches = loader.num_workers and hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD) if watches else None
    items = iter(loader)
    if watches:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
    return items


def _death(pid: int, code: int) -> str:
    """How a worker ended, and what can be done."""
    names = {-number: number.name for number in signal.Signals}
    how = f"was ended by {names[code]}" if code in names else f"ended with code {code}"
    if code > 0:
        remedy = f"its own message stands above; {_GUARD}, or use data.workers=0"
    elif names.get(code) == "SIGBUS":
        remedy = "shared memory (/dev/shm) is full: give the container more (docker run --shm-size=8g), or use data.workers=0"
    elif names.get(code) == "SIGKILL":
        remedy = "most often for lack of memory: lower data.workers or batch_size, or use data.workers=0"
    else:
        remedy = "start again; if it happens again, use data.workers=0"
    return f"a worker process of data.loader=torch (pid {pid}) {how}; {remedy}"


def _as_it_is(item: tuple | str) -> tuple | str:
    """A batch is made by its worker; DataLoader's own way would turn arrays into tensors, which need shared memory."""
    return item


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
    """Step -> (views, index): uint8 [2 or 3, B, S, S, 3] for query, key and, if asked for, clean, and int64 [B]; or what is wrong
    with a file. A pure function of the step."""

    def __init__(self, images: ImageList, seed: int, batch_size: int, side: int, clean: ImageInput | None, shard: Shard):
        self.images, self.seed, self.batch_size, self.side = images, seed, batch_size, side
        self.clean, self.shard = clean, shard

    def __getitem__(self, step: int) -> tuple[Tensor | np.ndarray, np.ndarray] | str:
        try:
            pixels, index = self._batch(step)
        except BrokenFile as error:
            return str(error)
        views = torch.from_numpy(pixels)
        if get_worker_info() is None:
            return views, index
        try:  # here: in the thread that hands it over a failure would be lost, and the batch waited for without end
            return views.share_memory_(), index
        except RuntimeError:  # a container has 64 MiB unless it is told otherwise
            return pixels, index

    def _batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        epoch, index = batch_at(self.seed, step, len(self.images), self.batch_size, self.shard)
        sizes = self.images.sizes[index]
        values = [view_values(self.seed, epoch, index, view, sizes, self.side) for view in (0, 1)]
        shape = (3 if self.clean else 2, len(index), self.side, self.side, 3)
        pixels = np.empty(shape, np.uint8)
        for b, i in enumerate(index.tolist()):
            image = self.images.read(i)
            for view in (0, 1):
                pixels[view, b] = np.asarray(execute_view(image, values[view], b, self.side))
            if self.clean:
                pixels[2, b] = np.asarray(input_view(image, self.clean, self.side))
        return pixels, index.copy()
