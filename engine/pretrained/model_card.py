"""The model card beside an exported file: what it is, what it was trained on, how well it did, how images enter it."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from engine import __version__, run_folder
from engine.config import flatten
from engine.console import printable
from engine.files import write_text
from engine.pretrained.run import Run
from ppssl.method import METHODS
from ppssl.settings import method_settings, title
from ppssl.timm_trunk import ImageInput, image_input

# What a person would have to know about the machine that trained it, not about the network.
_LOCAL = ("out", "resume")
_NUMBERS = ("rank1", "rank5", "mAP", "top1", "top5", "knn_top1", "linear_top1")


def write(path: Path, facts: dict[str, Any]) -> None:
    """Writes ``path``.json and ``path``.md for the exported file ``path``, of which ``describe`` gives the facts."""
    for suffix, text in ((".json", json.dumps(facts, indent=2) + "\n"), (".md", markdown(facts))):
        write_text(path.with_name(path.name + suffix), text)


def describe(
    path: Path, run: Run, folder: Path, *, to: str, graph: bool, use: str, notes: list[str], normalize: bool = False
) -> dict[str, Any]:
    """The card of the exported file ``path`` of the run ``folder`` as plain data. Paths of the machine are cut to their last part.

    use: lines of code that read the file; notes: sentences a user must know; graph: the file computes the inference feature itself;
    normalize: and takes images in [0, 1].
    """
    cfg = run.config
    records = run_folder.read_metrics(folder)
    start = next((r for r in records if r["kind"] == "start"), {})
    return {
        "file": path.name,
        "format": to,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "use": use,
        "notes": notes,
        "network": {
            "arch": arch_of(run),
            "feature": feature(run, graph=graph),
            "dimension": run.network.trunk.channels,
            "mask_scaled_over": run.network.mask.minmax if run.network.mask is not None and graph else None,
        },
        "preprocessing": preprocessing(run, normalize=normalize),
        "training": {
            "method": title(cfg),
            "data": cfg.data.name,
            "class_names": list(run.class_names),
            "initial_weights": _short(cfg.encoder.weights),
            "epoch": run.epoch,
            "step": run.step,
            "commit": start.get("commit"),
            "run": folder.resolve().name,
            "environment": {name: start[name] for name in ("torch", "torchvision", "device", "precision") if name in start},
        },
        "metrics": metrics(folder, records),
        "config": {key: _short(value) for key, value in flatten(cfg).items() if key not in _LOCAL},
        "exported_with": {"engine": __version__, "torch": torch.__version__, "commit": run_folder.commit()},
        "license": license_text(run),
    }


def metadata(run: Run, *, graph: bool, normalize: bool = False) -> dict[str, str]:
    """What whoever has nothing but the file needs of the card, each value as JSON, for files that have room for it."""
    facts = preprocessing(run, normalize=normalize) | {
        "arch": arch_of(run),
        "feature": feature(run, graph=graph),
        "dimension": run.network.trunk.channels,
        "class_names": list(run.class_names),
        "step": run.step,
        "epoch": run.epoch,
        "engine_version": __version__,
    }
    return {key: json.dumps(value) for key, value in facts.items()}


def arch_of(run: Run) -> str:
    """``encoder.arch``, or what a trunk of a user's own calls itself."""
    return getattr(run.network.trunk, "arch", run.config.encoder.arch)


def feature(run: Run, *, graph: bool) -> str:
    """The formula of what the exported file computes; graph: the whole inference feature."""
    if not graph:
        return "gap(F), the mean of the trunk's map"
    return "l2(gap(F))" if run.network.mask is None else "l2(gap(A * F))"


def image_input_of(run: Run) -> ImageInput:
    """How images enter the run's trunk."""
    return image_input(run.config.encoder.arch, run.config.encoder.weights)


def preprocessing(run: Run, *, normalize: bool = False) -> dict[str, Any]:
    """How an image enters the exported file. normalize: the file normalizes, so that mean 0 and std 1 are left to its user, and
    ``normalized_inside`` says what it does."""
    size, how = run.config.data.image_size, image_input_of(run)
    found = {
        "color": "RGB in [0, 1], upright by EXIF",
        "resize_short_side": how.resize(size),
        "interpolation": f"{how.interpolation}, antialiased",
        "center_crop": size,
        "mean": list(how.mean),
        "std": list(how.std),
    }
    if normalize:
        found |= {"mean": [0.0] * 3, "std": [1.0] * 3, "normalized_inside": {"mean": found["mean"], "std": found["std"]}}
    return found


