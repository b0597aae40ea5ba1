"""The protocols of metric learning as records: queries of one list in the gallery of another, and the test classes, which training
has not seen, among themselves."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.config import Config
from engine.console import counted, printable, say
from engine.data import Catalog, ImageList
from engine.evaluation.evaluator import Candidate
from engine.evaluation.retrieval import Matching, matching

RECALL = (1, 2, 4, 8)
"""k of Recall@K, as for CUB and Cars; Stanford Online Products has 1, 10, 100, 1000."""
_SHOWN = 5
"""Names that a line gives."""


def evaluate_gallery(
    candidate: Candidate, query: ImageList, gallery: ImageList, cfg: Config, device: torch.device, k: Sequence[int] = RECALL
) -> dict[str, Any]:
    """The record of every image of ``query`` asking for those of its class, by its name, in ``gallery``. A photo that lies in both
    is left out of its own ranking; that, and labels that only one of them has, are said and recorded.

    Raises ``ValueError`` where a list has no labels, or no query has an image of its class in the gallery.
    """
    for name, images in (("--query", query), ("--gallery", gallery)):
        if images.labels is None or not len(images):
            raise ValueError(f"{name}: {images.root} has no labelled photos; expected <class>/*.jpg, or a list with a column label")
    started = time.perf_counter()
    classes = sorted({*query.classes, *gallery.classes})
    number = {name: i for i, name in enumerate(classes)}
    labels = [torch.tensor([number[i.classes[label]] for label in i.labels.tolist()], device=device) for i in (query, gallery)]
    only = _only_in(query, gallery), _only_in(gallery, query)
    if only[0]:
        lost = sum(query.classes[label] in only[0] for label in query.labels.tolist())
        say(f"{counted(len(only[0]), 'class', 'classes')} of --query without a photo in --gallery ({_listed(only[0])}): "
            f"{counted(lost, 'query', 'queries')} cannot be answered and {'is' if lost == 1 else 'are'} excluded")  # fmt: skip
    if only[1]:
        say(f"{counted(len(only[1]), 'class', 'classes')} of --gallery without a query ({_listed(only[1])}): they stay ranked")
    same = shared_photos(query, gallery)
    if len(same):
        first = printable(str(query.path(int(same[0, 0]))))
        say(f"{counted(len(same[:, 0].unique()), 'photo')} of --query {'lies' if len(same) == 1 else 'lie'} in --gallery too, the "
            f"first is {first}: each is left out of its own ranking")  # fmt: skip
        if differ := int((labels[0].cpu()[same[:, 0]] != labels[1].cpu()[same[:, 1]]).sum()):
            say(f"warning: {counted(differ, 'photo')} of both {'has' if differ == 1 else 'have'} another class in each")
    features = candidate.features(query, "query"), candidate.features(gallery, "gallery")
    try:
        found = matching(features[0], labels[0], features[1], labels[1], same=same, k=k)
    except ValueError as error:
        if set(query.classes) & set(gallery.classes):
            raise
        raise ValueError(
            f"--query and --gallery have no class in common ({_listed(only[0])}; {_listed(only[1])}); classes are told by the "
            f"names of their folders, or by the column label"
        ) from error
    fingerprints = {"query_fingerprint": query.fingerprint, "gallery_fingerprint": gallery.fingerprint}
    both = hashlib.sha256("".join(fingerprints.values()).encode()).hexdigest()
    return {
        "protocol": "query-gallery",
        "setting": "every query against the gallery, cosine" + (", shared photos left out of their own ranking" * bool(len(same))),
        **_about(candidate, query, cfg, "query", features[0].shape[1]),
        "gallery_root": str(gallery.root.resolve()),
        "gallery_images": len(gallery),
        "gallery_classes": len(np.unique(gallery.labels)),
        "only_in_query": only[0],
        "only_in_gallery": only[1],
        "shared_photos": len(same),
        "own_data": False,
        "fingerprint": both[:16],
        **{name: value[:16] for name, value in fingerprints.items()},
        **_values(found),
        "seconds": time.perf_counter() - started,
    }


def evaluate_disjoint(
    candidate: Candidate, images: Catalog, cfg: Config, device: torch.device, k: Sequence[int] = RECALL, own: str | None = None
) -> dict[str, Any]:
    """The record of every test image against all other test images; whether the test classes are disjoint from those of training,
    as the protocol wants, is recorded, and said where they are not.

    own: identity of the run's own test list; None: this is the run's.
    Raises ``ValueError`` where there is no labelled test split or no class has two images.
    """
    test = images.test
    if test is None or test.labels is None or not len(test):
        raise ValueError(
            f"metric-learning: data.root={images.train.root} has no labelled test split, of which every image is a query; for "
            f"folders put one in test/<class>/*.jpg, or name it: data.test=FOLDER"
        )
    started = time.perf_counter()
    train = images.labelled
    trained = set() if train.labels is None else {train.classes[label] for label in train.labels.tolist()}
    both = sorted({test.classes[label] for label in test.labels.tolist()} & trained)
    if both:
        say(f"warning: metric-learning: {counted(len(both), 'test class', 'test classes')} of {len(np.unique(test.labels))} "
            f"{'has' if len(both) == 1 else 'have'} training images ({_listed(both)}): not class-disjoint")  # fmt: skip
    features, labels = candidate.features(test, "test"), torch.from_numpy(test.labels).to(device)
    itself = torch.arange(len(test), device=device)
    found = matching(features, labels, features, labels, same=torch.stack([itself, itself], 1), k=k)
    seen = "classes not seen in training" if not both and trained else f"{len(both)} test classes with training images"
    return {
        "protocol": "metric-learning",
        "setting": f"every test image against all others, cosine; {seen if trained else 'no labelled training images'}",
        **_about(candidate, test, cfg, "test", features.shape[1]),
        "disjoint": not both,
        "classes_with_training_images": len(both),
        "own_data": own is None or own == test.identity,
        "fingerprint": test.identity[:16],
        **_values(found),
        "seconds": time.perf_counter() - started,
    }


def shared_photos(query: ImageList, gallery: ImageList) -> Tensor:
    """[P, 2] int64 (position in ``query``, position in ``gallery``) of the photos that both have: one file, or equal bytes."""
    sizes = set(query.file_sizes.tolist()) & set(gallery.file_sizes.tolist())
    known: dict[Path, str] = {}

    def content(images: ImageList, i: int) -> str:
        path = images.path(i).resolve()
        if path not in known:
            with path.open("rb") as file:
                known[path] = hashlib.file_digest(file, "sha256").hexdigest()
        return known[path]

    at: dict[str, list[int]] = {}
    for i, size in enumerate(gallery.file_sizes.tolist()):
        if size in sizes:
            at.setdefault(content(gallery, i), []).append(i)
    pairs = [
        (q, g) for q, size in enumerate(query.file_sizes.tolist()) if size in sizes for g in at.get(content(query, q), [])
    ]  # fmt: skip
    return torch.tensor(pairs, dtype=torch.int64).view(-1, 2)


def _about(candidate: Candidate, images: ImageList, cfg: Config, split: str, dim: int) -> dict[str, Any]:
    return {
        "model": candidate.model,
        "feature": f"{candidate.feature}, {dim}-d",
        "epoch": candidate.epoch,
        "step": candidate.step,
        "data": cfg.data.name,
        "root": str(images.root.resolve()),
        "split": split,
        "images": len(images),
        "classes": len(np.unique(images.labels)),
        "image_size": cfg.data.image_size,
        "batch_size": cfg.eval.batch_size,
        "amp": cfg.amp,
    }


def _values(found: Matching) -> dict[str, Any]:
    """``rank1`` is Recall@1 under the name that the other protocols have for it."""
    recall = {f"recall{k}": value for k, value in found.recall.items()}
    first = {"rank1": found.recall[1]} if 1 in found.recall else {}
    return first | recall | {"r_precision": found.r_precision, "map_at_r": found.map_at_r, "mAP": found.mAP} | {
        "queries": found.queries, "excluded": found.excluded,
    }  # fmt: skip


def _only_in(one: ImageList, other: ImageList) -> list[str]:
    """The classes that have photos in ``one`` alone."""
    names = [{images.classes[label] for label in images.labels.tolist()} for images in (one, other)]
    return sorted(names[0] - names[1])


def _listed(names: Sequence[str]) -> str:
    shown = [printable(name) for name in names[:_SHOWN]]
    return ", ".join(shown) + (f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else "")
