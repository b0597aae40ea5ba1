"""Features evaluated by protocols, as plain records: once for a command, again and again beside a training run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine import files
from engine.config import Config
from engine.console import say
from engine.data import Catalog, ImageList, teacher_cache
from engine.evaluation import knn, linear
from engine.evaluation.features import extract
from engine.evaluation.retrieval import retrieval
from engine.files import write_text
from engine.run_folder import RunFolder, read_metrics
from engine.training import ALONE, COLLAPSE, COLLAPSED, Trainer, World
from ppssl.method import spread
from ppssl.teacher import Teacher

DRAW_SEED = 0
"""Of label fractions and of what is held out of them: the same images for every run."""
_LEARNED = {"knn", "linear"}
"""Protocols that need labelled training images."""
SHARE = 0.02
"""Of the training time, which ``eval.every=auto`` stays below."""


class Candidate(NamedTuple):
    """Something that turns images into features."""

    model: str
    """run, initial (the untouched network), teacher, or weights (of a file)."""
    feature: str
    """How the feature is made, e.g. ``l2(gap(F))``."""
    epoch: int | None
    """Epochs done; None where there are none to count."""
    step: int | None
    features: Callable[[ImageList, str], Tensor]
    """(images, name of the split) -> [N, C]."""


def of_teacher(teacher: Teacher, device: torch.device, workers: int | None) -> Candidate:
    """The teacher's own image features of clean images, read from the cache that training uses."""

    def features(images: ImageList, split: str) -> Tensor:
        cache = files.cache_folder()
        return teacher_cache.embeddings(teacher, images, device=device, cache_dir=cache, workers=workers).float()

    return Candidate("teacher", f"image feature of {teacher.name}", None, None, features)


def feature_name(network: nn.Module) -> str:
    """What a ``FeatureNet`` computes."""
    return "l2(gap(F))" if getattr(network, "mask", None) is None else "l2(gap(A * F))"


def check(images: Catalog, protocols: Sequence[str], split: str = "test") -> None:
    """Raises ``ValueError`` where ``protocols`` cannot evaluate this data, saying what can be done with it."""
    root = images.train.root
    in_test = images.test is not None and images.test.labels is not None and len(images.test) > 0
    if not in_test and not _labelled(images.labelled):
        raise ValueError(
            f"data.root: {root} has no labels, so that {', '.join(protocols)} cannot evaluate anything. What works without labels: "
            f"python -m engine.report RUN (neighbors and near-duplicates), python -m engine.search RUN IMAGE"
        )
    if split == "train":
        if not _labelled(images.labelled):
            raise ValueError(f"--split train: the training images of {root} have no labels; --split test evaluates the test split")
        if tuple(protocols) != ("retrieval",):
            raise ValueError("--split train: only --protocol retrieval leaves the asked image out; knn and linear learn from it")
        return
    if split == "validation":
        if images.validation is None:
            raise ValueError("--split validation: the run held no part of its training images out; see eval.validation")
        return
    if not in_test:
        raise ValueError(
            f"data.root: {root} has no labelled test split; for folders put one in {root}/test/<class>/*.jpg (or val/). "
            f"Without it: --protocol retrieval --split train, which ranks the training images among themselves"
        )
    learned = [p for p in protocols if p in _LEARNED]
    if learned and not _labelled(images.labelled):
        learn = "learns" if len(learned) == 1 else "learn"
        raise ValueError(
            f"{' and '.join(learned)} {learn} from labelled training images, of which data.root={root} has none; --protocol "
            f"retrieval (eval.protocols=[retrieval]) needs the test split alone"
        )


def supported(images: Catalog, protocols: Sequence[str]) -> tuple[str, ...]:
    """``protocols`` without those that learn from training labels where there are none, which is said; all where none would be
    left, for ``check`` to refuse."""
    left = tuple(p for p in protocols if p not in _LEARNED)
    if not left or len(left) == len(protocols) or _labelled(images.labelled):
        return tuple(protocols)
    say(f"{' and '.join(p for p in protocols if p in _LEARNED)} left out: there are no labelled training images to learn from")
    return left


def _labelled(images: ImageList) -> bool:
    return images.labels is not None and len(images) > 0


