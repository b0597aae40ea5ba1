"""A validation part of the training images: held out before training, evaluated between epochs, and what the best weights are
chosen by. The test split has no part in it."""

from __future__ import annotations

import hashlib
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from engine.config import Config, ConfigError
from engine.console import counted, say
from engine.data import Catalog, ImageList
from engine.evaluation.evaluator import Candidate, evaluate_features, feature_name, headline, in_percent
from engine.evaluation.features import extract
from engine.training import ALONE, Trainer, World

LEAST = 2
"""Held-out images of a class, since retrieval leaves the asked one out; as many stay for training at least."""
_PROTOCOL = {"knn_top1": "knn", "linear_top1": "linear"}  # all other measures are of retrieval
_ABOUT = ("feature", "data", "fingerprint", "split", "images", "classes", "queries", "excluded", "image_size", "batch_size")


def hold_out(images: Catalog, cfg: Config, *, tell: bool = False, needed: bool = True) -> Catalog:
    """``images`` without the validation part of ``eval.validation``, which becomes ``images.validation``.

    Of each class of n labelled training images max(2, round(fraction * n)) are held out, of a class with fewer than four none.
    Which ones is a function of ``seed`` and the file names alone: the order of sha256(seed, name). tell: say how many.
    Raises ``ConfigError`` where nothing can be held out, or one class only; not ``needed``, all images stay then (other data than
    the run's own).
    """
    fraction = cfg.eval.validation or 0.0
    labelled = images.labelled
    if not fraction or not len(images.train) or not needed and labelled.labels is None:
        return images
    if labelled.labels is None:
        raise ConfigError(
            f"eval.validation: {fraction:g} of the training images are to be held out and evaluated by their classes, but those in "
            f"{images.train.root} have no labels; leave both keys out, or sort the photos into class folders"
        )
    held = drawn(labelled, fraction, cfg.seed)
    validation = subset(labelled, held)
    found = set(validation.labels.tolist())
    if len(found) < 2 and not needed:
        return images
    if len(found) < 2:
        raise ConfigError(
            f"eval.validation: {counted(len(found), 'class has', 'classes have')} at least {2 * LEAST} labelled training images, "
            f"and choosing weights takes two such classes; leave eval.keep_best and eval.validation out"
        )
    if tell:
        share = f"{100 * len(held) / len(labelled):.1f} % of the {len(labelled):,} labelled ones"
        without = len(set(labelled.labels.tolist())) - len(found)
        few = f"; {counted(without, 'class', 'classes')} with fewer than {2 * LEAST} photos stay whole" if without else ""
        say(
            f"validation: {counted(len(held), 'photo')} in {counted(len(found), 'class', 'classes')} held out of training, "
            f"{share}, at least {LEAST} a class, drawn by seed {cfg.seed}{few}"
        )
    gone = {labelled.names[i] for i in held.tolist()}
    train, part = (some and subset(some, _without(some, gone)) for some in (images.train, images.labelled_part))
    return images._replace(train=train, labelled_part=part, validation=validation)


def drawn(images: ImageList, fraction: float, seed: int) -> npt.NDArray[np.int64]:
    """Positions of the held-out images, ascending."""
    assert images.labels is not None
    by_class: dict[int, list[int]] = defaultdict(list)
    for i, label in enumerate(images.labels.tolist()):
        by_class[label].append(i)

    def place(i: int) -> bytes:
        return hashlib.sha256(f"{seed}\0".encode() + os.fsencode(images.names[i])).digest()

    held: list[int] = []
    for members in by_class.values():
        if len(members) >= 2 * LEAST:
            held += sorted(members, key=place)[: max(LEAST, round(fraction * len(members)))]
    return np.array(sorted(held), np.int64)


def _without(images: ImageList, gone: set[str]) -> npt.NDArray[np.int64]:
    return np.array([i for i, name in enumerate(images.names) if name not in gone], np.int64)


def subset(images: ImageList, index: npt.NDArray[np.int64]) -> ImageList:
    """The images at the positions ``index``, as a list of its own."""
    digest = hashlib.sha256(f"{images.fingerprint}\n".encode() + index.astype("<i8").tobytes())
    return replace(
        images,
        names=tuple(images.names[i] for i in index.tolist()),
        labels=None if images.labels is None else images.labels[index],
        sizes=images.sizes[index],
        plain=images.plain[index],
        file_sizes=images.file_sizes[index],
        fingerprint=digest.hexdigest(),
    )


class Validation:
    """Evaluates a trainer's network on the validation part: a line ``validation`` of metrics.jsonl. As a hook, ``after_epoch`` does
    so every ``eval.every`` epochs and after the last, and tells ``trainer.best`` of it.

    With ``eval.keep_best`` the protocol of that measure alone is evaluated, else ``eval.protocols``. knn and linear learn from the
    training images that are left. The processes of ``world`` share the features; the first one's number is everybody's.
    """

    def __init__(self, cfg: Config, images: Catalog, device: torch.device, world: World = ALONE):
        self.cfg, self.images, self.device, self.world = cfg, images, device, world
        self.measure = cfg.eval.keep_best
        self.protocols: Sequence[str] = (
            (_PROTOCOL.get(self.measure, "retrieval"),) if self.measure is not None else cfg.eval.protocols
        )

    def __call__(self, trainer: Trainer) -> float | None:
        """Evaluates now; the value of the measure, None without ``eval.keep_best``."""
        started = time.perf_counter()
        network, step, epoch = trainer.method.network, trainer.step.steps_done, trainer.epoch
        candidate = Candidate(
            "initial" if step == 0 else "run", feature_name(network), epoch, step,
            lambda images, split: extract(network, images, self.cfg, self.device, self.world.group),
        )  # fmt: skip
        records = evaluate_features(candidate, self.images, self.cfg, self.device, protocols=self.protocols, split="validation")
        shown = headline(records)
        if self.world.first:
            settings = {r["protocol"]: r["setting"] for r in records}
            about = {"kind": "validation", "step": step, "epoch": epoch}
            about["protocol"] = "; ".join(f"{name}: {setting}" for name, setting in settings.items())
            about |= {name: records[0][name] for name in _ABOUT if name in records[0]}
            trainer.records.write(about | shown | {"seconds": time.perf_counter() - started}, shown)
            say(f"epoch {epoch}, validation: {in_percent(shown)}")
        return None if self.measure is None else float(self.world.broadcast_object(shown[self.measure]))

    def after_epoch(self, trainer: Trainer) -> None:
        """A hook of the trainer."""
        every = self.cfg.eval.every
        due = isinstance(every, int) and every > 0 and trainer.epoch % every == 0
        if due or trainer.step.steps_done >= trainer.total_steps:
            value = self(trainer)
            if value is not None:
                assert self.images.validation is not None
                trainer.see_best(value, self.images.validation.identity)
