"""From a data set's folder to its image lists: every file that its layout lists is decoded once, the result is cached.

Unreadable files leave the list here, before any order is drawn over it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from types import NoneType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image

from engine.console import counted, printable, say, with_progress
from engine.data import layouts
from engine.data.image_file import MAX_PIXELS, Verdict, Watch, read_image
from engine.data.layouts.lists import UNLABELLED, BadFile, Split
from engine.data.layouts.official import AIRCRAFT_BANNER
from engine.data.machine import cores
from engine.errors import BrokenFile
from engine.files import write_text

_CACHE_VERSION = f"3, Pillow {PIL.__version__}"
"""Of the check's rows; what Pillow reads changes with it."""
_EMPTY_CLASS = "empty class: no readable image"


@dataclass(frozen=True)
class ImageList:
    """The readable images of one split, in a fixed order; a position in it is an image's index everywhere."""

    root: Path
    names: tuple[str, ...]
    """Posix paths relative to ``root``."""
    labels: npt.NDArray[np.int64] | None
    """[N] position in ``classes``; None for a folder without labels."""
    classes: tuple[str, ...]
    sizes: npt.NDArray[np.int32]
    """[N, 2] height and width in pixels after EXIF rotation, without ``cut``."""
    plain: npt.NDArray[np.bool_]
    """[N] read alike by every decoder, as the bytes of the file show (image_file/markers.py): 8-bit Huffman-coded RGB or gray JPEG,
    8-bit PNG without palette, animation or orientation; all else is left to PIL."""
    fingerprint: str
    """sha256 over names, byte sizes and modification times, how unusual levels were scaled, and ``cut``: of these
    very files on this disk."""
    file_sizes: npt.NDArray[np.int64]
    """[N] bytes of the files."""
    cut: int = 0
    """Rows at the bottom of every file's upright picture that are no part of the image. A loader that opens files itself need
    not know: its boxes count from the top left and lie within ``sizes``."""

    def __len__(self) -> int:
        return len(self.names)

    @property
    def identity(self) -> str:
        """sha256 over names, byte sizes, classes and ``cut``: equal for a copy of the data set, unlike ``fingerprint``."""
        labels = [0] * len(self) if self.labels is None else self.labels.tolist()
        digest = hashlib.sha256(f"cut {self.cut}\n".encode())
        for name, size, label in zip(self.names, self.file_sizes.tolist(), labels, strict=True):
            digest.update(os.fsencode(name) + f"\0{size}\0{self.classes[label] if self.classes else ''}\n".encode())
        return digest.hexdigest()

    def path(self, i: int) -> Path:
        """Where image ``i`` lies."""
        return self.root / self.names[i]

    def read(self, i: int) -> Image.Image:
        """Image ``i`` as upright 8-bit RGB. Raises BrokenFile naming it."""
        height, width = self.sizes[i].tolist()
        try:
            image = read_image(self.path(i))[0]
            if image.size != (width, height + self.cut):
                raise ValueError(f"it has {image.width} x {image.height} pixels instead of {width} x {height + self.cut}")
            return image.crop((0, 0, width, height)) if self.cut else image
        except (OSError, ValueError) as error:
            raise BrokenFile(
                f"{printable(str(self.path(i)))}: unreadable now ({error}), but not when the list was made; "
                "restore or remove the file and resume"
            ) from error


class Catalog(NamedTuple):
    """A data set: its lists, and what had to be left out."""

    train: ImageList
    """Empty where there is nothing but a test split."""
    test: ImageList | None
    bad: tuple[BadFile, ...]
    notes: tuple[str, ...] = ()
    """What was understood, a line each: the splits, then what somebody should know of them."""
    labelled_part: ImageList | None = None
    """The training images that have labels, where others have none; then ``train`` has no labels."""
    validation: ImageList | None = None
    """Labelled images that were held out of training, where ``eval.validation`` says so (engine/evaluation/validation.py)."""

    @property
    def labelled(self) -> ImageList:
        """What can be learned from with labels: ``labelled_part`` where there is one, else ``train``."""
        return self.train if self.labelled_part is None else self.labelled_part


