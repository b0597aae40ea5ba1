"""Lists of files and labels as CSV or Parquet: data.name=list, and the splits of sets that come as tables.

A first row names the columns; without one there are a path and, at most, a label. What a list says is not trusted: names stay
below the root.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import NamedTuple

from engine.console import printable
from engine.data.layouts.guess import SUFFIXES, setting, split_of
from engine.data.layouts.lists import UNLABELLED, Known, Layout, Split, inside

_FILE = (
    "path", "filepath", "file_path", "filepaths", "relative_path", "relative_im_path", "image_path", "img_path", "file", "filename",
    "file_name", "fname", "image", "images", "img", "image_name", "name", "image_id", "id",
)  # fmt: skip
_LABEL = (
    "label", "labels", "class", "classes", "class_name", "classname", "category", "species", "breed", "variant", "target",
    "class_id", "class id", "label_id",
)  # fmt: skip
_PART = ("split", "set", "subset", "partition", "data set", "data_set", "dataset")
EXPECTED = (
    "lists of photos: data.train=train.csv data.test=test.csv, each with a row path,label and then one row a photo; paths are "
    "relative to data.root or to the list"
)


class Row(NamedTuple):
    """A photo of a list."""

    line: int
    name: str
    label: str | None
    part: str | None
    """What stands in the column of splits, if there is one."""


def rows(path: Path) -> list[Row]:
    """The photos of a CSV (commas, semicolons or tabs) or Parquet file. Of several columns of labels that with words is taken; a
    row may have no label.

    Raises ValueError naming file and line, ImportError for Parquet without pyarrow.
    """
    cells = _parquet(path) if _is_parquet(path) else _csv(path)
    if not cells:
        raise ValueError(f"{path}: lists nothing; expected a row path,label and then one row a photo")
    (_, header), *body = cells
    names = [cell.lower() for cell in header]
    file_at = next((names.index(n) for n in _FILE if n in names), None)
    labels_at = [names.index(n) for n in _LABEL if n in names]
    part_at = next((names.index(n) for n in _PART if n in names), None)
    if file_at is None:
        if os.path.splitext(header[0])[1].lower() not in SUFFIXES or len(header) > 2:
            shown = printable(",".join(header)[:80])
            raise ValueError(f"{path}: its first row, {shown}, names no column with the files; call the columns path and label")
        file_at, labels_at, part_at, body = 0, list(range(1, len(header))), None, cells
    for line, row in body:
        if len(row) != len(header):
            raise ValueError(f"{path}:{line}: {len(row)} columns; the first row has {len(header)}")
    label_at = next((at for at in labels_at if not all(row[at].isdecimal() for _, row in body)), next(iter(labels_at), None))
    found = []
    for line, row in body:
        if not row[file_at]:
            raise ValueError(f"{path}:{line}: no file")
        label = None if label_at is None else row[label_at] or None
        found.append(Row(line, row[file_at], label, None if part_at is None else row[part_at]))
    return found


def _csv(path: Path) -> list[tuple[int, list[str]]]:
    """(line, cells) of the rows that hold something."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=max(",;\t", key=first.count), strict=True)
            return [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(cell.strip() for cell in row)]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as CSV UTF-8") from error
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: not CSV ({error})") from error


def _is_parquet(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


def _parquet(path: Path) -> list[tuple[int, list[str]]]:
    """The same of a Parquet file, of the columns that may be of use alone: features can be large. A row counts as a line."""
    try:
        import pyarrow  # only lists of this format need it
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"{path} is a Parquet file, which needs pyarrow: pip install pyarrow; or save it as CSV") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = [name for name in file.schema_arrow.names if name.lower() in {*_FILE, *_LABEL, *_PART}]
            if not names:
                shown = printable(",".join(file.schema_arrow.names)[:80])
                raise ValueError(f"{path}: its columns, {shown}, name none with the files; call the columns path and label")
            columns = file.read(columns=names).to_pydict()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a Parquet file that can be read ({printable(str(error))[:200]})") from error
    texts = [["" if value is None else str(value).strip() for value in columns[name]] for name in names]
    return [(1, names), *((line, list(row)) for line, row in enumerate(zip(*texts, strict=True), 1))]


