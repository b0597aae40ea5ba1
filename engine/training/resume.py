"""Which checkpoint a run continues, and whether it may: what was computed until then must be what is computed from now on."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.config import FILES, Config, ConfigError, OptimConfig, RunConfig, absolute, flatten, from_run, keys
from engine.console import printable, say
from engine.data import ImageList
from engine.run_folder import RunFolder, append_metrics, read_metrics
from engine.training import checkpoint
from engine.training.distributed import ALONE, World
from engine.training.optim import EMA_FORMULAS, formula, warmup_steps
from ppssl.method import METHODS, Method
from ppssl.settings import OF_RUN, SETTINGS

Found = tuple[Path, dict[str, Any]]
"""A checkpoint and its state."""
_CHOOSES = ("data.train", "data.classes", "data.fraction", "data.extra_roots", "eval.keep_best", "eval.validation")
"""By which images are chosen among those that are there."""
_EXAMPLES = 3
_LONGEST = 1 << 30
"""Bytes that a list of files may unpack to."""


def find_checkpoint(resume: str, out: Path, settings: dict[str, Any], world: World = ALONE) -> Found | None:
    """The checkpoint that every process of ``world`` continues in the run folder ``out``; None to start afresh.

    resume: ``auto`` is the folder's newest checkpoint, ``none`` is none, anything else the path of a checkpoint or of a run folder.
    settings: {dotted key: value} of the run that is to continue it.
    Raises ``FileNotFoundError`` where a path holds no checkpoint, ``ConfigError`` naming a key whose value must not change or where
    ``out`` holds another run, ``ValueError`` for a checkpoint that cannot be read.
    """
    found = None
    if world.first and (found := _find(resume, out)):
        then = recorded_settings(found[1], found[0])
        refuse_shorter(then, settings, found[1], found[0])
        refuse_change(then, settings, found[0], world.size)
    source = world.broadcast_object(found and found[0])
    return found or (source and (source, checkpoint.load(source)))


def _find(resume: str, out: Path) -> Found | None:
    if resume == "none":
        return None
    if resume != "auto":
        path = Path(resume)
        if not path.exists():
            raise FileNotFoundError(f"resume: {path} is not there; give a checkpoint, a run folder, auto or none")
        refuse_mixing(path, out)
        if is_inside(path, out) or RunFolder(out).is_empty() or not checkpoint.list_checkpoints(RunFolder(out).checkpoints):
            found = checkpoint.newest(RunFolder(path).checkpoints, say) if path.is_dir() else (path, checkpoint.load(path))
            if found is None:
                raise FileNotFoundError(f"resume: {path} holds no checkpoint")
            return found
    return checkpoint.newest(RunFolder(out).checkpoints, say)


def is_inside(path: Path, out: Path) -> bool:
    """Whether a checkpoint (or run folder) is that of the run in ``out``."""
    return out.resolve() in (path.resolve(), *path.resolve().parents)


def begun_from(out: Path) -> str | None:
    """The checkpoint of another run that the run in ``out`` began from; None for a run that began by itself."""
    return next((str(r.get("from")) for r in read_metrics(out) if r.get("kind") == "resume"), None)


def refuse_mixing(path: Path, out: Path) -> None:
    """Raises ``ConfigError`` where ``out`` holds another run than the one that ``path`` is a checkpoint of, or began from it."""
    if is_inside(path, out) or RunFolder(out).is_empty():
        return
    began = begun_from(out)
    if began is None or path.resolve() not in (Path(began), *Path(began).parents):
        raise ConfigError(
            f"resume: {path} is not of the run in {out}, and the two would be mixed; give an empty folder by --out DIR, or the "
            f"folder of {path}"
        )


def continue_in(out: Path, path: Path, step: int) -> None:
    """Makes the run folder ``out`` one of a run that continues the checkpoint at ``path`` of ``step``: checkpoints of later steps
    are set aside, and a folder that is not the checkpoint's own remembers where it began."""
    if not is_inside(path, out):
        if begun_from(out) is None:
            append_metrics(out, {"kind": "resume", "step": step, "from": str(path.resolve())})
        return
    for later in checkpoint.set_aside(RunFolder(out).checkpoints, step, ".later"):
        say(f"{later.name} is of a later step than {path} and was set aside")


def refuse_other_run(
    source: Path,
    state: dict[str, Any],
    out: Path | None,
    images: ImageList | None,
    loader: str,
    *,
    config: Config | None = None,
) -> Tensor | None:
    """Compares what made the checkpoint ``source`` with what is to continue it in ``out``: the run, the images, the loader.

    Says what differs and may. Returns and raises as ``refuse_mixing`` and ``refuse_other_images`` do.
    """
    if out is not None:
        refuse_mixing(source, out)
    places = None
    if images is not None:
        chosen = partial(_chosen_otherwise, state, source, config)
        allow = config is not None and config.data.allow_change
        places = refuse_other_images(state.get("images"), images, source, chosen, allow=allow)
    then = state.get("loader", loader)
    if then != loader:  # they agree in what they show, not in every level of every pixel
        say(f"loader: {loader} from here on, {then} until {source}: the pixels of views may differ slightly")
    return places


