"""What each part of the page but its tables shows, as plain values for the template. A part that cannot be made is the sentence
that says why."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from engine.console import counted
from engine.evaluation import MAP_NAMES, ClassScore, Confusion, Neighbours, neighbours, overlay
from engine.report import charts, embedding, pictures
from engine.report.charts import Chart
from engine.report.numbers import SCORES, steps_per_epoch
from engine.report.pictures import Thumbnails
from engine.report.run import Run

MOMENTS = 5
"""Columns of attention maps at most."""
QUERIES = 8
NEAR_DUPLICATE = 0.97
"""Cosine from which two images are candidates for near-duplicates."""
SAME_PIXELS = 0.9
"""Correlation from which the pixels of two images are said to agree."""
_COMPARED = 200
_PAIRS = 12
_CONFUSED = 8
_BARS = 60
_PICTURES_ON_MAP = 70


class Picture(NamedTuple):
    source: str
    alt: str
    caption: str = ""
    hit: bool | None = None
    """Whether it is of the query's class; None where that is not the question."""


def class_name(text: str) -> str:
    """``001.Black_footed_Albatross`` -> ``Black footed Albatross``."""
    return re.sub(r"^\d+[._-]", "", text).replace("_", " ")


def curves(runs: Sequence[Run]) -> list[Chart] | str:
    """Losses, rates and, where it was measured more than twice or there is nothing else, retrieval over the training."""
    trained = {run.name: run.of_kind("train") for run in runs}
    per_epoch = {run.name: steps_per_epoch(run) for run in runs}
    x_name = "epoch" if all(per_epoch.values()) else "step"

    def series(kind: str, key: str) -> dict[str, list[charts.Point]]:
        found = {}
        for run in runs:
            unit = per_epoch[run.name] if x_name == "epoch" else 1
            found[run.name] = [(r["step"] / unit, r[key]) for r in run.of_kind(kind) if isinstance(r.get(key), (int, float))]
        return found

    own = {"kind", "step", "epoch", "lr", "images_per_s", "data_wait", "seconds", "grad_norm", "collapsed"}
    terms = list(dict.fromkeys(key for records in trained.values() for r in records for key in r if key not in own))
    shares = [key for key in terms if "_top" in key]
    evaluated = [charts.line_chart(text, series("eval", key), x_name=x_name, percent=True) for key, text in SCORES.items()]
    evaluated += [
        charts.line_chart(f"validation {text}", series("validation", key), x_name=x_name, percent=True)
        for key, text in SCORES.items()
    ]
    made = []
    for key in [*[k for k in terms if k not in shares], *shares, "lr", "grad_norm", "images_per_s", "data_wait"]:
        title = {"lr": "learning rate", "grad_norm": "gradient norm", "images_per_s": "images per second", "data_wait": "data wait",
                 "contrast_top1": "contrast top-1", "contrast_top5": "contrast top-5",
                 "contrast_ties": "ties in the contrast", "spread": "spread of the features"}.get(key, key)  # fmt: skip
        lines = series("train", key)
        if any(value for line in lines.values() for _, value in line):  # what stayed 0 throughout needs no picture
            chart = charts.line_chart(title, lines, x_name=x_name, percent=key in shares or key in ("data_wait", "contrast_ties"))
            made += [chart] if chart else []
    if not made or any(len(run.of_kind(kind)) > 2 for run in runs for kind in ("eval", "validation")):
        made = [chart for chart in evaluated if chart] + made
    lines, points = (max(len(run.of_kind(kind)) for run in runs) for kind in ("train", "eval"))
    logged = f"{counted(lines, 'training line')} and {counted(points, 'evaluation')}"
    return made or f"No curves: each needs two points, and the log holds {logged}."


class Watched(NamedTuple):
    """One image and what several runs looked at in it."""

    picture: Picture
    rows: list[tuple[str, list[Picture]]]
    """(run and map, one picture a moment)."""


class AttentionPart(NamedTuple):
    moments: list[str]
    """Epochs of the columns."""
    together: bool
    """Whether every run was watched at these epochs."""
    images: list[Watched]
    agreement: list[tuple[str, list[str]]]
    """By run: correlation of mask and CAM over the cells at each moment."""
    split: str


