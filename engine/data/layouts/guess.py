"""Which folders of somebody's photos are the splits, where nobody said so: by the usual names, looking through needless levels.

What could be read in two ways is refused with both readings and the settings that choose one; what is passed over is said.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, NoReturn

from engine.console import printable
from engine.data.layouts.lists import below, subfolders, walk

SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pnm", ".jp2", ".avif",
    ".heic", ".heif",
}  # fmt: skip
"""Files with another suffix are images where their first bytes say so."""
SPLITS = {"train": ("train", "training"), "test": ("test", "testing"), "val": ("val", "valid", "validation")}
_SPLIT = {alias: split for split, aliases in SPLITS.items() for alias in aliases}
_MASKS = {
    "annotation", "annotations", "ground_truth", "groundtruth", "labels", "masks", "segmentation", "segmentationclass",
    "segmentationobject", "segmentations", "trimaps",
}  # fmt: skip
MASK_OF = re.compile(r"(.+)[ _.-](?:mask|matte|seg|segmentation|trimap)", re.IGNORECASE)
"""The stem of a mask that lies beside its photo; the photo's stem is the group."""
_PICTURES = {"image", "images", "img", "imgs", "jpegimages", "photo", "photos", "pictures"}
_LEVELS = 2
"""Needless folders that are looked through, one inside another."""


class Guess(NamedTuple):
    """Folders relative to the root, "." for the root itself."""

    train: str | None
    test: str | None
    labels: bool
    """Whether the class folders in ``train`` are classes."""
    notes: list[str]
    classes: str | None = None
    """Where there are no splits: the folder whose folders look like classes."""


def split_of(name: str) -> str | None:
    """train, test or val where ``name`` is a usual name of that split, in any case."""
    return _SPLIT.get(name.lower())


def resembles(name: str) -> str | None:
    """train, test or val where a word in ``name`` is a usual name of that split: cars_train, Training Set, test2017."""
    return next((_SPLIT[word] for word in re.split("[^a-z]+", name.lower()) if word in _SPLIT), None)


def holds_masks(name: str) -> bool:
    """Whether folders of this name hold masks or other annotations rather than photos: annotations, train_masks."""
    words = set(re.split("[^a-z]+", name.lower()))
    return name.lower() in _MASKS or resembles(name) is not None and bool(words & (_MASKS | {"mask"}))


def holds_photos(folder: Path) -> bool:
    """Whether any file below ``folder`` has the suffix of an image."""
    return any(_is_photo(file) for _, _, files in walk(folder, folder.parents) for file in files)


def _holds_files(folder: Path) -> bool:
    return any(files for _, _, files in walk(folder, folder.parents))


def class_folders(folder: Path) -> list[str]:
    """Sorted names of the class folders in a split's ``folder``."""
    return subfolders(folder)


def masks_note(names: Iterable[str]) -> str:
    """What is said of folders that ``holds_masks`` keeps out."""
    return f"not used, being masks or annotations by the name: {_list(names)}"


def setting(key: str, value: str) -> str:
    """``key=value`` as it is typed in a shell."""
    return shlex.quote(f"{key}={printable(value)}")


def guess(root: Path) -> Guess:
    """The splits below ``root``. Raises ValueError with the readings where there are two."""
    bases = [b for b in _bases(root) if not any(holds_masks(part) for part in b.relative_to(root).parts)]
    if len(bases) > 1:
        readings = [(f"the splits of {_shown(root, b)}", setting("data.root", str(b))) for b in bases]
        _refuse(root, f"{len(bases)} folders hold splits", readings)
    return _with_splits(root, bases[0]) if bases else _without_splits(root)


def _bases(root: Path) -> list[Path]:
    """The uppermost folders that hold folders with a split's name and with files."""
    found: list[Path] = []
    for folder in below(root, _LEVELS):
        depth = len(folder.relative_to(root).parts)
        if found and depth > len(found[0].relative_to(root).parts):
            break
        if any(split_of(name) and _holds_files(folder / name) for name in _subfolders(folder)):
            found.append(folder)
    return found


