"""The one place that turns a configuration into objects: lists, teacher, method, trainer; and the network of a finished run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from engine.config import FILES, Config, absolute, keys_per_step
from engine.console import counted, say
from engine.data import Transform, build_loader, catalog, cores, sampler
from engine.errors import ConfigError
from engine.files import cache_folder
from engine.pretrained import load_run, teacher, third_party
from engine.synthetic import dataset
from engine.training import ALONE, Trainer, World, describe_optimizer
from ppssl.encoder import BaseTrunk, FeatureNet, Trunk
from ppssl.method import METHODS, Method
from ppssl.ops import can_run
from ppssl.settings import (
    QueueConfig,
    Settings,
    get_key,
    idle_keys,
    method_settings,
    replace_keys,
    resolve_variant,
    settings_class,
    title,
)
from ppssl.teacher import SHIPPED, Teacher, load_descriptions
from ppssl.timm_trunk import PREFIX, TimmTrunk, build_trunk, image_input

HELD_OUT = 0.1
"""``eval.validation`` where ``eval.keep_best`` is set and that is not."""


def settings_of(cfg: Config) -> Settings:
    """What the method of ``cfg`` is told."""
    return method_settings(cfg, cfg.data.image_size)


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
    try:
        settings_class(cfg.method.name)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    cfg = resolve_variant(cfg)
    settings = settings_of(cfg)
    if settings.uses_text and cfg.teacher.model.startswith(PREFIX):
        raise ConfigError(
            f"teacher.model: {cfg.teacher.model} sees images and reads no text; use ais.target=image or ais.target=relations with "
            f"it, or an image-text model of open_clip, as teacher.model=ViT-B-32-quickgelu"
        )
    if cfg.ais.count is None:  # written down, so that a file that is changed later does not change a run that goes on
        count = len(load_descriptions(cfg.ais.prompts)) if settings.uses_text else SHIPPED
        cfg = replace(cfg, ais=replace(cfg.ais, count=count))
    cfg = with_absolute_paths(with_validation(cfg))
    if cfg.data.root is not None:  # a run is evaluated from other folders too
        root, *more = (os.path.abspath(os.path.expanduser(path)) for path in (cfg.data.root, *cfg.data.extra_roots))
        cfg = replace(cfg, data=replace(cfg.data, root=root, extra_roots=tuple(more)))
    if cfg.queue.dtype == "auto":
        narrow = {"bf16": "bfloat16", "fp16": "float16"}.get(cfg.amp or "", "float32")
        cfg = replace(cfg, queue=replace(cfg.queue, dtype=narrow if device.type == "cuda" else "float32"))
    if cfg.bn.impl == "auto":
        fused = device.type == "cuda" and can_run(device) and not cfg.encoder.arch.startswith(PREFIX)
        cfg = replace(cfg, bn=replace(cfg.bn, impl="fused" if fused else "torch"))
    elif cfg.bn.impl == "fused" and not can_run(device):
        raise ConfigError(f"bn.impl: fused needs a GPU and triton, the device is {device}; use bn.impl=torch")
    return cfg


def with_validation(cfg: Config) -> Config:
    """``cfg`` with what ``eval.keep_best`` implies where nothing else is asked for: a part that is held out, and evaluations."""
    validation, every = cfg.eval.validation, cfg.eval.every
    if validation is None:
        validation = HELD_OUT if cfg.eval.keep_best else 0.0
    if cfg.eval.keep_best and every == 0:
        say("eval.every: 1, as eval.keep_best compares the epochs; set it higher to evaluate less often")
        every = 1
    return replace(cfg, eval=replace(cfg.eval, validation=validation, every=every))


def with_absolute_paths(cfg: Config) -> Config:
    """``cfg`` with the files that it names by absolute paths: a run is continued from other folders too."""
    changed = {key: absolute(key, get_key(cfg, key)) for key in FILES}
    return replace_keys(cfg, {key: value for key, value in changed.items() if value != get_key(cfg, key)})


def keep_batch_norm(cfg: Config, then: str | None, device: torch.device) -> Config:
    """``cfg``, whose ``bn.impl`` was left to auto, with ``then``, what the run that it continues computes (None: it does not tell).
    Where this machine cannot compute that, it says so."""
    if then in (None, cfg.bn.impl):
        return cfg
    if then == "fused" and not can_run(device):
        say(f"bn.impl: {cfg.bn.impl!r} from here on, {then!r} until now: it needs a GPU and triton")
        return cfg
    return replace(cfg, bn=replace(cfg.bn, impl=then))


def decide_queue(cfg: Config, photos: int, found: dict[str, Any] | None = None) -> Config:
    """``cfg`` with ``queue.size: auto`` decided: a row for each of the training ``photos``, at most the published 65536, and room
    for the keys of a step. found: the settings of the checkpoint that is continued, whose size is taken."""
    if cfg.queue.size != "auto":
        return cfg
    keys = keys_per_step(cfg)
    size, why = max(keys, min(QueueConfig.size, photos)), f"auto, of {counted(photos, 'training photo')}"
    if found and isinstance(found.get("queue.size"), int):
        size, why = found["queue.size"], "as in the checkpoint"
    if keys:
        say(f"queue.size: {size} ({why})")
    return replace(cfg, queue=replace(cfg.queue, size=size))


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


def draw(cfg: Config, *, progress: bool = True) -> None:
    """Draws the synthetic dataset at ``data.root`` where that names it and it is missing or of another version. For the commands
    whose config is the person's own: one that was found in a run folder or a file decides nothing that is written."""
    if cfg.data.name == "birds" and cfg.data.root is not None:
        dataset.ensure(Path(cfg.data.root), progress=progress)


