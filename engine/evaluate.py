"""``python -m engine.evaluate RUN|WEIGHTS``: evaluates a run or a weights file by retrieval, kNN and linear probes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from engine import build, files
from engine.config import Config, from_run, parse
from engine.console import console, counted, say
from engine.errors import ConfigError, command
from engine.evaluation import Candidate, check, evaluate_features, feature_name, hold_out, keep, of_run, of_teacher, supported
from engine.evaluation import retrieval as retrieval  # under this name for whoever has features of their own
from engine.pretrained import Run, load_run, run_config, say_which, third_party, weights_file
from engine.run_folder import read_data
from engine.training import add_device_option, option_device
from ppssl.encoder import FeatureNet
from ppssl.method import METHODS
from ppssl.timm_trunk import build_trunk

PROTOCOLS = ("retrieval", "knn", "linear")
_FREE_SECTIONS = ("data.", "eval.", "amp=")


def evaluate(
    source: Path,
    device: torch.device,
    *,
    cfg: str | None = None,
    overrides: Sequence[str] = (),
    protocols: Sequence[str] | None = None,
    fractions: Sequence[float] = (100.0,),
    split: str = "test",
    baselines: bool = False,
    best: bool = False,
) -> list[dict[str, Any]]:
    """The records of an evaluation of a run folder, or of a weights file with the recipe ``cfg`` (data, architecture, method).

    overrides: ``data.x=...``, ``eval.x=...`` of the config; protocols: None takes ``eval.protocols``; baselines: also the untouched
    initial network and the teacher's own image features; best: of a run the weights of its best evaluation (``eval.keep_best``),
    not the last. Features are kept in RUN/features, those of a file in the cache folder.
    Raises ``FileNotFoundError`` and ``ValueError`` for what is no run, no weights file, or data that cannot be evaluated.
    """
    run, model, folder = _open(source, cfg, overrides, device, best)
    own = _own_lists(source, run.config) if source.is_dir() else None
    images = hold_out(build.data(run.config, cache_dir=files.cache_folder(), training=False), run.config, needed=False)
    protocols = supported(images, protocols or run.config.eval.protocols)
    check(images, protocols, split)
    found = [(model, run)]
    if baselines:
        untouched = build.initial_network(run.config).to(device, memory_format=torch.channels_last).eval()
        found.append(("initial", Run(run.config, untouched, 0, 0)))
    candidates = [_candidate(name, of, folder, device) for name, of in found]
    if baselines and (teacher := build.teacher(run.config, device)):
        candidates.append(of_teacher(teacher, device, run.config.data.workers))
    records: list[dict[str, Any]] = []
    for candidate in candidates:
        records += evaluate_features(
            candidate, images, run.config, device,
            protocols=protocols, fractions=fractions, solvers=("convex", "sgd"), split=split, own=own,
        )  # fmt: skip
    return records


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


def _open(
    source: Path, cfg: str | None, overrides: Sequence[str], device: torch.device, best: bool = False
) -> tuple[Run, str, Path]:
    """(network and config, what it is called, where its features are kept) of a run folder or a weights file."""
    if not source.exists():
        raise FileNotFoundError(f"{source} is not there; give a run folder or a weights file")
    if source.is_dir():
        if cfg is not None:
            raise ValueError(f"--cfg {cfg}: {source} is a run folder and brings its own config; --cfg goes with a weights file")
        if foreign := [text for text in overrides if not text.lstrip("-").startswith(_FREE_SECTIONS)]:
            raise ValueError(f"{foreign[0]}: a run is evaluated as it was trained; only data.* and eval.* and amp can be set")
        run = load_run(source, device, best=best)
        say_which(source, best)
        config = parse(["--cfg", str(source / "config.yaml"), *overrides]).config
        if config.data.root == from_run(source / "config.yaml").data.root:
            config = replace(config, data=replace(config.data, root=run.config.data.root))  # where it lies now
        return run._replace(config=config), "best" if best else "run", source
    if best:
        raise ValueError(f"--best: {source} is a file, not a run folder; leave it out")
    if cfg is None:
        raise ValueError(f"{source} is a file; name the recipe of its data and architecture with --cfg, e.g. --cfg cub.yaml")
    config = parse(["--cfg", cfg, *overrides]).config
    network = _network_of_file(source, config).to(device, memory_format=torch.channels_last).eval()
    return Run(config, network, 0, 0), "weights", files.cache_folder() / "features" / source.stem


def _network_of_file(path: Path, config: Any) -> FeatureNet:
    """Our own files with their mask branch, everybody else's trunk with plain pooling."""
    tensors = weights_file.load_weights(path) if path.suffix == ".safetensors" else {}
    if any(name.startswith("mask.") for name in tensors):
        network = METHODS[config.method.name].build_network(build.settings_of(config), build_trunk(config.encoder.arch))
        if network.mask is not None:
            weights_file.refuse_not_finite(tensors, str(path))
            try:
                network.load_weights(tensors)
            except RuntimeError as error:
                raise ValueError(f"{path} does not fit encoder.arch={config.encoder.arch}: {error}") from error
            return network
    trunk = build_trunk(config.encoder.arch)
    found = third_party.initialize(trunk, str(path.resolve()), partial=config.encoder.partial)
    say(f"encoder: {config.encoder.arch}, {found}")
    return FeatureNet(trunk)


