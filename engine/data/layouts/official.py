"""The lists of the seven official data sets, each as its archives hold them.

torchvision reads three of them too, but only through private attributes, in fixed folder names, and without a word on what is
missing; what it does offer, the names of the flowers, is taken from there.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from engine.data.layouts import lists, matlab
from engine.data.layouts.lists import Known, Layout, Piece, Split, inside, pieces_of

AIRCRAFT_BANNER = 20
"""Rows at the bottom of every image of FGVC-Aircraft that name its photographer (the set's own README)."""
CARS_TEST = "cars_test_annos_withlabels.mat"

Rows = list[tuple[str, int]]
"""(posix path relative to the root, class id) of one split."""


def cub(root: Path) -> Layout:
    """CUB-200-2011: every line of every list is ``<image id> <value>``; classes.txt is optional and counts in full."""
    return _birds(root, every_class=True)


def nabirds(root: Path) -> Layout:
    """NABirds: CUB's lists with UUIDs for ids, with dashes or without. classes.txt holds the taxonomy's inner nodes too, so that
    only classes with images count."""
    return _birds(root, every_class=False)


def _birds(root: Path, *, every_class: bool) -> Layout:
    paths = [root / n for n in ("images.txt", "image_class_labels.txt", "train_test_split.txt")]
    images, labels, split = (lists.pairs(path, dashes=every_class) for path in paths)
    for path, column in zip(paths[1:], (labels, split), strict=True):
        without = next((i for i in images if i not in column), None)
        if without is not None:
            raise ValueError(f"{path}: no line for image {without} ({images[without]}), which images.txt lists")
    for i, value in split.items():
        if value not in ("0", "1"):
            raise ValueError(f"{paths[2]}: image {i} has {value!r}; expected 1 (train) or 0 (test)")
    for i, value in labels.items():
        if not value.isdecimal():
            raise ValueError(f"{paths[1]}: image {i} has class {value!r}; expected a number")
    named = lists.pairs(root / "classes.txt") if (root / "classes.txt").is_file() else {}
    ids = {int(labels[i]) for i in images} | ({int(i) for i in named if i.isdecimal()} if every_class else set())
    folder = {int(labels[i]): PurePosixPath(n).parent.name for i, n in reversed(images.items())}
    rows: dict[str, Rows] = {"0": [], "1": []}
    for i, n in images.items():
        rows[split[i]].append((inside("images", n, paths[0]), int(labels[i])))
    return layout_of(root, rows["1"], rows["0"], {c: named.get(str(c)) or folder.get(c) or str(c) for c in ids})


def cars(root: Path) -> Layout:
    """Stanford Cars. The test set's labels came later than the devkit, as a file of their own: beside it or in it."""
    test = root / CARS_TEST if (root / CARS_TEST).exists() else root / "devkit" / CARS_TEST
    train = root / "devkit/cars_train_annos.mat"
    return cars_from(root, root / "devkit/cars_meta.mat", (train, "cars_train"), (test, "cars_test"))


def cars_from(root: Path, meta: Path, train: tuple[Path, str], test: tuple[Path, str] | None) -> Layout:
    """train, test: a list, and its folder below ``root``. A list is a struct array ``annotations`` of ``fname`` and ``class`` (from
    1)."""
    lists_of = [train] if test is None else [train, test]
    content = matlab.read({meta: ("class_names",), **{path: ("annotations",) for path, _ in lists_of}})
    classes = dict(enumerate(lists.texts(content[0]["class_names"], meta, "class_names"), 1))

    def rows(path: Path, annotations: list | dict[str, list], folder: str) -> Rows:
        for field in ("fname", "class"):
            if field not in annotations:
                raise ValueError(f"{path}: annotations has no field {field}; unpack it again")
        files = lists.texts(annotations["fname"], path, "fname")
        labels = lists.numbers(annotations["class"], path, "class", classes)
        return [(inside(folder, n, path), label) for n, label in zip(files, labels, strict=True)]

    parts = [rows(path, read["annotations"], folder) for (path, folder), read in zip(lists_of, content[1:], strict=True)]
    return layout_of(root, parts[0], parts[1] if test else [], classes)


def aircraft(root: Path) -> Layout:
    """FGVC-Aircraft as its archive holds it."""
    return aircraft_from(root, "data/")


def aircraft_from(root: Path, data: str) -> Layout:
    """``<image id> <variant>`` a line, variants in the order of variants.txt; training is train + val. data: their folder, with a
    slash, or empty."""
    classes = dict(enumerate(text for _, text in lists.lines(root / f"{data}variants.txt")))
    ids = {text: i for i, text in classes.items()}

    def rows(split: str) -> Rows:
        path = root / f"{data}images_variant_{split}.txt"
        variants = lists.pairs(path)
        for i, variant in variants.items():
            if variant not in ids:
                raise ValueError(f"{path}: image {i} has variant {variant!r}, which variants.txt does not list")
        return [(inside(f"{data}images", f"{i}.jpg", path), ids[variant]) for i, variant in variants.items()]

    return layout_of(root, rows("trainval"), rows("test"), classes)


def flowers(root: Path) -> Layout:
    """Flowers102 as it is downloaded."""
    return flowers_from(root, root / "imagelabels.mat", root / "setid.mat", "jpg")


def flowers_from(root: Path, label_file: Path, split_file: Path, folder: str) -> Layout:
    """``labels`` (from 1) of image_00001.jpg and on; ``trnid`` trains, ``tstid`` tests, ``valid`` is unused."""
    classes = dict(enumerate(flower_names(), 1))
    content = matlab.read({label_file: ("labels",), split_file: ("trnid", "tstid")})
    labels = lists.numbers(content[0]["labels"], label_file, "labels", classes)

    def rows(what: str) -> Rows:
        ids = lists.numbers(content[1][what], split_file, what, range(1, len(labels) + 1))
        return [(f"{folder}/image_{i:05d}.jpg", labels[i - 1]) for i in ids]

    return layout_of(root, rows("trnid"), rows("tstid"), classes)


def flower_names() -> list[str]:
    """Of the classes 1 to 102."""
    from torchvision.datasets import Flowers102

    return list(Flowers102.classes)


def butterfly(root: Path) -> Layout:
    """Butterfly200: ``<path> <species> <genus> <subfamily> <family>`` a line, numbers from 1; training is train + val. A species
    is named as its folder is."""
    pictures = "images" if (root / "images").exists() else "images_small"
    classes: dict[int, str] = {}

    def rows(split: str) -> Rows:
        path = root / f"Butterfly200_{split}_release.txt"
        found: Rows = []
        for number, line in lists.lines(path):
            name, *levels = line.rsplit(" ", 4)
            if len(levels) != 4 or not all(level.isdecimal() for level in levels):
                raise ValueError(f"{path}:{number}: {line!r} is not '<path> <species> <genus> <subfamily> <family>'")
            species = int(levels[0])
            classes.setdefault(species, PurePosixPath(name).parent.name or str(species))
            found.append((inside(pictures, name, path), species))
        return found

    return layout_of(root, rows("train") + rows("val"), rows("test"), classes)


def dogs(root: Path) -> Layout:
    """Stanford Dogs as its archives hold it."""
    return dogs_from(root, [root / "train_list.mat", root / "test_list.mat"], "Images")


def dogs_from(root: Path, paths: list[Path], pictures: str) -> Layout:
    """Cells ``file_list`` of paths below ``pictures``, and ``labels`` (from 1). A breed is named as its folder is, without the
    WordNet number."""
    content = matlab.read({path: ("file_list", "labels") for path in paths})
    classes: dict[int, str] = {}

    def rows(path: Path, variables: dict[str, list]) -> Rows:
        files = lists.texts(variables["file_list"], path, "file_list")
        labels = lists.numbers(variables["labels"], path, "labels", range(1, 1 << 16))
        if len(files) != len(labels):
            raise ValueError(f"{path}: {len(files)} files but {len(labels)} labels; unpack lists.tar again")
        for n, label in zip(files, labels, strict=True):
            folder = PurePosixPath(n).parent.name
            classes.setdefault(label, folder.partition("-")[2] or folder or str(label))
        return [(inside(pictures, n, path), label) for n, label in zip(files, labels, strict=True)]

    training, test = map(rows, paths, content)
    return layout_of(root, training, test, classes)


def layout_of(root: Path, train: Rows, test: Rows, classes: dict[int, str]) -> Layout:
    """Class ids, whatever they are, as positions in their order; an empty ``test`` is none."""
    ids = sorted(classes)
    position = {class_id: p for p, class_id in enumerate(ids)}

    def split(rows: Rows, text: str) -> Split:
        wanted = {position[c]: f"{text}: class {classes[c]}" for c in ids}
        return Split([n for n, _ in rows], [position[c] for _, c in rows], wanted)

    return Layout(root, tuple(classes[c] for c in ids), split(train, "train"), split(test, "test") if test else None, [])


_CUB_FILES = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "images/")
LAYOUTS: dict[str, Known] = {
    "birds": Known(
        "the synthetic dataset",
        cub,
        pieces_of("", *_CUB_FILES),
        expected="the synthetic dataset (CUB-200-2011's layout), which is drawn where the folder is missing",
    ),
    "cub": Known("CUB-200-2011", cub, pieces_of("CUB_200_2011.tgz", *_CUB_FILES), "CUB_200_2011", (5994, 5794, 200)),
    "cars": Known(
        "Stanford Cars",
        cars,
        (
            *pieces_of("car_devkit.tgz", "devkit/cars_meta.mat", "devkit/cars_train_annos.mat"),
            Piece(CARS_TEST, instead=f"devkit/{CARS_TEST}"),
            Piece("cars_train/", "cars_train.tgz"),
            Piece("cars_test/", "cars_test.tgz"),
        ),
        counts=(8144, 8041, 196),
        hint=(
            "the authors' page is gone, but copies of the set hold the same files, also flat or one folder deeper; the training "
            "half alone can be trained on; cars_annos.mat goes with the images of car_ims/ and with no others"
        ),
    ),
    "aircraft": Known(
        "FGVC-Aircraft",
        aircraft,
        pieces_of(
            "fgvc-aircraft-2013b.tar.gz",
            "data/variants.txt",
            "data/images_variant_trainval.txt",
            "data/images_variant_test.txt",
            "data/images/",
        ),
        makes="fgvc-aircraft-2013b",
        counts=(6667, 3333, 100),
    ),
    "nabirds": Known("NABirds", nabirds, pieces_of("nabirds.tar.gz", *_CUB_FILES, "classes.txt"), "nabirds", (23929, 24633, 555)),
    "flowers": Known(
        "Flowers102",
        flowers,
        (Piece("imagelabels.mat"), Piece("setid.mat"), Piece("jpg/", "102flowers.tgz")),
        counts=(1020, 6149, 102),
    ),
    "butterfly": Known(
        "Butterfly200",
        butterfly,
        (
            *pieces_of("", *(f"Butterfly200_{split}_release.txt" for split in ("train", "val", "test"))),
            Piece("images/", "the archive of the images", instead="images_small/"),
        ),
        counts=(10270, 15009, 200),
    ),
    "dogs": Known(
        "Stanford Dogs",
        dogs,
        (*pieces_of("lists.tar", "train_list.mat", "test_list.mat"), Piece("Images/", "images.tar")),
        counts=(12000, 8580, 120),
    ),
}
