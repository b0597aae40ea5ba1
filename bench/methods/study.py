"""How a study is carried out: its cells in separate processes, their records, and the tables of all records."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.methods import records
from bench.methods.cells import Cell, Study
from bench.methods.maps import coverage, picture
from bench.methods.run_cell import HELD_OUT, images_of, run_cell
from bench.methods.settings import FILE_KEYS, SETTINGS, WEIGHTS, weights_file, weights_sha256
from bench.methods.table import markdown, summarize
from engine.config import Config, flatten, read, resolve
from engine.console import counted, say
from engine.data import sampler
from engine.data.catalog import Catalog
from engine.errors import ConfigError
from engine.files import cache_folder, write_text
from engine.synthetic import dataset
from ppssl.settings import resolve_variant


def configure(cell: Cell, args: argparse.Namespace, seed: int, root: Path) -> Config:
    """The setting's pinned recipe with the cell's keys, then the command line's."""
    setting = SETTINGS[args.setting]
    values = read(setting.recipe.read_bytes(), str(setting.recipe)) | cell.overrides | args.overrides
    values |= {"seed": seed, "data.root": str(root), "amp": None if args.amp == "off" else args.amp}
    values |= {"run.log_every": 10**6, "run.save_every_steps": 10**9}
    values |= {key: str(weights_file()) for key in FILE_KEYS if values.get(key) == WEIGHTS}
    if args.jobs > 1:
        values |= {"data.workers": 0}  # a cell that has one core of several decodes in its own process
    return resolve(values, f"cell {cell.name!r}")


def epochs_of(budget: float, train_images: int, batch_size: int) -> int:
    """Whole epochs, at least one, that come nearest to ``budget`` images."""
    return max(1, round(budget / (batch_size * sampler.steps_per_epoch(train_images, batch_size))))


def specification(cell: Cell, cfg: Config, images: Catalog | None = None, tune: bool = False) -> dict[str, Any]:
    """What a cell's result depends on; its hash is in the name of the record.

    ``world`` is the stamp of the synthetic dataset, ``images`` the photographs, ``variant`` the value of what the config leaves to
    the method's variant, ``weights`` the sha256 of a weights file that the recipe names, ``validation`` what is evaluated on.
    """
    free = ("out", "resume", "data.root", "data.workers")
    keys = {key: value for key, value in flatten(cfg).items() if key not in free and not key.startswith("run.")}
    of_variant = flatten(resolve_variant(cfg))
    found = keys | {"kind": cell.kind, "embeddings": cell.teacher, "variant": {k: of_variant[k] for k in keys if keys[k] is None}}
    for key in FILE_KEYS:
        if Path(str(keys[key])).name == WEIGHTS:
            found |= {key: WEIGHTS, "weights": weights_sha256()}
    if not cell.has_seed:
        found["seed"] = None
    if images is None:
        stamp = Path(cfg.data.root, "birds.json")
        return found | {"world": json.loads(stamp.read_text()) if stamp.is_file() else None}
    splits = {"train": images.train, "test": images.test}
    found["images"] = {name: {"count": len(of), "identity": of.identity} for name, of in splits.items() if of is not None}
    return found | ({"validation": f"{HELD_OUT:g} of each class of the training photos, drawn by seed 0"} if tune else {})


def dataset_root(args: argparse.Namespace) -> Path:
    """``data.root`` from the command line, the photographs of the setting, or the synthetic dataset of --dataset-seed, drawn where
    it is missing. Raises ``ConfigError`` where photographs are missing."""
    if root := args.overrides.get("data.root"):
        return Path(root)
    if SETTINGS[args.setting].folder is not None:
        return SETTINGS[args.setting].root(args.data)
    root = cache_folder() / f"birds-{args.dataset_seed}"
    return dataset.generate(root, seed=args.dataset_seed) if dataset.is_missing(root) else root


