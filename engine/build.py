"""What a config builds: the image lists, the teacher, the method; and the network of a finished run."""

from __future__ import annotations

import os
import tempfile
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from engine import checkpoint, weights
from engine.config import Config, ConfigError
from engine.data import IMAGENET_MEAN, IMAGENET_STD, birds, catalog, cores
from engine.data.torch_loader import Normalise, clean_view
from engine.data.views import clean_resize
from engine.distributed import ALONE, World
from engine.log import say
from engine.recipe import from_yaml
from ppssl.encoder import FeatureNet, Trunk
from ppssl.method import METHODS, Method
from ppssl.teacher import Teacher, load_descriptions


def cache_folder() -> Path:
    """$PPSSL_CACHE, else $XDG_CACHE_HOME/ppssl-engine, else ~/.cache/ppssl-engine."""
    if own := os.environ.get("PPSSL_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ppssl-engine"


def check_environment(*, writes: bool) -> None:
    """Raises ``ConfigError`` naming an environment variable whose value cannot be used. writes: the run fills the cache."""
    for name, least in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0), ("OMP_NUM_THREADS", 1)):
        text = os.environ.get(name, "")
        levels = text.split(",") if name == "OMP_NUM_THREADS" else [text]  # one number for each level of nesting
        if text and not all(number.strip().isdecimal() and int(number) >= least for number in levels):
            raise ConfigError(f"{name}: got {text!r} in the environment, expected a whole number of at least {least}; unset it")
    if writes:
        folder = cache_folder()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise ConfigError(
                f"PPSSL_CACHE: the cache folder {folder} cannot be written ({error}); set PPSSL_CACHE to a folder that can"
            ) from error


def resolve(cfg: Config, device: torch.device, processes: int = 1, on_this_machine: int = 1) -> Config:
    """``cfg`` with what depends on the machine and on the number of processes decided.

    Raises ``ValueError`` naming the key for what this version cannot do.
    """
    if processes > 1:
        cfg = spread(cfg, processes, on_this_machine)
    if cfg.method.name not in METHODS:
        raise ConfigError(f"method.name: {cfg.method.name!r} is not known; use one of {', '.join(sorted(METHODS))}")
    if cfg.queue.dtype == "auto":
        narrow = {"bf16": "bfloat16", "fp16": "float16"}.get(cfg.amp or "", "float32")
        cfg = replace(cfg, queue=replace(cfg.queue, dtype=narrow if device.type == "cuda" else "float32"))
    return cfg


