"""Runs cells: training, evaluation, and the outcome of each."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from bench.paper.exhibits import Cell, Exhibit, Outcome, Plan, cells, obstacle
from engine import build, files, run, run_folder
from engine.config import to_yaml
from engine.console import say
from engine.errors import FAILURES
from engine.evaluation.evaluator import Candidate, evaluate_features, feature_name, of_teacher
from engine.evaluation.evaluator import keep as keep_records
from engine.evaluation.features import of_run
from engine.files import read_metadata, write_text
from engine.pretrained import third_party, weights_file
from engine.pretrained.run import load_run
from engine.training import Stopped
from ppssl.encoder import FeatureNet, Trunk


def run_cell(cell: Cell, measures: Sequence[str]) -> dict[str, float]:
    """Trains and evaluates a cell, or what is left of it, and returns its measures as fractions in [0, 1]. Raises what training and
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
    write_text(path, json.dumps(known, indent=2) + "\n")
    return known


def finished(cell: Cell) -> bool:
    """Whether the run in the cell's folder has reached its last epoch."""
    last = run_folder.read_metrics(cell.folder)[-1:]
    path = cell.folder / "weights.safetensors"
    return bool(last) and last[0]["kind"] == "summary" and read_metadata(path).get("epoch") == str(cell.config.epochs)


def keep_initial(cell: Cell) -> None:
    """A run folder of the network that training would start from."""
    torch.manual_seed(cell.config.seed)
    trunk = Trunk(cell.config.encoder.arch)
    encoder = cell.config.encoder
    say(f"encoder: {third_party.initialize(trunk, encoder.weights, partial=encoder.partial)}")
    cell.folder.mkdir(parents=True, exist_ok=True)
    write_text(cell.folder / "config.yaml", to_yaml(cell.config))
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
    build.draw(cfg)
    images = build.data(cfg, cache_dir=files.cache_folder())
    records = evaluate_features(candidate, images, cfg, device, protocols=protocols, fractions=fractions, solvers=("sgd",))
    keep_records(cell.folder / "evaluation.json", records)
    found = {name: records[0][name] for name in ("rank1", "rank5", "mAP")}
    return found | {f"linear {record['fraction']:g} %": record["top1"] for record in records[1:]}


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
                    measures = [*measures, run_cell(cell, exhibit.measures)]
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
