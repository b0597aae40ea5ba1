"""From a data set's folder to its image lists: layouts are read, every file is decoded once, the result is cached.

Unreadable files leave the list here, before any order is drawn over it.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

MAX_PIXELS = 178_956_970
"""PIL's own limit against decompression bombs."""

_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pnm"}
_ORIENTATION = 0x0112
_CACHE_VERSION = 1
_CUB_COUNTS = {"train": 5994, "test": 5794}

_FOLDER_LAYOUT = (
    "data.name=folder expects ROOT/train/<class>/*.jpg and, optionally, ROOT/test/<class>/*.jpg (or ROOT/val), "
    "or a flat ROOT/*.jpg without labels"
)
_CUB_FILES = "images.txt, image_class_labels.txt, train_test_split.txt, images/<class>/*.jpg"
_LAYOUTS = {
    "birds": f"{_CUB_FILES} (the demo world draws them itself)",
    "cub": f"the content of CUB_200_2011.tgz: {_CUB_FILES}",
    "cars": "the content of car_ims and the devkit: cars_train/*.jpg, cars_test/*.jpg, devkit/cars_train_annos.mat, "
    "devkit/cars_test_annos_withlabels.mat",
    "aircraft": "the content of fgvc-aircraft-2013b.tar.gz: data/images/*.jpg, data/images_variant_trainval.txt, "
    "data/images_variant_test.txt",
    "nabirds": f"the content of nabirds.tar.gz: {_CUB_FILES}",
    "flowers": "102flowers.tgz unpacked and two lists: jpg/*.jpg, imagelabels.mat, setid.mat",
    "butterfly": "the content of Butterfly200's archives: images/<class>/*.jpg, Butterfly200_train_release.txt, "
    "Butterfly200_val_release.txt, Butterfly200_test_release.txt",
    "dogs": "the content of images.tar and lists.tar: Images/<class>/*.jpg, train_list.mat, test_list.mat",
    "folder": "your own photos: train/<class>/*.jpg and optionally test/<class>/*.jpg or val/<class>/*.jpg, "
    "or a flat folder without labels",
}
"""What the folder of every known set holds."""
_CUB_LIKE = ("birds", "cub")


class BadFile(NamedTuple):
    """Something of the data set that could not be used."""

    name: str
    """Posix path relative to the root: a file, or the folder or name of a class."""
    reason: str


class BrokenFile(RuntimeError):
    """A file that was readable when the list was made and no longer is."""


class LayoutNotSupported(NotImplementedError):
    """A known data set whose reader is not part of this version."""


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
    """[N, 2] height and width in pixels after EXIF rotation."""
    plain: npt.NDArray[np.bool_]
    """[N] RGB or grey JPEG, or 8-bit PNG without palette: read alike by every decoder; all else is left to PIL."""
    fingerprint: str
    """sha256 over names, byte sizes and modification times."""

    def __len__(self) -> int:
        return len(self.names)

    def path(self, i: int) -> Path:
        """Where image ``i`` lies."""
        return self.root / self.names[i]

    def read(self, i: int) -> Image.Image:
        """Image ``i`` as upright 8-bit RGB. Raises BrokenFile naming it."""
        try:
            return read_image(self.path(i))[0]
        except (OSError, ValueError) as error:
            raise BrokenFile(
                f"{self.path(i)}: unreadable now ({error}), but not when the list was made; "
                "restore or remove the file and resume"
            ) from error


class Catalog(NamedTuple):
    """A data set: its lists, and what had to be left out."""

    train: ImageList
    test: ImageList | None
    bad: tuple[BadFile, ...]


class _Split(NamedTuple):
    """What a layout says about one split, before any file was opened."""

    names: list[str]
    labels: list[int] | None
    expected: dict[int, str]
    """Classes that should have images here: label -> name for a message."""


