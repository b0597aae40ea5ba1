"""How a study is carried out: its cells in separate processes, their records, and the tables of all records."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import multiprocessing
import platform
import resource
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.methods.cells import STUDIES, Cell, Study
from bench.methods.maps import coverage, look, picture
from bench.methods.table import markdown, summarize
from engine import build
from engine.build import assemble
from engine.config import Config, flatten, read, resolve, to_yaml
from engine.console import say
from engine.data import sampler, teacher_cache
from engine.data.catalog import Catalog, ImageList
from engine.evaluation import attention_maps, linear
from engine.evaluation.features import extract
from engine.evaluation.retrieval import retrieval
from engine.files import cache_folder, write_text
from engine.synthetic import dataset
from ppssl.encoder import FeatureNet
from ppssl.method import Method
from ppssl.teacher import Teacher

ROOT = Path(__file__).resolve().parents[2]
RECIPE = Path(__file__).with_name("synthetic.yaml")
"""What every cell starts from. It is pinned here, so that committed studies keep their meaning when the demo changes."""
PERCENTS = (100, 50, 20)
"""Of the training labels that the linear probes see."""
NOTE = """Percentages are mean ± standard deviation over seeds. Differences are paired by seed (same order and views), with the
number of seeds in which they are positive; p is of a two-sided paired t test, uncorrected for the number of rows. "Unmasked"
pools the same network without its mask, "by the silhouette" with the true outline of the bird in place of the mask. "On the
bird" is the fraction of a map's mass that lies on the bird over the fraction of the image that is bird: 1 is chance. The
synthetic dataset shows how the methods behave at this budget from random weights. It shows nothing about photographs, pretrained
weights or hundreds of epochs.
"""


def configure(cell: Cell, args: argparse.Namespace, seed: int, root: Path) -> Config:
    """The pinned recipe with the cell's keys, then the command line's."""
    values = read(RECIPE.read_bytes(), str(RECIPE)) | cell.overrides | args.overrides
    values |= {"seed": seed, "data.root": str(root), "amp": None if args.amp == "off" else args.amp}
    values |= {"run.log_every": 10**6, "run.save_every_steps": 10**9}
    if args.jobs > 1:
        values |= {"data.workers": 0}  # a cell that has one core of several decodes in its own process
    return resolve(values, f"cell {cell.name!r}")


def epochs_of(budget: float, train_images: int, batch_size: int) -> int:
    """Whole epochs, at least one, that come nearest to ``budget`` images."""
    return max(1, round(budget / (batch_size * sampler.steps_per_epoch(train_images, batch_size))))


def specification(cell: Cell, cfg: Config) -> dict[str, Any]:
    """What a cell's result depends on; its hash is in the name of the record. ``world`` is the stamp of the synthetic dataset."""
    free = ("out", "resume", "data.root", "data.workers")
    keys = {key: value for key, value in flatten(cfg).items() if key not in free and not key.startswith("run.")}
    stamp = Path(cfg.data.root, "birds.json")
    world = json.loads(stamp.read_text()) if stamp.is_file() else None
    return keys | {"kind": cell.kind, "embeddings": cell.teacher, "world": world}


def run_cell(cell: Cell, cfg: Config, spec: dict[str, Any], record: Path, folder: Path | None, threads: int) -> None:
    """Trains and measures one cell and writes its record; in a separate process, so that memory and CPU time are the cell's."""
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cfg = build.resolve(cfg, device)
    images = build.data(cfg, cache_dir=cache_folder(), progress=False)
    found: dict[str, Any] = {"cell": cell.name, "seed": cfg.seed, "specification": spec}
    cache = dict(device=device, cache_dir=cache_folder(), workers=cfg.data.workers)
    if cell.kind == "teacher":
        teacher = build.teacher(cfg, device)
        rows = [teacher_cache.embeddings(teacher, part, **cache).float() for part in (images.train, images.test)]
        found |= measure_features(*rows, images)
    elif cell.kind == "untrained":
        found |= measure(build.method(cfg, None).to(device), cfg, images, device)
    else:

        def embed(teacher: Teacher) -> Tensor:
            rows = teacher_cache.embeddings(teacher, images.train, **cache)
            return altered(rows, cell.teacher, cfg.seed, labels_of(images.train, device))

        teacher = build.teacher(cfg, device)
        trainer = assemble(cfg, images, device, teacher=teacher, out=folder, cache=cache_folder(), embed=embed)
        if folder is not None:
            trainer.begin(None)
            write_text(folder / "config.yaml", to_yaml(cfg))
            watch = attention_maps.Watch(folder, cfg, images, device)
            trainer.hooks.append(watch.after_epoch)
        before = cpu_seconds()
        try:
            summary = trainer.fit()
            trainer.loader.close()
            found["cpu_seconds_per_epoch"] = (cpu_seconds() - before) / cfg.epochs
            peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 1024 * _usage(resource.RUSAGE_SELF).ru_maxrss
            found |= {"peak_memory_mib": peak / 2**20, "steps": summary.steps, "images": summary.steps * cfg.batch_size}
            if folder is not None:
                watch(trainer)
            found |= measure(trainer.method, cfg, images, device)
        except FloatingPointError as error:
            found["failed"] = str(error)
    write_text(record, json.dumps(found | provenance(), indent=1) + "\n")


