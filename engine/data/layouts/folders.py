"""Plain folders of images: class folders in train/ and test/ (or val/), or images anywhere without labels.

Links are followed wherever they lead, but into each folder once and never back into a folder above: circles end.
"""

from __future__ import annotations

import os
from pathlib import Path

from engine.data.layouts.lists import BadFile, Known, Layout, Split

EXPECTED = (
    "your own photos: train/<class>/*.jpg and optionally test/<class>/*.jpg or val/<class>/*.jpg, "
    "or images in any folders, without labels"
)
_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pnm"}


def read(root: Path) -> Layout:
    """``train/<class>/…`` with an optional ``test`` or ``val``, or images anywhere below ``root`` without labels."""
    bad: list[BadFile] = []
    held_out = next((root / n for n in ("test", "val") if (root / n).is_dir()), None)
    if not (root / "train").is_dir():
        if held_out is not None:
            raise ValueError(f"data.root={root} has {held_out.name}/ but no train/; expected {EXPECTED}")
        return Layout(root, (), Split(_image_names(root, root, bad), None, {}), None, bad)
    train_classes = _class_folders(root / "train")
    test_classes = [] if held_out is None else _class_folders(held_out)
    if not train_classes:
        if test_classes:
            raise ValueError(f"data.root={root}: {held_out.name}/ has class folders but train/ has none; expected {EXPECTED}")
        return Layout(root, (), Split(_image_names(root / "train", root, bad), None, {}), None, bad)
    classes = tuple(sorted({*train_classes, *test_classes}))
    position = {c: p for p, c in enumerate(classes)}

    def part(folder: Path, folders: list[str]) -> Split:
        names: list[str] = []
        labels: list[int] = []
        for entry in sorted(folder.iterdir()):
            if entry.is_file() and not entry.name.startswith("."):
                bad.append(BadFile(f"{folder.name}/{entry.name}", "lies beside the class folders, so it has no class"))
        for c in folders:
            found = _image_names(folder / c, root, bad)
            names += found
            labels += [position[c]] * len(found)
        return Split(names, labels, {position[c]: f"{folder.name}/{c}" for c in folders})

    train = part(root / "train", train_classes)
    test = part(held_out, test_classes) if held_out is not None and test_classes else None
    return Layout(root, classes, train, test, bad)


def _class_folders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _image_names(folder: Path, root: Path, bad: list[BadFile]) -> list[str]:
    """Sorted posix names, relative to ``root``, of the image files below ``folder``; hidden files are passed over, files with
    another suffix and what cannot be read are added to ``bad``."""

    def name_of(path: str) -> str:
        return Path(path).relative_to(root).as_posix()

    def identity(path: str | Path) -> tuple[int, int]:
        stat = os.stat(path)
        return stat.st_dev, stat.st_ino

    def unreadable(error: OSError) -> None:
        bad.append(BadFile(name_of(error.filename), f"cannot be listed ({error.strerror})"))

    names: list[str] = []
    visited = {identity(above) for above in folder.parents if above.is_relative_to(root)}
    for here, folders, files in os.walk(folder, followlinks=True, onerror=unreadable):
        if identity(here) in visited:
            folders.clear()
            continue
        visited.add(identity(here))
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for file in sorted(files):
            if file.startswith("."):
                continue
            path = os.path.join(here, file)
            suffix = os.path.splitext(file)[1].lower()
            if suffix not in _SUFFIXES:
                bad.append(BadFile(name_of(path), f"not the name of an image file ({suffix or 'no suffix'})"))
            elif not os.path.isfile(path):
                bad.append(BadFile(name_of(path), "not a file (a broken link?)"))
            else:
                names.append(name_of(path))
    return sorted(names)


LAYOUTS = {"folder": Known("a folder", read)}