class _Check(NamedTuple):
    """What one file was when it was read, and what that came to."""

    size: int
    mtime: int
    verdict: Verdict


def load(
    name: str,
    root: str | Path | None,
    *,
    train: str | None = None,
    test: str | None = None,
    classes: Sequence[str] = (),
    fraction: float = 1.0,
    extra_roots: Sequence[str] = (),
    seed: int = 0,
    training: bool = True,
    crop_banner: bool = False,
    workers: int | None = None,
    cache_dir: Path | None = None,
    progress: bool = True,
) -> Catalog:
    """The image lists of the data set ``name`` unpacked at ``root``.

    train, test: ``data.train`` and ``data.test``, the splits of a set that has no fixed ones.
    classes, fraction, extra_roots: ``data.*`` of these names, which part of the set is used and what is trained on too; ``seed``
    draws the fraction.
    training: whether there must be training images; else a test split will do.
    crop_banner: leave out the rows of FGVC-Aircraft's images that name the photographer.
    workers: decoding threads of the first check; None takes the machine's cores.
    cache_dir: where the check of every file is kept, by name, size and modification time; None writes nothing.
    Raises FileNotFoundError for what is missing, naming the archive that holds it; ValueError for a list that cannot be used, an
    unknown name, ``crop_banner`` for another set, a set that can be read in two ways, or one without any readable training image.
    """
    if crop_banner and name != "aircraft":
        raise ValueError(f"data.crop_banner: only images of data.name=aircraft have a banner, not those of {name}")
    layout = layouts.read(
        name, root, train=train, test=test, classes=classes, fraction=fraction, extra_roots=extra_roots, seed=seed
    )
    checks = _check_files(name, layout, workers, cache_dir, progress)
    if progress:
        _say_what_is_unusual(checks)
    bad = list(layout.bad)
    cut = AIRCRAFT_BANNER if crop_banner else 0
    of_train, labelled = _finish(layout, layout.train, checks, bad, cut), None
    if of_train.labels is not None and UNLABELLED in of_train.labels:
        of_train, labelled = replace(of_train, labels=None), _finish(layout, _with_labels(layout.train), checks, [], cut)
    of_test = None if layout.test is None else _finish(layout, layout.test, checks, bad, cut)
    if not len(of_train) and (training or not of_test):
        listed = len(layout.train.names)
        found = "; ".join([f"{listed} training files, none readable" if listed else "no training files", *layout.notes])
        first = f" (first: {printable(bad[0].name)}: {bad[0].reason})" if bad else ""
        raise ValueError(f"data.root={root}: {found}{first}; expected {layouts.expected(name)}")
    of = f"; {_described('with labels', labelled)}" if labelled is not None else ""
    notes = (_described("train", of_train, layout.train) + of, _described("test", of_test, layout.test), *layout.notes)
    return Catalog(of_train, of_test, tuple(bad), notes, labelled)


def _with_labels(split: Split) -> Split:
    """The photos of ``split`` that have a label."""
    rows = [(n, label) for n, label in zip(split.names, split.labels or (), strict=True) if label != UNLABELLED]
    return split._replace(names=[n for n, _ in rows], labels=[label for _, label in rows])


def _described(split: str, images: ImageList | None, of: Split | None = None) -> str:
    """``train: 1,096 photos in 10 classes from training/``."""
    if images is None:
        return f"{split}: none"
    classes = "without labels" if images.labels is None else f"in {counted(len(set(images.labels.tolist())), 'class', 'classes')}"
    return f"{split}: {counted(len(images), 'photo')} {classes}" + (f" from {printable(of.source)}" if of and of.source else "")


