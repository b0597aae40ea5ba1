"""The known data sets: what their folders hold, which archive it comes from, and the counts of the official split.

Only lists are read here, no picture is opened. What lies below the root is the user's own, so that links in it are followed
wherever they lead; what a list says is not trusted (lists.py).
"""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from engine.data.layouts import folders, official
from engine.data.layouts.lists import Layout


class Piece(NamedTuple):
    """A file or folder of a data set."""

    path: str
    """Relative to the root; a folder ends with a slash."""
    archive: str = ""
    """What it is unpacked from; empty for a file that is downloaded as it is."""
    instead: str = ""
    """Another place where it may lie."""

    def is_in(self, root: Path) -> bool:
        return (root / self.path).exists() or bool(self.instead) and (root / self.instead).exists()

    def holds(self, file: str) -> bool:
        """Whether this is the folder of a listed file."""
        return any(folder.endswith("/") and file.startswith(folder) for folder in (self.path, self.instead))


class Known(NamedTuple):
    """What is known of a data set before it is read."""

    title: str
    read: Callable[[Path], Layout]
    pieces: tuple[Piece, ...] = ()
    makes: str = ""
    """The folder that the archive itself makes; the root is this folder or the one it lies in."""
    counts: tuple[int, int, int] | None = None
    """Training images, test images and classes of the official split."""


def read(name: str, root: str | Path | None) -> Layout:
    """The lists of the data set ``name`` unpacked at ``root``.

    Counts other than the official split's are a warning that names both, and so are files that are listed twice.
    Raises FileNotFoundError naming the archive and where to unpack it when a piece is missing, ValueError for an unknown name
    and for a list that cannot be used (naming file and line).
    """
    if name not in KNOWN:
        raise ValueError(f"data.name={name}: unknown; known are {', '.join(KNOWN)}")
    if root is None or not Path(root).is_dir():
        where = "data.root is not set" if root is None else f"data.root={root} is not a folder"
        raise FileNotFoundError(f"{where}; data.name={name} expects there {expected(name)}")
    known, root = KNOWN[name], Path(root)
    if known.makes and (root / known.makes).is_dir() and not known.pieces[0].is_in(root):
        root = root / known.makes
    missing = [piece for piece in known.pieces if not piece.is_in(root)]
    if missing:
        remedies = dict.fromkeys(_remedy(name, root, piece) for piece in missing)
        raise FileNotFoundError(
            f"data.root={root} has no {', '.join(piece.path for piece in missing)}, which data.name={name} needs: "
            f"{'; '.join(remedies)}"
        )
    layout = known.read(root)
    splits = [layout.train] if layout.test is None else [layout.train, layout.test]
    names = [n for split in splits for n in split.names]
    if known.counts is not None:
        labels = {label for split in splits for label in split.labels}
        found = (len(layout.train.names), len(names) - len(layout.train.names), len(labels))
        if found != known.counts:
            text = "{} training images, {} test images, {} classes"
            warnings.warn(
                f"{root}: the official split of {known.title} has {text.format(*known.counts)}; found {text.format(*found)}",
                stacklevel=3,
            )
    if len(set(names)) < len(names):
        seen: set[str] = set()
        twice = [n for n in names if n in seen or seen.add(n)]
        warnings.warn(f"{root}: {len(twice)} files are listed twice, the first is {twice[0]}", stacklevel=3)
    return layout


def expected(name: str) -> str:
    """What ``data.root`` should hold, in words."""
    if name == "folder":
        return folders.EXPECTED
    if name == "birds":
        return "the synthetic dataset (CUB-200-2011's layout), which is drawn where the folder is missing"
    by_archive: dict[str, list[str]] = {}
    for piece in KNOWN[name].pieces:
        by_archive.setdefault(piece.archive, []).append(piece.path)
    sources = (f"{', '.join(paths)} ({archive or 'downloads of their own'})" for archive, paths in by_archive.items())
    return f"{KNOWN[name].title}: {'; '.join(sources)}"


def remedy(name: str, root: Path, file: str) -> str:
    """What to do about a listed ``file`` that is not there."""
    for piece in KNOWN[name].pieces:
        if piece.holds(file):
            return _remedy(name, root, piece)
    return "restore it and start again"


def _remedy(name: str, root: Path, piece: Piece) -> str:
    if name == "birds":
        return f"remove {root} and the synthetic dataset is drawn again"
    if not piece.archive:
        return f"download {piece.path} into {root}"
    where = root.parent if root.name == KNOWN[name].makes else root
    return f"unpack {piece.archive}: tar -xf {piece.archive} -C {shlex.quote(str(where))}"


def _from(archive: str, *paths: str) -> tuple[Piece, ...]:
    return tuple(Piece(path, archive) for path in paths)


_CUB_FILES = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "images/")
KNOWN: dict[str, Known] = {
    "birds": Known("the synthetic dataset", official.cub, _from("", *_CUB_FILES)),
    "cub": Known("CUB-200-2011", official.cub, _from("CUB_200_2011.tgz", *_CUB_FILES), "CUB_200_2011", (5994, 5794, 200)),
    "cars": Known(
        "Stanford Cars",
        official.cars,
        (
            *_from("car_devkit.tgz", "devkit/cars_meta.mat", "devkit/cars_train_annos.mat"),
            Piece(official.CARS_TEST, instead=f"devkit/{official.CARS_TEST}"),
            Piece("cars_train/", "cars_train.tgz"),
            Piece("cars_test/", "cars_test.tgz"),
        ),
        counts=(8144, 8041, 196),
    ),
    "aircraft": Known(
        "FGVC-Aircraft",
        official.aircraft,
        _from(
            "fgvc-aircraft-2013b.tar.gz",
            "data/variants.txt",
            "data/images_variant_trainval.txt",
            "data/images_variant_test.txt",
            "data/images/",
        ),
        makes="fgvc-aircraft-2013b",
        counts=(6667, 3333, 100),
    ),
    "nabirds": Known(
        "NABirds", official.nabirds, _from("nabirds.tar.gz", *_CUB_FILES, "classes.txt"), "nabirds", (23929, 24633, 555)
    ),
    "flowers": Known(
        "Flowers102",
        official.flowers,
        (Piece("imagelabels.mat"), Piece("setid.mat"), Piece("jpg/", "102flowers.tgz")),
        counts=(1020, 6149, 102),
    ),
    "butterfly": Known(
        "Butterfly200",
        official.butterfly,
        (
            *_from("", *(f"Butterfly200_{split}_release.txt" for split in ("train", "val", "test"))),
            Piece("images/", "the archive of the images", instead="images_small/"),
        ),
        counts=(10270, 15009, 200),
    ),
    "dogs": Known(
        "Stanford Dogs",
        official.dogs,
        (*_from("lists.tar", "train_list.mat", "test_list.mat"), Piece("Images/", "images.tar")),
        counts=(12000, 8580, 120),
    ),
    "folder": Known("a folder", folders.read),
}
"""Every value of ``data.name``."""
