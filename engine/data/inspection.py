"""``python -m engine.check --cfg cub.yaml data.root=…``: what a data set holds, what is wrong with it, and a contact sheet."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from rich.table import Table
from rich.text import Text

from engine.console import printable, with_progress
from engine.data import contact_sheet
from engine.data.catalog import Catalog, ImageList
from engine.data.machine import cores

_SHOWN, _COPIES = 10, 4
"""On the terminal: lines of a long list, files of one group of copies."""
_CLASSES, _COLUMNS, _SIDE = 12, 8, 112
"""The contact sheet: classes, images of one, pixels of a cell."""


class Copy(NamedTuple):
    """One of several files of the same content."""

    split: str
    name: str
    label: int | None


def splits(catalog: Catalog) -> dict[str, ImageList]:
    """The lists by name, those that hold images."""
    return {
        split: images for split, images in (("train", catalog.train), ("test", catalog.test)) if images is not None and len(images)
    }


def _labelled(catalog: Catalog) -> dict[str, ImageList]:
    """The same with the images that have labels alone, those lists that have any."""
    lists = splits(catalog) | ({} if catalog.labelled_part is None else {"train": catalog.labelled_part})
    return {split: images for split, images in lists.items() if images.labels is not None and len(images)}


def duplicates(catalog: Catalog, *, workers: int | None = None, progress: bool = True) -> list[list[Copy]]:
    """Groups of files that are equal byte for byte, in list order. Only files of one length are read.

    Raises OSError naming a file that has gone.
    """
    by_length: dict[int, list[tuple[Path, Copy]]] = defaultdict(list)
    labels = {split: dict(zip(i.names, i.labels.tolist(), strict=True)) for split, i in _labelled(catalog).items()}
    labels = {"train": {}, "test": {}} | labels
    for split, images in splits(catalog).items():
        for i, name in enumerate(images.names):
            label = labels[split].get(name)
            by_length[images.path(i).stat().st_size].append((images.path(i), Copy(split, name, label)))
    todo = [entry for entries in by_length.values() if len(entries) > 1 for entry in entries]

    def digest(entry: tuple[Path, Copy]) -> bytes:
        with entry[0].open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()

    groups: dict[bytes, list[Copy]] = defaultdict(list)
    with ThreadPoolExecutor(workers or cores()) as pool:
        digests = with_progress(pool.map(digest, todo), len(todo), "looking for duplicates", progress)
        for key, (_, copy) in zip(digests, todo, strict=True):
            groups[key].append(copy)
    return [group for group in groups.values() if len(group) > 1]


def table(catalog: Catalog) -> Table:
    """One column per split: images, classes, images per class, sizes, what PIL has to decode."""
    made = Table("", *splits(catalog), title=Text(printable(str(catalog.train.root))), title_justify="left")
    columns = [_column(images, _labelled(catalog).get(split)) for split, images in splits(catalog).items()]
    for row in columns[0]:
        made.add_row(row, *(column[row] for column in columns))
    return made


def _column(images: ImageList, labelled: ImageList | None) -> dict[str, str]:
    rows = {"images": f"{len(images):,}"}
    if labelled is None:
        rows |= {"classes": "no labels", "images per class": "", "classes of one image": ""}
    else:
        counts = np.bincount(labelled.labels, minlength=len(labelled.classes))
        used = counts[counts > 0]
        bare = len(images) - len(labelled)
        rows["classes"] = f"{len(used):,} of {len(counts):,}" + f"; {bare:,} without label" * (bare > 0)
        rows["images per class"] = _range(used)
        rows["classes of one image"] = str((used == 1).sum())
    rows["height"], rows["width"] = (_range(side) for side in images.sizes.T)
    rows["decoded by PIL alone"] = f"{(~images.plain).sum():,}"
    rows["rows cut off"] = str(images.cut)
    return rows


def _range(values: np.ndarray) -> str:
    if not len(values):
        return "-"
    low, high = values.min(), values.max()
    return f"{low}" if low == high else f"{low} to {high}, median {np.median(values):.0f}"


class Finding(NamedTuple):
    """Something that somebody should look at."""

    title: str
    entries: list[list[str]]
    """One list a line: a name with its reason, or the names of one file's copies; harmless to a terminal."""


def findings(catalog: Catalog, copies: list[list[Copy]]) -> list[Finding]:
    """What somebody should look at, complete."""
    across = [group for group in copies if len({copy.split for copy in group}) > 1]
    torn = [group for group in copies if len({copy.label for copy in group} - {None}) > 1]
    found = [
        Finding(f"warning: {text}: {len(groups)}", [[printable(copy.name) for copy in group] for group in groups])
        for groups, text in (
            (across, "the same file in train and in test, so that retrieval and probes look too good"),
            ([group for group in copies if group not in across], "the same file more than once in one split"),
            (torn, "the same file under more than one class"),
        )
        if groups
    ]
    if catalog.bad:
        title = f"{len(catalog.bad)} left out (files that cannot be used, classes without images):"
        found.insert(0, Finding(title, [[f"{printable(name)}: {printable(reason)}"] for name, reason in catalog.bad]))
    return found


def in_full(found: list[Finding]) -> str:
    """Every entry, one a line; names of copies are joined by `` = ``."""
    return "".join(line + "\n" for title, entries in found for line in (title, *("  " + " = ".join(entry) for entry in entries)))


def in_short(found: list[Finding]) -> list[str]:
    """Lines for a terminal: of long lists and large groups the beginning."""
    lines = []
    for title, entries in found:
        lines.append(title)
        for entry in entries[:_SHOWN]:
            more = f" and {len(entry) - _COPIES} more" if len(entry) > _COPIES else ""
            lines.append("  " + " = ".join(entry[:_COPIES]) + more)
        lines += [f"  and {len(entries) - _SHOWN} more"] * (len(entries) > _SHOWN)
    return lines


def class_sheet(catalog: Catalog) -> Image.Image:
    """Rows of one class each, training images left and test images right, so that labels that disagree are seen; without
    labels, images from all over the list.

    Raises BrokenFile naming a file that no longer opens.
    """
    title = f"{catalog.train.root}\n" + ", ".join(f"{split} {len(images):,}" for split, images in splits(catalog).items())
    labelled = _labelled(catalog)
    if not labelled:
        images = catalog.train
        tiles = [_tile(images, i, f"{Path(images.names[i]).name}\n") for i in _spread(len(images), _CLASSES * _COLUMNS)]
        return contact_sheet.draw(tiles, columns=_COLUMNS, side=_SIDE, title=title)
    tiles = []
    each = _COLUMNS // len(labelled)
    present = np.unique(np.concatenate([images.labels for images in labelled.values()]))
    for label in present[_spread(len(present), _CLASSES)].tolist():
        for split, images in labelled.items():
            name = images.classes[label]
            members = np.flatnonzero(images.labels == label)[:each].tolist()
            row = [_tile(images, i, f"{name}\n{split} ") for i in members] or [
                contact_sheet.Tile(None, f"{name}\n{split}: no image")
            ]
            tiles += row + [contact_sheet.Tile(None)] * (each - len(row))
    return contact_sheet.draw(tiles, columns=_COLUMNS, side=_SIDE, title=title)


def _tile(images: ImageList, i: int, caption: str) -> contact_sheet.Tile:
    height, width = images.sizes[i].tolist()
    return contact_sheet.Tile(np.asarray(images.read(i)), f"{caption}{width} x {height}")


def _spread(count: int, most: int) -> np.ndarray:
    """Up to ``most`` positions, evenly over ``count``."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))