def left_out(catalog: Catalog, most: int = 3) -> str:
    """What is not used of the files that were found, and the classes that vanished, in one line; empty where all are used."""
    classes = [b.name for b in catalog.bad if b.reason == _EMPTY_CLASS]
    reasons = Counter(_kind(b) for b in catalog.bad if b.reason != _EMPTY_CLASS)
    parts = []
    if reasons:
        files = reasons.total()
        listed = sum(len(part) for part in (catalog.train, catalog.test, catalog.validation) if part is not None) + files
        shown = [f"{count:,} x {reason}" for reason, count in reasons.most_common(most)]
        shown += [counted(len(reasons) - most, "other reason")] * (len(reasons) > most)
        parts.append(f"{files:,} of {counted(listed, 'file')} left out: {', '.join(shown)}")
    if classes:
        shown = [printable(name) for name in classes[:most]] + [f"{len(classes) - most:,} more"] * (len(classes) > most)
        parts.append(f"{counted(len(classes), 'class', 'classes')} without a readable image: {', '.join(shown)}")
    return "; ".join(parts)


def _kind(bad: BadFile) -> str:
    """The reason without what differs from file to file."""
    suffix = PurePosixPath(bad.name).suffix.lower()
    if bad.reason.startswith("not an image file"):
        return printable(suffix or "without suffix")
    return re.sub(r"\d+", "N", printable(bad.reason))


def write_bad_files(catalog: Catalog, path: Path) -> None:
    """One line ``name<TAB>reason`` for each file or class that was left out; an empty file says that all were used. What would
    break a line is escaped as in Python, and so is a backslash."""
    lines = (f"{printable(name)}\t{printable(reason)}\n" for name, reason in catalog.bad)
    text = "".join(lines)
    write_text(Path(path), text)


def _check_files(
    name: str, layout: layouts.Layout, workers: int | None, cache_dir: Path | None, progress: bool
) -> dict[str, _Check]:
    """Size and readability of every listed file; one that the cache knows by byte size and modification time is not opened.

    Raises FileNotFoundError where files are missing.
    """
    root = layout.root
    cache = None
    known: dict[str, list] = {}
    if cache_dir is not None:
        key = hashlib.sha256(os.fsencode(f"{name}\0{root.resolve()}")).hexdigest()[:16]
        cache = Path(cache_dir) / f"catalog-{name}-{key}.json"
        known = _read_cache(cache)
    checks: dict[str, _Check] = {}
    todo: list[tuple[str, os.stat_result]] = []
    absent: list[str] = []
    for n in layout.train.names + ([] if layout.test is None else layout.test.names):
        try:
            found = os.stat(root / n)
        except (FileNotFoundError, NotADirectoryError):
            absent.append(n)
            continue
        except OSError as error:  # a link to itself, a name that is too long, no permission
            checks[n] = _Check(0, 0, Verdict(reason=error.strerror or str(error) or type(error).__name__))
            continue
        if not stat.S_ISREG(found.st_mode):  # a pipe would block whoever opens it
            checks[n] = _Check(0, 0, Verdict(reason="not a regular file"))
        elif n in known and known[n][:2] == [found.st_size, found.st_mtime_ns]:
            checks[n] = _Check(*known[n][:2], Verdict(*known[n][2:]))
        else:
            todo.append((n, found))
    if absent:
        listed = len(absent) + len(checks) + len(todo)
        raise FileNotFoundError(
            f"data.root={root}: {printable(absent[0])} is listed but not there ({len(absent)} of {listed} files missing); "
            f"{layouts.remedy(name, root, absent[0])}"
        )
    if not todo:
        return checks

    with warnings.catch_warnings(), Watch() as watch, ThreadPoolExecutor(workers or cores()) as pool:  # PIL decodes without the GIL
        warnings.simplefilter("ignore")  # PIL warns of large images and odd EXIF; what matters becomes a reason

        def check(item: tuple[str, os.stat_result]) -> tuple[str, _Check]:
            n, found = item
            return n, _Check(found.st_size, found.st_mtime_ns, watch.judge(root / n))

        checks.update(with_progress(pool.map(check, todo), len(todo), f"checking {name}", progress))
    if cache is not None:
        try:
            _write_cache(cache, known | {n: _row(checks[n]) for n, _ in todo if checks[n].verdict.lasting})
        except OSError as error:
            warnings.warn(f"the check of {root} could not be kept in {cache} ({error}); it will be repeated", stacklevel=3)
    return checks


