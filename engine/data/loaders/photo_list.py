"""The photos of a folder or a list in a fixed order, none of them opened yet: what is embedded, and what is asked for.

A training list opens every file before its first order is drawn (catalog.py). Here one that cannot be read is found when its turn
comes, so that every file is decoded once.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from engine.config import DataConfig
from engine.console import printable
from engine.data import layouts
from engine.data.image_file import Watch
from engine.data.layouts import folders
from engine.data.layouts.guess import SUFFIXES, guess, holds_photos, split_of
from engine.data.layouts.lists import UNLABELLED, BadFile, Layout, Split, subfolders, walk
from engine.data.layouts.official import AIRCRAFT_BANNER
from engine.errors import ConfigError


@dataclass(frozen=True)
class PhotoList:
    """Photos by name; a position in it is a photo's index everywhere."""

    root: Path
    names: tuple[str, ...]
    """Posix paths relative to ``root``."""
    labels: tuple[str, ...] | None
    """Class of each; "" for one without, None where none has any."""
    splits: tuple[tuple[str, int], ...]
    """(train, test, val or other, photos), in order; val and other are there only where every photo of a folder is taken."""
    identity: str
    """sha256 over names, labels, splits, byte sizes and modification times, and ``cut``."""
    bad: tuple[BadFile, ...] = ()
    """What the layout found that is no photo."""
    notes: tuple[str, ...] = ()
    """How the folder was understood, a line each."""
    cut: int = 0
    """Rows at the bottom of every upright picture that are no part of it."""

    def __len__(self) -> int:
        return len(self.names)

    def split_of(self) -> list[str]:
        """The split of every photo."""
        return [split for split, count in self.splits for _ in range(count)]

    def batches(self, size: int) -> list[range]:
        """Positions in batches of ``size``; none holds photos of two splits, as in evaluation."""
        found, first = [], 0
        for _, count in self.splits:
            found += [range(i, min(i + size, first + count)) for i in range(first, first + count, size)]
            first += count
        return found

    def read(self, i: int, watch: Watch) -> Image.Image:
        """Photo ``i`` as upright 8-bit RGB. Raises ``ValueError`` or ``OSError`` for a file that cannot be read."""
        image = watch.read(self.root / self.names[i]).image
        if image.height <= self.cut:
            raise ValueError(f"only {image.height} rows high, {self.cut} of which data.crop_banner takes away")
        return image.crop((0, 0, image.width, image.height - self.cut)) if self.cut else image


def list_photos(data: DataConfig, seed: int = 0, *, whole: bool = False) -> PhotoList:
    """The photos of ``data.name`` at ``data.root``: those of the training split, then those of the test split; ``seed`` draws
    ``data.fraction``.

    whole: also those of a folder that are in neither split, where no setting chooses among them. In a folder called like a split
    they are of that split, with its classes; elsewhere of ``other``, without labels.

    Raises as ``layouts.read`` does, and ``ValueError`` where there are none.
    """
    if data.root is None:
        raise ConfigError(
            "data.root: not set; name a folder or a list of photos, e.g. python -m engine.embed RUN photos --out e.npz"
        )
    layout = layouts.read(
        data.name, data.root, train=data.train, test=data.test,
        classes=data.classes, fraction=data.fraction, extra_roots=data.extra_roots, seed=seed,
    )  # fmt: skip
    parts = {name: split for name, split in (("train", layout.train), ("test", layout.test)) if split is not None and split.names}
    if whole and data.name == "folder" and not (data.train or data.test or data.classes or data.fraction < 1):
        layout, parts = _with_the_rest(layout, parts)
    if not parts:
        why = "; ".join([*layout.notes, *(f"{printable(b.name)}: {b.reason}" for b in layout.bad[:3])])
        raise ValueError(f"data.root={printable(str(data.root))}: no photos{f' ({why})' if why else ''}; expected "
                         f"{layouts.expected(data.name)}")  # fmt: skip
    names = [n for split in parts.values() for n in split.names]
    labels = [label for split in parts.values() for label in _labels(split, layout.classes)]
    cut = AIRCRAFT_BANNER if data.crop_banner else 0
    digest = hashlib.sha256(repr([cut, [(name, len(split.names)) for name, split in parts.items()]]).encode())
    for name, label in zip(names, labels, strict=True):
        try:
            found = os.stat(layout.root / name)
            size, mtime = found.st_size, found.st_mtime_ns
        except OSError:  # missing, or a link to itself: said when its turn comes
            size = mtime = -1
        digest.update(os.fsencode(f"{name}\0{label}\0{size}\0{mtime}\n"))
    return PhotoList(
        Path(layout.root), tuple(names), tuple(labels) if any(labels) else None,
        tuple((name, len(split.names)) for name, split in parts.items()), digest.hexdigest(), tuple(layout.bad),
        tuple(layout.notes), cut,
    )  # fmt: skip