def metrics(folder: Path, records: list[dict[str, Any]]) -> dict[str, Any]:
    """What the run's log and its evaluation files say of its own data: ``before`` and ``last`` from the log, the rest by file
    name."""
    evaluated = [{k: v for k, v in r.items() if k not in ("kind", "seconds")} for r in records if r["kind"] == "eval"]
    found: dict[str, Any] = {"before": evaluated[0], "last": evaluated[-1]} if evaluated else {}
    for name in ("evaluation", "retrieval"):
        if (file := folder / f"{name}.json").is_file():
            records = json.loads(file.read_text(encoding="utf-8"))
            own = [r for r in records if r.get("own_data", True)] if isinstance(records, list) else records
            found[name] = _without_paths(own)
    return found


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(inner) for key, inner in value.items()}
    return [_without_paths(inner) for inner in value] if isinstance(value, list) else _short(value)


def _short(value: Any) -> Any:
    """A path without the folders above it, which are nobody's business."""
    if isinstance(value, str) and Path(value).is_absolute():
        return Path(value).name
    return list(value) if isinstance(value, tuple) else value


def sources(run: Run) -> list[str]:
    """What the weights were learned from that has terms of its own, as far as the config tells."""
    cfg = run.config
    found = [] if cfg.data.name == "birds" else [f"the images of {cfg.data.name}"]
    if cfg.encoder.weights != "none":
        found.append(f"the initial weights {_short(cfg.encoder.weights)}")
    if cfg.method.name in METHODS and method_settings(cfg).uses_teacher and cfg.teacher.weights != "birds":
        found.append(f"the teacher {cfg.teacher.model} ({_short(cfg.teacher.weights)})")
    return found


def license_text(run: Run) -> str:
    """What code and weights may be used for."""
    found = sources(run)
    if not found:
        return "Trained on the synthetic dataset, which this project draws: MIT, as the code."
    return (
        f"The code is MIT. The weights were learned from {' and '.join(found)}, which have terms of their own (many image sets "
        f"allow research only): read them before you share or sell what you make with this file."
    )


def markdown(facts: dict[str, Any]) -> str:
    """The card as a page of text; the whole configuration is in the JSON."""
    network, images, training = facts["network"], facts["preprocessing"], facts["training"]
    start = training["initial_weights"]
    inside = images.get("normalized_inside")
    normalization = f"mean {(inside or images)['mean']}, std {(inside or images)['std']}"
    normalization += ", inside the graph, which takes RGB in [0, 1]" if inside else ""
    lines = [
        f"# {facts.get('name', facts['file'])}",
        "",
        f"{network['arch']} trained by {training['method']} on {training['data']}, epoch {training['epoch']} (step "
        f"{training['step']}), from {'random weights' if start == 'none' else start}. Commit "
        f"{training['commit'] or 'not recorded'}.",
        "",
        "```python",
        facts["use"],
        "```",
        "",
        *[f"> {note}\n" for note in facts["notes"]],
        "| | |",
        "|---|---|",
        f"| feature | {network['feature']}, {network['dimension']}-d |",
        *[f"| classes | {len(names)}: {_named(names)} |" for names in [training["class_names"]] if names],
        f"| images | {images['color']}; short side to {images['resize_short_side']} ({images['interpolation']}), center crop "
        f"{images['center_crop']} |",
        f"| normalization | {normalization} |",
        f"| sha256 | {facts['sha256']} |",
        "",
        "## Metrics",
        "",
        *(_table(facts["metrics"]) or ["None recorded."]),
        "",
        "## License",
        "",
        facts["license"],
        "",
    ]
    return "\n".join(lines)


def _named(names: list[str], most: int = 6) -> str:
    """The first of ``names``, for a cell of a table."""
    return ", ".join(printable(name).replace("|", r"\|") for name in names[:most]) + (", ..." if len(names) > most else "")


def _numbers(record: dict[str, Any]) -> set[float]:
    return {record[name] for name in _NUMBERS if isinstance(record.get(name), float)}


def _table(found: dict[str, Any]) -> list[str]:
    """One line a record: what was measured, how, and its numbers in percent. A line of the log is left out where the records of
    that epoch hold all its numbers."""
    evaluated = found.get("evaluation", [])
    evaluated = evaluated if isinstance(evaluated, list) else [evaluated]
    logged = [found[name] for name in ("before", "last", "retrieval") if name in found]
    recorded: dict[Any, set[float]] = defaultdict(set)
    for record in evaluated:
        recorded[record.get("epoch")] |= _numbers(record)
    rows = []
    for record in [r for r in logged if not _numbers(r) <= recorded[r.get("epoch")]] + evaluated:
        epoch = f"epoch {record['epoch']}" if record.get("epoch") is not None else None
        what = ", ".join(str(part) for part in (record.get("model"), epoch) if part is not None)
        fraction = f"{record['fraction']:g} % of the labels" if "fraction" in record else None
        parts = (record.get("protocol"), record.get("setting"), fraction, record.get("feature"))
        how = "; ".join(part for part in parts if part)
        numbers = ", ".join(f"{name} {100 * record[name]:.2f} %" for name in _NUMBERS if isinstance(record.get(name), float))
        if numbers:
            rows.append(f"| {what} | {how} | {numbers} |")
    return ["| network | protocol | result |", "|---|---|---|", *dict.fromkeys(rows)] if rows else []
