"""Folders of photos: which of them are the splits and classes, and what is said or refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from miniatures import make, open_set, picture

from engine.data.catalog import left_out


def test_folder_with_classes(folder):
    train, test, bad, *_ = open_set("folder", folder)
    assert train.names == ("train/a b/1.jpg", "train/a b/2.png", "train/größe/x.jpeg")
    assert train.classes == test.classes == ("a b", "größe")
    assert train.labels.dtype == np.int64 and train.labels.tolist() == [0, 0, 1] and test.labels.tolist() == [0, 1]
    assert train.sizes.dtype == np.int32 and train.sizes.tolist() == [[14, 20]] * 3
    assert train.path(2) == folder / "train/größe/x.jpeg" and train.path(2).is_file() and len(train) == 3
    assert train.plain.all() and bad == ()


def test_val_is_the_test_split_where_there_is_no_test(folder):
    (folder / "test").rename(folder / "val")
    assert open_set("folder", folder).test.names == ("val/a b/3.jpg", "val/größe/y.JPG")


@pytest.mark.parametrize("below", ["", "train"])
def test_flat_folder_has_no_labels(tmp_path, below):
    for name in ("b.jpg", "a.png", ".hidden.jpg"):
        picture(tmp_path / below / name)
    if not below:
        picture(tmp_path / "deep/er/c.jpg")
    train, test, *_ = open_set("folder", tmp_path)
    prefix = f"{below}/" if below else ""
    assert train.names == (f"{prefix}a.png", f"{prefix}b.jpg", *(() if below else ("deep/er/c.jpg",)))
    assert train.labels is None and train.classes == () and test is None


def test_a_linked_folder_is_read_once_and_a_circle_ends(folder, tmp_path):
    picture(tmp_path / "elsewhere/z.jpg")
    (folder / "train/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/round").symlink_to(tmp_path / "elsewhere")
    train = open_set("folder", folder).train
    assert [n for n in train.names if "linked" in n] == ["train/linked/z.jpg"]


def test_circles_of_class_folders_end(folder):
    (folder / "train/again").symlink_to(folder)
    (folder / "train/self").symlink_to("self")
    result = open_set("folder", folder)
    assert all("again" not in n for n in result.train.names + result.test.names)
    assert [b.name for b in result.bad] == ["train/again"] and "empty class" in result.bad[0].reason


def drawn(root: Path, *names: str) -> Path:
    """``root`` with a different picture at each of ``names``."""
    for i, name in enumerate(names):
        picture(root / name, seed=i)
    return root


def each(prefix: str, *classes: str, count: int = 2) -> list[str]:
    return [f"{prefix}/{c}/{i}.jpg" for c in classes for i in range(count)]


def understood(root: Path, **options) -> tuple[list[str], list[str] | None, list[str], list[str]]:
    """(training names, classes of their labels, test names, notes)."""
    found = open_set("folder", root, **options)
    labels = None if found.train.labels is None else [found.train.classes[i] for i in sorted(set(found.train.labels.tolist()))]
    return list(found.train.names), labels, list(found.test.names) if found.test else [], list(found.notes)


@pytest.mark.parametrize("train", ["train", "Train", "TRAINING"])
@pytest.mark.parametrize("test", ["test", "Testing", "val", "VALID", "Validation"])
def test_the_usual_names_of_splits_are_known_in_any_case(train, test, tmp_path):
    root = drawn(tmp_path, *each(train, "a", "b"), *each(test, "a", "b", count=1))
    assert understood(root) == (
        each(train, "a", "b"),
        ["a", "b"],
        each(test, "a", "b", count=1),
        [f"train: 4 photos in 2 classes from {train}/", f"test: 2 photos in 2 classes from {test}/"],
    )


@pytest.mark.parametrize("above", ["", "car_data/", "car_data/car_data/"])
@pytest.mark.parametrize("inside", ["{0}/", "{0}/{0}/", "{0}/images/"])
def test_needless_levels_are_looked_through(above, inside, tmp_path):
    train, test = (f"{above}{inside.format(split)}" for split in ("train", "test"))
    root = drawn(tmp_path, *each(train[:-1], "a", "b"), *each(test[:-1], "a", "b"))
    names, classes, of_test, notes = understood(root)
    assert classes == ["a", "b"] and len(names) == len(of_test) == 4
    assert notes == [f"train: 4 photos in 2 classes from {train}", f"test: 4 photos in 2 classes from {test}"]


def test_a_folder_of_pictures_in_a_split_is_no_class(tmp_path):
    root = drawn(tmp_path, "train/images/1.jpg", "train/images/2.jpg", "train/labels/1.png", "val/a/1.jpg")
    names, classes, test, notes = understood(root)
    assert names == ["train/images/1.jpg", "train/images/2.jpg"] and classes is None and test == ["val/a/1.jpg"]
    assert "not used, being masks or annotations by the name: train/labels/" in notes


def test_test_wins_over_validation_and_that_is_said(tmp_path):
    root = drawn(tmp_path, *each("train", "a", "b"), *each("valid", "a"), *each("test", "b"))
    assert understood(root)[2:] == (
        each("test", "b"),
        ["train: 4 photos in 2 classes from train/", "test: 2 photos in 1 class from test/",
         "valid/ is not used: test/ is the test split; data.train=train data.test=valid takes it instead"],
    )  # fmt: skip
    assert understood(root, train="train", test="valid")[2] == each("valid", "a")


def test_a_test_folder_without_classes_gives_way_to_validation(tmp_path):
    root = drawn(tmp_path, *each("train", "a", "b"), *each("val", "a"), "test/1.jpg")
    _, _, test, notes = understood(root)
    assert test == each("val", "a") and any(n.startswith("test/ has no class folders") for n in notes)


def test_training_without_labels_beside_a_labelled_test_split(tmp_path):
    root = drawn(tmp_path, "train/1.jpg", "train/2.jpg", *each("test", "a", "b"))
    found = open_set("folder", root)
    assert found.train.labels is None and found.train.names == ("train/1.jpg", "train/2.jpg")
    assert found.test.classes == ("a", "b") and found.test.labels.tolist() == [0, 0, 1, 1]
    assert found.notes[:2] == ("train: 2 photos without labels from train/", "test: 4 photos in 2 classes from test/")


def test_a_test_split_alone_is_for_evaluation(tmp_path):
    root = drawn(tmp_path, *each("test", "a", "b"))
    with pytest.raises(ValueError, match="no training files; there is test/ but no train/: this can be evaluated"):
        open_set("folder", root)
    found = open_set("folder", root, training=False)
    assert len(found.train) == 0 and found.test.labels.tolist() == [0, 0, 1, 1]


def test_class_folders_outside_of_train_are_one_set_without_labels_and_that_is_said(tmp_path):
    root = drawn(tmp_path, *each("photos", "a", "b", "c d", "e"))
    names, classes, test, notes = understood(root)
    assert names == each("photos", "a", "b", "c d", "e") and classes is None and test == []
    assert notes[:2] == ["train: 8 photos without labels from ./", "test: none"]
    assert "the 4 folders a/, b/, c d/ and 1 more are classes: data.train=photos" in notes[2] and len(notes) == 3
    assert understood(root, train="photos")[:2] == (names, ["a", "b", "c d", "e"])


def test_photos_in_no_folder_need_no_words(tmp_path):
    assert understood(drawn(tmp_path, "1.jpg", "2.jpg", "more/3.jpg"))[3] == [
        "train: 3 photos without labels from ./",
        "test: none",
    ]


def test_masks_beside_photos_are_not_trained_on(tmp_path):
    root = drawn(tmp_path, "images/1.jpg", "images/2.jpg", "annotations/trimaps/1.png", "annotations/trimaps/2.png")
    names, _, _, notes = understood(root)
    assert names == ["images/1.jpg", "images/2.jpg"]
    assert "not used, being masks or annotations by the name: annotations/; data.train=. takes every folder" in notes
    assert len(understood(root, train=".")[0]) == 4
    alone = drawn(tmp_path / "alone", "labels/1.png")
    assert understood(alone)[0] == ["labels/1.png"]


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (each("train", "a") + each("Training", "a"), "Training/ and train/ could all .*data.train=Training; or .*train=train$"),
        (each("in/train", "a") + each("in/Train", "a") + each("in/val", "a"), "data.train=in/Train data.test=in/val; or "),
        (each("in/train", "a") + each("in/Test", "a") + each("in/test", "a"), "data.test=in/test data.train=in/train$"),
        (each("cats/train", "a") + each("dogs/train", "b"), r"2 folders hold splits.*data.root=\S*/cats; or .*data.root=\S*/dogs$"),
        (each("cars_train", "a") + each("cars_test", "a"), "look like splits.*=cars_train data.test=cars_test; or .*=.$"),
        (["train2017/1.jpg", "val2017/2.jpg", "annotations/x.jpg"], "splits. Say which: they are: data.train=train2017; or"),
        (each("A/Training Set/Training Set", "a", "b") + each("A/Test Set/Test Set", "a", "b"),
         "'data.train=A/Training Set/Training Set' 'data.test=A/Test Set/Test Set'; or .*data.train=A$"),
        (["train/1.jpg", "boat/2.jpg"], "boat/ lies beside train/.* data.train=train; or train/ is a class .*: data.train=.$"),
        (each("x/train", "a") + each("y", "b"), r"y/ lies beside x/train/.* data.train=x/train; or "),
        (each("train", "a") + each("test", "a") + each("train_extra", "a"), "train_extra/ could be a split.*data.test=test; or"),
        (each("train/train", "a") + each("train/val", "a"), r"train/ holds train/ and val/, which .*data.root=\S*/train;"),
        (each("train/birds", "a", "b"), "holds birds/ alone, and that 2 folders.*data.train=train/birds; or .*data.train=train$"),
    ],
)  # fmt: skip
def test_what_can_be_read_in_two_ways_is_refused_with_both(names, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        open_set("folder", drawn(tmp_path, *names))


def test_pictures_of_a_run_folder_are_no_photos(tmp_path):
    root = drawn(tmp_path, *each("train", "a", "b"), "runs/folder/search.png")
    (root / "runs/folder/metrics.jsonl").touch()
    assert understood(root)[0] == each("train", "a", "b")


def test_what_is_no_split_is_said(tmp_path):
    root = drawn(tmp_path, *each("train", "a", "b"), *each("test", "a"), *each("train_masks", "a"), "more/1.jpg", "loose.jpg")
    names, _, _, notes = understood(root)
    assert names == each("train", "a", "b")
    assert notes[2:] == ["not used, being no split: more/", "not used: the photos that lie beside train/"]


def test_named_folders_are_taken_as_they_are(tmp_path):
    root = drawn(tmp_path, *each("mine", "a", "test"), *each("theirs", "a"), *each("train", "z"))
    assert understood(root, train="mine", test="./theirs/")[:3] == (each("mine", "a", "test"), ["a", "test"], each("theirs", "a"))
    assert understood(root, train="mine")[2] == []
    assert understood(root, test="theirs")[:3] == (each("train", "z"), ["z"], each("theirs", "a"))
    held_out_of_all = understood(root, train=".", test="theirs")
    assert held_out_of_all[1] == ["mine", "train"] and not any("theirs" in n for n in held_out_of_all[0])


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"train": "trian"}, FileNotFoundError, "data.train=trian: no folder of that name in .*; it has test, train"),
        ({"train": "../x"}, ValueError, "data.train=../x: leads out of data.root"),
        ({"train": "/etc"}, ValueError, "data.train=/etc: leads out of data.root"),
        ({"test": "test/a b"}, ValueError, "data.test=test/a b: has no class folders"),
        ({"train": "test/a b", "test": "test"}, ValueError, "data.train=test/a b lies in data.test=test"),
        ({"train": "train", "test": "train"}, ValueError, "data.train=train lies in data.test=train"),
    ],
)
def test_a_wrong_name_of_a_split_is_refused(options, error, match, folder):
    with pytest.raises(error, match=match):
        open_set("folder", folder, **options)


def test_only_folders_and_lists_take_names_of_splits(tmp_path):
    with pytest.raises(ValueError, match="data.name=dogs has a split of its own; they go with .*list"):
        open_set("dogs", make("dogs", tmp_path), train="Images")


def test_content_decides_what_an_image_is(tmp_path):
    root = drawn(tmp_path, "a.jpg")
    for name in ("b.jfif", "c", "d.picture", "e.JPG_large"):
        (root / name).write_bytes((root / "a.jpg").read_bytes())
    (root / "f.csv").write_text("a,b")
    found = open_set("folder", root)
    assert found.train.names == ("a.jpg", "b.jfif", "c", "d.picture", "e.JPG_large")
    assert left_out(found) == "1 of 6 files left out: 1 x .csv"
    assert left_out(found._replace(validation=found.train)).startswith("1 of 11 files")  # what is held out is used


def test_what_was_left_out_is_one_line(folder):
    for i in range(3):
        (folder / f"train/a b/{i}.txt").write_text("notes")
        (folder / f"train/a b/broken{i}.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    (folder / "train/größe/x.jpeg").write_bytes(b"")
    (folder / "train/a b/pages.pdf").write_text("%PDF")
    line = left_out(open_set("folder", folder))
    assert line.startswith("8 of 12 files left out: 3 x ") and "3 x .txt" in line and "\n" not in line
    assert line.endswith(", 1 other reason; 1 class without a readable image: train/größe")
    assert left_out(open_set("folder", folder / "test")) == ""


def test_masks_beside_their_photos_are_not_photos(tmp_path):
    for i, name in enumerate(("a.jpg", "a_mask.png", "b.c.jpg", "b.c-Trimap.png", "mask.png", "venetian_mask.jpg")):
        picture(tmp_path / "train/owl" / name, seed=i)
    found = open_set("folder", tmp_path)
    assert [Path(name).name for name in found.train.names] == ["a.jpg", "b.c.jpg", "mask.png", "venetian_mask.jpg"]
    assert {Path(b.name).name: b.reason.partition(";")[0] for b in found.bad} == {
        "a_mask.png": "the mask of a photo beside it, by its name", "b.c-Trimap.png": "the mask of a photo beside it, by its name",
    }  # fmt: skip
    assert left_out(found).startswith("2 of 6 files left out: 2 x the mask of a photo beside it")