def _chosen_otherwise(state: dict[str, Any], source: Path, config: Config | None) -> str:
    """The settings by which other images are chosen than by the checkpoint's run, in words."""
    then, now = ({}, {}) if config is None else (recorded_settings(state, source), flatten(config))
    return ", ".join(f"{key}={now[key]} (was {then[key]})" for key in _CHOOSES if key in then and then[key] != now.get(key))


def recorded_settings(state: dict[str, Any], source: Path) -> dict[str, Any]:
    """{dotted key: value} that the run of a checkpoint's ``state`` had. Raises ``ValueError`` where they cannot be read."""
    info = state.get("info", {})
    if "config" not in info:  # a run that was built in code
        return info.get("settings", {})
    try:
        return flatten(from_run(str(info["config"])))
    except ConfigError as error:
        raise ValueError(f"resume: {source} was made with a config that this version cannot read: {error}") from error


def known_settings(
    method: Method,
    epochs: int,
    optim: OptimConfig,
    run: RunConfig,
    ema_decay: float,
    amp: str | None,
    ema_schedule: str = "constant",
) -> dict[str, Any]:
    """{dotted key: value} of a run that was built in code, as far as it can be told: enough to load its network again where the
    method is registered, and to refuse another run's folder."""
    sections = {"optim": optim, "run": run}
    known = {"epochs": epochs, "amp": amp, "ema.decay": ema_decay, "ema.schedule": ema_schedule}
    known |= {
        f"{name}.{field.name}": getattr(section, field.name) for name, section in sections.items() for field in fields(section)
    }
    known["method.name"] = METHODS.name_of(type(method)) or type(method).__name__
    network = method.network if type(method).network is not Method.network else None
    if network is not None:
        known["encoder.arch"] = getattr(network.trunk, "arch", type(network.trunk).__name__)
        known["encoder.weights"] = "none"
        known["encoder.freeze"] = getattr(network.trunk, "frozen", ())
    if network is not None and network.mask is not None:
        known |= {"method.minmax": network.mask.minmax, "method.maxout_width": network.mask.conv.out_channels}
    return known


def refuse_change(then: dict[str, Any], now: dict[str, Any], source: Path, processes: int = 1) -> None:
    """Compares the settings of a checkpoint with those of the run that continues it (``Key.resume``). Raises ``ConfigError`` naming
    the first key that must not change and did, and the ways on."""
    for key in _changed(then, now, "refused"):
        value = now[key]
        way = f"give {key}={then[key]} to continue it"
        if key == "bn.groups" and then[key] % processes:  # as many parts as processes at least
            fits = [str(n) for n in range(1, then[key] + 1) if then[key] % n == 0]
            way = f"{processes} processes cannot share those parts of the batch: start {' or '.join(fits)} to continue it"
        raise ConfigError(
            f"{key}: the checkpoint {source} was made with {then[key]!r}, this run has {value!r}, which changes what is learned; "
            f"{way}, or --out DIR (or --resume none) starts afresh{_from_its_weights(source)}"
        )