def show(records: Sequence[dict[str, Any]]) -> None:
    """Prints one row for every record, and below them what every feature and protocol is, exactly."""
    first = records[0]
    size = f"{counted(first['images'], 'image')} of {counted(first['classes'], 'class', 'classes')}"
    title = f"{first['data']}, {first['split']} split: {size}, "
    title += f"{first['image_size']} px, batches of {first['batch_size']} in file order"
    table = Table("model", "epoch", "protocol", "result", title=title, title_justify="left")
    notes: dict[str, None] = {}  # a set that keeps its order
    for r in records:
        notes[f"feature of {r['model']}: {r['feature']}"] = None
    for r in records:
        name, setting, shown = r["protocol"], r["setting"], ("top1",)
        if r.get("top1", 0) is None:
            shown = ()
        elif name == "retrieval":
            shown = ("rank1", "rank5", "mAP")
            setting += f"; {r['queries']:,} queries, {r['excluded']} alone in their class"
        elif name == "knn":
            name, shown = f"knn, k {r['k']}", ("top1", "top5")
        else:
            name = f"linear {r['solver']}, {r['fraction']:g} %"
            few, many = r["train_images_a_class"]
            each = f"{few}" if few == many else f"{few} to {many}"
            setting += f"; {r['train_images']:,} training images, {each} a class, draw {r['draw_seed']}"
        result = "  ".join(f"{key} {100 * r[key]:.2f} %" for key in shown) or "not applicable"
        table.add_row(r["model"], "-" if r["epoch"] is None else str(r["epoch"]), name, result)
        about = f"{name} of {r['model']}" if "penalty" in r else name  # its penalty is chosen for every model
        notes[f"{about}: {setting}"] = None
    console.print(table)
    for note in notes:
        say(note)


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


@command(ConfigError, RuntimeError)
def main(argv: Sequence[str] | None = None) -> int:
    """Prints the numbers and adds them to a JSON file; returns the exit code: 0 done, 1 failure, 2 usage, 130 interrupted."""
    parser = argparse.ArgumentParser(
        "python -m engine.evaluate",
        description="features of a run or of a weights file, evaluated; key=value overrides the config",
        allow_abbrev=False,
    )
    parser.add_argument("source", type=Path, metavar="RUN|WEIGHTS", help="run folder, or a .safetensors/.pth file with --cfg")
    parser.add_argument("--cfg", metavar="FILE|RECIPE", help="data and architecture for a weights file")
    parser.add_argument("--protocol", type=_protocols, metavar="LIST", help="of retrieval,knn,linear (default: eval.protocols)")
    parser.add_argument("--fractions", type=_fractions, default=[100.0], metavar="LIST",
                        help="percent of the training labels that linear probes see, e.g. 100,50,20 (default: 100)")  # fmt: skip
    parser.add_argument("--split", choices=("test", "train", "validation"), default="test",
                        help="train: retrieval among the training images; validation: what eval.validation held out")  # fmt: skip
    parser.add_argument("--baselines", action="store_true", help="also the untouched network and the teacher's own features")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON list that is added to (default: RUN/evaluation.json)")
    parser.add_argument("--best", action="store_true", help="the weights of the best evaluation, not the last (eval.keep_best)")
    add_device_option(parser)
    args, overrides = parser.parse_known_args(argv)
    if "--row0" in overrides:
        parser.error("--row0 is called --baselines now")
    if wrong := [text for text in overrides if "=" not in text]:
        parser.error(f"unexpected argument {wrong[0]!r}; overrides are given as key=value")
    device = option_device(args.device)
    records = evaluate(
        args.source, device, cfg=args.cfg, overrides=overrides, protocols=args.protocol, fractions=args.fractions,
        split=args.split, baselines=args.baselines, best=args.best,
    )  # fmt: skip
    show(records)
    if not all(r["own_data"] for r in records):
        say("these are not the images of the run: the records stand beside its own and name their data")
    beside = args.source / "evaluation.json" if args.source.is_dir() else args.source.with_suffix(".evaluation.json")
    source = {"source": str(args.source.resolve())} if args.out else {}  # a file of one's own may hold several
    keep(args.out or beside, [r | source for r in records])
    say(f"written: {args.out or beside}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