class _Layout(NamedTuple):
    classes: tuple[str, ...]
    train: _Split
    test: _Split | None
    bad: list[BadFile]


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
    workers: int | None = None,
    cache_dir: Path | None = None,
    progress: bool = True,
) -> Catalog:
    """The image lists of the data set ``name`` unpacked at ``root``.

    workers: decoding threads of the first check; None takes the machine's cores.
    cache_dir: where the check of every file is kept, by name, size and modification time; None writes nothing.
    Raises FileNotFoundError for a missing folder or a listed file that is not there, ValueError for a wrong layout, an
    unknown name or a set without any readable training image, LayoutNotSupported for a set this version has no reader
    for.
    """
    if name not in _LAYOUTS:
        raise ValueError(f"data.name={name}: unknown; known are {', '.join(_LAYOUTS)}")
    supported = name in _CUB_LIKE or name == "folder"
    if root is None or not Path(root).is_dir():
        where = "data.root is not set" if root is None else f"data.root={root} is not a folder"
        more = "" if supported else f". The reader of {name} is not part of this version; {_FOLDER_LAYOUT}"
        raise FileNotFoundError(f"{where}; data.name={name} expects there {_LAYOUTS[name]}{more}")
    if not supported:
        raise LayoutNotSupported(
            f"data.name={name}: its reader is not part of this version (the layout will be {_LAYOUTS[name]}). "
            f"Arrange the images as plain folders instead: {_FOLDER_LAYOUT}"
        )
    root = Path(root)
    if name in _CUB_LIKE:
        if not (root / "images.txt").is_file() and (root / "CUB_200_2011" / "images.txt").is_file():
            root = root / "CUB_200_2011"
        layout = _read_cub(root, name)
    else:
        layout = _read_folder(root)
    splits = [split for split in (layout.train, layout.test) if split is not None]
    checks = _check_files(name, root, [n for split in splits for n in split.names], workers, cache_dir, progress)
    bad = list(layout.bad)
    train = _finish(root, layout.classes, layout.train, checks, bad)
    test = None if layout.test is None else _finish(root, layout.classes, layout.test, checks, bad)
    if not len(train):
        listed = len(layout.train.names)
        found = f"{listed} training files, none readable" if listed else "no training files"
        first = f" (first: {bad[0].name}: {bad[0].reason})" if bad else ""
        raise ValueError(f"data.root={root}: {found}{first}; expected {_LAYOUTS[name]}")
    return Catalog(train, test, tuple(bad))


def write_bad_files(catalog: Catalog, path: Path) -> None:
    """One line ``name<TAB>reason`` for each file or class that was left out; an empty file says that all were used."""
    lines = (f"{_printable(name)}\t{_printable(reason)}\n" for name, reason in catalog.bad)
    Path(path).write_text("".join(lines), encoding="utf-8")