def refuse_shorter(then: dict[str, Any], now: dict[str, Any], state: dict[str, Any], source: Path) -> None:
    """Raises ``ConfigError`` where ``epochs`` of the run that continues the ``state`` of ``source`` is below what was done."""
    if "epochs" not in now or now["epochs"] >= then.get("epochs", 0):
        return
    done = -(-state["step"] // state["steps_per_epoch"]) if "steps_per_epoch" in state else state.get("epoch", 0)
    if now["epochs"] < done:
        raise ConfigError(
            f"epochs: {now['epochs']}, but {source} has trained {state['step']:,} steps, into epoch {done}; give epochs={done} or "
            f"more to continue it, an earlier checkpoint by --resume CHECKPOINT, or --out DIR (or --resume none) starts "
            f"afresh{_from_its_weights(source)}"
        )


def _from_its_weights(source: Path) -> str:
    """How a new run begins with what was learned."""
    weights = RunFolder(source.parent.parent).weights
    return f", from its weights with encoder.weights={weights}" if weights.is_file() else ""


def _changed(then: dict[str, Any], now: dict[str, Any], policy: str) -> list[str]:
    """The keys of that ``Key.resume`` whose value is another one now; a file that an earlier version recorded by a relative path is
    the same one."""
    known = {key: absolute(key, then[key]) if key in FILES else then[key] for key in now if key in then}
    differing = [key for key, value in known.items() if keys()[key].resume == policy and value != now[key]]
    return [key for key in differing if (key, now[key]) != ("queue.size", "auto")]  # the checkpoint's is taken (build.decide_queue)


def say_changes(state: dict[str, Any], source: Path, now: dict[str, Any], schedules: dict[str, float], total_steps: int) -> None:
    """Says in the log which settings that may change are other ones from here on than in the ``state`` of the checkpoint
    ``source``, and what follows for the learning rate, the decay of the momentum network and warm-ups.

    schedules: ``Step.schedules`` of the next step of the run that continues it, which has ``total_steps``.
    """
    then = recorded_settings(state, source)
    for key in _changed(then, now, "said"):
        say(f"{key}: {now[key]!r} from here on, {then[key]!r} until {source}")
    step = state["step"]
    for name, before in state.get("next", {}).items():  # absent in a checkpoint of an earlier version
        value = schedules.get(name, before)
        if value != before:
            key = "ema.schedule" if name == "ema.decay" else "optim.schedule"
            how = f"{key}={now[key]}, {_formula(key, state, now, total_steps)}, total_steps {total_steps:,}, step counted from 0"
            say(f"{name} of step {step + 1:,}: {value:.6g}, which was to be {before:.6g}; from here on {how}")
    if now.get("epochs") == then.get("epochs") or "steps_per_epoch" not in state:
        return
    # warm-ups that are a fraction of the run
    former = state["steps_per_epoch"] * then["epochs"]
    kind = SETTINGS.get(now.get("method.name", ""))
    read = {entry.name for entry in fields(kind)} if kind else set()
    for key in now:
        if OF_RUN in keys()[key].marks and now[key] and key.partition(".")[0] in read:
            ends, ended = (round(now[key] * steps) for steps in (total_steps, former))
            again = "; it is warmed up again" if ended <= step < ends else ""
            text = f"it ends at step {ends:,}, not {ended:,}; step {step:,} is done{again}"
            say(f"{key}={now[key]:g} is a fraction of the run: {text}")


def _formula(key: str, state: dict[str, Any], now: dict[str, Any], total_steps: int) -> str:
    """What the next step has of that schedule, in words."""
    if key == "ema.schedule":
        return EMA_FORMULAS[now[key]]
    warmup = warmup_steps(now["optim.warmup"], state["steps_per_epoch"], total_steps)
    return formula(state["step"], schedule=now[key], warmup=warmup)


def listing(images: ImageList) -> dict[str, Any]:
    """What a checkpoint keeps of its training list: enough to name what has changed since."""
    rows = zip(images.names, images.file_sizes.tolist(), strict=True)
    packed = zlib.compress(b"".join(os.fsencode(name) + f"\0{size}\0".encode() for name, size in rows))
    return {"fingerprint": images.fingerprint, "files": torch.frombuffer(bytearray(packed), dtype=torch.uint8)}


def refuse_other_images(
    listed: dict[str, Any] | None, images: ImageList, source: Path, chosen: Callable[[], str] = str, *, allow: bool = False
) -> Tensor | None:
    """Compares the training list of the checkpoint ``source`` with ``images`` by names and sizes of the files: a copy of a data set
    is the same.

    listed: of ``listing``; None of a checkpoint that holds none. chosen: gives the settings that chose others, asked for the
    error alone. allow: go on with another list.
    Returns where the images of then are now ([N + 1] int64, -1 for those that are gone and in the last row), None where the lists
    are the same. Raises ``ConfigError`` with counts and examples where they differ.
    """
    if listed is None:
        say(f"{source} is of an earlier version and does not say which images it was trained on: they are taken to be these")
        return None
    if listed["fingerprint"] == images.fingerprint:
        return None
    parts = zlib.decompressobj().decompress(listed["files"].numpy().tobytes(), _LONGEST).split(b"\0")
    then = dict(zip(map(os.fsdecode, parts[0::2]), map(int, parts[1::2]), strict=False))
    now = dict(zip(images.names, images.file_sizes.tolist(), strict=True))
    kinds = {
        "added": [name for name in now if name not in then],
        "removed": [name for name in then if name not in now],
        "changed": [name for name in now if name in then and then[name] != now[name]],
    }
    difference = ", ".join(_counted(names, kind) for kind, names in kinds.items() if names)
    if not difference and list(then) == list(now):
        say(f"the images have the names and sizes of those of {source}, but other modification times: taken to be a copy")
        return None
    difference = f"the training images in {images.root} are not those of {source}: {difference or 'another order'} of {len(then)}"
    if not allow:
        named = chosen()
        raise ConfigError(
            f"{named or 'data.root'}: {difference}; the order of the images and the length of the run would change. "
            f"{'Set it' if named else 'Put them'} back, or continue with these by data.allow_change=true, or --resume none starts "
            "afresh"
        )
    say(f"{difference}; data.allow_change=true: the run goes on with these, in another order")
    place = {name: i for i, name in enumerate(now)}
    return torch.tensor([*(place.get(name, -1) for name in then), -1])


def _counted(names: list[str], kind: str) -> str:
    examples = ", ".join(map(printable, names[:_EXAMPLES])) + (", ..." if len(names) > _EXAMPLES else "")
    return f"{len(names)} {kind} ({examples})"