def tabulate(study_name: str, study: Study, found: list[dict[str, Any]], args: argparse.Namespace, command: str) -> None:
    """Writes STUDY.json and STUDY.md."""
    rows = summarize(found, [cell.name for cell in study.cells], study.reference, study.floor)
    images = sorted({r["images"] for r in found if "images" in r})  # whole epochs, the nearest to the budget
    table = {"study": study_name, "command": command, "images": images, "reference": study.reference}
    if args.setting != "synthetic":
        table |= {"setting": args.setting, "tuning": args.tune}
    table |= {"rows": rows} | records.compact(found)
    path = table_path(study_name, args)
    write_text(path, records.one_record_per_line(table))
    write_text(path.with_suffix(".md"), page(table))


def table_path(study_name: str, args: argparse.Namespace) -> Path:
    """STUDY.json, or STUDY-tuning.json of --tune."""
    return args.out / SETTINGS[args.setting].results / f"{study_name}{'-tuning' if args.tune else ''}.json"


def page(table: dict[str, Any]) -> str:
    """The Markdown of what STUDY.json holds."""
    setting = SETTINGS[table.get("setting", "synthetic")]
    study = setting.studies[table["study"]]
    commits = ", ".join(sorted({r["commit"] for r in table["records"]}))
    seen = " or ".join(f"{count:,}" for count in table["images"]) or "no"
    title = study.title if setting.folder is None else f"{study.title}, {setting.name}"
    head = f"# {title}\n\n`{table['command']}`\n\n{seen} images per run; commit {commits}.\n\n"
    if study.is_planned:
        head += _planned(table, study) + "\n\n"
    return head + markdown(table["rows"], table["reference"], study.is_planned) + "\n" + setting.explained(study)


def _planned(table: dict[str, Any], study: Study) -> str:
    """What the table may be read for."""
    assert study.seeds is not None
    if table.get("tuning"):
        return "Tuning: evaluated on training photos that were held out, with seeds that no other table has. It chose settings."
    done = min((len(row["seeds"]) + len(row["failed"]) for row in table["rows"] if row["seeds"] or row["failed"]), default=0)
    rows = {row["cell"] for row in table["rows"]}
    if done >= study.seeds and rows >= {cell.name for cell in study.cells}:
        return f"Complete: the {study.seeds} seeds that were planned, on test images that chose nothing."
    return (
        f"**Incomplete:** {len(rows)} of {len(study.cells)} rows, the shortest with {done} of the {study.seeds} seeds that were "
        f"planned. The p values mean nothing before all are there."
    )


def run_study(name: str, args: argparse.Namespace, command: str) -> None:
    """Runs every cell without a record, ``args.jobs`` at a time, seed by seed, so that a table is balanced at any time. A record is
    a file in ``args.work`` or a line of the table in ``args.out``, which also keeps its other seeds.

    Raises ``ConfigError`` where that table has records of another specification, ``RuntimeError`` naming cells that failed.
    """
    setting = SETTINGS[args.setting]
    study, root = setting.studies[name], dataset_root(args)
    some = configure(study.cells[0], args, args.first_seed, root)
    images = images_of(some, args.tune)
    coverage(images.test, some, cache_folder())  # once, before several cells need it
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    plans = [
        planned(name, cell, args, seed, root, images) for seed in seeds for cell in study.cells if cell.has_seed or seed == seeds[0]
    ]
    committed = records.read(table_path(name, args))
    kept = of_this_study(committed, name, args, root, images)
    kept += [record for other in study.shares for record in taken_over(records.read(table_path(other, args)), plans)]
    asked = [plan for plan in plans if not args.only or plan.cell.name in args.only]
    done = [plan for plan in asked if record_of(plan, kept) is not None]
    say(f"{name}: {counted(len(asked), 'cell')}, {len(done)} of them done before; {args.jobs} at a time")
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
                tabulate(name, study, records_of(plans, kept), args, command)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failures:
        raise RuntimeError("; ".join(failures))
    tabulate(name, study, records_of(plans, kept), args, command)
    path = table_path(name, args)
    if args.keep:
        of_first = [(p.cell.name, p.record.with_suffix("")) for p in plans if p.cfg.seed == args.first_seed]
        picture(of_first, f"{study.title}: last epoch, seed {args.first_seed}", path.with_suffix(".jpg"))
    say(f"written: {path.with_suffix('.md')}")