def _with_splits(root: Path, base: Path) -> Guess:
    named = {split: [n for n in subfolders(base) if split_of(n) == split] for split in SPLITS}
    names = {split: [n for n in found if _holds_files(base / n)] or found for split, found in named.items()}
    notes: list[str] = []

    def path(name: str) -> str:
        return (base / name).relative_to(root).as_posix()

    others = _others(root, base)
    held_out = [path(n) for split in ("test", "val") for n in names[split]]
    for split in ("train", "test"):
        if len(names[split]) > 1:
            other = "test" if split == "train" else "train"
            usable = [n for n in held_out if class_folders(root / n)] if split == "train" else [path(n) for n in names["train"]]
            rest = "".join(f" {setting(f'data.{other}', n)}" for n in usable[:1])  # one alone leaves the other out, or to luck
            _refuse(root, f"{_list(names[split])} could all be the {split} split", [
                (f"{printable(path(n))}/", setting(f"data.{split}", path(n)) + rest) for n in names[split]
            ])  # fmt: skip
    train = path(names["train"][0]) if names["train"] else None
    if others and not (train and held_out):
        found = train or held_out[0]
        here = _relative(root, base if any(Path(o).parent == base.relative_to(root) for o in others) else root)
        key = "data.train" if train else "data.test"
        _refuse(root, f"{_list(others)} {'lies' if len(others) == 1 else 'lie'} beside {printable(found)}/", [
            (f"{printable(found)}/ is a split and the rest is not used", setting(key, found)),
            (f"{printable(found)}/ is a class like the others", setting("data.train", here)),
        ])  # fmt: skip
    if alike := [o for o in others if resembles(Path(o).name)]:
        both = f"{setting('data.train', train or '')} {setting('data.test', held_out[0])}"
        _refuse(root, f"{_list(alike)} could be a split too", [
            (f"{printable(train or '')}/ and {printable(held_out[0])}/ only", both),
            (f"{printable(alike[0])}/ instead", f"{setting(f'data.{_key(alike[0])}', alike[0])}, and the other key likewise"),
        ])  # fmt: skip
    if others:
        notes.append(f"not used, being no split: {_list(others)}")
    if _photos_in(base):
        notes.append(f"not used: the photos that lie beside {printable(train or held_out[0])}/")
    train_at = None if train is None else through(root, root / train, "train", notes)
    test_at = None
    for name in held_out:
        split = split_of(Path(name).name) or ""
        at = through(root, root / name, split, notes)
        if test_at is not None:
            notes.append(f"{printable(name)}/ is not used: {printable(test_at)}/ is the test split; "
                         f"{setting('data.train', train or '.')} {setting('data.test', at)} takes it instead")  # fmt: skip
        elif class_folders(root / at):
            test_at = at
        else:
            notes.append(f"{printable(name)}/ has no class folders: without labels it cannot be the test split, and is not used")
    if train is None:
        notes.append(f"there is {printable(held_out[0])}/ but no train/: this can be evaluated, but nothing can be trained on it")
    return Guess(train_at, test_at, True, notes)


def _without_splits(root: Path) -> Guess:
    for folder in below(root, _LEVELS):
        alike = {n: resembles(n) for n in _subfolders(folder) if resembles(n) and not holds_masks(n) and holds_photos(folder / n)}
        trains, tests = ([n for n, s in alike.items() if (s == "train") is wanted] for wanted in (True, False))
        if trains and tests:
            train, test = ((folder / n[0]).relative_to(root).as_posix() for n in (trains, tests))
            at = [through(root, root / n, s, []) for n, s in ((train, "train"), (test, alike[tests[0]] or ""))]
            evaluated = f" {setting('data.test', at[1])}" if class_folders(root / at[1]) else ""
            _refuse(root, f"{_list([train, test])} look like splits", [
                ("they are", setting("data.train", at[0]) + evaluated),
                ("they are classes like any other folder", setting("data.train", _relative(root, folder))),
            ])  # fmt: skip
    here, classes = root, _with_photos(root)
    for _ in range(_LEVELS):
        if len(classes) != 1 or _photos_in(here):
            break
        here, classes = here / classes[0], _with_photos(here / classes[0])
    notes = []
    if len(classes) > 1:
        notes.append(
            f"no train/ was found, so that all photos are one training set without labels. If the {len(classes):,} folders "
            f"{_list(classes)} are classes: {setting('data.train', _relative(root, here))}"
        )
    return Guess(".", None, False, notes, _relative(root, here) if len(classes) > 1 else None)