def read_image(path: Path) -> tuple[Image.Image, bool]:
    """(upright 8-bit RGB image, plain) of one file, fully decoded; ``plain`` as in ImageList.

    16-bit grey is scaled to 8 bits; alpha is dropped; CMYK and palettes are converted; of an animation the first frame.
    Raises OSError or ValueError saying what is wrong with the file.
    """
    if not os.path.getsize(path):
        raise ValueError("empty file (0 bytes)")
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(_too_large(image.width, image.height))
            raw_mode = image.tile[0].args if image.tile else None
            raw_mode = raw_mode[0] if isinstance(raw_mode, tuple) else raw_mode
            jpeg = image.format in ("JPEG", "MPO")
            image.load()
            turn = _orientation(image)
            upright = ImageOps.exif_transpose(image) if turn != 1 else image
            simple_png = image.format == "PNG" and raw_mode == image.mode and turn == 1
            plain = (jpeg and image.mode in ("RGB", "L")) or (simple_png and image.mode in ("RGB", "L", "RGBA", "LA"))
            return _to_rgb(upright), plain
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error
    except Image.UnidentifiedImageError as error:
        raise ValueError("not an image that PIL can identify") from error
    except (SyntaxError, struct.error, EOFError, IndexError, TypeError, KeyError, MemoryError) as error:
        raise ValueError(f"damaged: {error}") from error  # what PIL's parsers raise on broken headers and chunks


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 0xFFFF:
            raise ValueError("32-bit integer pixels are not supported")
        return Image.fromarray((levels >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels are not supported")
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        turn = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a damaged EXIF block in a readable picture: PIL raises a dozen kinds; decoders ignore it
        return 1
    return turn if turn in range(1, 9) else 1


def _too_large(width: int, height: int) -> str:
    return f"header says {width} x {height} pixels, more than {MAX_PIXELS}"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _check_files(
    name: str, root: Path, names: list[str], workers: int | None, cache_dir: Path | None, progress: bool
) -> dict[str, _Check]:
    """Size and readability of every file; one that the cache knows by byte size and modification time is not opened."""
    cache = None
    known: dict[str, list] = {}
    if cache_dir is not None:
        key = hashlib.sha256(f"{name}\0{root.resolve()}".encode("utf-8", "surrogateescape")).hexdigest()[:16]
        cache = Path(cache_dir) / f"catalog-{name}-{key}.json"
        known = _read_cache(cache)
    checks: dict[str, _Check] = {}
    todo: list[tuple[str, os.stat_result]] = []
    for n in names:
        stat = os.stat(root / n)
        seen = known.get(n)
        if seen is not None and seen[:2] == [stat.st_size, stat.st_mtime_ns]:
            checks[n] = _Check(*seen)
        else:
            todo.append((n, stat))
    if not todo:
        return checks

    def check(item: tuple[str, os.stat_result]) -> tuple[str, _Check]:
        n, stat = item
        try:
            image, plain = read_image(root / n)
        except (OSError, ValueError) as error:
            reason = str(error) or type(error).__name__
            return n, _Check(stat.st_size, stat.st_mtime_ns, 0, 0, False, reason)
        return n, _Check(stat.st_size, stat.st_mtime_ns, image.height, image.width, plain, None)

    from engine.data import cores

    with warnings.catch_warnings(), ThreadPoolExecutor(workers or cores()) as pool:  # PIL decodes without the GIL
        warnings.simplefilter("ignore")  # PIL warns of large images and odd EXIF; what matters becomes a reason
        checks.update(_with_progress(pool.map(check, todo), len(todo), f"checking {name}", progress))
    if cache is not None:
        try:
            _write_cache(cache, {**known, **{n: list(checks[n]) for n, _ in todo}})
        except OSError as error:
            warnings.warn(
                f"the check of {root} could not be kept in {cache} ({error}); it will be repeated", stacklevel=3
            )
    return checks


def _with_progress(items: Iterable, total: int, text: str, show: bool) -> Iterable:
    if not show:
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, text, total, console=Console(stderr=True), transient=True)


def _read_cache(path: Path) -> dict[str, list]:
    """{} for a cache that is missing, damaged or of another version: it only saves time."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        files = content["files"] if content["version"] == _CACHE_VERSION else {}
        return {n: row for n, row in files.items() if len(row) == len(_Check._fields)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write_cache(path: Path, files: dict[str, list]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps({"version": _CACHE_VERSION, "files": files}), encoding="utf-8")
    os.replace(temporary, path)


def _finish(
    root: Path, classes: tuple[str, ...], split: _Split, checks: dict[str, _Check], bad: list[BadFile]
) -> ImageList:
    """Drops unreadable files; what was dropped, and classes left without an image, are added to ``bad``."""
    keep = []
    for i, n in enumerate(split.names):
        reason = checks[n].reason
        if reason is None:
            keep.append(i)
        else:
            bad.append(BadFile(n, reason))
    names = tuple(split.names[i] for i in keep)
    labels = None if split.labels is None else np.array([split.labels[i] for i in keep], np.int64)
    if labels is not None:
        present = set(labels.tolist())
        bad.extend(
            BadFile(text, "empty class: no readable image")
            for label, text in split.expected.items()
            if label not in present
        )
    used = [checks[n] for n in names]
    digest = hashlib.sha256()
    for n, c in zip(names, used, strict=True):
        digest.update(f"{n}\0{c.size}\0{c.mtime}\n".encode("utf-8", "surrogateescape"))
    return ImageList(
        root=root,
        names=names,
        labels=labels,
        classes=classes,
        sizes=np.array([(c.height, c.width) for c in used], np.int32).reshape(-1, 2),
        plain=np.array([c.plain for c in used], bool),
        fingerprint=digest.hexdigest(),
    )


def _read_cub(root: Path, name: str) -> _Layout:
    """CUB-200-2011's own lists; every line is ``<image id> <value>``."""
    lists = {n: root / n for n in ("images.txt", "image_class_labels.txt", "train_test_split.txt")}
    missing = [n for n, path in lists.items() if not path.is_file()]
    missing += [] if (root / "images").is_dir() else ["images/"]
    if missing:
        raise ValueError(f"data.root={root} has no {', '.join(missing)}; data.name={name} expects {_LAYOUTS[name]}")
    images, labels, split = (_read_pairs(path) for path in lists.values())
    for path, column in zip(list(lists.values())[1:], (labels, split), strict=True):
        without = [i for i in images if i not in column]
        if without:
            raise ValueError(f"{path}: no line for image {without[0]} ({images[without[0]]}), which images.txt lists")
    for i, value in split.items():
        if value not in ("0", "1"):
            where = lists["train_test_split.txt"]
            raise ValueError(f"{where}: image {i} has {value!r}; expected 1 (train) or 0 (test)")
    for i, value in labels.items():
        if not value.isdecimal():
            raise ValueError(f"{lists['image_class_labels.txt']}: image {i} has class {value!r}; expected a number")
    absent = [n for n in images.values() if not (root / "images" / _inside(n, lists["images.txt"])).is_file()]
    if absent:
        raise FileNotFoundError(
            f"{lists['images.txt']} names {absent[0]}, which is not in {root / 'images'} "
            f"({len(absent)} of {len(images)} files missing); unpack the archive again"
        )
    named = _read_pairs(root / "classes.txt") if (root / "classes.txt").is_file() else {}
    ids = sorted({int(v) for v in labels.values()} | {int(i) for i in named if i.isdecimal()})
    position = {class_id: p for p, class_id in enumerate(ids)}
    first_folder = {int(labels[i]): PurePosixPath(n).parent.name for i, n in reversed(images.items())}
    classes = tuple(named.get(str(c)) or first_folder.get(c) or str(c) for c in ids)

    def part(flag: str, text: str) -> _Split:
        chosen = [i for i in images if split[i] == flag]
        expected = {p: f"{text}: class {classes[p]}" for p in range(len(classes))}
        return _Split([f"images/{images[i]}" for i in chosen], [position[int(labels[i])] for i in chosen], expected)

    train, test = part("1", "train"), part("0", "test")
    found = {"train": len(train.names), "test": len(test.names)}
    if name == "cub" and found != _CUB_COUNTS:
        warnings.warn(f"{root}: CUB-200-2011 has {_CUB_COUNTS} images, found {found}", stacklevel=3)
    return _Layout(classes, train, test if test.names else None, [])


def _read_pairs(path: Path) -> dict[str, str]:
    """``id value`` lines; the value may hold spaces. Raises ValueError naming file and line."""
    pairs: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="surrogateescape").splitlines(), 1):
        if not line.strip():
            continue
        key, _, value = line.strip().partition(" ")
        if not value:
            raise ValueError(f"{path}:{number}: {line!r} is not '<id> <value>'")
        if key in pairs:
            raise ValueError(f"{path}:{number}: id {key} appears twice")
        pairs[key] = value.strip()
    return pairs


