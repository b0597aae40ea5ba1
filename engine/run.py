"""A whole run: from a config to a trained, evaluated and reported network in a run folder."""

from __future__ import annotations

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
from engine.config import Config, flatten, from_run, to_yaml
from engine.console import counted, say
from engine.data import catalog, sampler, teacher_cache
from engine.evaluation import Evaluator, Validation, attention_maps, hold_out
from engine.files import cache_folder, remove_temporary_files, write_text
from engine.pretrained import best_of
from engine.run_folder import RunFolder, append_data, append_metrics, commit, read_data, read_metrics, write_classes
from engine.synthetic import dataset
from engine.training import ALONE, Summary, Trainer, World, checkpoint, distributed, find_checkpoint, recorded_settings
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
    open_keys = {"bn.impl"} if cfg.bn.impl == "auto" else set()
    cfg = build.resolve(cfg, device, world.size, world.local_size)
    if distributed.restarted() and checkpoint.list_checkpoints(folder.checkpoints):
        cfg = replace(cfg, resume="auto")  # a failure was restarted: `none` or a path was meant for the first start
    fixed = {key: value for key, value in flatten(cfg).items() if key not in open_keys}
    found = find_checkpoint(cfg.resume, out, fixed, world)
    if found and open_keys:
        cfg = build.keep_batch_norm(cfg, recorded_settings(found[1], found[0]).get("bn.impl"), device)
    with world.main_process_first():
        build.draw(cfg)
        images = hold_out(build.data(cfg, cache_dir=cache), cfg, tell=True)
    cfg = build.decide_queue(cfg, len(images.train), found and recorded_settings(found[1], found[0]))

    def embed(teacher: Teacher) -> torch.Tensor:
        with world.main_process_first():
            return teacher_cache.embeddings(teacher, images.train, device=device, cache_dir=cache, workers=cfg.data.workers)

    teacher = load_teacher(cfg, world)
    trainer = assemble(
        cfg,
        images,
        device,
        teacher=teacher,
        out=out,
        cache=cache,
        embed=embed,
        profile=profile,
        world=world,
    )
    trainer.begin(found)
    done = world.broadcast_object(world.first and trainer.ended and is_finished(out, trainer.step.steps_done))
    if world.first:
        for written in (folder.path, folder.checkpoints, folder.replay):
            remove_temporary_files(written)
        if found is None:
            append_metrics(out, {"kind": "start", "step": 0} | environment(trainer, device))
        text = found[1].get("info", {}).get("config") if found and done else None
        note_settings(folder, cfg, images, trainer.step.steps_done, text and from_run(text))
        catalog.write_bad_files(images, folder.bad_files)
        if text := catalog.left_out(images):
            say(f"warning: {text}; see {folder.bad_files}")
    evaluator = Evaluator(out, cfg, images, device, world)
    validation = Validation(cfg, images, device, world) if images.validation is not None else None
    watch = attention_maps.Watch(out if world.first else None, cfg, images, device)
    opened = time.perf_counter()
    if found is not None:
        evaluator.resume(trainer.step.steps_done)
    else:
        with trainer.writing("the evaluation before training"):
            evaluator(trainer)
            if validation is not None:
                validation(trainer)
            evaluator.teacher(teacher)
            watch(trainer)
    evaluating = time.perf_counter() - opened
    if validation is not None:
        trainer.hooks.append(validation.after_epoch)  # the first: it says whether this epoch is the last
    if cfg.eval.every:
        trainer.hooks.append(evaluator.after_epoch)
    trainer.hooks.append(watch.after_epoch)
    cold = time.perf_counter() - started - evaluating
    try:
        summary = trainer.fit()
    finally:
        trainer.loader.close()
    if done:
        say(f"{out} was finished before: nothing is trained or evaluated again, its records stay, the report is regenerated")
    else:
        opened = time.perf_counter()
        with trainer.writing("the evaluation after training"):
            evaluator(trainer)
            watch(trainer)
        trainer.records.finish()
        if world.first:
            now = time.perf_counter()
            evaluating += now - opened
            about = {"cold_start_seconds": cold, "evaluation_seconds": evaluating, "total_seconds": now - started}
            record = summary._asdict() | about
            append_metrics(out, {"kind": "summary", "step": trainer.step.steps_done} | record)
            closing_lines(out, record, trainer.records.told)
            if share := evaluator.closing(summary.seconds - evaluator.spent):
                say(share)
    if world.first:
        write_report(folder, device)
    return summary


