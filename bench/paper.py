"""The paper's tables and figures as commands: every cell is a run, and stands beside what was published.

    python -m bench.paper --table 1 --data-root /data                 # /data/cub, /data/cars, ... as the recipes expect them
    python -m bench.paper --table 4 --seeds 5 amp=bf16                # any override of engine.train goes to every run
    python -m bench.paper --figure 5 --dry-run                        # one step of every cell, nothing kept

What the exhibits consist of is data: bench/paper.yaml. A cell is a run folder below --out, named by what differs from the recipe:
exhibits share their runs, a stopped command continues where it was, a finished run is neither trained nor judged again. Reported
is the last epoch. A cell without its data set or method is left empty, with the reason.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from rich.table import Table

from engine import build, files, run, run_folder
from engine.command import FAILURES
from engine.config import Config, command_line, flatten, from_yaml, to_yaml
from engine.console import console, say
from engine.evaluation.evaluator import Candidate, feature_name, judge, of_teacher
from engine.evaluation.evaluator import keep as keep_records
from engine.evaluation.features import of_run
from engine.files import write_atomically
from engine.pretrained import third_party, weights_file
from engine.pretrained.run import load_run
from engine.training.trainer import Stopped
from ppssl.encoder import FeatureNet, Trunk
from ppssl.method import METHODS

HERE = Path(__file__).resolve().parent
# Where a run lies and how it is executed makes no other cell of it.
_NOT_IN_A_NAME = ("seed", "out", "resume", "data.root", "data.loader", "data.resident", "data.workers")


@dataclass(frozen=True)
class Row:
    """One line of an exhibit."""

    name: str
    set: dict[str, Any] = field(default_factory=dict)
    """Overrides of the recipe."""
    untouched: str | None = None
    """``initial``: the network before training; ``teacher``: the teacher's image features."""


@dataclass(frozen=True)
class Claim:
    """A published number, in points of percent."""

    row: str
    data: str
    measure: str
    source: str
    value: float | None = None
    gain: float | None = None
    over: tuple[str, ...] = ()
    """Rows whose best the ``gain`` is over."""


@dataclass(frozen=True)
class Exhibit:
    """A table or a figure."""

    key: str
    title: str
    data: tuple[str, ...]
    measures: tuple[str, ...]
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...]
    notes: tuple[str, ...] = ()
    picture: str | None = None


def exhibits() -> dict[str, Exhibit]:
    """What bench/paper.yaml holds, by ``table N`` and ``figure N``."""
    found = {}
    for key, entry in yaml.safe_load((HERE / "paper.yaml").read_text(encoding="utf-8")).items():
        lists = {name: tuple(entry.pop(name, ())) for name in ("data", "measures", "notes")}
        claims = tuple(Claim(**c | {"over": tuple(c.get("over", ()))}) for c in entry.pop("claims"))
        found[key] = Exhibit(key, rows=tuple(Row(**r) for r in entry.pop("rows")), claims=claims, **lists, **entry)
    return found


class Plan(NamedTuple):
    """What the command line adds to every cell."""

    data_root: Path
    out: Path
    seeds: int
    overrides: tuple[str, ...]


class Cell(NamedTuple):
    """One run."""

    row: Row
    data: str
    config: Config
    folder: Path


def cells(exhibit: Exhibit, plan: Plan) -> Iterator[Cell]:
    """Every run of an exhibit; rows that train nothing have one seed unless the initial weights are random."""
    for data in exhibit.data:
        recipe = flatten(from_yaml(command_line.find_recipe(data)))
        for row in exhibit.rows:
            words = ["--cfg", data, *(f"{key}={_word(value)}" for key, value in row.set.items()), *plan.overrides]
            words += [f"data.root={plan.data_root / data}"]
            if row.untouched == "initial":
                words += ["method.name=moco"]  # the plain pooled feature
            base = command_line.parse(words).config
            differs = {k: v for k, v in flatten(base).items() if v != recipe[k] and not k.startswith("run.")}
            name = ",".join(f"{k}={_word(v)}" for k, v in differs.items() if k not in _NOT_IN_A_NAME) or "recipe"
            if row.untouched:
                name = f"{row.untouched} {name}"
            if len(name) > 120:  # file systems end at 255
                name = f"{name[:110]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
            once = row.untouched == "teacher" or (row.untouched and base.encoder.weights != "none")
            for seed in range(1 if once else plan.seeds):
                folder = plan.out / data / name.replace("/", "_") / f"seed{seed}"
                yield Cell(row, data, replace(base, seed=seed, out=str(folder)), folder)


