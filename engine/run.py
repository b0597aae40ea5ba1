"""A whole run: from a config to a trained, evaluated and reported network in a run folder."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torchvision

from engine import build
from engine.build import assemble, load_teacher
from engine.config import Config, flatten, to_yaml
from engine.console import say
from engine.data import catalog, sampler, teacher_cache
from engine.evaluation import Evaluator, attention_maps
from engine.files import cache_folder, remove_temporary_files, write_text
from engine.run_folder import RunFolder, append_metrics, commit, read_metrics
from engine.synthetic import dataset
from engine.training import ALONE, COLLAPSE, Summary, Trainer, World, checkpoint, distributed, find_checkpoint
from ppssl.teacher import Teacher

_SHOWN = ("rank1", "rank5", "mAP", "knn_top1", "linear_top1")


def train(cfg: Config, out: Path, started: float, *, profile: int = 0, world: World = ALONE) -> Summary:
    """Trains ``cfg`` in the run folder ``out`` and evaluates the network before and after where the data has labels; writes the
    report. Every process of ``world`` calls it; the first one writes, and holds the folder's lock until the report is written.

    started: ``time.perf_counter()`` when the command began. profile: steady steps to profile.
    Raises ``RunFolderInUse`` where another process trains in ``out``, ``ConfigError`` and ``ValueError`` for settings and data that
    cannot be used, and what ``Trainer.fit`` raises.
    """
    with RunFolder(out).locked() if world.first else nullcontext():
        return _train(cfg, out, started, profile, world)


def _train(cfg: Config, out: Path, started: float, profile: int, world: World) -> Summary:
    device, folder, cache = world.device, RunFolder(out), cache_folder()
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "inductor"))  # a second start is warm
    cfg = build.resolve(cfg, device, world.size, world.local_size)
    if distributed.restarted() and checkpoint.list_checkpoints(folder.checkpoints):
        cfg = replace(cfg, resume="auto")  # a failure was restarted: `none` or a path was meant for the first start
    source, state = _checkpoint(cfg, folder, world)
    with world.main_process_first():
        build.draw(cfg)
        images = build.data(cfg, cache_dir=cache)

    def embed(teacher: Teacher) -> torch.Tensor:
        with world.main_process_first():
            return teacher_cache.embeddings(teacher, images.train, device=device, cache_dir=cache, workers=cfg.data.workers)

    teacher = load_teacher(cfg, world)
    trainer = assemble(
        cfg,
        images,
        device,
        teacher=teacher,
        out=out if world.first else None,
        cache=cache,
        embed=embed,
        profile=profile,
        world=world,
    )
    if world.first:
        for written in (folder.path, folder.checkpoints, folder.replay):
            remove_temporary_files(written)
        write_text(folder.config, to_yaml(cfg))
        catalog.write_bad_files(images, folder.bad_files)
    evaluator = Evaluator(out, cfg, images, device, world)
    watch = attention_maps.Watch(out if world.first else None, cfg, images, device)
    if source is not None:
        trainer.resume(source, state)
        evaluator.resume(trainer.step.steps_done)
    else:
        if world.first:
            append_metrics(out, {"kind": "start", "step": 0} | environment(trainer, device))
        evaluator(trainer)
        evaluator.teacher(teacher)
        watch(trainer)
    if cfg.eval.every:
        trainer.hooks.append(evaluator.after_epoch)
    trainer.hooks.append(watch.after_epoch)
    cold = time.perf_counter() - started
    try:
        summary = trainer.fit()
    finally:
        trainer.loader.close()
    if world.broadcast_object(world.first and is_finished(out, trainer.step.steps_done)):
        say(f"{out} was finished before: nothing is trained or evaluated again, the report is regenerated")
    else:
        evaluator(trainer)
        watch(trainer)
        if world.first:
            record = summary._asdict() | {"cold_start_seconds": cold, "total_seconds": time.perf_counter() - started}
            append_metrics(out, {"kind": "summary", "step": trainer.step.steps_done} | record)
            closing_lines(out, record)
            if share := evaluator.closing(summary.seconds - evaluator.spent):
                say(share)
    if world.first:
        write_report(folder, device)
    return summary


def _checkpoint(cfg: Config, folder: RunFolder, world: World) -> tuple[Path | None, dict[str, Any] | None]:
    """The checkpoint that every process continues, and its state; (None, None) to start afresh, in which case a run that is already
    in ``folder`` is moved aside, not overwritten."""
    found = None
    if world.first:
        found = find_checkpoint(cfg.resume, folder.path, flatten(cfg))
        if found is None:
            folder.move_aside()
    source, state = found or (None, None)
    source = world.broadcast_object(source)
    if source is not None and state is None:
        state = checkpoint.load(source)
    return source, state


def is_finished(out: Path, step: int) -> bool:
    """Whether the run in ``out`` came to its end, the evaluation after training included, at ``step``."""
    return any(record["kind"] == "summary" and record["step"] == step for record in read_metrics(out))


def dry_run(cfg: Config, world: World = ALONE) -> None:
    """Builds everything, runs one step and says what a run would do; writes nothing (the demo's world goes to a temporary
    folder)."""
    device = world.device
    cfg = build.resolve(cfg, device, world.size, world.local_size)
    with tempfile.TemporaryDirectory() as scratch:
        if cfg.data.name == "birds" and dataset.is_missing(cfg.data.root or "."):
            cfg = replace(cfg, data=replace(cfg.data, root=str(Path(scratch) / "birds")))
            each = -(-cfg.batch_size // len(dataset.SPECIES))
            dataset.generate(Path(cfg.data.root), train_per_species=each, test_per_species=1, progress=False)
        cfg = replace(cfg, data=replace(cfg.data, resident="off"))  # one batch is decoded, not the set
        images = build.data(cfg, cache_dir=None)
        index = sampler.batch_at(cfg.seed, 0, len(images.train), cfg.batch_size)[1]

        def embed_first_batch(teacher: Teacher) -> torch.Tensor:
            rows = torch.zeros(len(images.train), teacher.dim, dtype=torch.float16, device=device)
            rows[index] = teacher_cache.embeddings_of(teacher, images.train, index, device=device)
            return rows

        teacher = load_teacher(cfg, world)
        trainer = assemble(cfg, images, device, teacher=teacher, out=None, cache=None, embed=embed_first_batch, world=world)
        try:
            batch = next(iter(trainer.loader.batches(0, 1)))
            output = trainer.step(trainer.with_teacher(batch))
            trainer.check()
        finally:
            trainer.loader.close()
    terms = ", ".join(f"{name} {float(value):.4f}" for name, value in output.terms.items())
    say(f"one step on {len(batch.index) * world.size} images: loss {float(output.total.detach()):.4f} ({terms})")
    steps, epoch = trainer.total_steps, trainer.loader.steps_per_epoch
    say(f"a run would take {steps} steps: {cfg.epochs} epochs of {epoch}; nothing was written")


def environment(trainer: Trainer, device: torch.device) -> dict[str, Any]:
    """What the run ran on and when, for its record."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": commit(),
        "steps_per_epoch": trainer.loader.steps_per_epoch,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "threads": str(torch.get_num_threads()),
        "loader": trainer.loader.name,
        "precision": trainer.precision.note,
    }