def layout(root: Path, train: list[tuple[str, str | None]], test: list[tuple[str, str | None]] | None, notes: list[str]) -> Layout:
    """A layout of (posix path below ``root``, label) rows. Classes are in the order of their names, or of their numbers where all
    are numbers."""
    known = {label for _, label in train + (test or []) if label is not None}
    classes = sorted(known, key=int) if all(label.isdecimal() for label in known) else sorted(known)
    position = {label: p for p, label in enumerate(classes)}

    def split(listed: list[tuple[str, str | None]]) -> Split:
        labels = [UNLABELLED if label is None else position[label] for _, label in listed]
        return Split([name for name, _ in listed], labels if any(label != UNLABELLED for label in labels) else None, {})

    return Layout(root, tuple(classes), split(train), None if test is None else split(test), [], tuple(notes))


def read(root: Path, train: str | None = None, test: str | None = None) -> Layout:
    """The lists ``train`` and ``test``: paths of CSV files, relative to ``root`` or as they are. One list with a column ``split``
    may hold both. Raises FileNotFoundError for a list that is not there, ValueError naming file and line."""
    if train is None and test is None:
        there = sorted(p.name for p in root.glob("*.csv"))
        raise ValueError(f"data.train: not set; data.name=list expects {EXPECTED}; data.root has {', '.join(there) or 'no *.csv'}")
    notes: list[str] = []
    training = [] if train is None else _listed(root, train, "train")
    held_out = None if test is None else _listed(root, test, "test")
    if held_out is None and any(row.part for row, _ in training):
        training, held_out = _parts(_path(root, str(train), "train"), training, notes)
    bare = next((row for row, _ in held_out or [] if row.label is None), None)
    if bare is not None:
        name = printable(test or train or "")
        what = "no column of labels" if all(row.label is None for row, _ in held_out or []) else f"no label in row {bare.line}"
        raise ValueError(f"data.test={name}: has {what}, and without nothing can be evaluated")
    pairs = [[(name, row.label) for row, name in part] for part in (training, held_out or [])]
    made = layout(root, pairs[0], None if held_out is None else pairs[1], notes)
    return made._replace(
        train=made.train._replace(source=train or ""),
        test=None if made.test is None else made.test._replace(source=test or train or ""),
    )


def _path(root: Path, name: str, key: str) -> Path:
    for path in (root / name, Path(name)):
        if path.is_file():
            return path
    raise FileNotFoundError(f"data.{key}={printable(name)}: no such list in data.root={root} or here; it expects {EXPECTED}")


def _listed(root: Path, name: str, key: str) -> list[tuple[Row, str]]:
    """Rows with the posix path of each below ``root``."""
    path = _path(root, name, key)
    listed = rows(path)
    beside = path.resolve().parent
    folder = ""
    if listed and not (root / listed[0].name).exists() and (beside / listed[0].name).exists():
        if not beside.is_relative_to(root.resolve()):
            raise ValueError(f"{path}: its files lie in {beside}, not below data.root={root}; {setting('data.root', str(beside))}")
        folder = beside.relative_to(root.resolve()).as_posix()
    return [(row, _below(root, folder, row, path)) for row in listed]


def _below(root: Path, folder: str, row: Row, path: Path) -> str:
    name = row.name
    if os.path.isabs(name):
        for base in (root.absolute(), root.resolve()):
            if Path(name).is_relative_to(base):
                name = Path(name).relative_to(base).as_posix()
                break
    try:
        return inside(folder, name, path).removeprefix("/").removeprefix("./")
    except ValueError as error:
        raise ValueError(f"{error} (line {row.line}); data.root={root} must hold every file of the list") from None


def _parts(
    path: Path, listed: list[tuple[Row, str]], notes: list[str]
) -> tuple[list[tuple[Row, str]], list[tuple[Row, str]] | None]:
    found: dict[str, list[tuple[Row, str]]] = {"train": [], "test": [], "val": []}
    for row, name in listed:
        split = split_of(row.part or "")
        if split is None:
            raise ValueError(f"{path}:{row.line}: split {printable(row.part or '')!r}; expected train, test or val")
        found[split].append((row, name))
    if found["test"] and found["val"]:
        notes.append(
            f"{len(found['val']):,} photos of the split val in {printable(path.name)} are not used: test is the test split"
        )
    return found["train"], found["test"] or found["val"] or None


LAYOUTS = {"list": Known("a list", read, named=True, expected=EXPECTED)}
