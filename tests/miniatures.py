"""Miniature copies of the official data sets: the same files in the same forms as their archives hold, with few small images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from engine.data.catalog import Catalog, load

CLASSES = 3
EACH = 2
"""Images a class and split."""


def picture(path: Path, size: tuple[int, int] = (20, 14), seed: int = 0, **options) -> Path:
    """A file of noise, width and height as in PIL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def _every(split: int) -> list[tuple[int, int]]:
    """(class, number of the image) of one split; training and test numbers differ."""
    return [(c, split * EACH + i) for c in range(CLASSES) for i in range(EACH)]


def cub(root: Path, size: tuple[int, int]) -> None:
    names = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross"]
    rows = []
    for c, name in enumerate(names):
        for i in range(2 * EACH):
            rows.append((f"{name}/{name[4:]}_{i:04d}.jpg", c + 1, int(i < EACH)))
            picture(root / "images" / rows[-1][0], size, len(rows))
    for file, column in (("images", 0), ("image_class_labels", 1), ("train_test_split", 2)):
        (root / f"{file}.txt").write_text("".join(f"{n} {row[column]}\n" for n, row in enumerate(rows, 1)))
    (root / "classes.txt").write_text("".join(f"{c} {name}\n" for c, name in enumerate(names, 1)))


def nabirds(root: Path, size: tuple[int, int]) -> None:
    """UUIDs with dashes in the lists, without in file names; classes.txt is the whole taxonomy."""
    species = {817: "Oak Titmouse", 295: "Common Goldeneye (Adult male)", 1003: "Cactus Wren"}
    rows = []
    for c, label in enumerate(species):
        for i in range(2 * EACH):
            uuid = f"{c:08x}-21dc-4d0c-bfe1-{i:012x}"
            rows.append((uuid, f"{label:04d}/{uuid.replace('-', '')}.jpg", label, int(i < EACH)))
            picture(root / "images" / rows[-1][1], size, len(rows))
    (root / "images.txt").write_text("".join(f"{r[0]} {r[1]}\n" for r in rows))
    (root / "image_class_labels.txt").write_text("".join(f"{r[0]} {r[2]}\n" for r in rows))
    (root / "train_test_split.txt").write_text("".join(f"{r[0]} {r[3]}\n" for r in rows))
    inner = {0: "Birds", 1: "Ducks, Geese, and Swans"}
    (root / "classes.txt").write_text("".join(f"{i} {n}\n" for i, n in sorted({**inner, **species}.items())))


def cars(root: Path, size: tuple[int, int], test_annotations: str = "cars_test_annos_withlabels.mat") -> None:
    (root / "devkit").mkdir(parents=True)
    names = np.array(["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "smart fortwo Convertible 2012"], object)
    savemat(root / "devkit/cars_meta.mat", {"class_names": names})
    kinds = [(f, object) for f in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
    for split, folder, file in ((0, "cars_train", "devkit/cars_train_annos.mat"), (1, "cars_test", test_annotations)):
        rows = [(1.0, 1.0, 9.0, 9.0, np.uint8(c + 1), f"{n:05d}.jpg") for n, (c, _) in enumerate(_every(split)[::-1], 1)]
        savemat(root / file, {"annotations": np.array([rows], kinds)})
        for n, row in enumerate(rows):
            picture(root / folder / row[-1], size, 10 * split + n)


def aircraft(root: Path, size: tuple[int, int]) -> None:
    data = root / "data"
    data.mkdir(parents=True)
    variants = ["707-320", "Boeing 717", "F-16A/B"]
    (data / "variants.txt").write_text("".join(f"{v}\n" for v in variants))
    lists: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for c, variant in enumerate(variants):
        for i, split in enumerate(("train", "val", "test", "test")):
            number = f"{1000 * c + i:07d}"
            lists[split].append(f"{number} {variant}\n")
            picture(data / f"images/{number}.jpg", size, 10 * c + i)
    for split, rows in {**lists, "trainval": lists["train"] + lists["val"]}.items():
        (data / f"images_variant_{split}.txt").write_text("".join(rows))


def flowers(root: Path, size: tuple[int, int]) -> None:
    """Three labels among the 102; the ids of a split are in no order."""
    labels = np.array([77, 1, 102] * 5, np.uint8)
    root.mkdir(parents=True, exist_ok=True)
    savemat(root / "imagelabels.mat", {"labels": labels[None]})
    savemat(root / "setid.mat", {"trnid": [[6, 1, 2, 3, 5, 4]], "valid": [[7, 8, 9]], "tstid": [[15, 14, 13, 10, 12, 11]]})
    for number in range(1, 16):
        picture(root / f"jpg/image_{number:05d}.jpg", size, number)


def butterfly(root: Path, size: tuple[int, int]) -> None:
    root.mkdir(parents=True, exist_ok=True)
    names = ["001.Atrophaneura_horishanus", "002.Atrophaneura_varuna", "003.Byasa_alcinous"]
    for s, split in enumerate(("train", "val", "test", "test")):
        with (root / f"Butterfly200_{split}_release.txt").open("a") as file:
            for c, name in enumerate(names):
                file.write(f"{name}/{s:03d}.jpg {c + 1} {c // 2 + 1} 1 1\n")
                picture(root / "images" / name / f"{s:03d}.jpg", size, 10 * c + s)


def dogs(root: Path, size: tuple[int, int]) -> None:
    folders = ["n02085620-Chihuahua", "n02095314-wire-haired_fox_terrier", "n02116738-African_hunting_dog"]
    root.mkdir(parents=True, exist_ok=True)
    for split, text in enumerate(("train", "test")):
        names = [f"{folders[c]}/{folders[c].partition('-')[0]}_{i}.jpg" for c, i in _every(split)]
        cells = np.array(names, object)[:, None]
        labels = np.array([[c + 1] for c, _ in _every(split)], np.uint8)
        savemat(root / f"{text}_list.mat", {"file_list": cells, "annotation_list": cells, "labels": labels})
        for n, name in enumerate(names):
            picture(root / "Images" / name, size, 10 * split + n)


MAKERS: dict[str, Callable[..., None]] = {
    "cub": cub, "cars": cars, "aircraft": aircraft, "nabirds": nabirds, "flowers": flowers, "butterfly": butterfly, "dogs": dogs,
}  # fmt: skip


def make(name: str, root: Path, size: tuple[int, int] = (20, 14), **options) -> Path:
    """Writes the miniature of ``name`` at ``root``, images of ``size`` (width, height): six for training, six for test."""
    MAKERS[name](root, size, **options)
    return root


def open_set(name: str, root: Path, **options) -> Catalog:
    """The image lists of the layout ``name``, without a progress bar."""
    return load(name, root, progress=False, **options)