def altered(rows: Tensor, how: str, seed: int, labels: Tensor) -> Tensor:
    """Teacher embeddings [N, E]: as they are (``true``), each image with another's (``shuffled``), their mean (``constant``), or
    that mean and a random direction for each of the ``labels`` [N] (``species``), which no teacher without labels could give."""
    if how == "true":
        return rows
    generator = torch.Generator().manual_seed(seed)
    if how == "shuffled":
        return rows[torch.randperm(len(rows), generator=generator).to(rows.device)]
    found = F.normalize(rows.float().mean(0, keepdim=True), dim=1).expand(len(rows), -1)
    if how == "species":
        directions = F.normalize(torch.randn(int(labels.max()) + 1, rows.shape[1], generator=generator), dim=1).to(rows.device)
        # 0.8: between species the logits then differ by a standard deviation of 1.4 (of the demo's teacher: 0.1)
        found = F.normalize(found + 0.8 * directions[labels], dim=1)
    return found.to(rows.dtype).contiguous()


def measure(method: Method, cfg: Config, images: Catalog, device: torch.device) -> dict[str, Any]:
    """Retrieval and linear probes of the method's network, retrieval without its mask, and, on a synthetic dataset, where it looks
    (``bench.methods.maps``). Raises ``FloatingPointError``."""
    network = method.network
    train, test = (extract(network, part, cfg, device) for part in (images.train, images.test))
    if not all(torch.isfinite(features).all() for features in (train, test)):
        raise FloatingPointError("the features are not finite: the network has diverged")
    labels = labels_of(images.test, device)
    found = measure_features(train, test, images)
    plain = test if network.mask is None else extract(FeatureNet(network.trunk), images.test, cfg, device)
    unmasked = retrieval(plain, labels)
    found |= {"plain_rank1": unmasked.rank1, "plain_mAP": unmasked.mAP}
    return found | look(method, cfg, images.test, labels, device, cache_folder())


def measure_features(train: Tensor, test: Tensor, images: Catalog) -> dict[str, float]:
    """rank1, rank5, mAP inside the test split; accuracy of linear probes on ``PERCENTS`` of the training labels; in [0, 1]."""
    of_train, of_test = (labels_of(part, test.device) for part in (images.train, images.test))
    ranked = retrieval(test, of_test)
    found = {"rank1": ranked.rank1, "rank5": ranked.rank5, "mAP": ranked.mAP}
    classes = int(of_train.max()) + 1
    for percent in PERCENTS:
        some = linear.fraction(of_train, percent, seed=0)
        if int(torch.bincount(of_train[some]).max()) < 2:
            continue  # nothing to hold out for the choice of the penalty
        found[f"linear_{percent}"] = linear.convex(train[some], of_train[some], classes).probe.accuracy(test, of_test)
    return found


def labels_of(images: ImageList, device: torch.device) -> Tensor:
    return torch.as_tensor(images.labels, dtype=torch.int64, device=device)


def _usage(who: int) -> resource.struct_rusage:
    return resource.getrusage(who)