def closing_lines(out: Path, record: dict[str, float]) -> None:
    """The closing lines: before and after, and where the time went."""
    evaluated = [r for r in read_metrics(out) if r["kind"] == "eval"]
    if evaluated:
        first, last = evaluated[0], evaluated[-1]
        say(f"{last['protocol']}, epoch {first['epoch']} -> epoch {last['epoch']}:")
        for name in _SHOWN:
            if name in first and name in last:
                say(f"  {name:>11} {100 * first[name]:5.1f} % -> {100 * last[name]:5.1f} %")
    if record["steps"]:
        say(
            f"{record['steps']} steps in {record['seconds']:.0f} s ({record['images_per_s']:.0f} img/s, data wait "
            f"{100 * record['data_wait']:.0f} %), compile {record['compile_seconds']:.0f} s, checkpoints "
            f"{record['checkpoint_seconds']:.1f} s, cold start {record['cold_start_seconds']:.0f} s, total "
            f"{record['total_seconds']:.0f} s"
        )
    if record.get("collapsed"):
        say(f"warning: {COLLAPSE}")
    say(f"run folder: {out}")


def write_report(folder: RunFolder, device: torch.device) -> None:
    """The run's report. Everything is saved by now: what goes wrong here is said and costs the run nothing."""
    from engine import report  # matplotlib, scikit-learn: a dry run does not need them

    try:
        report.write([folder.path], folder.report, device, quick=True)
    except (Exception, KeyboardInterrupt) as error:
        say(f"no report ({type(error).__name__}: {error}); the run is complete, python -m engine.report {folder.path} tries again")