def note_settings(folder: RunFolder, cfg: Config, images: catalog.Catalog, step: int, ended: Config | None) -> None:
    """Writes ``cfg`` and which images the run has, and says where it had others.

    ended: the config of a finished run, which stays with its images: a new one would say of the weights what they were not trained
    by. Only where the same images lie now is written down.
    """
    parts = {"train": images.train, "test": images.test, "validation": images.validation}
    lists = {name: part.identity for name, part in parts.items() if part is not None}
    before = read_data(folder.path)
    same = before is None or before["lists"] == lists
    if not same:
        say(f"the images are not those of before step {step}: what was evaluated until then is of others")
    if ended is not None and not same:
        return
    write_text(folder.config, to_yaml(cfg if ended is None else replace(ended, data=replace(ended.data, root=cfg.data.root))))
    append_data(folder.path, step, cfg.data.root, lists)
    write_classes(folder.path, images.train.classes)


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
        images = hold_out(build.data(cfg, cache_dir=None), cfg, tell=True)
        cfg = build.decide_queue(cfg, len(images.train))
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
    say(f"a run would take {counted(steps, 'step')}: {counted(cfg.epochs, 'epoch')} of {epoch}; nothing was written")


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


def closing_lines(out: Path, record: dict[str, float], told: int = 0) -> None:
    """The closing lines: before and after, where the time went, and how many symptoms were told."""
    records = read_metrics(out)
    evaluated = [r for r in records if r["kind"] == "eval"]
    if evaluated:
        ends = [evaluated[0], evaluated[-1]][-len(evaluated) :]  # one of a run that began from another's last checkpoint
        epochs = " -> ".join(f"epoch {r['epoch']}" for r in ends)
        measured = [name for name in _SHOWN if all(name in r for r in ends)]
        say(f"{ends[-1]['protocol']}{f', {epochs}:' if measured else ''}")
        for name in measured:
            values = " -> ".join(f"{100 * r[name]:5.1f} %" for r in ends)
            say(f"  {name:>11} {values}")
    for line in best_lines(out, records):
        say(line)
    if record["steps"]:
        steps = record["seconds"] - record["hook_seconds"] - record["checkpoint_seconds"] - record["compile_seconds"]
        say(
            f"{counted(record['steps'], 'step')} in {steps:.0f} s ({record['images_per_s']:.0f} img/s, data wait "
            f"{100 * record['data_wait']:.0f} %), compile {record['compile_seconds']:.0f} s, checkpoints "
            f"{record['checkpoint_seconds']:.1f} s, evaluation {record['evaluation_seconds'] + record['hook_seconds']:.0f} s, "
            f"cold start {record['cold_start_seconds']:.0f} s, total {record['total_seconds']:.0f} s"
        )
    if told:
        say(f"{counted(told, 'warning')} above; the report lists what people do about {'it' if told == 1 else 'them'}")
    say(f"run folder: {out}")


def best_lines(out: Path, records: list[dict[str, Any]]) -> list[str]:
    """Which weights are the best, and how they do on the test split where that was evaluated then."""
    best = best_of(out)
    if best is None:
        return []
    measure, step, value = best["measure"], int(best["step"]), float(best["value"])
    text = f"best by validation {measure}: epoch {best['epoch']}, {100 * value:.1f} %, in {RunFolder(out).best.name}"
    tested = [r for r in records if r["kind"] == "eval" and r["step"] == step and measure in r]
    text += f"; its {measure} on the test split {100 * tested[-1][measure]:.1f} %" if tested else ""
    before = next((r[measure] for r in records if r["kind"] == "validation" and r["step"] == 0 and measure in r), None)
    lines = [f"{text}; {RunFolder(out).weights.name} holds the last"]
    if before is not None and before > value:
        lines.append(f"warning: no epoch is better than the network before training, validation {measure} {100 * before:.1f} %")
    return lines


def write_report(folder: RunFolder, device: torch.device) -> None:
    """The run's report. Everything is saved by now: what goes wrong here is said and costs the run nothing."""
    from engine import report  # matplotlib, scikit-learn: a dry run does not need them

    try:
        report.write([folder.path], folder.report, device, quick=True)
    except (Exception, KeyboardInterrupt) as error:
        say(f"no report ({type(error).__name__}: {error}); the run is complete, python -m engine.report {folder.path} tries again")