class Plan(NamedTuple):
    """One cell with one seed, and where its result goes."""

    cell: Cell
    cfg: Config
    specification: dict[str, Any]
    record: Path


def planned(study_name: str, cell: Cell, args: argparse.Namespace, seed: int, root: Path, images: Catalog | int) -> Plan:
    """The plan of a cell. images: of a synthetic dataset, the number of training images will do."""
    setting = SETTINGS[args.setting]
    cfg = configure(cell, args, seed, root)
    if cell.trains:
        budget = setting.studies[study_name].budget_fraction * cell.budget * args.budget
        train_images = images if isinstance(images, int) else len(images.train)
        cfg = dataclasses.replace(cfg, epochs=epochs_of(budget, train_images, cfg.batch_size))
    photographs = None if isinstance(images, int) or setting.folder is None else images
    spec = json.loads(json.dumps(specification(cell, cfg, photographs, args.tune)))
    key = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:12]
    label = f"{cell.name.replace(' ', '_').replace(',', '')}-{seed if cell.has_seed else 'any'}"
    return Plan(cell, cfg, spec, args.work / setting.results / study_name / f"{label}-{key}.json")


def of_this_study(
    found: list[dict[str, Any]], name: str, args: argparse.Namespace, root: Path, images: Catalog
) -> list[dict[str, Any]]:
    """The records of a committed table, all of which must be of today's specification, whatever their seeds. Raises ``ConfigError``
    naming what differs."""
    cells = {cell.name: cell for cell in SETTINGS[args.setting].studies[name].cells}
    for record in found:
        if record["cell"] not in cells:
            raise ConfigError(f"{table_path(name, args)} has a cell {record['cell']!r}, which study {name} has not; {_ELSEWHERE}")
        seed = args.first_seed if record["seed"] is None else record["seed"]
        wanted = planned(name, cells[record["cell"]], args, seed, root, images).specification
        if differs := next(records.differences(record["specification"], wanted), None):
            raise ConfigError(
                f"{table_path(name, args)} holds records of another specification: of {record['cell']!r}, {differs}; {_ELSEWHERE}"
            )
    return found


def taken_over(found: Sequence[dict[str, Any]], plans: Sequence[Plan]) -> list[dict[str, Any]]:
    """Of the records of another study those of ``plans``, under the names that their cells have here."""
    of_seed = ((record, plan) for record in found for plan in plans if record["seed"] == plan.specification["seed"])
    renamed = ((record | {"cell": plan.cell.name}, plan) for record, plan in of_seed)
    return [record for record, plan in renamed if records.is_of(record, plan.cell.name, plan.specification)]


_ELSEWHERE = "name another folder for this table (--out DIR), or move that file away"


def run_apart(plan: Plan, args: argparse.Namespace) -> int:
    """Runs one cell in a separate process; returns its exit code."""
    folder = plan.record.with_suffix("") if args.keep else None
    threads = max(1, torch.get_num_threads() // args.jobs)
    process = multiprocessing.get_context("spawn").Process(target=run_cell, args=(*plan, folder, threads))
    process.start()
    process.join()
    return process.exitcode


def record_of(plan: Plan, kept: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """What is known of a plan: its file, or its record among those ``kept`` of the table."""
    if plan.record.is_file():
        return json.loads(plan.record.read_text())
    return next((record for record in kept if records.is_of(record, plan.cell.name, plan.specification)), None)


def records_of(plans: Sequence[Plan], kept: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """The records of ``plans``, and those that the table had beside them, by seed and in the order of the plans."""
    found = [record for plan in plans if (record := record_of(plan, kept)) is not None]
    known = {(record["cell"], record["seed"]) for record in found}
    order = {name: place for place, name in enumerate(dict.fromkeys(plan.cell.name for plan in plans))}
    found += [record for record in kept if (record["cell"], record["seed"]) not in known]
    return sorted(found, key=lambda r: (-1 if r["seed"] is None else r["seed"], order[r["cell"]]))


def shown(record: Path) -> str:
    found = json.loads(record.read_text())
    return found.get("failed") or f"rank-1 {100 * found['rank1']:.1f} %, mAP {100 * found['mAP']:.1f} %"