def attention(runs: Sequence[Run]) -> AttentionPart | str:
    """The maps of all runs that watched the first run's images."""
    lead = runs[0].attention
    if isinstance(lead, str):
        return lead
    shown = [r for r in runs if not isinstance(r.attention, str) and r.attention.names == lead.names]
    count = min(MOMENTS, max(len(r.attention.looks) for r in shown))
    looks = {run.name: _spread(run.attention.looks, count) for run in shown}
    several = len(shown) > 1
    images = []
    for i, name in enumerate(lead.names):
        rows = []
        for run in shown:
            for kind in sorted(looks[run.name][0].maps, reverse=True):  # mask, feature map, CAM
                label = MAP_NAMES.get(kind, kind)
                row = []
                for look in looks[run.name]:
                    source = pictures.address(overlay(run.attention.pictures[i], look.maps[kind][i]))
                    where = f" of run {run.name}" if several else ""
                    row.append(Picture(source, f"{label}{where} at epoch {look.epoch} over {name}", f"{look.epoch}"))
                rows.append((f"{label} · {run.name}" if several else label, row))
        photo = Picture(pictures.address(lead.pictures[i]), f"watched image {name}", PurePosixPath(name).name)
        images.append(Watched(photo, rows))
    agreement = []
    for run in shown:
        if {"mask", "cam"} <= looks[run.name][0].maps.keys():
            values = [f"{_agreement(look.maps['mask'], look.maps['cam']):+.2f}" for look in looks[run.name]]
            agreement.append((run.name, values))
    moments = {run.name: [str(look.epoch) for look in looks[run.name]] for run in shown}
    together = all(m == moments[shown[0].name] for m in moments.values())
    return AttentionPart(moments[shown[0].name], together, images, agreement if together else [], lead.split)


def _spread(items: list[Any], count: int) -> list[Any]:
    """``count`` of ``items``, the first and the last among them."""
    return [items[i] for i in dict.fromkeys(np.linspace(0, len(items) - 1, count).round().astype(int).tolist())]


