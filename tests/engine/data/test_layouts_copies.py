"""Official sets in the forms of their copies: flat, nested, by class folders, by tables; read as the archives are, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from miniatures import make, open_set, picture
from scipy.io import savemat

from engine.data import layouts
from engine.data.catalog import Catalog

pytestmark = pytest.mark.filterwarnings("ignore:.*official split")


def counted(monkeypatch: pytest.MonkeyPatch, name: str, *counts: int) -> None:
    """A miniature has other counts than the set."""
    monkeypatch.setitem(layouts.KNOWN, name, layouts.KNOWN[name]._replace(counts=counts))


def move(root: Path, *moves: tuple[str, str]) -> Path:
    for old, new in moves:
        (root / new).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(root / old, root / new)
    return root


def content(found: Catalog) -> list[tuple[list[str], list[int], tuple[str, ...]]]:
    """(file names without folders, labels, classes) of both splits."""
    return [
        ([n.rpartition("/")[2] for n in images.names], images.labels.tolist(), images.classes)
        for images in (found.train, found.test)
    ]


@pytest.mark.parametrize("name", ["cub", "nabirds", "aircraft", "flowers", "cars", "dogs", "butterfly"])
@pytest.mark.parametrize("above", ["copy", "copy/copy"])
def test_a_set_that_was_unpacked_deeper_is_the_same(name, above, tmp_path):
    make(name, tmp_path / "root" / above)
    picture(tmp_path / "root/segmentations/1.png")
    (tmp_path / "root/__MACOSX").mkdir()
    found = open_set(name, tmp_path / "root")
    assert content(found) == content(open_set(name, tmp_path / "root" / above))
    assert found.train.fingerprint == open_set(name, tmp_path / "root" / above).train.fingerprint


def test_two_copies_are_refused_with_both(tmp_path):
    make("cub", tmp_path / "one")
    make("cub", tmp_path / "two")
    with pytest.raises(ValueError, match=r"2 folders hold CUB-200-2011. Say which: data.root=\S*/one; or data.root=\S*/two"):
        open_set("cub", tmp_path)


FORMS = {
    "cars flat": ("cars", [("devkit/cars_meta.mat", "cars_meta.mat"), ("devkit/cars_train_annos.mat", "cars_train_annos.mat")]),
    "cars nested": (
        "cars",
        [
            ("cars_train", "tmp/cars_train"), ("tmp", "cars_train"), ("cars_test", "tmp/cars_test"), ("tmp", "cars_test"),
            ("devkit", "car_devkit/devkit"), ("cars_test_annos_withlabels.mat", "cars_test_annos_withlabels (1).mat"),
        ],
    ),
    "dogs nested": (
        "dogs",
        [("Images", "tmp/Images"), ("tmp", "images"),
         ("train_list.mat", "lists/train_list.mat"), ("test_list.mat", "lists/test_list.mat")],
    ),
    "flowers nested": ("flowers", [("jpg", "102flowers/jpg"), ("setid.mat", "labels/setid.mat")]),
    "aircraft from its data folder": ("aircraft", [(f"data/{n}", n) for n in (
        "images", "variants.txt", "images_variant_trainval.txt", "images_variant_test.txt")]),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_the_pieces_may_lie_elsewhere(form, tmp_path):
    name, moves = FORMS[form]
    expected = content(open_set(name, make(name, tmp_path / "official")))
    found = open_set(name, move(make(name, tmp_path / "copy"), *moves))
    assert content(found) == expected and found.notes[2:] == ()


@pytest.mark.parametrize("missing", ["cars_test_annos_withlabels.mat", "cars_test"])
def test_the_training_half_of_cars_is_enough_to_train(missing, tmp_path, recwarn, monkeypatch):
    root = make("cars", tmp_path / "cars")
    whole = open_set("cars", root)
    move(root, (missing, "../gone"))
    counted(monkeypatch, "cars", 6, 6, 3)
    recwarn.clear()
    found = open_set("cars", root)
    assert found.train.names == whole.train.names and found.train.fingerprint == whole.train.fingerprint and found.test is None
    assert any(n.startswith("no test split, as") and missing in n for n in found.notes) and not recwarn.list


def test_cars_in_one_folder(tmp_path):
    kinds = [("relative_im_path", object), ("class", object), ("test", object)]
    rows = [(f"car_ims/{n:06d}.jpg", np.uint8(n % 2 + 1), np.uint8(n > 2)) for n in range(1, 5)]
    for row in rows:
        picture(tmp_path / row[0], seed=int(row[0][8:14]))
    names = np.array(["Audi TT 2011", "smart fortwo 2012"], object)
    savemat(tmp_path / "cars_annos.mat", {"annotations": np.array([rows], kinds), "class_names": names})
    train, test, *_ = open_set("cars", tmp_path)
    assert train.names == ("car_ims/000001.jpg", "car_ims/000002.jpg") and train.labels.tolist() == [1, 0]
    assert test.names == ("car_ims/000003.jpg", "car_ims/000004.jpg") and test.classes == ("Audi TT 2011", "smart fortwo 2012")
    (tmp_path / "car_ims").rename(tmp_path / "cars_train")
    with pytest.raises(FileNotFoundError, match="cars_annos.mat goes with the images of car_ims/ and with no others"):
        open_set("cars", tmp_path)


def test_cars_by_class_folders(tmp_path, monkeypatch):
    for i, name in enumerate(("train/Audi TT/1.jpg", "train/Fiat 500/2.jpg", "test/Audi TT/3.jpg", "test/Fiat 500/4.jpg")):
        picture(tmp_path / "car_data/car_data" / name, seed=i)
    (tmp_path / "anno_train.csv").write_text("1.jpg,39,116,569,375,1\n")
    with pytest.raises(FileNotFoundError, match="data.name=folder reads the class folders in car_data/car_data/train/"):
        open_set("cars", tmp_path)  # two classes are not Stanford Cars
    counted(monkeypatch, "cars", 2, 2, 2)
    found = open_set("cars", tmp_path)
    assert content(found) == [
        (["1.jpg", "2.jpg"], [0, 1], ("Audi TT", "Fiat 500")),
        (["3.jpg", "4.jpg"], [0, 1], ("Audi TT", "Fiat 500")),
    ]
    assert found.notes[2] == "Stanford Cars is read by its class folders, its lists are not there"


def test_cars_by_tables(tmp_path, monkeypatch):
    for split in ("train", "test"):
        for n in (1, 2):
            picture(tmp_path / f"cars_{split}/cars_{split}/0000{n}.jpg", seed=n)
        (tmp_path / f"cardataset{split}.csv").write_text(
            ",x1,y1,x2,y2,Class,image\n0,1,1,9,9,14,00001.jpg\n1,1,1,9,9,3,00002.jpg\n"
        )
    counted(monkeypatch, "cars", 2, 2, 2)
    found = open_set("cars", tmp_path)
    assert found.train.names == ("cars_train/cars_train/00001.jpg", "cars_train/cars_train/00002.jpg")
    assert found.test.names[0] == "cars_test/cars_test/00001.jpg" and found.train.labels.tolist() == [1, 0]


def test_aircraft_by_tables(tmp_path, monkeypatch):
    for i, split in enumerate(("train", "val", "test")):
        picture(tmp_path / f"fgvc/data/images/{i}.jpg", seed=i)
        (tmp_path / f"{split}.csv").write_text(f"filename,Classes,Labels\n{i}.jpg,707-320,0\n")
    counted(monkeypatch, "aircraft", 2, 1, 1)
    found = open_set("aircraft", tmp_path)
    assert content(found) == [(["0.jpg", "1.jpg"], [0, 0], ("707-320",)), (["2.jpg"], [0], ("707-320",))]
    counted(monkeypatch, "aircraft", 1, 1, 1)  # not train + val
    found = open_set("aircraft", tmp_path)
    assert len(found.train) == 1 and "val.csv is not used: test is the test split" in found.notes


@pytest.mark.parametrize("test", ["test/10", "test"])
def test_flowers_by_number(test, tmp_path, monkeypatch):
    root = tmp_path / "flower_data/flower_data"
    for i, name in enumerate(("train/10", "train/2", "valid/2", "valid/10", test)):
        picture(root / name / f"image_0000{i}.jpg", seed=i)
    (tmp_path / "cat_to_name.json").write_text(json.dumps({"2": "hard-leaved pocket orchid", "10": "globe thistle"}))
    counted(monkeypatch, "flowers", 2, 1, 2)
    found = open_set("flowers", tmp_path)
    assert found.train.classes == ("hard-leaved pocket orchid", "globe thistle")
    assert [found.train.classes[i] for i in found.train.labels] == ["globe thistle", "hard-leaved pocket orchid"]
    assert len(found.test) == (1 if test == "test/10" else 2)


def test_dogs_without_lists_say_what_can_be_done(tmp_path):
    root = move(make("dogs", tmp_path / "dogs"), ("Images", "images/Images"))
    for name in ("train_list.mat", "test_list.mat"):
        (root / name).unlink()
    (root / "annotations/Annotation/n02085620-Chihuahua").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="unpack lists.tar.*: data.name=folder data.train=images/Images$"):
        open_set("dogs", root)
    assert len(open_set("folder", root, train="images/Images").train.classes) == 3


def test_cub_without_lists_says_what_can_be_done(tmp_path):
    root = make("cub", tmp_path / "cub")
    (root / "train_test_split.txt").unlink()
    with pytest.raises(FileNotFoundError, match="has no train_test_split.txt.*data.name=folder data.train=images$"):
        open_set("cub", root)