def spread(cfg: Config, processes: int, on_this_machine: int) -> Config:
    """``cfg`` for one of several processes: what is computed is written down in ``bn.groups``, so that another number of processes
    can continue it. Raises ``ConfigError`` where the batch or its parts do not divide."""
    if cfg.batch_size % processes:
        near = max(processes, cfg.batch_size // processes * processes)
        raise ConfigError(
            f"batch_size: {cfg.batch_size} images over all processes do not divide among {processes}; use {near} or "
            f"{near + processes}, or another --nproc-per-node"
        )
    if not cfg.bn.sync and cfg.bn.groups == 1:
        say(f"bn.groups: {processes}: each process has batch statistics of its own; bn.sync=true shares them")
        cfg = replace(cfg, bn=replace(cfg.bn, groups=processes))
    elif not cfg.bn.sync and cfg.bn.groups % processes:
        raise ConfigError(
            f"bn.groups: {cfg.bn.groups} parts of the batch cannot be spread over {processes} processes; use a multiple of them, "
            f"or start {cfg.bn.groups} processes"
        )
    if cfg.batch_size % cfg.bn.groups:
        raise ConfigError(f"bn.groups: got {cfg.bn.groups}, must divide batch_size ({cfg.batch_size})")
    if cfg.data.workers is None:
        cfg = replace(cfg, data=replace(cfg.data, workers=max(1, cores() // on_this_machine)))
    return cfg


def data(cfg: Config, *, cache_dir: Path | None, progress: bool = True) -> catalog.Catalog:
    """The checked image lists of ``data.name`` under ``data.root``; the demo world is drawn there first if it is missing
    or of another version."""
    if cfg.data.root is None:
        raise ConfigError("data.root: not set; give the folder of the unpacked data set, e.g. data.root=/data/CUB_200_2011")
    root = Path(cfg.data.root)
    if cfg.data.name == "birds" and birds.is_missing(root):
        birds.ensure(root, progress=progress)
    return catalog.load(
        cfg.data.name,
        root,
        crop_banner=cfg.data.crop_banner,
        workers=cfg.data.workers,
        cache_dir=cache_dir,
        progress=progress,
    )


def teacher(cfg: Config, device: torch.device) -> Teacher | None:
    """The frozen image-text model, where the method listens to one."""
    if cfg.method.name != "ppssl" or cfg.ais.weight == 0:
        return None
    model, files = cfg.teacher.model, cfg.teacher.weights
    say(f"teacher: {model}, weights {files}")  # before it is loaded: a first use downloads it
    if "birds" in (model, files):
        if model != files:
            raise ValueError(f"teacher.model: {model} with teacher.weights: {files}; birds goes with birds only")
        from engine.data.birds_teacher import teacher_files

        model, files = map(str, teacher_files())
    return Teacher.from_open_clip(model, files, load_descriptions(cfg.ais.prompts, cfg.ais.count)).to(device)


def method(cfg: Config, model: Teacher | None, world: World = ALONE) -> Method:
    """The method of ``cfg`` with its starting weights, in ``world``; random parts are a function of ``seed`` alone."""
    network = initial_network(cfg, world)
    method = METHODS[cfg.method.name].from_config(cfg, network, model)
    if world.group:
        world.spread(method)
        method.distribute(world.group, sync_bn=cfg.bn.sync, shard_queue=cfg.queue.sharded)
    return method


def initial_network(cfg: Config, world: World = ALONE) -> FeatureNet:
    """The inference network of ``cfg`` as training finds it, a function of ``seed`` and ``encoder.weights``."""
    torch.manual_seed(cfg.seed)
    trunk = Trunk(cfg.encoder.arch)
    with world.first_then_others():
        say(f"encoder: {cfg.encoder.arch}, {weights.initialise(trunk, cfg.encoder.weights)}")
    return METHODS[cfg.method.name].build_network(cfg, trunk)


class Run(NamedTuple):
    """A run folder that has been read."""

    config: Config
    network: FeatureNet
    step: int
    epoch: int


def load_run(folder: str | Path, device: torch.device | str = "cpu") -> Run:
    """The config and the trained network of a run folder, in eval mode.

    Raises ``FileNotFoundError`` when ``folder`` is not a run folder or has no weights yet, ``ValueError`` when its files do not
    belong together.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        raise FileNotFoundError(f"{folder} is not a run folder: it has no config.yaml")
    cfg = from_yaml(folder / "config.yaml")
    path = folder / "weights.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no weights.safetensors yet: the run has not reached its first checkpoint")
    network = METHODS[cfg.method.name].build_network(cfg, Trunk(cfg.encoder.arch))
    try:
        network.load_weights(checkpoint.load_weights(path))
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit {folder / 'config.yaml'}: {textwrap.shorten(str(error), 300)}") from error
    metadata = checkpoint.read_metadata(path)
    network = network.to(device, memory_format=torch.channels_last).eval()
    return Run(cfg, network, int(metadata.get("step", 0)), int(metadata.get("epoch", 0)))


@dataclass(frozen=True)
class Transform:
    """What evaluation does to an image: upright RGB, short side 256/224 of ``image_size``, centre crop, ImageNet normalisation."""

    image_size: int

    def __call__(self, image: Image.Image | str | Path) -> torch.Tensor:
        """A PIL image or an image file -> [3, S, S] float32. Raises ``OSError`` or ``ValueError`` for a file that is no image."""
        if isinstance(image, Image.Image):
            upright = ImageOps.exif_transpose(image).convert("RGB")
        else:
            upright = catalog.read_image(Path(image))[0]
        view = clean_view(upright, clean_resize(self.image_size), self.image_size, Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(view))
        return Normalise(IMAGENET_MEAN, IMAGENET_STD, torch.device("cpu"), torch.float32)(pixels[None])[0]


def load(folder: str | Path, device: torch.device | str = "cpu") -> FeatureNet:
    """The trained network of a run folder, in eval mode.

    ``engine.load(RUN).features(images)`` maps [B, 3, S, S] normalised images to unit rows [B, C]; its ``transform`` makes one such
    image [3, S, S] from a PIL image or a file, as evaluation does.
    """
    run = load_run(folder, device)
    run.network.transform = Transform(run.config.data.image_size)
    return run.network
