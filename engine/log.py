"""What a run tells: the progress bar, ``metrics.jsonl``, TensorBoard events. Sums stay on the device between due lines."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from engine.checkpoint import write_atomically
from ppssl.method import Output
from ppssl.span import span

T = TypeVar("T")
console = Console(stderr=True, highlight=False)
if not console.is_terminal and "COLUMNS" not in os.environ:
    console.width = 132  # a file or a pipe has no width: rich's 80 columns break tables


def say(text: str) -> None:
    """One line for the person at the terminal."""
    console.print(text, markup=False, soft_wrap=True)


def bar() -> Progress:
    """A progress bar for work outside the steps: on a terminal only, and gone when the work is done."""
    return Progress(console=console, transient=True, disable=not console.is_terminal)


class RunLog:
    """Log of one run into ``out`` (None: terminal only).

    ``watch(batches)`` times the wait for data; ``add`` after every step; ``line(...)`` when a line is due: it reads the
    device once and returns the record that it wrote.
    """

    def __init__(self, out: Path | None, *, total_steps: int, start_step: int, description: str):
        self.out, self.total_steps = out, total_steps
        self.names: list[str] = []
        self.sums: Tensor | None = None
        self.count = self.images = 0
        self.waited = self.waited_total = 0.0
        self.opened = self.since = time.perf_counter()
        self.writer = None
        if out is not None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import; a dry run does not need it

            out.mkdir(parents=True, exist_ok=True)
            self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=start_step)
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
        if self.writer is not None:
            self.writer.close()

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
            yield batch

    def add(self, output: Output, *, images: int) -> None:
        """Adds one step's losses and statistics, without waiting for the device. A skipped step adds to ``skipped`` alone."""
        values = {"loss": output.total.detach()} | output.terms | output.stats
        skipped = values.pop("skipped")
        row = torch.stack([value.float() for value in values.values()])
        row = torch.cat([torch.where(skipped > 0, 0.0, row), skipped[None]])
        self.names, self.sums = [*values], row if self.sums is None else self.sums + row
        self.count += 1
        self.images += images
        self.progress.advance(self.task)

    def line(self, *, step: int, epoch: int, lr: float) -> dict[str, Any]:
        """Means since the last line, speed and data wait, to the bar, the file and TensorBoard."""
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
        self.waited_total, taken = self.waited_total + self.waited, self.count
        self.sums, self.count, self.images, self.waited, self.since = None, 0, 0, 0.0, now
        self.write(record)
        shown = [name for name in self.names if name in record and name not in ("grad_norm", "contrast_top5")]
        status = "  ".join(f"{name} {record[name]:.3f}" for name in shown)
        status += f"  {record['skipped']} of {taken} steps skipped: not finite" if skipped else ""
        status += f"  lr {lr:.3g}  {record['images_per_s']:.0f} img/s  data wait {100 * record['data_wait']:.0f} %"
        self.progress.update(self.task, status=status)
        if not console.is_terminal:
            say(f"step {step}/{self.total_steps}  epoch {epoch}  {status}")
        return record

    def leave_out(self, seconds: float) -> None:
        """Takes work that was not training (a checkpoint, an evaluation) out of the speed of the next line."""
        self.since += seconds

    def write(self, record: dict[str, Any]) -> None:
        """Appends ``record`` to metrics.jsonl and its numbers to TensorBoard under ``kind/name``."""
        if self.out is None:
            return
        append(self.out, record)
        for name, value in record.items():
            if isinstance(value, (int, float)) and name not in ("step", "epoch"):
                self.writer.add_scalar(f"{record['kind']}/{name}", value, record["step"])


def append(out: Path, record: dict[str, Any]) -> None:
    """Appends one JSON line to ``out``/metrics.jsonl."""
    with (out / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read(out: Path) -> list[dict[str, Any]]:
    """The records of ``out``/metrics.jsonl; a line cut off by a kill, or otherwise damaged, is left out."""
    path = out / "metrics.jsonl"
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step", 0), int):
            records.append(record)
    return records


def commit() -> str | None:
    """The commit of this source tree, with ``-dirty`` where files differ from it; None where it is no git clone."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # an installed package inside somebody else's repository
        return None
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=root, capture_output=True, text=True, timeout=10, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None


def rewind(out: Path, step: int) -> None:
    """Drops the records after ``step``, so that a resumed run's log reads as one run."""
    records = [r for r in read(out) if r.get("step", 0) <= step]
    text = "".join(json.dumps(r) + "\n" for r in records)
    write_atomically(out / "metrics.jsonl", lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))
