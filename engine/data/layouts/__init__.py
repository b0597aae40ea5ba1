"""The known layouts of data sets, by name: every module beside this one that has ``LAYOUTS`` adds to them.

Only lists are read here, no picture is opened. What lies below the root is the user's own, so that links in it are followed
wherever they lead; what a list says is not trusted (lists.py).
"""

from __future__ import annotations

import importlib
import shlex
import warnings
from collections.abc import Sequence
from pathlib import Path

from engine.data.layouts import copies, parts
from engine.data.layouts.lists import Known, Layout, Piece


def _known() -> dict[str, Known]:
    modules = sorted((path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "__init__"), reverse=True)
    found: dict[str, Known] = {}
    for name in modules:
        found |= getattr(importlib.import_module(f"{__name__}.{name}"), "LAYOUTS", {})
    return found


KNOWN = _known()
"""Every value of ``data.name``."""
NAMED = tuple(name for name, known in KNOWN.items() if known.named)
"""Those that take ``data.train`` and ``data.test``."""


def read(
    name: str,
    root: str | Path | None,
    *,
    train: str | None = None,
    test: str | None = None,
    classes: Sequence[str] = (),
    fraction: float = 1.0,
    extra_roots: Sequence[str] = (),
    seed: int = 0,
) -> Layout:
    """The lists of the data set ``name`` unpacked at ``root``; ``train`` and ``test`` name its splits where it has no fixed ones.
    ``extra_roots`` add photos; ``classes`` and ``fraction`` (drawn by ``seed``) choose among all: see parts.py.

    Counts other than the official split's are a warning that names both, and so are files that are listed twice.
    Raises FileNotFoundError naming the archive and where to unpack it when a piece is missing, ValueError for an unknown name
    and for a list that cannot be used (naming file and line).
    """
    if name not in KNOWN:
        raise ValueError(f"data.name={name}: unknown; known are {', '.join(KNOWN)}")
    if root is None or not Path(root).is_dir():
        where = "data.root is not set" if root is None else f"data.root={root} is not a folder"
        raise FileNotFoundError(f"{where}; data.name={name} expects there {expected(name)}")
    known = KNOWN[name]
    root = copies.unpacked(Path(root), known)
    missing = [piece for piece in known.pieces if not piece.is_in(root)]
    if not known.named and (train is not None or test is not None):
        raise ValueError(f"data.train, data.test: data.name={name} has a split of its own; they go with {', '.join(NAMED)}")
    layout = None
    if missing and known.counts:
        layout = copies.read(name, root, known)
    if missing and layout is None:
        remedies = dict.fromkeys(_remedy(name, root, piece) for piece in missing)
        raise FileNotFoundError(
            f"data.root={root} has no {', '.join(piece.path for piece in missing)}, which data.name={name} needs: "
            f"{'; '.join(remedies)}{known.hint and f'; {known.hint}'}{copies.instead(root) if known.counts else ''}"
        )
    if layout is None:
        layout = known.read(root, train, test) if known.named else known.read(root)
    splits = [layout.train] if layout.test is None else [layout.train, layout.test]
    names = [n for split in splits for n in split.names]
    if known.counts is not None:
        labels = {label for split in splits for label in split.labels or ()}
        found = (len(layout.train.names), len(names) - len(layout.train.names), len(labels))
        if found != known.counts and not (layout.test is None and found[::2] == known.counts[::2]):
            text = "{} training images, {} test images, {} classes"
            warnings.warn(
                f"{root}: the official split of {known.title} has {text.format(*known.counts)}; found {text.format(*found)}",
                stacklevel=3,
            )
    if len(set(names)) < len(names):
        seen: set[str] = set()
        twice = [n for n in names if n in seen or seen.add(n)]
        warnings.warn(f"{root}: {len(twice)} files are listed twice, the first is {twice[0]}", stacklevel=3)
    if extra_roots:
        layout = parts.join(layout, extra_roots, with_tests=name == "folder")
    return parts.choose(layout, classes, fraction, seed)


def expected(name: str) -> str:
    """What ``data.root`` should hold, in words."""
    if KNOWN[name].expected:
        return KNOWN[name].expected
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
