"""A whole run: from a config to a trained, evaluated and reported network in a run folder."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from engine import build, files, run_folder
from engine.build import assemble, load_teacher
from engine.config import Config, flatten, from_yaml, to_yaml
from engine.console import say
from engine.data import catalog, sampler, teacher_cache
from engine.errors import ConfigError
from engine.evaluation import Judge, attention_maps
from engine.files import write_atomically
from engine.synthetic import dataset
from engine.training import ALONE, Summary, Trainer, World, checkpoint, distributed
from ppssl.teacher import Teacher

# What may differ between a checkpoint and the run that continues it: where things are and how they are executed, never what is
# computed.
_FREE_TO_CHANGE = ("out", "resume", "queue.sharded", "data.root", "data.loader", "data.resident", "data.workers")
_FREE_SECTIONS = ("run.", "eval.")
_SHOWN = ("rank1", "rank5", "mAP", "knn_top1", "linear_top1")


def train(cfg: Config, out: Path, started: float, *, profile: int = 0, world: World = ALONE) -> Summary:
    """Trains ``cfg`` in the run folder ``out``, judging the network before and after where the data has labels; ``profile`` steady
    steps are profiled. Every process of ``world`` calls it; the first one writes."""
    device = world.device
    torch.backends.cudnn.benchmark = True  # every step has the same shapes
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(files.cache_folder() / "inductor"))  # a second start is warm
    cfg = build.resolve(cfg, device, world.size, world.local_size)
    if distributed.restarted() and checkpoint.list_checkpoints(out / "checkpoints"):
        cfg = replace(cfg, resume="auto")  # a failure was restarted: `none` or a path was meant for the first start
    source, state = find_checkpoint(cfg, out) if world.first else (None, None)
    source = world.share(source)
    if source is not None and state is None:
        state = checkpoint.load(source)
    cache = files.cache_folder()
    with world.first_then_others():
        images = build.data(cfg, cache_dir=cache)

    def embed(teacher: Teacher) -> torch.Tensor:
        with world.first_then_others():
            return teacher_cache.embeddings(teacher, images.train, device=device, cache_dir=cache, workers=cfg.data.workers)

    teacher = load_teacher(cfg, world)
    trainer = assemble(
        cfg, images, device, teacher=teacher, out=out if world.first else None, cache=cache, embed=embed, world=world
    )
    if world.first:
        for folder in (out, out / "checkpoints", out / "replay"):
            files.remove_temporary_files(folder)
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "config.yaml", lambda temporary: Path(temporary).write_text(to_yaml(cfg), encoding="utf-8"))
        catalog.write_bad_files(images, out / "bad_files.txt")
    judge = Judge(out, cfg, images, device, world)
    watch = attention_maps.Watch(out if world.first else None, cfg, images, device)
    if source is not None:
        trainer.resume(source, state)
        judge.resume(trainer.step.step)
    else:
        if world.first:
            run_folder.append_metrics(out, {"kind": "start", "step": 0} | environment(trainer, device))
        judge(trainer)
        judge.teacher(teacher)
        watch(trainer)
    trainer.profile = profile if world.first else 0
    if cfg.eval.every:
        trainer.hooks.append(judge.after_epoch)
    trainer.hooks.append(watch.after_epoch)
    cold = time.perf_counter() - started
    try:
        summary = trainer.fit()
    finally:
        trainer.loader.close()
    if world.share(world.first and is_finished(out, trainer.step.step)):
        say(f"{out} was finished before: nothing is trained or judged again, the report is made anew")
        if world.first:
            make_page(out, device)
        return summary
    judge(trainer)
    watch(trainer)
    if world.first:
        record = summary._asdict() | {"cold_start_seconds": cold, "total_seconds": time.perf_counter() - started}
        run_folder.append_metrics(out, {"kind": "summary", "step": trainer.step.step} | record)
        report(out, record)
        if share := judge.closing(summary.seconds - judge.spent):
            say(share)
        make_page(out, device)
    return summary


def is_finished(out: Path, step: int) -> bool:
    """Whether the run in ``out`` came to its end, the judging after training included, at ``step``."""
    return any(record["kind"] == "summary" and record["step"] == step for record in run_folder.read_metrics(out))


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


def find_checkpoint(cfg: Config, out: Path) -> tuple[Path | None, dict | None]:
    """The checkpoint that ``resume`` names, read and compared with ``cfg``; (None, None) to start afresh, in which case a run that
    is already in ``out`` is moved aside, not overwritten."""
    found = None
    if cfg.resume == "auto":
        found = checkpoint.newest(out / "checkpoints", say)
    elif cfg.resume != "none":
        source = Path(cfg.resume)
        if not source.exists():
            raise FileNotFoundError(f"resume: {source} is not there; give a checkpoint, a run folder, auto or none")
        found = checkpoint.newest(source / "checkpoints", say) if source.is_dir() else (source, checkpoint.load(source))
        if found is None:
            raise FileNotFoundError(f"resume: {source} holds no checkpoint")
    if found is None:
        if out.is_dir() and any(out.iterdir()):
            number = next(n for n in range(1, 10**6) if not out.with_name(f"{out.name}.{n}").exists())
            out.rename(out.with_name(f"{out.name}.{number}"))
            say(f"{out} held an earlier run; it is now {out}.{number}")
        return None, None
    source, state = found
    try:
        then = flatten(from_yaml(str(state.get("info", {}).get("config", ""))))
    except ConfigError as error:
        raise ValueError(f"resume: {source} was made with a config that this version cannot read: {error}") from error
    now = flatten(cfg)
    for key, value in now.items():
        free = key in _FREE_TO_CHANGE or key.startswith(_FREE_SECTIONS)
        if not free and then[key] != value:
            raise ConfigError(
                f"{key}: the checkpoint {source} was made with {then[key]!r}, this run has {value!r}; give {key}={then[key]} to "
                f"continue it, or --out DIR (or --resume none) to start afresh"
            )
    return source, state


def environment(trainer: Trainer, device: torch.device) -> dict[str, Any]:
    """What the run ran on and when, for its record."""
    import platform

    import torchvision

    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": run_folder.commit(),
        "steps_per_epoch": trainer.loader.steps_per_epoch,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "threads": str(torch.get_num_threads()),
        "loader": trainer.loader.name,
        "precision": trainer.precision.note,
    }


def report(out: Path, record: dict[str, float]) -> None:
    """The closing lines: before and after, and where the time went."""
    judged = [r for r in run_folder.read_metrics(out) if r["kind"] == "eval"]
    if judged:
        first, last = judged[0], judged[-1]
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
    say(f"run folder: {out}")


def make_page(out: Path, device: torch.device) -> None:
    """The run's report. Everything is saved by now: what goes wrong here is said and costs the run nothing."""
    from engine import report as pages  # matplotlib, scikit-learn: a dry run does not need them

    try:
        pages.write([out], out / "report.html", device, quick=True)
    except (Exception, KeyboardInterrupt) as error:
        say(f"no report ({type(error).__name__}: {error}); the run is complete, python -m engine.report {out} tries again")
