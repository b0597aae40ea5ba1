"""What features are made by: the network of a run folder, of a weights file, or of timm; with the config that says how images enter
it and where its data lie. The one resolver of every command that takes RUN|WEIGHTS."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from engine import build, files
from engine.config import Config, from_run, parse
from engine.console import say
from engine.pretrained import Run, is_model_folder, load_run, say_which, third_party, weights_file
from ppssl.encoder import FeatureNet
from ppssl.method import METHODS
from ppssl.timm_trunk import PREFIX, TimmTrunk, build_trunk

HELP = "run folder, a .safetensors/.pth file or a model folder of timm's with --cfg or encoder.arch=NAME, or timm/NAME"
"""Of the argument RUN|WEIGHTS."""
_FREE_SECTIONS = ("data.", "eval.", "amp=")
_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")
_PLAIN = "folder"
"""The recipe of weights for which none is named."""


class Source(NamedTuple):
    """A network and its config."""

    run: Run
    model: str
    """run; best for the best weights of one (``eval.keep_best``); weights where no training of ours is known."""
    folder: Path
    """Where its features are kept, in ``features/``."""


def open_source(
    source: str | Path, device: torch.device, *, cfg: str | None = None, overrides: Sequence[str] = (), best: bool = False
) -> Source:
    """The network of a run folder, a weights file, a model folder of timm's or ``timm/NAME``, in eval mode on ``device``.

    cfg: of a weights file, the recipe of its architecture, method and data; of a run, the recipe of other data than its own.
    overrides: ``data.x=...``, ``eval.x=...`` and ``amp=...`` of the config; of what is no run, any key. best: of a run, the weights
    of its best evaluation (``eval.keep_best``), not the last.
    Raises ``FileNotFoundError`` and ``ValueError`` for what is no run and no weights file, and a setting that a run does not take.
    """
    path = Path(source)
    if path.is_dir() and not is_model_folder(path):
        return _of_run(path, device, cfg, overrides, best)
    if best:
        raise ValueError(f"--best: {source} is not a run folder, which may keep best weights beside the last; leave --best out")
    if str(source).startswith(PREFIX):
        return _of_timm(str(source), device, cfg, overrides)
    if not path.exists():
        raise FileNotFoundError(f"{source} is not there; give a run folder or a weights file, or {PREFIX}NAME")
    if cfg is None and not _sets("encoder.arch", overrides):
        raise ValueError(
            f"{source} is no run; name the recipe of its data and architecture with --cfg, e.g. --cfg cub.yaml, or the "
            f"architecture alone, e.g. encoder.arch=resnet50"
        )
    config = parse(["--cfg", cfg or _PLAIN, *overrides]).config
    network = _network_of_file(path, config).to(device, memory_format=torch.channels_last).eval()
    return Source(Run(config, network, 0, 0), "weights", files.cache_folder() / "features" / path.stem)


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(what is left, the overrides ``key=value``) of a command line; what exists as a file is none, whatever its name."""
    found = [text for text in argv if _OVERRIDE.match(text) and not Path(text).exists()]
    return [text for text in argv if text not in found], found


def add_best_option(parser: argparse.ArgumentParser) -> None:
    """``--best``, for ``open_source``."""
    parser.add_argument(
        "--best", action="store_true", help="of a run the weights of its best evaluation, not the last (eval.keep_best)"
    )


def _of_run(path: Path, device: torch.device, cfg: str | None, overrides: Sequence[str], best: bool) -> Source:
    if foreign := [text for text in overrides if not text.lstrip("-").startswith(_FREE_SECTIONS)]:
        raise ValueError(f"{foreign[0]}: a run is evaluated as it was trained; only data.* and eval.* and amp can be set")
    run = load_run(path, device, best=best)
    say_which(path, best)
    config = parse(["--cfg", str(path / "config.yaml"), *overrides]).config
    if cfg is not None:
        config = _with_data_of(config, cfg, overrides)
        say(f"data: {config.data.name} of --cfg {cfg}; all else is the run's own, images of {config.data.image_size} px")
    elif config.data.root == from_run(path / "config.yaml").data.root:
        config = replace(config, data=replace(config.data, root=run.config.data.root))  # where it lies now
    return Source(run._replace(config=config), "best" if best else "run", path)


def _with_data_of(config: Config, cfg: str, overrides: Sequence[str]) -> Config:
    """A run's config with the data of the recipe ``cfg``, at the run's own image size."""
    data = parse(["--cfg", cfg, *(text for text in overrides if text.lstrip("-").startswith("data."))]).config.data
    return replace(config, data=replace(data, image_size=config.data.image_size, workers=config.data.workers))


def _of_timm(arch: str, device: torch.device, cfg: str | None, overrides: Sequence[str]) -> Source:
    trunk = build_trunk(arch)
    assert isinstance(trunk, TimmTrunk)
    own = [f"encoder.arch={arch}", "encoder.weights=timm", f"data.image_size={trunk.native_side}"]
    config = parse(["--cfg", cfg or _PLAIN, *own, *overrides]).config
    if config.encoder.arch != arch:
        raise ValueError(f"encoder.arch={config.encoder.arch}: {arch} is named already; leave one of them out")
    torch.manual_seed(config.seed)  # of encoder.weights=none
    trunk = build_trunk(arch)
    build.check_trunk(trunk, config)
    network = FeatureNet(_filled(trunk, config.encoder.weights, config)).to(device, memory_format=torch.channels_last).eval()
    return Source(Run(config, network, 0, 0), "weights", files.cache_folder() / "features" / arch.replace("/", "-"))


def _network_of_file(path: Path, config: Config) -> FeatureNet:
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
    return FeatureNet(_filled(build_trunk(config.encoder.arch), str(path.resolve()), config))


def _filled(trunk: Any, weights: str, config: Config) -> Any:
    found = third_party.initialize(trunk, weights, partial=config.encoder.partial)
    say(f"encoder: {config.encoder.arch}, {found}")
    return trunk


def _sets(key: str, overrides: Sequence[str]) -> bool:
    return any(text.lstrip("-").startswith(f"{key}=") for text in overrides)
