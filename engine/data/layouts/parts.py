"""Parts of data sets: some of the classes, a fraction of the training photos, and further roots that are trained on too."""

from __future__ import annotations

import fnmatch
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from engine.console import counted, printable
from engine.data.layouts import folders
from engine.data.layouts.lists import UNLABELLED, BadFile, Layout, Split

_IF_CLASSES = re.compile(r"(If the .* are classes): .*")


def choose(layout: Layout, classes: Sequence[str], fraction: float, seed: int) -> Layout:
    """The photos of ``layout`` in some ``classes`` (names, or patterns with ``*`` and ``?``; none takes all), and a ``fraction`` of
    those in the training split.

    The fraction is drawn from each class apart, at least one photo of each, by ``seed``: a larger fraction holds the smaller one.
    Photos without labels count as a class of their own, and leave where ``classes`` are named.
    Raises ValueError for a name that no class has, and where there are no classes.
    """
    notes: list[str] = []
    if classes:
        layout = _with_classes(layout, classes, notes)
    if fraction < 1:
        before = len(layout.train.names)
        layout = layout._replace(train=_drawn(layout.train, fraction, seed))
        notes.append(f"data.fraction={fraction:g}: {len(layout.train.names):,} of {before:,} training photos, drawn by seed {seed}")
    return layout._replace(notes=(*layout.notes, *notes))


def _with_classes(layout: Layout, wanted: Sequence[str], notes: list[str]) -> Layout:
    if not layout.classes:
        raise ValueError(f"data.classes: {layout.root} has no classes to choose from; leave data.classes out")
    kept: set[int] = set()
    for pattern in wanted:
        found = {p for p, name in enumerate(layout.classes) if name == pattern or fnmatch.fnmatchcase(name, pattern)}
        if not found:
            shown = ", ".join(printable(name) for name in layout.classes[:5])
            more = f" and {len(layout.classes) - 5:,} more" if len(layout.classes) > 5 else ""
            raise ValueError(f"data.classes: no class is called {printable(pattern)!r}; the classes are {shown}{more}")
        kept |= found
    order = sorted(kept)
    position = {old: new for new, old in enumerate(order)}

    def part(split: Split) -> Split:
        if split.labels is None:
            return split
        rows = [(n, position[label]) for n, label in zip(split.names, split.labels, strict=True) if label in position]
        expected = {position[label]: text for label, text in split.expected.items() if label in position}
        return split._replace(names=[n for n, _ in rows], labels=[label for _, label in rows], expected=expected)

    if layout.train.labels is None and layout.train.names:
        notes.append(f"data.classes: {layout.train.source or 'the training split'} has no labels and is used whole")
    notes.append(f"data.classes: {len(order):,} of {counted(len(layout.classes), 'class', 'classes')}")
    test = None if layout.test is None else part(layout.test)
    return layout._replace(classes=tuple(layout.classes[old] for old in order), train=part(layout.train), test=test)


def _drawn(split: Split, fraction: float, seed: int) -> Split:
    """Of each class the photos that come first in an order by ``seed``, in the order of the list."""
    groups: dict[int, list[int]] = defaultdict(list)
    for i in range(len(split.names)):
        groups[UNLABELLED if split.labels is None else split.labels[i]].append(i)
    rng = np.random.default_rng([seed, 0x706172747])
    kept: list[int] = []
    for label in sorted(groups):
        order = rng.permutation(len(groups[label]))[: max(1, round(fraction * len(groups[label])))]
        kept += [groups[label][i] for i in order]
    kept.sort()
    labels = None if split.labels is None else [split.labels[i] for i in kept]
    return split._replace(names=[split.names[i] for i in kept], labels=labels)


