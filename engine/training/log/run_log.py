"""The lines of a run and its progress bar. Sums stay on the device between due lines."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from engine.console import console, say
from engine.data import views_sheet
from engine.training.log.records import Records
from engine.training.log.symptoms import COLLAPSED
from ppssl.method import Output
from ppssl.span import span
from ppssl.timm_trunk import image_input

T = TypeVar("T")
_NOT_SHOWN = ("grad_norm", "contrast_top5", "contrast_ties")


class RunLog:
    """Log of one run into ``records`` and onto the terminal.

    ``watch(batches)`` times the wait for data; ``add`` after every step; ``line(...)`` when a line is due: it reads the
    device once and returns the record that it wrote. ``collapsed`` says whether the features were one in the last of them.
    """

    def __init__(self, records: Records, *, total_steps: int, start_step: int, description: str):
        self.records, self.total_steps = records, total_steps
        self.names: list[str] = []
        self.sums: Tensor | None = None
        self.count = self.images = 0
        self.collapsed, self.views_due = False, start_step == 0
        self.waited = self.waited_total = 0.0
        self.opened = self.since = time.perf_counter()
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task(description, total=total_steps, completed=start_step, status="")

    def __enter__(self) -> RunLog:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
        self.records.close()

    def watch(self, batches: Iterable[T]) -> Iterator[T]:
        """Yields ``batches`` and sums up the seconds that the loop waits for them."""
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            try:
                with span("data"):
                    batch = next(iterator)
            except StopIteration:
                return
            self.waited += time.perf_counter() - start
            if self.views_due:
                self.show_views(batch)
            yield batch

    def show_views(self, batch: Any) -> None:
        """Shows the views of the run's first batch in the loggers, where it is known how images enter the trunk."""
        self.views_due = False
        arch = self.records.settings.get("encoder.arch")
        if arch is None or not self.records.takes_pictures:
            return
        started = time.perf_counter()
        how = image_input(arch, self.records.settings.get("encoder.weights", "none"))
        self.records.picture("views", np.asarray(views_sheet.of_batch(batch, how)), 0)
        self.leave_out(time.perf_counter() - started)

    def add(self, output: Output, *, images: int) -> None:
        """Adds one step's losses and statistics, without waiting for the device. A skipped step adds to ``skipped`` alone."""
        values = {"loss": output.total.detach()} | output.terms | output.stats
        skipped = values.pop("skipped")
        row = torch.stack([value.float() for value in values.values()])
        row = torch.cat([torch.where(skipped > 0, 0.0, row), skipped[None]])
        self.names, self.sums = [*values], row if self.sums is None else self.sums + row
        self.count += 1
        self.images += images
        self.records.settings.setdefault("batch_size", images)
        self.progress.advance(self.task)

    def line(self, *, step: int, epoch: int, lr: float) -> dict[str, Any]:
        """Means since the last line, speed and data wait, to the bar and the records."""
        *values, skipped = self.sums.tolist()  # the one wait for the device
        now = time.perf_counter()
        elapsed = now - self.since
        record: dict[str, Any] = {"kind": "train", "step": step, "epoch": epoch}
        if skipped < self.count:
            record |= {name: value / (self.count - skipped) for name, value in zip(self.names, values, strict=True)}
        record |= {
            "skipped": int(skipped),
            "lr": lr,
            "images_per_s": self.images / elapsed,
            "data_wait": self.waited / elapsed,
            "seconds": now - self.opened,
        }
        collapsed = record["spread"] < COLLAPSED if "spread" in record else self.collapsed
        if collapsed:
            record["collapsed"] = True
        self.waited_total, taken = self.waited_total + self.waited, self.count
        self.sums, self.count, self.images, self.waited, self.since = None, 0, 0, 0.0, now
        shown = [name for name in self.names if name in record and name not in _NOT_SHOWN]
        status = "  ".join(f"{name} {record[name]:.3f}" for name in shown)
        status += f"  {record['skipped']} of {taken} steps skipped: not finite" if skipped else ""
        status += f"  lr {lr:.3g}  {record['images_per_s']:.0f} img/s  data wait {100 * record['data_wait']:.0f} %"
        self.progress.update(self.task, status=status)
        if not console.is_terminal:
            say(f"step {step}/{self.total_steps}  epoch {epoch}  {status}")
        self.records.write(record)
        if self.collapsed and not collapsed:
            say(f"step {step}: the features of the images differ again, spread {record['spread']:.2g}")
        self.collapsed = collapsed
        return record

    def leave_out(self, seconds: float) -> None:
        """Takes work that was not training (a checkpoint, an evaluation) out of the speed of the next line."""
        self.since += seconds


class Summary(NamedTuple):
    """What a finished (or continued) ``fit`` did, in seconds and images."""

    steps: int
    seconds: float
    compile_seconds: float
    images_per_s: float
    data_wait: float
    checkpoint_seconds: float
    hook_seconds: float
    collapsed: bool = False
    """All images gave nearly the same feature at the end."""
    ended_early: bool = False
    """``eval.patience`` ended the run before its last epoch."""
