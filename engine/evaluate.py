"""``python -m engine.evaluate RUN|WEIGHTS``: evaluates a run or a weights file by retrieval, kNN and linear probes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from engine import build, files
from engine.config import Config
from engine.console import console, counted, printable, say
from engine.data import ImageList, catalog, photo_settings
from engine.errors import ConfigError, command
from engine.evaluation import (
    SOURCE_HELP,
    Candidate,
    add_best_option,
    check,
    evaluate_disjoint,
    evaluate_features,
    evaluate_gallery,
    feature_name,
    hold_out,
    keep,
    of_run,
    of_teacher,
    open_source,
    supported,
)
from engine.evaluation import retrieval as retrieval  # under this name for whoever has features of their own
from engine.pretrained import Run, run_config
from engine.run_folder import read_data
from engine.training import add_device_option, option_device

DISJOINT = "metric-learning"
PROTOCOLS = ("retrieval", "knn", "linear", DISJOINT)
RECALL = (1, 2, 4, 8)


def evaluate(
    source: str | Path,
    device: torch.device,
    *,
    cfg: str | None = None,
    overrides: Sequence[str] = (),
    protocols: Sequence[str] | None = None,
    fractions: Sequence[float] = (100.0,),
    split: str = "test",
    baselines: bool = False,
    recall: Sequence[int] = RECALL,
    best: bool = False,
) -> list[dict[str, Any]]:
    """The records of an evaluation of a run folder, of a weights file with the recipe ``cfg`` (data, architecture, method), or of
    ``timm/NAME``.

    cfg: of a run, the recipe of other data than its own; overrides: ``data.x=...``, ``eval.x=...`` of the config; protocols: None
    takes ``eval.protocols``; baselines: also the untouched initial network and the teacher's own image features; recall: k of
    Recall@K in metric-learning; best: of a run the weights of its best evaluation, not the last.
    Features are kept in RUN/features, those of a file in the cache folder.
    Raises ``FileNotFoundError`` and ``ValueError`` for what is no run, no weights file, or data that cannot be evaluated.
    """
    run, model, folder = open_source(source, device, cfg=cfg, overrides=overrides, best=best)
    own = _own_lists(Path(source), run.config) if model in ("run", "best") else None
    images = hold_out(build.data(run.config, cache_dir=files.cache_folder(), training=False), run.config, needed=False)
    named = tuple(protocols or run.config.eval.protocols)
    others = tuple(name for name in named if name != DISJOINT)
    if others:
        others = supported(images, others)
        check(images, others, split)
    if DISJOINT in named and split != "test":
        raise ValueError(f"--split {split}: {DISJOINT} is of the test split; leave one of them out")
    records: list[dict[str, Any]] = []
    for candidate in _candidates(run, model, folder, device, baselines):
        if others:
            records += evaluate_features(
                candidate, images, run.config, device,
                protocols=others, fractions=fractions, solvers=("convex", "sgd"), split=split, own=own,
            )  # fmt: skip
        if DISJOINT in named:
            of_run_itself = None if own is None else own.get("test", "")
            records.append(evaluate_disjoint(candidate, images, run.config, device, recall, of_run_itself))
    return records


def evaluate_query(
    source: str | Path,
    query: Path,
    gallery: Path,
    device: torch.device,
    *,
    cfg: str | None = None,
    overrides: Sequence[str] = (),
    baselines: bool = False,
    recall: Sequence[int] = RECALL,
    best: bool = False,
) -> list[dict[str, Any]]:
    """The records of the labelled folders or lists ``query`` and ``gallery``: every photo of the first asks for those of its
    class in the second. source, cfg, overrides, best and what is raised as of ``evaluate``."""
    run, model, folder = open_source(source, device, cfg=cfg, overrides=overrides, best=best)

    def images(name: str, path: Path) -> ImageList:
        data = photo_settings(path, labelled=True)
        found = catalog.load(**data, workers=run.config.data.workers, cache_dir=files.cache_folder())
        if found.test is not None and len(found.test):
            raise ValueError(f"{name} {path} holds two splits; give a list of one each")
        labelled = found.labelled
        if labelled.labels is not None:
            classes = counted(len(np.unique(labelled.labels)), "class", "classes")
            say(f"{name}: {counted(len(labelled), 'photo')} in {classes} below {printable(str(path))}")
            if len(labelled) < len(found.train):
                say(f"{name}: {counted(len(found.train) - len(labelled), 'photo')} without a label left out")
        if unused := catalog.left_out(found):
            say(f"{name}: {unused}")
        return labelled

    lists = images("--query", query), images("--gallery", gallery)
    config = replace(run.config, data=replace(run.config.data, name="list" if query.is_file() else "folder"))
    return [
        evaluate_gallery(candidate, *lists, config, device, recall)
        for candidate in _candidates(run, model, folder, device, baselines)
    ]


def _candidates(run: Run, model: str, folder: Path, device: torch.device, baselines: bool) -> list[Candidate]:
    """What is evaluated: the network, and as baselines the untouched one and the teacher."""
    found = [_candidate(model, run, folder, device)]
    if baselines:
        untouched = build.initial_network(run.config).to(device, memory_format=torch.channels_last).eval()
        found.append(_candidate("initial", Run(run.config, untouched, 0, 0), folder, device))
        if teacher := build.teacher(run.config, device):
            found.append(of_teacher(teacher, device, run.config.data.workers))
    return found


def _own_lists(folder: Path, now: Config) -> dict[str, str] | None:
    """{split: identity} of the lists that the run in ``folder`` had. None where it does not say, as in an earlier version, and
    ``now`` names the same folder."""
    if recorded := read_data(folder):
        return recorded["lists"]
    then = run_config(folder)
    same = then.data.name == now.data.name and Path(then.data.root or "").resolve() == Path(now.data.root or "").resolve()
    return None if same else {}


def _candidate(model: str, run: Run, folder: Path, device: torch.device) -> Candidate:
    """A network of which the features are kept in ``folder``."""
    counted = model != "weights"
    prefix = "" if model in ("run", "weights") else f"{model}-"
    return Candidate(
        model, feature_name(run.network), run.epoch if counted else None, run.step if counted else None,
        lambda images, split: of_run(run, images, f"{prefix}{split}", folder, device),
    )  # fmt: skip


def show(records: Sequence[dict[str, Any]]) -> None:
    """Prints one row for every record, and below them what every feature and protocol is, exactly."""
    first = records[0]
    size = f"{counted(first['images'], 'image')} of {counted(first['classes'], 'class', 'classes')}"
    title = f"{first['data']}, {first['split']} split: {size}, "
    if "gallery_images" in first:
        there = f"{counted(first['gallery_images'], 'image')} of {counted(first['gallery_classes'], 'class', 'classes')}"
        title = f"{size} asked for in a gallery of {there}, "
    title += f"{first['image_size']} px, batches of {first['batch_size']} in file order"
    table = Table("model", "epoch", "protocol", "result", title=title, title_justify="left")
    notes: dict[str, None] = {}  # a set that keeps its order
    for r in records:
        notes[f"feature of {r['model']}: {r['feature']}"] = None
    for r in records:
        name, setting, shown = _row(r)
        result = "  ".join(f"{text} {100 * r[key]:.2f} %" for key, text in shown.items()) or "not applicable"
        table.add_row(r["model"], "-" if r["epoch"] is None else str(r["epoch"]), name, result)
        about = f"{name} of {r['model']}" if "penalty" in r else name  # its penalty is chosen for every model
        notes[f"{about}: {setting}"] = None
    console.print(table)
    for note in notes:
        say(note)


def _row(r: dict[str, Any]) -> tuple[str, str, dict[str, str]]:
    """(name, setting, {key of a number: its name}) of a record."""
    name, setting, shown = r["protocol"], r["setting"], ["top1"]
    if r.get("top1", 0) is None:
        return name, setting, {}
    if "r_precision" in r:
        recall = {key: f"R@{key.removeprefix('recall')}" for key in r if key.startswith("recall")}
        setting += f"; {r['queries']:,} queries, {r['excluded']} without another photo of their class"
        return name, setting, recall | {"r_precision": "R-precision", "map_at_r": "MAP@R", "mAP": "mAP"}
    if name == "retrieval":
        shown = ["rank1", "rank5", "mAP"]
        setting += f"; {r['queries']:,} queries, {r['excluded']} alone in their class"
    elif name == "knn":
        name, shown = f"knn, k {r['k']}", ["top1", "top5"]
    else:
        name = f"linear {r['solver']}, {r['fraction']:g} %"
        few, many = r["train_images_a_class"]
        each = f"{few}" if few == many else f"{few} to {many}"
        setting += f"; {r['train_images']:,} training images, {each} a class, draw {r['draw_seed']}"
    return name, setting, {key: key for key in shown}


def _list_of(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _protocols(text: str) -> list[str]:
    names = _list_of(text)
    if not names or set(names) - set(PROTOCOLS):
        raise argparse.ArgumentTypeError(f"{text!r}: expected some of {','.join(PROTOCOLS)}")
    return list(dict.fromkeys(names))


def _fractions(text: str) -> list[float]:
    try:
        numbers = [float(part) for part in _list_of(text)]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number <= 100 for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r}: expected percentages above 0 and up to 100, e.g. 100,50,20")
    return list(dict.fromkeys(numbers))


def _numbers(text: str) -> list[int]:
    parts = _list_of(text)
    if not parts or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers of at least 1, e.g. 1,2,4,8 or 1,10,100,1000")
    return sorted({int(part) for part in parts})


@command(ConfigError, RuntimeError)
def main(argv: Sequence[str] | None = None) -> int:
    """Prints the numbers and adds them to a JSON file; returns the exit code: 0 done, 1 failure, 2 usage, 130 interrupted."""
    parser = argparse.ArgumentParser(
        "python -m engine.evaluate",
        description="features of a run or of a weights file, evaluated; key=value overrides the config",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="RUN|WEIGHTS", help=SOURCE_HELP)
    parser.add_argument("--cfg", metavar="FILE|RECIPE", help="data and architecture for a weights file, other data for a run")
    parser.add_argument("--protocol", type=_protocols, metavar="LIST",
                        help="of retrieval,knn,linear,metric-learning (default: eval.protocols)")  # fmt: skip
    parser.add_argument("--query", type=Path, metavar="FOLDER|LIST", help="labelled photos that ask for their class in --gallery")
    parser.add_argument(
        "--gallery", type=Path, metavar="FOLDER|LIST", help="labelled photos that are ranked for every one of --query"
    )
    parser.add_argument("--recall", type=_numbers, metavar="LIST", default=list(RECALL),
                        help="k of Recall@K in metric-learning and of --query (default: 1,2,4,8)")  # fmt: skip
    parser.add_argument("--fractions", type=_fractions, default=[100.0], metavar="LIST",
                        help="percent of the training labels that linear probes see, e.g. 100,50,20 (default: 100)")  # fmt: skip
    parser.add_argument("--split", choices=("test", "train", "validation"), default="test",
                        help="train: retrieval among the training images; validation: what eval.validation held out")  # fmt: skip
    parser.add_argument("--baselines", action="store_true", help="also the untouched network and the teacher's own features")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON list that is added to (default: RUN/evaluation.json)")
    add_best_option(parser)
    add_device_option(parser)
    args, overrides = parser.parse_known_args(argv)
    if "--row0" in overrides:
        parser.error("--row0 is called --baselines now")
    if wrong := [text for text in overrides if "=" not in text]:
        parser.error(f"unexpected argument {wrong[0]!r}; overrides are given as key=value")
    if (args.query is None) != (args.gallery is None):
        given, other = ("--query", "--gallery") if args.gallery is None else ("--gallery", "--query")
        parser.error(f"{given} goes with {other}; the same folder for both ranks its photos among themselves")
    device = option_device(args.device)
    common = {"cfg": args.cfg, "overrides": overrides, "baselines": args.baselines, "recall": args.recall, "best": args.best}
    if args.query is None:
        records = evaluate(args.source, device, protocols=args.protocol, fractions=args.fractions, split=args.split, **common)
    elif args.protocol or args.split != "test" or args.fractions != [100.0]:
        parser.error("--query and --gallery are a protocol of their own; leave out --protocol, --split and --fractions")
    else:
        records = evaluate_query(args.source, args.query, args.gallery, device, **common)
    show(records)
    path = Path(args.source)
    if path.is_dir() and not all(r["own_data"] for r in records):
        say("these are not the images of the run: the records stand beside its own and name their data")
    beside = path / "evaluation.json" if path.is_dir() else path.with_suffix(".evaluation.json")
    if not path.exists():  # timm/NAME
        beside = Path(f"{args.source.replace('/', '-')}.evaluation.json")
    source = {"source": str(path.resolve()) if path.exists() else args.source} if args.out else {}  # a file may hold several
    keep(args.out or beside, [r | source for r in records])
    say(f"written: {args.out or beside}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
