"""Official sets in other forms than their archives': unpacked flat or twice, by class folders, by tables (Kaggle's copies).

Read where the facts suffice. The official split is never guessed: other counts are a warning, as for every official set.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from engine.console import printable
from engine.data.layouts import folders, lists, matlab, official, tables
from engine.data.layouts.guess import SPLITS, guess, holds_photos, resembles, setting, split_of
from engine.data.layouts.lists import Known, Layout, below, inside

_LEVELS = 2


def unpacked(root: Path, known: Known) -> Path:
    """``root``, or the one folder up to two levels below it that holds every piece of ``known``; where none does, the folder that
    the archive makes, if it is there. Raises ValueError where several hold all."""
    if not known.pieces:
        return root
    made = root / known.makes if known.makes else root
    found = [f for f in below(root, _LEVELS) if all(piece.is_in(f) for piece in known.pieces)]
    if root in found or made in found:
        return root if root in found else made
    if len(found) > 1:
        shown = "; or ".join(setting("data.root", str(f)) for f in found)
        raise ValueError(f"data.root={printable(str(root))}: {len(found)} folders hold {known.title}. Say which: {shown}")
    if found:
        return found[0]
    return made if made.is_dir() and not known.pieces[0].is_in(root) else root


def read(name: str, root: Path, known: Known) -> Layout | None:
    """The set ``name`` from what is at ``root``, or None where that does not say which photo is of which class and split."""
    for reader in (_OWN.get(name), _by_folders, _by_tables):
        layout = reader(root, known) if reader else None
        if layout is not None:
            return layout
    return None


def instead(root: Path) -> str:
    """What can be done with photos that no list divides, as the end of an error; empty where there are none."""
    try:
        found = guess(root)
    except ValueError:
        return ""
    if found.labels:
        return f"; data.name=folder reads the class folders in {printable(str(found.train or found.test))}/"
    if found.classes is None:
        return "; its photos can be trained on without labels: data.name=folder" if holds_photos(root) else ""
    return (
        "; without the lists nobody can say which photos are the official test set, but all can be trained on, in their class "
        f"folders and without a test split: data.name=folder {setting('data.train', found.classes)}"
    )


def _cars(root: Path, known: Known) -> Layout | None:
    meta, train = _file(root, "cars_meta.mat"), _file(root, "cars_train_annos.mat")
    test = _file(root, official.CARS_TEST, "cars_test_annos_withlabels (1).mat")
    train_folder, test_folder = _folder(root, "cars_train"), _folder(root, "cars_test")
    if meta and train and train_folder:
        if test and test_folder:
            return official.cars_from(root, meta, (train, train_folder), (test, test_folder))
        missing = official.CARS_TEST if test is None else "cars_test/"
        notes = (f"no test split, as {missing} is not there: only evaluation needs it",)
        return official.cars_from(root, meta, (train, train_folder), None)._replace(notes=notes)
    whole_set, pictures = _file(root, "cars_annos.mat"), _folder(root, "car_ims")
    return _car_ims(root, whole_set, pictures) if whole_set and pictures else None


def _car_ims(root: Path, path: Path, folder: str) -> Layout:
    """cars_annos.mat, which numbers the images of both splits in one folder: ``relative_im_path``, ``class``, ``test`` (0 or 1)."""
    (content,) = matlab.read({path: ("annotations", "class_names")})
    classes = dict(enumerate(lists.texts(content["class_names"], path, "class_names"), 1))
    fields = content["annotations"]
    for field in ("relative_im_path", "class", "test"):
        if field not in fields:
            raise ValueError(f"{path}: annotations has no field {field}; unpack it again")
    names = lists.texts(fields["relative_im_path"], path, "relative_im_path")
    labels = lists.numbers(fields["class"], path, "class", classes)
    rows: dict[bool, official.Rows] = {False: [], True: []}
    for name, label, test in zip(names, labels, fields["test"], strict=True):
        rows[bool(test)].append((inside(folder, name.rpartition("/")[2], path), label))
    return official.layout_of(root, rows[False], rows[True], classes)


def _dogs(root: Path, known: Known) -> Layout | None:
    train, test, pictures = _file(root, "train_list.mat"), _file(root, "test_list.mat"), _folder(root, "images")
    return official.dogs_from(root, [train, test], pictures) if train and test and pictures else None


def _flowers(root: Path, known: Known) -> Layout | None:
    labels, split, pictures = _file(root, "imagelabels.mat"), _file(root, "setid.mat"), _folder(root, "jpg")
    if labels and split and pictures:
        return official.flowers_from(root, labels, split, pictures)
    layout = _by_folders(root, known)
    if layout is None or not all(c.isdecimal() and 1 <= int(c) <= 102 for c in layout.classes):
        return layout
    names, order = official.flower_names(), sorted(range(len(layout.classes)), key=lambda i: int(layout.classes[i]))
    position = {old: new for new, old in enumerate(order)}

    def renamed(split: lists.Split) -> lists.Split:
        labels = None if split.labels is None else [position[label] for label in split.labels]
        return split._replace(labels=labels, expected={position[label]: text for label, text in split.expected.items()})

    return layout._replace(
        classes=tuple(names[int(layout.classes[old]) - 1] for old in order),
        train=renamed(layout.train),
        test=None if layout.test is None else renamed(layout.test),
    )


def _aircraft(root: Path, known: Known) -> Layout | None:
    pieces = [piece.path.removeprefix("data/") for piece in known.pieces]
    return official.aircraft_from(root, "") if all((root / piece).exists() for piece in pieces) else None


_OWN: dict[str, Callable[[Path, Known], Layout | None]] = {
    "cars": _cars, "dogs": _dogs, "flowers": _flowers, "aircraft": _aircraft
}  # fmt: skip


def _by_folders(root: Path, known: Known) -> Layout | None:
    """Class folders in folders of splits."""
    try:
        layout = folders.read(root)
    except ValueError:
        return None
    if layout.train.labels is None or known.counts is None or len(layout.classes) != known.counts[2]:
        return None  # somebody's photos, but not this set
    return layout._replace(notes=(f"{known.title} is read by its class folders, its lists are not there", *layout.notes))


def _by_tables(root: Path, known: Known) -> Layout | None:
    """train.csv and test.csv (val.csv too, which is trained on where the official training set is train + val)."""
    found: dict[str, list[Path]] = {"train": [], "val": [], "test": []}
    for path in sorted(p for folder in below(root, _LEVELS) for p in folder.glob("*.csv")):
        if split := _split_of_table(path.stem):
            found[split].append(path)
    if len(found["train"]) != 1 or len(found["test"]) > 1:
        return None
    try:
        rows = {split: tables.rows(paths[0]) for split, paths in found.items() if len(paths) == 1}
    except ValueError:  # a table of something else
        return None
    if known.counts is None or len({row.label for part in rows.values() for row in part} - {None}) != known.counts[2]:
        return None
    read = {split: _located(root, found[split][0], split, part) for split, part in rows.items()}
    train, val, test = read["train"], read.get("val"), read.get("test")
    notes = [f"{known.title} is read from {' and '.join(p.name for paths in found.values() for p in paths)}"]
    if val and len(train) + len(val) == known.counts[0]:
        train = train + val
    elif val:
        notes.append(f"{found['val'][0].name} is not used{': test is the test split' if test else ''}")
    if test is not None and any(label is None for _, label in test):
        notes.append(f"{found['test'][0].name} has no labels: no test split")
        test = None
    return tables.layout(root, train, test, notes)


def _split_of_table(stem: str) -> str | None:
    ends = (split for split, aliases in SPLITS.items() if stem.lower().endswith(aliases))
    return split_of(stem) or resembles(stem) or next(ends, None)


def _located(root: Path, path: Path, split: str, listed: list[tables.Row]) -> list[tuple[str, str | None]]:
    """(posix path below ``root``, label) of every row. Names are relative to one folder up to three levels down: that in which the
    first file lies, for several the one called after the split. Raises ValueError where that does not tell."""
    places = [f for f in below(root, _LEVELS + 1) if listed and (f / listed[0].name).is_file()]
    places = [f for f in places if resembles(f.name) == split] or places
    if len(places) != 1:
        where = " and ".join(printable(str(f)) for f in places) or f"no folder below {printable(str(root))}"
        first = printable(listed[0].name) if listed else "any file"
        raise ValueError(f"{path}: {first} lies in {where}; data.name=list data.train={path.name} reads a list with whole paths")
    folder = places[0].relative_to(root).as_posix()
    return [(inside(folder, row.name, path).removeprefix("./"), row.label) for row in listed]


def _file(root: Path, *names: str) -> Path | None:
    """The first file of one of these names, the upper ones first."""
    return next((f / n for f in below(root, _LEVELS) for n in names if (f / n).is_file()), None)


def _folder(root: Path, name: str) -> str | None:
    """The posix path of a folder of that name in any case, or of the folder of the same name inside it that holds the photos."""
    found = next((f for f in below(root, _LEVELS) if f != root and f.name.lower() == name.lower()), None)
    if found is None:
        return None
    for inner in _same_name(found, name):
        found = inner
    return found.relative_to(root).as_posix()


def _same_name(folder: Path, name: str) -> Sequence[Path]:
    inner = [Path(e.path) for e in os.scandir(folder) if e.name.lower() == name.lower() and e.is_dir()]
    return inner[:1]