def cpu_seconds() -> float:
    """CPU time of this process, its threads and the children it has waited for, in seconds."""
    return sum(u.ru_utime + u.ru_stime for u in map(_usage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def provenance() -> dict[str, str]:
    """Where and with what a cell was run."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "commit": commit or "unknown", "torch": torch.__version__, "device": device, "threads": str(torch.get_num_threads()),
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def dataset_root(args: argparse.Namespace) -> Path:
    """``data.root`` from the command line, or the synthetic dataset of --dataset-seed, drawn where it is missing."""
    if root := args.overrides.get("data.root"):
        return Path(root)
    root = cache_folder() / f"birds-{args.dataset_seed}"
    return dataset.generate(root, seed=args.dataset_seed) if dataset.is_missing(root) else root


def tabulate(study_name: str, study: Study, records: list[dict[str, Any]], args: argparse.Namespace, command: str) -> None:
    """Writes STUDY.json and STUDY.md."""
    rows = summarize(records, [cell.name for cell in study.cells], study.reference)
    images = sorted({r["images"] for r in records if "images" in r})  # whole epochs, the nearest to the budget
    table = {"study": study_name, "command": command, "images": images, "reference": study.reference}
    table |= {"rows": rows, "records": records}
    write_text(args.out / f"{study_name}.json", one_record_per_line(table))
    write_text(args.out / f"{study_name}.md", page(table))


def page(table: dict[str, Any]) -> str:
    """The Markdown of what STUDY.json holds."""
    commits = ", ".join(sorted({r["commit"] for r in table["records"]}))
    seen = " or ".join(f"{count:,}" for count in table["images"]) or "no"
    head = f"# {STUDIES[table['study']].title}\n\n`{table['command']}`\n\n{seen} images per run; commit {commits}.\n\n"
    return head + markdown(table["rows"], table["reference"]) + "\n" + NOTE


def one_record_per_line(table: dict[str, Any]) -> str:
    """JSON in which a list has a line for each of its entries, so that a change of one record is a change of one line."""
    lines = []
    for key, value in table.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        else:
            value = json.dumps(value)
        lines.append(f" {json.dumps(key)}: {value}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def run_study(name: str, args: argparse.Namespace, command: str) -> None:
    """Runs every cell without a record, ``args.jobs`` at a time, seed by seed, so that a table is balanced at any time."""
    study = STUDIES[name]
    root = dataset_root(args)
    some = configure(study.cells[0], args, args.first_seed, root)
    images = build.data(some, cache_dir=cache_folder())
    coverage(images.test, some.data.image_size, cache_folder())  # once, before several cells need it
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    plans = [planned(name, cell, args, seed, root, len(images.train)) for seed in seeds for cell in study.cells]
    asked = [plan for plan in plans if not args.only or plan.cell.name in args.only]
    done = [plan for plan in asked if plan.record.is_file()]
    say(f"{name}: {len(asked)} cells, {len(done)} of them done before; {args.jobs} at a time")
    failures: list[str] = []
    with ThreadPoolExecutor(args.jobs) as pool:
        running = {pool.submit(run_apart, plan, args): plan for plan in asked if plan not in done}
        try:
            for future in as_completed(running):
                plan = running[future]
                if future.cancelled():
                    continue
                if code := future.result():
                    failures.append(f"cell {plan.cell.name!r}, seed {plan.cfg.seed} ended with exit code {code}; see above")
                    pool.shutdown(wait=False, cancel_futures=True)  # running cells are completed
                    continue
                done.append(plan)
                say(f"{name} {len(done)}/{len(asked)}: {plan.cell.name}, seed {plan.cfg.seed}: {shown(plan.record)}")
                tabulate(name, study, records_of(plans), args, command)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failures:
        raise RuntimeError("; ".join(failures))
    tabulate(name, study, records_of(plans), args, command)
    if args.keep:
        of_first = [(p.cell.name, p.record.with_suffix("")) for p in plans if p.cfg.seed == args.first_seed]
        picture(of_first, f"{study.title}: last epoch, seed {args.first_seed}", args.out / f"{name}.jpg")
    say(f"written: {args.out / name}.md")


class Plan(NamedTuple):
    """One cell with one seed, and where its result goes."""

    cell: Cell
    cfg: Config
    specification: dict[str, Any]
    record: Path


def planned(study_name: str, cell: Cell, args: argparse.Namespace, seed: int, root: Path, train_images: int) -> Plan:
    cfg = configure(cell, args, seed, root)
    if cell.kind == "train":
        budget = STUDIES[study_name].budget_fraction * args.budget
        cfg = dataclasses.replace(cfg, epochs=epochs_of(budget, train_images, cfg.batch_size))
    spec = specification(cell, cfg)
    key = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:12]
    label = f"{cell.name.replace(' ', '_').replace(',', '')}-{seed}"
    return Plan(cell, cfg, spec, args.work / study_name / f"{label}-{key}.json")


def run_apart(plan: Plan, args: argparse.Namespace) -> int:
    """Runs one cell in a separate process; returns its exit code."""
    folder = plan.record.with_suffix("") if args.keep else None
    threads = max(1, torch.get_num_threads() // args.jobs)
    process = multiprocessing.get_context("spawn").Process(target=run_cell, args=(*plan, folder, threads))
    process.start()
    process.join()
    return process.exitcode


def records_of(plans: Sequence[Plan]) -> list[dict[str, Any]]:
    return [json.loads(plan.record.read_text()) for plan in plans if plan.record.is_file()]


def shown(record: Path) -> str:
    found = json.loads(record.read_text())
    return found.get("failed") or f"rank-1 {100 * found['rank1']:.1f} %, mAP {100 * found['mAP']:.1f} %"