def _agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation over the cells of a map, mean over images; images with a constant map are left out."""
    a, b = (x.reshape(len(x), -1) - x.reshape(len(x), -1).mean(1, keepdims=True) for x in (a, b))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    used = norms > 0
    return float(((a * b).sum(1)[used] / norms[used]).mean()) if used.any() else float("nan")


class GalleryPart(NamedTuple):
    rows: list[tuple[Picture, list[Picture]]]
    labelled: bool
    hits: int
    mean_cosine: float
    """Of all pairs: what the cosines of neighbors stand out from."""


def gallery(run: Run, near: Neighbours, thumbnail: Thumbnails) -> GalleryPart:
    """Queries spread evenly over the list, not chosen by how well they do, and their five nearest images: the nearest with its
    cosine, the others with how far theirs is below it, as all of them may be 0.98."""
    images = run.images
    rows, hits = [], 0
    for i in sorted({(2 * n + 1) * len(images) // (2 * QUERIES) for n in range(QUERIES)}):
        found = []
        nearest = near.cosine[i, 0]
        for rank, (j, cosine) in enumerate(zip(near.index[i, :5].tolist(), near.cosine[i, :5].tolist(), strict=True)):
            hit = None if images.labels is None else bool(images.labels[i] == images.labels[j])
            hits += bool(hit)
            says = "" if hit is None else ", same class" if hit else ", another class"
            closeness = f"−{nearest - cosine:.4f}" if rank else f"{cosine:.4f}"
            found.append(Picture(thumbnail(j), f"neighbor {_called(run, j)}{says}", f"{_called(run, j)}\n{closeness}", hit))
        rows.append((Picture(thumbnail(i), f"query {_called(run, i)}", _called(run, i)), found))
    return GalleryPart(rows, images.labels is not None, hits, neighbours.mean_cosine(run.features))


def _called(run: Run, i: int) -> str:
    """The class of an image, or its file where there are no classes."""
    if run.images.labels is None:
        return PurePosixPath(run.images.names[i]).name
    return class_name(run.images.classes[run.images.labels[i]])


class ClassesPart(NamedTuple):
    worst: list[tuple[str, ClassScore]]
    best: list[tuple[str, ClassScore]]
    """Empty where ``worst`` holds all classes."""
    mean: float
    count: int
    confused: list[tuple[str, str, Confusion, Picture, Picture]]


def classes(run: Run, near: Neighbours, thumbnail: Thumbnails) -> ClassesPart | str:
    """1-NN accuracy by class, and the classes that are taken for each other; of many classes the worst and the best."""
    labels, names = run.images.labels, [class_name(c) for c in run.images.classes]
    if labels is None:
        return "No per-class accuracy: the images have no labels."
    scores = [(names[s.label], s) for s in neighbours.class_scores(near, labels)]
    if not scores:
        return "No per-class accuracy: no class has two images."
    confused = []
    for c in neighbours.confusions(near, labels, _CONFUSED):
        shown = [Picture(thumbnail(i), f"{_called(run, i)}, file {run.images.names[i]}", _called(run, i)) for i in c.example]
        confused.append((names[c.first], names[c.second], c, *shown))
    mean = float(np.mean([s.accuracy for _, s in scores]))
    if len(scores) <= _BARS:
        return ClassesPart(scores, [], mean, len(scores), confused)
    return ClassesPart(scores[: _BARS // 3], scores[: -_BARS // 3 - 1 : -1], mean, len(scores), confused)


class MapPart(NamedTuple):
    how: str
    side: int
    marks: list[charts.Marks]
    """Empty without labels."""
    pictures: list[tuple[float, float, Picture]]
    size: float
    """Side of a picture on the map."""


def embedding_map(run: Run, thumbnail: Thumbnails, *, quick: bool) -> MapPart | str:
    """The features in the plane, as marks by class and as pictures."""
    if len(run.features) < 5:
        return f"No embedding map: {len(run.features)} images are too few for one."
    try:
        made = embedding.layout(run.features, quick=quick)
    except ValueError as error:
        return f"No embedding map: {error}."
    marks = []
    if run.images.labels is not None:
        marks = charts.scatter(made.points, run.images.labels[made.chosen], [class_name(c) for c in run.images.classes])
    return MapPart(made.how, charts.MAP, marks, _scattered(run, made, thumbnail), _CELL)


_CELL = charts.MAP / 11


def _scattered(run: Run, made: embedding.Map, thumbnail: Thumbnails) -> list[tuple[float, float, Picture]]:
    """Pictures of images that do not cover each other: on a grid of cells, the image nearest to each cell's middle."""
    spots = made.points * (charts.MAP - _CELL)
    cells = np.round(spots / _CELL)
    distance = ((spots / _CELL - cells) ** 2).sum(1)
    taken: dict[tuple[float, float], int] = {}
    for p in np.argsort(distance, kind="stable").tolist():
        taken.setdefault(tuple(cells[p]), p)
    placed = []
    for (x, y), p in sorted(taken.items())[:: max(1, len(taken) // _PICTURES_ON_MAP)]:
        i = int(made.chosen[p])
        picture = Picture(thumbnail(i, 72), _called(run, i), _called(run, i))
        placed.append((round(x * _CELL, 1), round(charts.MAP - _CELL - y * _CELL, 1), picture))
    return placed


class Pair(NamedTuple):
    first: Picture
    second: Picture
    cosine: float
    pixels: float
    """Correlation of the two photographs, small and grey."""


class DuplicatesPart(NamedTuple):
    pairs: list[Pair]
    count: int
    """Pairs above the cosine."""
    compared: int
    """The closest of them, whose pixels were compared."""
    same: int
    """Those of them whose pixels agree."""


def duplicates(run: Run, thumbnail: Thumbnails) -> DuplicatesPart:
    """Pairs that are one picture to the network, those whose pixels agree too first. Where there are labels, only these: images
    of a class ought to be alike."""
    found, count = neighbours.near_duplicates(run.features, NEAR_DUPLICATE, _COMPARED)
    small = {i: pictures.tiny(run.images.read(i)) for pair in found for i in pair[:2]}
    evaluated = [(i, j, cosine, float((small[i] * small[j]).mean())) for i, j, cosine in found]
    same = sorted([pair for pair in evaluated if pair[3] >= SAME_PIXELS], key=lambda pair: -pair[3])
    listed = same if run.images.labels is not None else same + [pair for pair in evaluated if pair[3] < SAME_PIXELS]
    names = run.images.names
    pairs = [
        Pair(*(Picture(thumbnail(n), f"photo {names[n]}", names[n]) for n in (i, j)), cosine, pixels)
        for i, j, cosine, pixels in listed[:_PAIRS]
    ]
    return DuplicatesPart(pairs, count, len(evaluated), len(same))
