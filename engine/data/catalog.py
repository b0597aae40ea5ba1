"""From a data set's folder to its image lists: every file that its layout lists is decoded once, the result is cached.

Unreadable files leave the list here, before any order is drawn over it.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from engine.console import printable, with_progress
from engine.data import layouts
from engine.data.image_file import MAX_PIXELS, read_image
from engine.data.layouts.lists import BadFile, Split
from engine.data.layouts.official import AIRCRAFT_BANNER
from engine.data.machine import cores
from engine.errors import BrokenFile
from engine.files import write_text

_CACHE_VERSION = 1


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
    """[N] RGB or grey JPEG, or 8-bit PNG without palette: read alike by every decoder; all else is left to PIL."""
    fingerprint: str
    """sha256 over names, byte sizes and modification times, and ``cut``: of these very files on this disk."""
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
    test: ImageList | None
    bad: tuple[BadFile, ...]


class _Check(NamedTuple):
    """What one decode found: (height, width, plain), or why it failed."""

    size: int
    mtime: int
    height: int
    width: int
    plain: bool
    reason: str | None


def load(
    name: str,
    root: str | Path | None,
    *,
    crop_banner: bool = False,
    workers: int | None = None,
    cache_dir: Path | None = None,
    progress: bool = True,
) -> Catalog:
    """The image lists of the data set ``name`` unpacked at ``root``.

    crop_banner: leave out the rows of FGVC-Aircraft's images that name the photographer.
    workers: decoding threads of the first check; None takes the machine's cores.
    cache_dir: where the check of every file is kept, by name, size and modification time; None writes nothing.
    Raises FileNotFoundError for what is missing, naming the archive that holds it; ValueError for a list that cannot be used, an
    unknown name, ``crop_banner`` for another set, or a set without any readable training image.
    """
    if crop_banner and name != "aircraft":
        raise ValueError(f"data.crop_banner: only images of data.name=aircraft have a banner, not those of {name}")
    layout = layouts.read(name, root)
    checks = _check_files(name, layout, workers, cache_dir, progress)
    bad = list(layout.bad)
    cut = AIRCRAFT_BANNER if crop_banner else 0
    train = _finish(layout, layout.train, checks, bad, cut)
    test = None if layout.test is None else _finish(layout, layout.test, checks, bad, cut)
    if not len(train):
        listed = len(layout.train.names)
        found = f"{listed} training files, none readable" if listed else "no training files"
        first = f" (first: {printable(bad[0].name)}: {bad[0].reason})" if bad else ""
        raise ValueError(f"data.root={root}: {found}{first}; expected {layouts.expected(name)}")
    return Catalog(train, test, tuple(bad))


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
            checks[n] = _Check(0, 0, 0, 0, False, error.strerror)
            continue
        if not stat.S_ISREG(found.st_mode):  # a pipe would block whoever opens it
            checks[n] = _Check(0, 0, 0, 0, False, "not a regular file")
        elif n in known and known[n][:2] == [found.st_size, found.st_mtime_ns]:
            checks[n] = _Check(*known[n])
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

    def check(item: tuple[str, os.stat_result]) -> tuple[str, _Check]:
        n, found = item
        try:
            image, plain = read_image(root / n)
        except (OSError, ValueError) as error:
            reason = str(error) or type(error).__name__
            return n, _Check(found.st_size, found.st_mtime_ns, 0, 0, False, reason)
        return n, _Check(found.st_size, found.st_mtime_ns, image.height, image.width, plain, None)

    with warnings.catch_warnings(), ThreadPoolExecutor(workers or cores()) as pool:  # PIL decodes without the GIL
        warnings.simplefilter("ignore")  # PIL warns of large images and odd EXIF; what matters becomes a reason
        checks.update(with_progress(pool.map(check, todo), len(todo), f"checking {name}", progress))
    if cache is not None:
        try:
            _write_cache(cache, {**known, **{n: list(checks[n]) for n, _ in todo}})
        except OSError as error:
            warnings.warn(f"the check of {root} could not be kept in {cache} ({error}); it will be repeated", stacklevel=3)
    return checks


def _read_cache(path: Path) -> dict[str, list]:
    """{} for a cache that is missing, damaged or of another version: it only saves time. A row that is none is passed over."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        files = content["files"] if content["version"] == _CACHE_VERSION else {}
        return {n: row for n, row in files.items() if _is_row(row)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _is_row(row: list) -> bool:
    kinds = [type(value) for value in row]
    if kinds[:5] != [int, int, int, int, bool] or kinds[5:] not in ([NoneType], [str]):
        return False
    return 0 <= min(row[2:4]) <= max(row[2:4]) <= MAX_PIXELS


def _write_cache(path: Path, files: dict[str, list]) -> None:
    text = json.dumps({"version": _CACHE_VERSION, "files": files})
    write_text(path, text)


def _finish(layout: layouts.Layout, split: Split, checks: dict[str, _Check], bad: list[BadFile], cut: int) -> ImageList:
    """Drops unreadable files; what was dropped, and classes left without an image, are added to ``bad``."""
    keep = []
    for i, n in enumerate(split.names):
        reason = checks[n].reason
        if reason is None and checks[n].height <= cut:
            reason = f"only {checks[n].height} rows high, {cut} of which data.crop_banner takes away"
        if reason is None:
            keep.append(i)
        else:
            bad.append(BadFile(n, reason))
    names = tuple(split.names[i] for i in keep)
    labels = None if split.labels is None else np.array([split.labels[i] for i in keep], np.int64)
    if labels is not None:
        present = set(labels.tolist())
        bad.extend(
            BadFile(text, "empty class: no readable image") for label, text in split.expected.items() if label not in present
        )
    used = [checks[n] for n in names]
    digest = hashlib.sha256(f"cut {cut}\n".encode() if cut else b"")
    for n, c in zip(names, used, strict=True):
        digest.update(os.fsencode(f"{n}\0{c.size}\0{c.mtime}\n"))
    return ImageList(
        root=layout.root,
        names=names,
        labels=labels,
        classes=layout.classes,
        sizes=np.array([(c.height - cut, c.width) for c in used], np.int32).reshape(-1, 2),
        plain=np.array([c.plain for c in used], bool),
        fingerprint=digest.hexdigest(),
        file_sizes=np.array([c.size for c in used], np.int64),
        cut=cut,
    )