def data(cfg: Config, *, cache_dir: Path | None, training: bool = True, progress: bool = True) -> catalog.Catalog:
    """The checked image lists of ``data.name`` under ``data.root``, where nothing is written.

    training: whether training images are needed. progress: shows it, and says how the set was understood.
    """
    if cfg.data.root is None:
        raise ConfigError("data.root: not set; give the folder of the unpacked data set, e.g. data.root=/data/CUB_200_2011")
    root = Path(cfg.data.root)
    if cfg.data.name == "birds" and dataset.is_missing(root):
        raise ConfigError(
            f"data.root: the synthetic dataset is not at {root}, or is of another version, and this command only reads: name the "
            f"folder where it lies (data.root=DIR, of engine.replay --root DIR), or draw it: python -m engine.check --cfg demo "
            f"data.root=DIR"
        )
    found = catalog.load(
        cfg.data.name,
        root,
        train=cfg.data.train,
        test=cfg.data.test,
        classes=cfg.data.classes,
        fraction=cfg.data.fraction,
        extra_roots=cfg.data.extra_roots,
        seed=cfg.seed,
        training=training,
        crop_banner=cfg.data.crop_banner,
        workers=cfg.data.workers,
        cache_dir=cache_dir,
        progress=progress,
    )
    if progress:
        for note in found.notes:
            say(note)
    return found


def method(cfg: Config, model: Teacher | None, world: World = ALONE) -> Method:
    """The method of ``cfg`` with its starting weights, in ``world``; random parts are a function of ``seed`` alone."""
    network = initial_network(cfg, world)
    method = METHODS[cfg.method.name].from_settings(settings_of(cfg), network, model)
    if world.group:
        world.broadcast_module(method)
        method.distribute(world.group, sync_bn=cfg.bn.sync, shard_queue=cfg.queue.sharded)
    return method


def initial_network(cfg: Config, world: World = ALONE) -> FeatureNet:
    """The inference network of ``cfg`` as training finds it, a function of ``seed`` and ``encoder.weights``."""
    torch.manual_seed(cfg.seed)
    trunk = build_trunk(cfg.encoder.arch)
    if isinstance(trunk, TimmTrunk):
        check_trunk(trunk, cfg)
    with world.main_process_first():
        found = third_party.initialize(trunk, cfg.encoder.weights, partial=cfg.encoder.partial)
        say(f"encoder: {cfg.encoder.arch}, {found}")
    if cfg.bn.impl == "fused" and isinstance(trunk, Trunk):
        trunk.fuse_batch_norm()
        say(
            "bn.impl: fused: batch-norm, shortcut and ReLU are one op, which by arithmetic moves fewer bytes in fewer launches; "
            "its time has not been measured. bn.impl=torch takes torch's"
        )
    if cfg.encoder.freeze:
        freeze(trunk, cfg)
    say_idle_batch_norm(trunk, cfg)
    return METHODS[cfg.method.name].build_network(settings_of(cfg), trunk)


def freeze(trunk: BaseTrunk, cfg: Config) -> None:
    """Freezes ``encoder.freeze`` of ``trunk`` and says what is left to train. Raises ``ConfigError`` for a part that the trunk does
    not have, and where nothing that is kept would be trained."""
    try:
        trunk.freeze(cfg.encoder.freeze)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    every, trained = (sum(p.numel() for p in trunk.parameters() if p.requires_grad or all_) for all_ in (True, False))
    if not trained and not settings_of(cfg).has_mask:
        raise ConfigError(
            f"encoder.freeze: with {', '.join(cfg.encoder.freeze)} nothing of {trunk.arch} is trained, and {cfg.method.name} keeps "
            f"nothing else; leave a part out"
        )
    say(f"encoder.freeze: {', '.join(cfg.encoder.freeze)}; {trained:,} of {every:,} weights of the trunk are trained")
    if cfg.encoder.weights == "none":
        say("encoder.freeze: with encoder.weights=none what is frozen stays random")