def _word(value: Any) -> str:
    """A value as an override is written; files beside paper.yaml are found from anywhere."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return str(HERE / value) if str(value).endswith(".yaml") else "null" if value is None else str(value)


def obstacle(cell: Cell) -> str | None:
    """Why a cell cannot be run here, if it cannot."""
    if cell.config.method.name not in METHODS:
        return f"method {cell.config.method.name} is not registered (there are {', '.join(sorted(METHODS))})"
    if not Path(cell.config.data.root).is_dir():
        return f"no data: {cell.config.data.root} is not there"
    return None


def run(cell: Cell, measures: Sequence[str]) -> dict[str, float]:
    """Trains and judges a cell, or what is left of it, and returns its measures as fractions in [0, 1]. Raises what training and
    evaluation raise, ``Stopped`` after a signal."""
    path = cell.folder / "measures.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if set(measures) <= set(known):
        return known
    if cell.row.untouched == "initial":
        keep_initial(cell)
    elif cell.row.untouched is None and not finished(cell):
        run.train(cell.config, cell.folder, time.perf_counter())
    known |= measure(cell, measures)
    write_atomically(path, lambda temporary: Path(temporary).write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8"))
    return known


def finished(cell: Cell) -> bool:
    """Whether the run in the cell's folder has reached its last epoch."""
    last = run_folder.read_metrics(cell.folder)[-1:]
    path = cell.folder / "weights.safetensors"
    return bool(last) and last[0]["kind"] == "summary" and weights_file.read_metadata(path).get("epoch") == str(cell.config.epochs)


def keep_initial(cell: Cell) -> None:
    """A run folder of the network that training would start from."""
    torch.manual_seed(cell.config.seed)
    trunk = Trunk(cell.config.encoder.arch)
    say(f"encoder: {third_party.initialise(trunk, cell.config.encoder.weights)}")
    cell.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(
        cell.folder / "config.yaml", lambda temporary: Path(temporary).write_text(to_yaml(cell.config), encoding="utf-8")
    )
    weights_file.save_weights(cell.folder / "weights.safetensors", FeatureNet(trunk).weights(), {"step": "0", "epoch": "0"})


def measure(cell: Cell, measures: Sequence[str]) -> dict[str, float]:
    """What the cell's features reach: retrieval on the test split and, where ``measures`` has ``linear P %``, the papers' probe
    (SGD) on P % of the training labels. The records go to evaluation.json in the cell's folder."""
    cfg, device = cell.config, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if cell.row.untouched == "teacher":
        candidate = of_teacher(build.teacher(cfg, device), device, cfg.data.workers)
    else:
        made = load_run(cell.folder, device)._replace(config=cfg)
        candidate = Candidate(
            cell.row.untouched or "run", feature_name(made.network), made.epoch, made.step,
            lambda images, split: of_run(made, images, split, cell.folder, device),
        )  # fmt: skip
    fractions = [float(name.split()[1]) for name in measures if name.startswith("linear")]
    protocols = ("retrieval", "linear") if fractions else ("retrieval",)
    images = build.data(cfg, cache_dir=files.cache_folder())
    records = judge(candidate, images, cfg, device, protocols=protocols, fractions=fractions, solvers=("sgd",))
    keep_records(cell.folder / "evaluation.json", records)
    found = {name: records[0][name] for name in ("rank1", "rank5", "mAP")}
    return found | {f"linear {record['fraction']:g} %": record["top1"] for record in records[1:]}


class Outcome(NamedTuple):
    """What became of one row on one data set."""

    measures: list[dict[str, float]]
    """One a seed."""
    reason: str | None
    """Why seeds are missing."""


def carry_out(exhibit: Exhibit, plan: Plan, *, dry_run: bool) -> tuple[dict[tuple[str, str], Outcome], int]:
    """Runs every cell that can be run; returns the outcomes by (row, data) and an exit code. A failed cell does not end the others,
    a signal does."""
    todo = [cell for cell in cells(exhibit, plan) if not dry_run or cell.config.seed == 0]
    found: dict[tuple[str, str], Outcome] = {}
    code = 0
    for number, cell in enumerate(todo, 1):
        measures, reason = found.get((cell.row.name, cell.data), Outcome([], None))
        why = obstacle(cell)
        if why is None:
            say(f"[{number}/{len(todo)}] {exhibit.key}: {cell.row.name} on {cell.data}, seed {cell.config.seed} ({cell.folder})")
            try:
                if not dry_run:
                    measures = [*measures, run(cell, exhibit.measures)]
                elif cell.row.untouched is None:
                    run.dry_run(replace(cell.config, out=None))
            except Stopped as stopped:
                say(str(stopped))
                return found, stopped.code
            except (*FAILURES, RuntimeError) as error:
                code, why = 1, f"failed: {error}"
                say(f"error: {error}")
            finally:
                torch.compiler.reset()  # the next cell's step is another graph
                gc.collect()
        found[cell.row.name, cell.data] = Outcome(measures, why or reason or ("one step done" if dry_run else None))
    return found, code


