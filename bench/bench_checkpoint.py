"""What saving and continuing cost: ``python -m bench.bench_checkpoint`` for the demo's state and that of a ResNet-50 with a queue
of 65,536 keys.

The stall is what the training loop waits: the copy of every tensor, beside the thread that writes. The rest is what the thread
takes meanwhile, and what a start that continues takes longer than a fresh one.
"""

from __future__ import annotations

import json
import resource
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from engine import build
from engine.config import command_line
from engine.training import checkpoint
from engine.training.trainer import Trainer

CPU = torch.device("cpu")
STATES = {
    "demo": ["--cfg", "demo", "ais.weight=0", "data.root=unused"],
    "ResNet-50, K 65536": ["--cfg", "cub", "encoder.weights=none", "ais.weight=0", "data.root=unused"],
}
ROUNDS = 5


def measure(argv: list[str]) -> dict[str, float]:
    """Medians in milliseconds, and the checkpoint's size in MiB."""
    cfg = build.resolve(command_line.parse(argv).config, CPU)
    seconds: dict[str, list[float]] = {"stall_ms": [], "thread_ms": [], "cpu_ms": [], "resume_ms": []}
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        trainer = Trainer(build.method(cfg, None), SimpleNamespace(steps_per_epoch=1000), epochs=9, out=folder, device=CPU)
        for step in range(1, ROUNDS + 2):
            trainer.step.steps_done = step
            used, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
            trainer.save()
            stalled = time.perf_counter()
            trainer.saver.wait()
            written, now = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
            path, state = checkpoint.newest(Path(folder) / "checkpoints", print)
            trainer.resume(path, state)
            resumed = time.perf_counter()
            cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
            if step > 1:  # the first one makes the buffers
                taken = (stalled - began, written - stalled, cpu, resumed - written)
                for values, value in zip(seconds.values(), taken, strict=True):
                    values.append(1e3 * value)
        size = path.stat().st_size / 2**20
    return {name: round(statistics.median(values), 1) for name, values in seconds.items()} | {"mib": round(size)}


if __name__ == "__main__":
    print(json.dumps({name: measure(argv) for name, argv in STATES.items()}, indent=2))
