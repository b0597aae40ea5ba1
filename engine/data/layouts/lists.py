"""What a layout says of a data set before any picture is opened, and how its lists are read.

What a list says is not trusted: it names files by relative paths without ``..``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

UNLABELLED = -1
"""The label of a photo without one, in a split where others have labels."""


class BadFile(NamedTuple):
    """Something of the data set that could not be used."""

    name: str
    """Posix path relative to the root: a file, or the folder or name of a class."""
    reason: str


class Split(NamedTuple):
    """What a layout says about one split."""

    names: list[str]
    """Posix paths relative to the root."""
    labels: list[int] | None
    """Positions in the layout's ``classes``, ``UNLABELLED`` for an image without label; None where no image has one."""
    expected: dict[int, str]
    """Classes that should have images here: label -> name for a message."""
    source: str = ""
    """Where it was read from, for a message; empty where the lists of an official set say it."""


class Layout(NamedTuple):
    """What a layout says about a data set."""

    root: Path
    classes: tuple[str, ...]
    train: Split
    test: Split | None
    bad: list[BadFile]
    notes: tuple[str, ...] = ()
    """What somebody should know of how it was read: a sentence each."""


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
    read: Callable[..., Layout]
    pieces: tuple[Piece, ...] = ()
    makes: str = ""
    """The folder that the archive itself makes; the root is this folder or the one it lies in."""
    counts: tuple[int, int, int] | None = None
    """Training images, test images and classes of the official split."""
    hint: str = ""
    """What else helps where a piece is missing."""
    expected: str = ""
    """What the root should hold, in words; empty for what ``pieces`` says."""
    named: bool = False
    """Whether ``read`` takes ``train`` and ``test``, the values of ``data.train`` and ``data.test``."""


def subfolders(folder: Path) -> list[str]:
    """Sorted names of the folders in ``folder``, without hidden ones and what macOS adds to an archive. Raises OSError."""
    return sorted(n for n in os.listdir(folder) if not n.startswith(".") and n != "__MACOSX" and os.path.isdir(folder / n))


def below(root: Path, levels: int = 2) -> Iterator[Path]:
    """``root`` and the folders up to ``levels`` below it, the upper ones first; one that cannot be listed has none."""
    here = [root]
    for level in range(levels + 1):
        yield from here
        if level < levels:
            here = [folder / name for folder in here for name in _listed(folder)]


def _listed(folder: Path) -> list[str]:
    try:
        return subfolders(folder)
    except OSError:
        return []


def walk(
    folder: Path, above: Iterable[Path] = (), unreadable: Callable[[OSError], object] | None = None
) -> Iterator[tuple[str, list[str], list[str]]]:
    """``os.walk`` without hidden files and folders, sorted. Links are followed, but into each folder once and never back into one
    of ``above``: circles end."""

    def identity(path: str | Path) -> tuple[int, int]:
        stat = os.stat(path)
        return stat.st_dev, stat.st_ino

    visited = {identity(path) for path in above}
    for here, folders, files in os.walk(folder, followlinks=True, onerror=unreadable):
        if identity(here) in visited:
            folders.clear()
            continue
        visited.add(identity(here))
        if "metrics.jsonl" in files:  # a run folder, whose pictures are no photos of the set
            folders.clear()
            continue
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        yield here, folders, sorted(f for f in files if not f.startswith("."))


def pieces_of(archive: str, *paths: str) -> tuple[Piece, ...]:
    """The pieces that one archive holds."""
    return tuple(Piece(path, archive) for path in paths)


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines that hold something. Only a line feed ends one: a file name may hold other separators."""
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    for number, line in enumerate(text.split("\n"), 1):
        if line := line.strip(" \t\r"):
            yield number, line


def pairs(path: Path, *, dashes: bool = True) -> dict[str, str]:
    """``<id> <value>`` lines; the value may hold spaces. dashes: they tell ids apart. Raises ValueError naming file and line."""
    found: dict[str, str] = {}
    for number, line in lines(path):
        key, _, value = line.partition(" ")
        if not value:
            raise ValueError(f"{path}:{number}: {line!r} is not '<id> <value>'")
        key = key if dashes else key.replace("-", "")
        if key in found:
            raise ValueError(f"{path}:{number}: id {key} appears twice")
        found[key] = value.strip(" \t")
    return found


def inside(folder: str, name: str, where: Path) -> str:
    """``folder/name``. Raises ValueError, naming the list ``where``, for a name that leads out of its folder or that no file can
    have."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{where}: {name!r} leads out of the data folder; only relative paths below it are read")
    try:
        possible = bool(path.name) and b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise ValueError(f"{where}: {name!r} is not the name of a file")
    return f"{folder}/{path}"


def texts(values: list, path: Path, what: str) -> list[str]:
    """``values`` if all are strings. Raises ValueError naming the first entry that is none."""
    for entry, text in enumerate(values, 1):
        if not isinstance(text, str):
            raise ValueError(f"{path}: entry {entry} of {what} is {text!r}; expected text")
    return list(values)


def numbers(values: list, path: Path, what: str, known: Collection[int]) -> list[int]:
    """``values`` if all are whole numbers in ``known``. Raises ValueError naming the first entry that is none."""
    for entry, number in enumerate(values, 1):
        if not isinstance(number, int | float) or number not in known:
            raise ValueError(f"{path}: entry {entry} of {what} is {number!r}; expected a whole number in 1..{len(known)}")
    return [int(number) for number in values]