def show(exhibit: Exhibit, found: dict[tuple[str, str], Outcome], plan: Plan) -> None:
    """Prints one table a data set: percent, mean and standard deviation over the seeds, with what was published below a number;
    then the claims in full beside what was found here, and why cells are empty."""
    seeds = "one seed" if plan.seeds == 1 else f"mean ± standard deviation over {plan.seeds} seeds"
    for data in exhibit.data:
        table = Table("", *exhibit.measures, title=f"{exhibit.key}, {data}: {exhibit.title}", title_justify="left")
        for row in exhibit.rows:
            table.add_row(row.name, *("\n".join(_entry(exhibit, found, row.name, data, m)) for m in exhibit.measures))
        console.print(table)
        for claim in exhibit.claims:
            if claim.data == data:
                say(compare(claim, found))
        empty: dict[str, list[str]] = {}
        for row in exhibit.rows:
            if reason := found.get((row.name, data), Outcome([], "not reached")).reason:
                empty.setdefault(reason, []).append(row.name)
        for reason, names in empty.items():
            say(f"{'all rows' if len(names) == len(exhibit.rows) else '; '.join(names)}: {reason}")
    say(f"last epoch, percent, {seeds}")
    for note in exhibit.notes:
        say(f"note: {note}")


def _entry(exhibit: Exhibit, found: dict[tuple[str, str], Outcome], row: str, data: str, measure: str) -> list[str]:
    lines = [spread(_values(found, row, data, measure))]
    for claim in exhibit.claims:
        if (claim.row, claim.data, claim.measure) == (row, data, measure):
            lines.append(f"published {claim.value:.2f}" if claim.gain is None else f"published {claim.gain:+.2f}")
    return lines


def compare(claim: Claim, found: dict[tuple[str, str], Outcome]) -> str:
    """A claim in words, and the same quantity of the runs here where they are complete."""
    values = _values(found, claim.row, claim.data, claim.measure)
    others = [_values(found, other, claim.data, claim.measure) for other in claim.over]
    if claim.gain is None:
        text, here = f"{claim.value:.2f}", f"{statistics.mean(values):.2f}" if values else None
    else:
        better = "the better of " if len(others) > 1 else ""
        text, here = f"{claim.gain:+.2f} over {better}{' and '.join(claim.over)}", None
        if values and all(others):
            here = f"{statistics.mean(values) - max(map(statistics.mean, others)):+.2f}"
    return f"published: {claim.row} {claim.measure} {text} ({claim.source}); here {here or 'not measured'}"


def _values(found: dict[tuple[str, str], Outcome], row: str, data: str, measure: str) -> list[float]:
    outcome = found.get((row, data), Outcome([], None))
    return [100 * m[measure] for m in outcome.measures if measure in m]


def spread(values: list[float]) -> str:
    """``mean ± standard deviation``, or the one value."""
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def keep(exhibit: Exhibit, found: dict[tuple[str, str], Outcome], plan: Plan) -> Path:
    """Writes the outcomes as JSON; returns the file."""
    rows = [
        {"row": row, "data": data, "seeds": outcome.measures, "reason": outcome.reason} for (row, data), outcome in found.items()
    ]
    claims = [{k: v for k, v in vars(claim).items() if v not in (None, ())} for claim in exhibit.claims]
    facts = {"exhibit": exhibit.key, "title": exhibit.title, "overrides": plan.overrides, "cells": rows, "claims": claims}
    facts |= {"notes": exhibit.notes, "commit": run_folder.commit()}
    path = plan.out / f"{exhibit.key.replace(' ', '')}.json"
    write_atomically(path, lambda temporary: Path(temporary).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8"))
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0 every cell that could be run is done, 1 one failed, 2 usage, 75 and 130
    stopped by a signal and resumable."""
    known = exhibits()
    parser = argparse.ArgumentParser("python -m bench.paper", description="the paper's tables and figures, cell by cell")
    which = parser.add_mutually_exclusive_group(required=True)
    for kind in ("table", "figure"):
        which.add_argument(f"--{kind}", choices=[key.split()[1] for key in known if key.startswith(kind)])
    parser.add_argument("--data-root", type=Path, default=Path("data"), metavar="DIR", help="holds cub, cars, aircraft, ...")
    parser.add_argument("--out", type=Path, default=Path("runs/paper"), metavar="DIR", help="run folders (default: runs/paper)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N - 1 (default: 3)")
    parser.add_argument("--dry-run", action="store_true", help="one step of every cell, nothing kept")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run, as in engine.train")
    args = parser.parse_intermixed_args(argv)
    if args.seeds < 1:
        parser.error(f"--seeds {args.seeds}: at least 1")
    exhibit = known[f"table {args.table}" if args.table else f"figure {args.figure}"]
    plan = Plan(args.data_root, args.out, args.seeds, tuple(args.overrides))
    found, code = carry_out(exhibit, plan, dry_run=args.dry_run)
    show(exhibit, found, plan)
    if not args.dry_run:
        say(f"written: {keep(exhibit, found, plan)}")
        if exhibit.picture and code == 0:
            from bench import paper_figures

            paper_figures.draw(exhibit, [cell for cell in cells(exhibit, plan) if obstacle(cell) is None], found, plan.out)
    return code


if __name__ == "__main__":
    sys.exit(main())
