"""A run folder as a page needs it: what is there, and for what is not there the sentence that says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine import build, files
from engine.config import Config
from engine.data import ImageList
from engine.evaluation import Attention, attention_maps
from engine.evaluation import features as kept_features
from engine.pretrained import load_run, run_config
from engine.run_folder import RunFolder, read_metrics


class Run(NamedTuple):
    """What was found in a run folder. A field that may be missing is a ``str`` then: one sentence why."""

    folder: Path
    name: str
    config: Config
    records: list[dict[str, Any]]
    """Of metrics.jsonl."""
    evaluation: list[dict[str, Any]]
    """Of evaluation.json."""
    attention: Attention | str
    images: ImageList | str
    """The labelled test split, or the training images where there is none."""
    split: str
    features: Tensor | str
    """[N, C] of ``images`` by the run's weights, on the CPU."""

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """The records of metrics.jsonl of that kind, in order."""
        return [r for r in self.records if r.get("kind") == kind]


def read(folder: Path, device: torch.device, *, with_features: bool = True) -> Run:
    """Reads ``folder`` and, with its images available, takes their features. Raises ``FileNotFoundError`` when it is not a run
    folder, ``ValueError`` when its config is damaged."""
    cfg = run_config(folder)
    images, split = _images(cfg) if with_features else ("Only the first run's images are shown.", "")
    features = images if isinstance(images, str) else _features(folder, images, split, device)
    name, evaluated = folder.resolve().name, _evaluation(folder)
    return Run(folder, name, cfg, read_metrics(folder), evaluated, _attention(folder), images, split, features)


def _evaluation(folder: Path) -> list[dict[str, Any]]:
    """The records of the run's own data in evaluation.json; empty where it is missing or not one."""
    path = RunFolder(folder).evaluation
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    except ValueError:
        return []
    return [r for r in found if isinstance(r, dict) and r.get("own_data", True)] if isinstance(found, list) else []


def _attention(folder: Path) -> Attention | str:
    try:
        found = attention_maps.read(folder)
    except (ValueError, KeyError) as error:
        return f"No attention maps: {error}."
    return found or "No attention maps: the run folder holds none (the method offers none, or the run is of an earlier version)."


def _images(cfg: Config) -> tuple[ImageList | str, str]:
    root = Path(cfg.data.root or "")
    if cfg.data.root is None or not root.is_dir():
        missing = f"The images are not available: data.root={cfg.data.root} is not there"
        return f"{missing}; the same training command with data.root=DIR makes this page again.", ""
    try:
        found = build.data(cfg, cache_dir=files.cache_folder(), training=False, progress=False)
    except (ValueError, OSError, NotImplementedError) as error:
        return f"The images are not available: {error}.", ""
    if found.test is not None and found.test.labels is not None:
        return found.test, "test"
    return found.train, "train"


def _features(folder: Path, images: ImageList, split: str, device: torch.device) -> Tensor | str:
    try:
        return kept_features.of_run(load_run(folder, device), images, split, folder, device).cpu()
    except (ValueError, OSError, RuntimeError) as error:
        return f"No features: {error}."