def through(root: Path, folder: Path, split: str, notes: list[str]) -> str:
    """``folder``, or the one inside where that adds nothing: train/train/<class>, train/images/*.jpg."""
    for _ in range(_LEVELS):
        names = class_folders(folder)
        photos = [n for n in names if not holds_masks(n)]
        if len(names) > 1 and len(photos) == 1 and photos[0].lower() in _PICTURES:
            if masks := [n for n in names if n not in photos and holds_photos(folder / n)]:
                notes.append(masks_note([_relative(root, folder / n) for n in masks]))
            names = photos
        if _photos_in(folder) or not names:
            break
        inside = [split_of(n) for n in names]
        if all(inside) and inside != [split]:
            _refuse(root, f"{_shown(root, folder)} holds {_list(names)}, which look like splits themselves", [
                ("they are", setting("data.root", str(folder))),
                ("they are classes", setting(f"data.{_key(split)}", _relative(root, folder))),
            ])  # fmt: skip
        if len(names) > 1:
            break
        inner = folder / names[0]
        if inside == [split] or names[0].lower() in {*_PICTURES, folder.name.lower()}:
            folder = inner
            continue
        classes = _with_photos(inner)
        if len(classes) > 1 and not _photos_in(inner):
            key = f"data.{_key(split)}"
            _refuse(root, f"{_shown(root, folder)} holds {printable(names[0])}/ alone, and that {len(classes):,} folders", [
                (f"{_list(classes)} are the classes", setting(key, _relative(root, inner))),
                (f"{printable(names[0])} is the only class", setting(key, _relative(root, folder))),
            ])  # fmt: skip
        break
    return _relative(root, folder)


def _others(root: Path, base: Path) -> list[str]:
    """Folders with photos beside the splits, or beside the folders that lead to them."""
    found = [base / n for n in subfolders(base) if not split_of(n)]
    for above, inner in zip((p for p in base.parents if p.is_relative_to(root)), (base, *base.parents), strict=False):
        found += [above / n for n in subfolders(above) if n != inner.name]
    return [_relative(root, f) for f in found if not holds_masks(f.name) and holds_photos(f)]


def _key(name: str) -> str:
    return "train" if resembles(Path(name).name) == "train" else "test"


def _with_photos(folder: Path) -> list[str]:
    return [n for n in _subfolders(folder) if not holds_masks(n) and holds_photos(folder / n)]


def _subfolders(folder: Path) -> list[str]:
    try:
        return subfolders(folder)
    except OSError:
        return []


def _photos_in(folder: Path) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(_is_photo(e.name) and not e.is_dir() for e in entries)
    except OSError:
        return False


def _is_photo(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES


def _relative(root: Path, folder: Path) -> str:
    return folder.relative_to(root).as_posix()


def _shown(root: Path, folder: Path) -> str:
    return printable(str(root)) if folder == root else f"{printable(_relative(root, folder))}/"


def _list(names: Iterable[str], most: int = 3) -> str:
    """train/, test/ and 2 more."""
    shown = [f"{printable(n)}/" for n in names]
    more = [f"{len(shown) - most} more"] if len(shown) > most else []
    *first, last = shown[:most] + more
    return f"{', '.join(first)} and {last}" if first else last


def _refuse(root: Path, what: str, readings: Iterable[tuple[str, str]]) -> NoReturn:
    choices = "; or ".join(f"{meaning}: {override}" for meaning, override in readings)
    raise ValueError(f"data.root={printable(str(root))}: {what}. Say which: {choices}")
