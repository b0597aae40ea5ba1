"""The trained network of a run folder."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError

from engine.config import Config, from_run
from engine.console import say
from engine.files import read_metadata
from engine.pretrained import weights_file
from engine.run_folder import RunFolder, find_root, read_classes
from ppssl.encoder import FeatureNet
from ppssl.method import METHODS
from ppssl.settings import method_settings
from ppssl.timm_trunk import build_trunk


class Run(NamedTuple):
    """A run folder that has been read."""

    config: Config
    network: FeatureNet
    step: int
    epoch: int
    class_names: tuple[str, ...] = ()
    """Of its data, by label; empty where the run does not know them."""


def run_config(folder: str | Path) -> Config:
    """The config of a run folder, with its data set where it lies now. Raises ``FileNotFoundError`` where there is none,
    ``ConfigError`` where it cannot be read."""
    path = RunFolder(Path(folder)).config
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a run folder: it has no config.yaml")
    cfg = from_run(path)
    return replace(cfg, data=replace(cfg.data, root=find_root(Path(folder), cfg.data.root)))


def best_of(folder: Path) -> dict[str, str] | None:
    """What the run's best weights are: ``step``, ``epoch``, ``measure`` and ``value`` as text; None where none are kept, or the
    file is damaged, of which whoever reads it is told."""
    path = RunFolder(folder).best
    try:
        return read_metadata(path) if path.is_file() else None
    except SafetensorError:
        return None


def say_which(folder: Path, best: bool) -> None:
    """Says which weights of the run ``folder`` a command takes, where there are best ones and they are not the last."""
    kept, last = best_of(folder), read_metadata(RunFolder(folder).weights) if RunFolder(folder).weights.is_file() else {}
    if kept is None or kept["step"] == last.get("step"):
        return
    ends = f"the last weights, of epoch {last.get('epoch')}"
    top = f"those with the best validation {kept['measure']}, of epoch {kept['epoch']}"
    say(f"{folder}: {top}, not {ends}" if best else f"{folder}: {ends}; --best takes {top}")


def load_run(
    folder: str | Path, device: torch.device | str = "cpu", network: FeatureNet | None = None, *, best: bool = False
) -> Run:
    """The config and the trained network of a run folder, in eval mode.

    network: takes the weights; None builds it, which needs a registered method and a trunk that is known by name.
    best: the weights of the best evaluation (``eval.keep_best``); else those of the newest checkpoint.
    Raises ``FileNotFoundError`` when ``folder`` is not a run folder or has no weights yet, ``ValueError`` when its files do not
    belong together.
    """
    folder = Path(folder)
    files = RunFolder(folder)
    cfg = run_config(folder)
    path = files.best if best else files.weights
    if not path.is_file():
        why = " yet: the run has not reached its first checkpoint"
        if best:
            why = ": the run was trained without eval.keep_best, or is not evaluated yet; leave --best out"
        raise FileNotFoundError(f"{folder} has no {path.name}{why}")
    if network is None:
        if cfg.method.name not in METHODS:
            raise ValueError(
                f"{files.config}: method.name: {cfg.method.name!r} is not registered here; import the module that registers it, or "
                f"give the network that takes the weights: engine.load({str(folder)!r}, network=FeatureNet(...))"
            )
        try:
            trunk = build_trunk(cfg.encoder.arch)
        except ValueError as error:
            raise ValueError(
                f"{files.config}: {error}; of a trunk of your own give the network that takes the weights: "
                f"engine.load({str(folder)!r}, network=FeatureNet(...))"
            ) from error
        network = METHODS[cfg.method.name].build_network(method_settings(cfg, cfg.data.image_size), trunk)
    tensors = weights_file.load_weights(path)
    weights_file.refuse_not_finite(tensors, str(path))
    try:
        network.load_weights(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit {files.config}: {textwrap.shorten(str(error), 300)}") from error
    metadata = read_metadata(path)
    network = network.to(device, memory_format=torch.channels_last).eval()
    return Run(cfg, network, int(metadata.get("step", 0)), int(metadata.get("epoch", 0)), read_classes(folder))