def evaluate_features(
    candidate: Candidate,
    images: Catalog,
    cfg: Config,
    device: torch.device,
    *,
    protocols: Sequence[str],
    fractions: Sequence[float] = (100,),
    solvers: Sequence[str] = ("convex",),
    split: str = "test",
    own: Mapping[str, str] | None = None,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """One plain record for every number of every protocol, each naming protocol, feature, data, split, epoch and step.

    protocols: of retrieval, knn (every k of ``knn.K``), linear (every ``fraction`` in percent and every solver: convex, sgd). Where
    no evaluated class has training images, knn and linear do not apply; where the evaluated images are of a single class, which
    every answer hits, no protocol does: one record each, whose ``top1`` is None.
    own: {split: identity} of the lists that are the run's own, so that ``own_data`` tells them from others; None: these are.
    quiet: whoever keeps the records tells of a collapse, once per run.
    Raises ``ValueError`` for data that they cannot evaluate.
    """
    check(images, protocols, split)
    evaluated = {"test": images.test, "validation": images.validation}.get(split, images.labelled)
    device = torch.device("cpu") if device.type == "mps" else device  # which has no float64
    labels = torch.from_numpy(evaluated.labels).to(device)
    started = time.perf_counter()
    features = candidate.features(evaluated, split).to(device)
    apart = spread(F.normalize(features.float(), dim=1)).get("spread", 1.0)
    if apart < COLLAPSED and not quiet:
        say(f"warning: {candidate.model}, {split} split: {COLLAPSE}; ranks are those of ties, which the order of the files decides")
    about = {
        "model": candidate.model,
        "feature": f"{candidate.feature}, {features.shape[1]}-d",
        "epoch": candidate.epoch,
        "step": candidate.step,
        "data": cfg.data.name,
        "root": str(images.train.root.resolve()),
        "split": split,
        "images": len(evaluated),
        "classes": len(np.unique(evaluated.labels)),
        "image_size": cfg.data.image_size,
        "batch_size": cfg.eval.batch_size,
        "amp": cfg.amp,
        "spread": float(apart),
    }
    identities = {"train": images.train.identity, split: evaluated.identity}
    records: list[dict[str, Any]] = []

    def add(protocol: str, setting: str, values: dict[str, Any]) -> None:
        nonlocal started
        now = time.perf_counter()
        used = (split,) if protocol == "retrieval" else (split, "train")
        which = {"own_data": own is None or all(own.get(name) == identities[name] for name in used)}
        which |= {"fingerprint": identities[split][:16]} | ({"train_fingerprint": identities["train"][:16]} if used[1:] else {})
        records.append({"protocol": protocol, "setting": setting} | about | which | values | {"seconds": now - started})
        started = now

    def not_applicable(names: Sequence[str], why: str, more: str = "", **values: Any) -> list[dict[str, Any]]:
        say(f"{', '.join(names)}: not applicable, {why}")
        for name in names:
            add(name, f"not applicable: {why}{more}", {"top1": None} | values)
        return records

    if about["classes"] == 1:
        return not_applicable(protocols, f"the {split} split has a single class", ", of which every answer is")
    if "retrieval" in protocols:
        add("retrieval", f"leave-one-out inside the {split} split, cosine", retrieval(features, labels)._asdict())
    if learned := [name for name in protocols if name in _LEARNED]:
        bank, known = candidate.features(images.labelled, "train").to(device), torch.from_numpy(images.labelled.labels).to(device)
        unseen = int((~torch.isin(labels, known)).sum())  # images of classes without a training image: they cannot be right
        if unseen == len(labels):  # an open-set split: nothing that is learned from the training labels can be right
            return not_applicable(learned, f"no {split} class has a training image", unseen=unseen)
        if unseen:
            say(f"{unseen} of {len(labels)} {split} images are of classes without training images; they count as wrong")
    if "knn" in protocols:
        for result in knn.knn(bank, known, features, labels):
            setting = f"k {result.k}, weights exp(cosine / {knn.TEMPERATURE}), bank: train split"
            add("knn", setting, result._asdict() | {"temperature": knn.TEMPERATURE, "bank": len(bank), "unseen": unseen})
    if "linear" in protocols:
        for percent in fractions:
            some = linear.fraction(known, percent, DRAW_SEED)
            counts = torch.bincount(known[some])
            counts = counts[counts > 0]
            drawn = {
                "fraction": percent, "train_images": len(some), "train_images_a_class": [int(counts.min()), int(counts.max())],
                "draw_seed": DRAW_SEED, "unseen": unseen,
            }  # fmt: skip
            for solver in solvers:
                if solver == "convex" and counts.max() < 2:
                    say(f"linear convex, {percent:g} %: left out, one image per class leaves none to choose the penalty on")
                    continue
                setting, probe, more = _PROBES[solver](bank[some], known[some], len(images.train.classes))
                add("linear", setting, {"solver": solver, "top1": probe.accuracy(features, labels)} | drawn | more)
    return records


def _convex(features: Tensor, labels: Tensor, classes: int) -> tuple[str, linear.Probe, dict[str, Any]]:
    fit = linear.convex(features, labels, classes, seed=DRAW_SEED)
    best = max(fit.held_out)
    setting = f"softmax regression, penalty {fit.penalty:.1e} by {100 * best:.1f} % on held-out training images, clean crops"
    if not fit.converged:
        say(f"linear probe: not converged after {fit.iterations} iterations")
    more = {"penalty": fit.penalty, "held_out_top1": best, "iterations": fit.iterations, "converged": fit.converged}
    return setting, fit.probe, more


def _sgd(features: Tensor, labels: Tensor, classes: int) -> tuple[str, linear.Probe, dict[str, Any]]:
    probe = linear.sgd(features, labels, classes, seed=DRAW_SEED)
    return "SGD lr 30, batch 256, 100 epochs, x 0.1 at 60 and 80, on features of clean crops", probe, {"lr": 30.0, "epochs": 100}


_PROBES = {"convex": _convex, "sgd": _sgd}


def headline(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The numbers of a curve: rank1, rank5, mAP, knn_top1 (largest k) and linear_top1 (largest fraction, convex)."""
    shown: dict[str, float] = {}
    for r in records:
        if r["protocol"] == "retrieval":
            shown |= {name: r[name] for name in ("rank1", "rank5", "mAP") if name in r}
        elif r["protocol"] == "knn" and r["top1"] is not None:
            shown["knn_top1"] = r["top1"]
    probes = [r for r in records if r["protocol"] == "linear" and r.get("solver") == "convex"]
    if probes:
        shown["linear_top1"] = max(probes, key=lambda r: r["fraction"])["top1"]
    return shown


def in_percent(values: dict[str, float]) -> str:
    """``headline`` as a line for the terminal."""
    return "  ".join(f"{name} {100 * value:.1f} %" for name, value in values.items()) or "no protocol is applicable"


_LISTS = ("fingerprint", "train_fingerprint")
_IDENTITY = (
    "source", "model", "protocol", "solver", "k", "fraction", "data", "split", "epoch", "step", "feature", "image_size",
    "batch_size", "amp", "temperature", "lr", "epochs", "draw_seed", *_LISTS,
)  # fmt: skip


def keep(path: Path, records: Sequence[dict[str, Any]], *, until: int | None = None) -> list[dict[str, Any]]:
    """Adds ``records`` to the list in ``path``, in the place of older ones of the same thing: the same network, protocol, settings
    and images. Other images are another thing, however they are called. Returns the whole list. ``until`` drops what was measured
    after that step (a run that is continued from there has not been there yet)."""
    old: list[dict[str, Any]] = []
    if path.is_file():
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            say(f"{path} cannot be read ({error}) and is written anew")

    def identity(record: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(record.get(name) for name in _IDENTITY)

    # records of earlier versions do not say which images they are of; they are taken for the run's own
    unnamed = [{k: v for k, v in r.items() if k not in _LISTS} for r in records if r.get("own_data")]
    new = {identity(r) for r in [*records, *unnamed]}
    kept = [r for r in old if identity(r) not in new and (until is None or (r["step"] or 0) <= until)]
    text = json.dumps([*kept, *records], indent=1) + "\n"
    write_text(path, text)
    return [*kept, *records]


# Of the first record, into the line of the log.
_ABOUT = (
    "feature", "data", "fingerprint", "split", "images", "classes", "queries", "excluded", "image_size", "batch_size", "spread",
)  # fmt: skip


class Evaluator:
    """Evaluates a trainer's network into ``out``: a line ``eval`` of metrics.jsonl and the records of evaluation.json.

    Calling it evaluates now. As a hook, ``after_epoch`` evaluates when ``eval.every`` says so: every n epochs, or, with ``auto``,
    as often as keeps it below 2 % of the training time, by what the last one took. Where there are no labels it says so, once.
    The processes of ``world`` share the features; the first one decides when, and writes.
    """

    def __init__(self, out: Path, cfg: Config, images: Catalog, device: torch.device, world: World = ALONE):
        self.out, self.cfg, self.images, self.device, self.world = out, cfg, images, device, world
        self.cost = self.spent = 0.0
        self.times = 0
        self.possible = images.test is not None and images.test.labels is not None and np.bincount(images.test.labels).max() > 1
        if not self.possible:
            say("no test split with two labelled images of a class: nothing to evaluate the features by")
            return
        self.protocols = supported(images, cfg.eval.protocols)
        if not _labelled(images.labelled) and _LEARNED.issuperset(self.protocols):
            self.possible = False
            names = " and ".join(self.protocols)
            say(f"{names}: no labelled training images to learn from: nothing is evaluated; eval.protocols=[retrieval] needs none")

    def __call__(self, trainer: Trainer) -> None:
        if not self.possible:
            return
        started = time.perf_counter()
        network, step, epoch = trainer.method.network, trainer.step.steps_done, trainer.epoch
        candidate = Candidate(
            "initial" if step == 0 else "run", feature_name(network), epoch, step,
            lambda images, split: extract(network, images, self.cfg, self.device, self.world.group),
        )  # fmt: skip
        records = evaluate_features(candidate, self.images, self.cfg, self.device, protocols=self.protocols, quiet=True)
        if not records or not self.world.first:  # nothing but a probe, which has said why it was left out
            return
        shown = headline(records)
        settings = {r["protocol"]: r["setting"] for r in records}  # of several k the last, which is the headline's
        protocol = "; ".join(f"{name}: {setting}" for name, setting in settings.items())
        about = {"kind": "eval", "step": step, "epoch": epoch, "protocol": protocol}
        about |= {name: records[0][name] for name in _ABOUT if name in records[0]}
        self.cost = time.perf_counter() - started
        trainer.records.write(about | shown | {"seconds": self.cost}, shown)
        keep(RunFolder(self.out).evaluation, records)
        say(f"epoch {epoch}: {in_percent(shown)}")

    def teacher(self, teacher: Teacher | None) -> None:
        """Evaluates the teacher's own image features, where the method has one: what the student could take over."""
        if teacher is None or not self.possible or not self.world.first:
            return
        candidate = of_teacher(teacher, self.device, self.cfg.data.workers)
        records = evaluate_features(candidate, self.images, self.cfg, self.device, protocols=self.protocols)
        keep(RunFolder(self.out).evaluation, records)
        say(f"teacher: {in_percent(headline(records))}")

    def resume(self, step: int) -> None:
        """Forgets what was measured after ``step`` and learns from the log what an evaluation costs."""
        if not self.world.first:
            return
        past = [r for r in read_metrics(self.out) if r["kind"] == "eval"]
        self.cost = past[-1]["seconds"] if past else 0.0
        if (RunFolder(self.out).evaluation).is_file():
            keep(RunFolder(self.out).evaluation, [], until=step)

    def after_epoch(self, trainer: Trainer) -> None:
        """A hook of the trainer; the last epoch is evaluated after training."""
        if not self.possible or trainer.ended:
            return
        trained = time.perf_counter() - trainer.log.opened - self.spent
        if self.world.broadcast_object(self.is_due(trainer.epoch, trained)):  # it depends on the clock
            started = time.perf_counter()
            self(trainer)
            self.spent += time.perf_counter() - started
            self.times += 1

    def is_due(self, epoch: int, trained: float) -> bool:
        """Whether to evaluate after ``epoch`` epochs and ``trained`` seconds of training."""
        every = self.cfg.eval.every
        if every == "auto":
            return self.spent + self.cost <= SHARE * trained
        return every > 0 and epoch % every == 0

    def closing(self, trained: float) -> str | None:
        """The share of ``trained`` seconds of training that was spent on evaluation between the epochs; None without any."""
        if not self.times:
            return None
        share = self.spent / max(trained, 1e-9)
        return f"evaluations between epochs: {self.times}, {self.spent:.1f} s, {100 * share:.1f} % of the training time"