def _inside(name: str, where: Path) -> str:
    """``name`` when it stays below its folder. Raises ValueError for an absolute path or one with ``..``."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{where}: {name!r} leads out of the data folder; only relative paths below it are read")
    return name


def _read_folder(root: Path) -> _Layout:
    """``train/<class>/…`` with an optional ``test`` or ``val``, or images anywhere below ``root`` without labels."""
    bad: list[BadFile] = []
    held_out = next((root / n for n in ("test", "val") if (root / n).is_dir()), None)
    if not (root / "train").is_dir():
        if held_out is not None:
            raise ValueError(f"data.root={root} has {held_out.name}/ but no train/; {_FOLDER_LAYOUT}")
        return _Layout((), _Split(_image_names(root, root, bad), None, {}), None, bad)
    train_classes = _class_folders(root / "train")
    test_classes = [] if held_out is None else _class_folders(held_out)
    if not train_classes:
        train = _Split(_image_names(root / "train", root, bad), None, {})
        if test_classes:
            raise ValueError(
                f"data.root={root}: {held_out.name}/ has class folders but train/ has none; {_FOLDER_LAYOUT}"
            )
        return _Layout((), train, None, bad)
    classes = tuple(sorted({*train_classes, *test_classes}))
    position = {c: p for p, c in enumerate(classes)}

    def part(folder: Path, folders: list[str]) -> _Split:
        names: list[str] = []
        labels: list[int] = []
        for entry in sorted(folder.iterdir()):
            if entry.is_file() and not entry.name.startswith("."):
                bad.append(BadFile(f"{folder.name}/{entry.name}", "lies beside the class folders, so it has no class"))
        for c in folders:
            found = _image_names(folder / c, root, bad)
            names += found
            labels += [position[c]] * len(found)
        return _Split(names, labels, {position[c]: f"{folder.name}/{c}" for c in folders})

    train = part(root / "train", train_classes)
    test = part(held_out, test_classes) if held_out is not None and test_classes else None
    return _Layout(classes, train, test, bad)


def _class_folders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _image_names(folder: Path, root: Path, bad: list[BadFile]) -> list[str]:
    """Sorted posix names, relative to ``root``, of the image files below ``folder``; hidden files are passed over,
    files with another suffix are added to ``bad``. Links to folders are followed, each folder once."""
    names: list[str] = []
    visited: set[tuple[int, int]] = set()
    for here, folders, files in os.walk(folder, followlinks=True):
        stat = os.stat(here)
        if (stat.st_dev, stat.st_ino) in visited:
            folders.clear()
            continue
        visited.add((stat.st_dev, stat.st_ino))
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for file in sorted(files):
            if file.startswith("."):
                continue
            name = (Path(here) / file).relative_to(root).as_posix()
            suffix = os.path.splitext(file)[1].lower()
            if suffix not in _SUFFIXES:
                bad.append(BadFile(name, f"not the name of an image file ({suffix or 'no suffix'})"))
            elif not os.path.isfile(os.path.join(here, file)):
                bad.append(BadFile(name, "not a file (a broken link?)"))
            else:
                names.append(name)
    return sorted(names)