def _labels(split: Split, classes: tuple[str, ...]) -> list[str]:
    if split.labels is None:
        return [""] * len(split.names)
    return ["" if label == UNLABELLED else classes[label] for label in split.labels]


def _with_the_rest(layout: Layout, parts: dict[str, Split]) -> tuple[Layout, dict[str, Split]]:
    """``layout`` and its splits with the photos below its root that are in none of them."""
    names, bad, notes = folders.everything(layout.root)
    places: dict[str, str] = {}

    def place(name: str) -> tuple[str, str]:
        """Of one file, whatever links lead to it."""
        folder, file = os.path.split(name)
        if folder not in places:
            places[folder] = os.path.realpath(layout.root / folder)
        return places[folder], file

    used = {place(n) for split in parts.values() for n in split.names}
    rest: dict[str, list[tuple[str, int]]] = {}
    position = {name: p for p, name in enumerate(layout.classes)}
    for name in names:
        if place(name) in used:
            continue
        above = name.split("/")[:-1]
        at, split = next(((i, found) for i, part in enumerate(above) if (found := split_of(part))), (len(above), "other"))
        label = next((position[part] for part in above[at + 1 :] if part in position), UNLABELLED)
        rest.setdefault(split, []).append((name, label))
    if not rest:
        return layout, parts
    found = {}
    for split in ("train", "test", "val", "other"):
        first, more = parts.get(split, Split([], [], {})), rest.get(split, [])
        labels = [UNLABELLED] * len(first.names) if first.labels is None else first.labels
        if first.names or more:
            found[split] = Split([*first.names, *(n for n, _ in more)], [*labels, *(label for _, label in more)], {})
    outside = [b for b in layout.bad if b.name.startswith("../")]  # of data.extra_roots
    return layout._replace(bad=[*bad, *outside], notes=tuple(notes)), found


def photo_settings(path: Path, *, labelled: bool = False) -> dict[str, Any]:
    """The settings of the section ``data`` that read the folder or the list (CSV, Parquet) ``path``, all of it and nothing else.

    labelled: the photos are to have classes: the folders in ``path`` are, whatever their names.
    Raises ``FileNotFoundError`` where there is nothing, ``ValueError`` where labels are wanted and there are none, or two splits.
    """
    all_of_it = {"test": None, "classes": (), "fraction": 1.0, "extra_roots": (), "crop_banner": False}
    if path.is_file():
        whole = path.absolute()
        return {"name": "list", "root": str(whole.parent), "train": str(whole), **all_of_it}
    if not path.is_dir():
        raise FileNotFoundError(f"{printable(str(path))} is not there; give a folder of photos or a list of them (CSV or Parquet)")
    found: dict[str, Any] = {"name": "folder", "root": str(path.absolute()), "train": None, **all_of_it}
    if not labelled:
        return found
    understood = guess(path)
    if understood.labels:
        inside = " or ".join(printable(str(path / name)) for name in (understood.train, understood.test) if name)
        raise ValueError(f"{printable(str(path))} holds splits and not classes; give one of them: {inside}")
    classes = understood.classes
    if classes is None:  # a single class is looked through by the guess
        classes = "." if [n for n in subfolders(path) if holds_photos(path / n)] else None
    if classes is None:
        raise ValueError(
            f"{printable(str(path))} has no labels; expected {printable(str(path))}/<class>/*.jpg, or a list with the columns path "
            f"and label"
        )
    return found | {"train": classes}


def readable_photos(folder: Path) -> tuple[list[Path], list[BadFile]]:
    """All photos below ``folder`` that can be read, sorted, and what cannot; files without an image's suffix are passed over."""
    found, bad = [], []
    with Watch() as watch:
        for here, _, files in walk(folder):
            for path in (Path(here, file) for file in files):
                if path.suffix.lower() not in SUFFIXES:
                    continue
                reason = watch.judge(path).reason
                if reason is None:
                    found.append(path)
                else:
                    bad.append(BadFile(path.relative_to(folder).as_posix(), reason))
    return found, bad