def join(layout: Layout, roots: Sequence[str], *, with_tests: bool) -> Layout:
    """``layout`` and what the folders ``roots`` hold, each read as ``data.name=folder`` reads it.

    Classes are joined by their names; photos of a root without classes are trained on without labels. Its test photos join the test
    split if ``with_tests``, else they are not used, which is said.
    Raises FileNotFoundError for a root that is not there, ValueError for one inside another, one without photos, and one that can
    be read in two ways.
    """
    paths = [Path(os.path.expanduser(root)) for root in roots]
    places = [layout.root.resolve(), *(path.resolve() for path in paths)]
    for i, (root, path) in enumerate(zip(roots, paths, strict=True), 1):
        if not path.is_dir():
            raise FileNotFoundError(f"data.extra_roots: {printable(root)} is not a folder")
        for other in places[:i] + places[i + 1 :]:
            if places[i].is_relative_to(other) or other.is_relative_to(places[i]):
                raise ValueError(f"data.extra_roots: {printable(root)} and {other} lie in one another: photos would count twice")
    parts = [layout] + [_seen_from(layout.root, _read(root, path)) for root, path in zip(roots, paths, strict=True)]
    classes = tuple(dict.fromkeys(name for part in parts for name in part.classes))
    position = {name: p for p, name in enumerate(classes)}
    train = _merged([(part.classes, part.train) for part in parts], position)
    tests = [(part.classes, part.test) for part in parts[: None if with_tests else 1] if part.test is not None]
    notes = list(layout.notes)
    for root, part in zip(roots, parts[1:], strict=True):
        labels = part.train.labels is not None
        of = f"in {counted(len(set(part.train.labels or ())), 'class', 'classes')}" if labels else "without labels"
        notes.append(f"{printable(root)}: {len(part.train.names):,} more training photos {of}")
        if part.test is not None:
            joined = "join the test split" if with_tests else "are not used: the test split is that of data.root alone"
            notes.append(f"{printable(root)}: {len(part.test.names):,} test photos {joined}")
        notes += [f"{printable(root)}: {note}" for note in part.notes]
    bad = [entry for part in parts for entry in part.bad]
    return Layout(layout.root, classes, train, _merged(tests, position) if tests else None, bad, tuple(notes))


def _read(name: str, root: Path) -> Layout:
    """What ``root`` holds. What folders.py says of the ways to read it names settings, which are those of data.root."""
    try:
        layout = folders.read(root)
    except ValueError as error:
        what = str(error).removeprefix(f"data.root={printable(str(root))}: ").partition(" Say which: ")[0]
        raise ValueError(
            f"data.extra_roots: {printable(name)}: {what} No setting says which: name the folders to use in data.extra_roots, or "
            f"move classes to train/<class>/"
        ) from error
    if not layout.train.names and not (layout.test and layout.test.names):
        raise ValueError(f"data.extra_roots: {printable(name)} holds no photos; expected {folders.EXPECTED.partition('; ')[0]}")
    return layout._replace(notes=tuple(_IF_CLASSES.sub(r"\1, move them into train/", note) for note in layout.notes))


def _seen_from(root: Path, layout: Layout) -> Layout:
    """``layout`` with every name relative to ``root``, which may lie elsewhere."""

    def renamed(name: str) -> str:
        return Path(os.path.relpath(layout.root / name, root)).as_posix()

    def split(part: Split) -> Split:
        return part._replace(names=[renamed(n) for n in part.names])

    bad = [BadFile(renamed(b.name), b.reason) for b in layout.bad]
    return layout._replace(train=split(layout.train), test=None if layout.test is None else split(layout.test), bad=bad)


def _merged(parts: Sequence[tuple[tuple[str, ...], Split]], position: dict[str, int]) -> Split:
    """The splits one after another, labels counted in ``position``; the source is that of the first, notes name the others."""
    names, labels, expected = [], [], {}
    for classes, split in parts:
        names += split.names
        labels += [
            UNLABELLED if label == UNLABELLED else position[classes[label]]
            for label in (split.labels if split.labels is not None else [UNLABELLED] * len(split.names))
        ]
        expected |= {position[classes[label]]: text for label, text in split.expected.items()}
    none = all(label == UNLABELLED for label in labels)
    return Split(names, None if none else labels, {} if none else expected, parts[0][1].source)
