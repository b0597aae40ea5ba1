"""Plain folders of images: class folders in train/ and test/ (or val/), or images anywhere without labels.

Links are followed wherever they lead, but into each folder once and never back into a folder above: circles end.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from engine.console import printable
from engine.data.image_file import signature
from engine.data.layouts.guess import MASK_OF, SUFFIXES, class_folders, guess, holds_masks, masks_note, setting, split_of, through
from engine.data.layouts.lists import BadFile, Known, Layout, Split, subfolders, walk

EXPECTED = (
    "your own photos: train/<class>/*.jpg and optionally test/<class>/*.jpg or val/<class>/*.jpg, or images in any folders, "
    "without labels; data.train=FOLDER data.test=FOLDER for other names"
)


def read(root: Path, train: str | None = None, test: str | None = None) -> Layout:
    """The folders ``train`` and ``test`` of ``root`` just as they are named, or, where neither is, what guess.py makes of ``root``.

    The class folders of a split are its classes; without any it has no labels. ``train`` alone means no test split; ``test`` alone
    leaves the training folder to its usual names. Nothing below ``test`` is trained on.
    Raises FileNotFoundError for a named folder that is not there, ValueError for what can be read in two ways and for splits that
    overlap.
    """
    bad: list[BadFile] = []
    if train is None and test is None:
        train, test, labelled, notes, _ = guess(root)
        masks: list[str] | None = []
    else:
        train, test, notes = _named(root, train, test)
        labelled, masks = True, None
    apart = None if test is None or test == train else root / test
    of_train = class_folders(root / train) if train is not None and labelled else []
    of_train = [c for c in of_train if root / str(train) / c != apart]
    of_test = [] if test is None else class_folders(root / test)
    classes = tuple(sorted({*of_train, *of_test}))
    position = {c: p for p, c in enumerate(classes)}

    def images(folder: Path) -> list[str]:
        return _image_names(folder, root, bad, masks, apart if folder != apart else None)

    def part(name: str, folders: list[str]) -> Split:
        folder, source = root / name, "" if name == "." else f"{name}/"
        if not folders:
            return Split(images(folder), None, {}, source or "./")
        names: list[str] = []
        labels: list[int] = []
        for entry in sorted(folder.iterdir()):
            if entry.is_file() and not entry.name.startswith("."):
                bad.append(BadFile(f"{source}{entry.name}", "lies beside the class folders, so it has no class"))
        for c in folders:
            found = images(folder / c)
            names += found
            labels += [position[c]] * len(found)
        return Split(names, labels, {position[c]: f"{source}{c}" for c in folders}, source or "./")

    training = Split([], [], {}) if train is None else part(train, of_train)
    held_out = part(test, of_test) if test is not None else None
    if held_out is not None and training.labels is None:
        notes.append(f"{printable(training.source)} has no class folders: it is trained on without labels")
    if masks:
        notes.append(f"{masks_note(masks)}; {setting('data.train', '.')} takes every folder")
    return Layout(root, classes, training, held_out, bad, tuple(notes))


def everything(root: Path) -> tuple[list[str], list[BadFile], list[str]]:
    """(sorted posix names of all photos below ``root``, what is none, a note of folders of masks, which are left out)."""
    bad: list[BadFile] = []
    masks: list[str] = []
    names = _image_names(root, root, bad, masks, None)
    return names, bad, [masks_note(masks)] if masks else []


def _named(root: Path, train: str | None, test: str | None) -> tuple[str | None, str | None, list[str]]:
    """The named folders as plain relative paths, and what to say of a training folder that was left to its usual names."""
    named = {"train": train, "test": test}
    for key, name in named.items():
        if name is None:
            continue
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"data.{key}={printable(name)}: leads out of data.root; name a folder below {printable(str(root))}")
        if not (root / path).is_dir():
            there = ", ".join(printable(n) for n in subfolders(root)[:8]) or "no folders"
            raise FileNotFoundError(
                f"data.{key}={printable(name)}: no folder of that name in {printable(str(root))}; it has {there}"
            )
        named[key] = path.as_posix()
    train, test = named["train"], named["test"]
    notes: list[str] = []
    if test is not None and not class_folders(root / test):
        raise ValueError(f"data.test={printable(test)}: has no class folders, and without labels nothing can be evaluated")
    if train is None:
        usual = [n for n in subfolders(root) if split_of(n) == "train"]
        if len(usual) > 1:
            raise ValueError(f"data.root={printable(str(root))} has {printable(' and '.join(usual))}; say which by data.train=NAME")
        train = through(root, root / usual[0], "train", notes) if usual else None
    if train is not None and test is not None and (root / train).is_relative_to(root / test):
        raise ValueError(f"data.train={printable(train)} lies in data.test={printable(test)}: the test split would be trained on")
    return train, test, notes


def _image_names(folder: Path, root: Path, bad: list[BadFile], masks: list[str] | None, apart: Path | None) -> list[str]:
    """Sorted posix names, relative to ``root``, of the image files below ``folder`` but not below ``apart``. Other files, but for
    hidden ones, are added to ``bad``; folders of masks are added to ``masks``, unless it is None or there are no other images."""

    def name_of(path: str) -> str:
        return Path(path).relative_to(root).as_posix()

    def unreadable(error: OSError) -> None:
        bad.append(BadFile(name_of(error.filename), f"cannot be listed ({error.strerror})"))

    names: list[str] = []
    passed: list[str] = []
    for here, folders, files in walk(folder, [p for p in folder.parents if p.is_relative_to(root)], unreadable):
        if masks is not None:
            passed += [name_of(os.path.join(here, f)) for f in folders if holds_masks(f)]
            folders[:] = [f for f in folders if not holds_masks(f)]
        if apart is not None:
            folders[:] = [f for f in folders if Path(here, f) != apart]
        stems = {os.path.splitext(file)[0] for file in files}
        for file in files:
            path = os.path.join(here, file)
            stem, suffix = os.path.splitext(file)
            suffix = suffix.lower()
            if (mask := MASK_OF.fullmatch(stem)) and mask[1] in stems:
                bad.append(BadFile(name_of(path), "the mask of a photo beside it, by its name; data.name=list takes any file"))
            elif not os.path.isfile(path):
                bad.append(BadFile(name_of(path), "not a file (a broken link?)"))
            elif suffix in SUFFIXES or _is_image(path):
                names.append(name_of(path))
            else:
                bad.append(BadFile(name_of(path), f"not an image file ({suffix or 'no suffix'})"))
    if passed and not names:
        return [n for p in passed for n in _image_names(root / p, root, bad, None, apart)]
    if masks is not None:
        masks += passed
    return sorted(names)


def _is_image(path: str) -> bool:
    try:
        return signature(path) is not None
    except OSError:
        return False


LAYOUTS = {"folder": Known("a folder", read, named=True, expected=EXPECTED)}