def check_trunk(trunk: TimmTrunk, cfg: Config) -> None:
    """Raises ``ConfigError`` where a timm trunk does not take images of ``data.image_size``, or the method needs a map that divides
    them."""
    side = cfg.data.image_size
    try:
        cells = trunk.map_side(side)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if settings_of(cfg).divides_image and side != cells * trunk.stride:
        below = side // trunk.stride * trunk.stride or trunk.stride
        raise ConfigError(
            f"data.image_size: got {side}, must be a multiple of {trunk.stride}, the stride of the map of {trunk.arch}; use "
            f"{below} or {below + trunk.stride}"
        )


def say_idle_batch_norm(trunk: BaseTrunk, cfg: Config) -> None:
    """Says of ``bn.*`` where it does nothing in the ``trunk`` in training mode."""
    norms = [module for module in trunk.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    trained = any(norm.training for norm in norms)
    if cfg.bn.impl == "fused" and isinstance(trunk, TimmTrunk):
        say(f"bn.impl: fused does nothing in {trunk.arch}; only the ResNets without timm/ have fused batch norm")
    elif cfg.bn.impl == "fused" and not trained:
        say(f"bn.impl: fused does nothing in {trunk.arch}, all of whose batch norms are frozen")
    for key, is_set in (("bn.groups", cfg.bn.groups > 1), ("bn.sync", cfg.bn.sync)):
        if is_set and not trained:
            why = "all of whose batch norms are frozen" if norms else "which has no batch norm"
            say(f"{key}: does nothing in {trunk.arch}, {why}, but in a mask branch and in encoder.head=mlp3_bn")


def load(
    folder: str | Path, device: torch.device | str = "cpu", *, network: FeatureNet | None = None, best: bool = False
) -> FeatureNet:
    """The trained network of a run folder, in eval mode; the images it was trained on are not needed.

    ``network.embed(paths)`` maps image files to unit rows [N, C], in batches. ``network.features(images)`` takes normalized images
    [B, 3, S, S]; ``network.transform`` makes one of them [3, S, S] from a PIL image or a file, as evaluation does.
    ``network.class_names`` are those of the run's data, by label.

    network: takes the weights of a method or a trunk of your own; None builds that of a registered method.
    best: the weights with the best validation measure (``eval.keep_best``); else those of the newest checkpoint.
    Raises ``FileNotFoundError`` for what is no run folder, ``ValueError`` where weights and network do not belong together.
    """
    run = load_run(folder, device, network, best=best)
    encoder = run.config.encoder
    run.network.transform = Transform(run.config.data.image_size, image_input(encoder.arch, encoder.weights))
    run.network.class_names = run.class_names
    return run.network


def assemble(
    cfg: Config,
    images: catalog.Catalog,
    device: torch.device,
    *,
    teacher: Teacher | None,
    out: Path | None,
    cache: Path | None,
    embed: Callable[[Teacher], torch.Tensor],
    profile: int = 0,
    world: World = ALONE,
) -> Trainer:
    """The trainer of ``cfg``; ``embed`` gives the teacher's [N, E] embeddings of the training images, if the method wants them."""
    cfg = decide_queue(cfg, len(images.train))
    trained = method(cfg, teacher, world)
    shard = sampler.Shard(world.rank, world.size)
    with world.main_process_first():
        loader = build_loader(images.train, cfg, device, with_clean=trained.needs_clean, cache_dir=cache, shard=shard)
    rows = embed(teacher) if trained.needs_teacher_embeddings else None
    trainer = Trainer(
        trained,
        loader,
        epochs=cfg.epochs,
        optim=cfg.optim,
        run=cfg.run,
        ema_decay=cfg.ema.decay,
        ema_schedule=cfg.ema.schedule,
        amp=cfg.amp,
        device=device,
        teacher=rows,
        out=out,
        config=cfg,
        images=images.train,
        profile=profile if world.first else 0,
        world=world,
    )
    for why, keys in idle_keys(cfg).items():
        say(f"{', '.join(keys)}: {'does' if len(keys) == 1 else 'do'} nothing here: {why}")
    say(f"method: {title(cfg)}, {sum(p.numel() for p in trainer.step.parameters):,} trained parameters")
    optimizer, *remarks = describe_optimizer(trainer.step.optimizer, cfg.optim)
    say(f"optimizer: {optimizer}")
    for remark in remarks:
        say(remark)
    say(f"data: {cfg.data.name}, {len(images.train)} training images, loader {loader.name}, color {cfg.data.aug}")
    say(f"precision: {trainer.precision.note}; device {device}; step: {trainer.execution.note}")
    if world.group:
        say(f"processes: {world.size}, {cfg.batch_size // world.size} images of each batch; " + (
            "batch statistics shared" if cfg.bn.sync else f"batch statistics of {cfg.bn.groups} parts"
        ) + ("; queue in parts" if cfg.queue.sharded else ""))  # fmt: skip
    return trainer


def load_teacher(cfg: Config, world: World) -> Teacher | None:
    """The method's teacher, if it has one; the first process fetches its weights where they are not available."""
    with world.main_process_first():
        return teacher(cfg, world.device)