def _say_what_is_unusual(checks: dict[str, _Check]) -> None:
    """A line for levels that were scaled or laid on a ground, and one for pictures with nothing to see."""
    for lead, what in (("not read as they are", lambda v: v.note), ("warning: nothing to see in", lambda v: v.empty)):
        found = {n: what(c.verdict) for n, c in checks.items() if c.verdict.reason is None and what(c.verdict)}
        if found:
            kinds = ", ".join(f"{count} x {text}" for text, count in Counter(found.values()).most_common())
            say(f"{lead}: {kinds}; of {len(checks)} files (the first is {printable(next(iter(found)))})")


def _read_cache(path: Path) -> dict[str, list]:
    """{} for a cache that is missing, damaged or of another version: it only saves time. A row that is none is passed over."""
    try:
        digest, _, text = path.read_text(encoding="utf-8").partition("\n")
        if digest != hashlib.sha256(text.encode()).hexdigest():
            say(f"{path} is damaged or of a former version; every file is checked again")
            return {}
        content = json.loads(text)
        files = content["files"] if content["version"] == _CACHE_VERSION else {}
        return {n: row for n, row in files.items() if _is_row(row)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _row(check: _Check) -> list:
    """One check as the cache keeps it: verdicts about the content alone, since no other outlives its cause."""
    return [check.size, check.mtime, *check.verdict[:-1]]


def _is_row(row: list) -> bool:
    kinds = [type(value) for value in row]
    if kinds[:7] != [int, int, int, int, bool, str, str] or kinds[7:] not in ([NoneType], [str]):
        return False
    return 0 <= min(row[2:4]) <= max(row[2:4]) <= MAX_PIXELS


def _write_cache(path: Path, files: dict[str, list]) -> None:
    text = json.dumps({"version": _CACHE_VERSION, "files": files})
    write_text(path, f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")


def _finish(layout: layouts.Layout, split: Split, checks: dict[str, _Check], bad: list[BadFile], cut: int) -> ImageList:
    """Drops unreadable files; what was dropped, and classes left without an image, are added to ``bad``."""
    keep = []
    for i, n in enumerate(split.names):
        verdict = checks[n].verdict
        reason = verdict.reason
        if reason is None and verdict.height <= cut:
            reason = f"only {verdict.height} rows high, {cut} of which data.crop_banner takes away"
        if reason is None:
            keep.append(i)
        else:
            bad.append(BadFile(n, reason))
    names = tuple(split.names[i] for i in keep)
    labels = None if split.labels is None else np.array([split.labels[i] for i in keep], np.int64)
    if labels is not None:
        present = set(labels.tolist())
        bad.extend(BadFile(text, _EMPTY_CLASS) for label, text in split.expected.items() if label not in present)
    used = [checks[n] for n in names]
    digest = hashlib.sha256(f"cut {cut}\n".encode() if cut else b"")
    for n, c in zip(names, used, strict=True):
        how = f"\0{c.verdict.note}" if c.verdict.note else ""
        digest.update(os.fsencode(f"{n}\0{c.size}\0{c.mtime}{how}\n"))
    return ImageList(
        root=layout.root,
        names=names,
        labels=labels,
        classes=layout.classes,
        sizes=np.array([(c.verdict.height - cut, c.verdict.width) for c in used], np.int32).reshape(-1, 2),
        plain=np.array([c.verdict.plain for c in used], bool),
        fingerprint=digest.hexdigest(),
        file_sizes=np.array([c.size for c in used], np.int64),
        cut=cut,
    )
