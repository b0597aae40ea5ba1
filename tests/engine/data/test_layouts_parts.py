"""Some of the classes, a fraction of the training photos, further roots."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from miniatures import make, open_set, picture

from engine.config import from_yaml
from engine.errors import ConfigError


def photos(root: Path, **classes: int) -> Path:
    """Class folders in train/ and test/ with that many photos each."""
    for split in ("train", "test"):
        for name, number in classes.items():
            for i in range(number):
                picture(root / split / name / f"{i}.png", seed=i)
    return root


def test_classes_by_name_and_by_pattern(tmp_path):
    root = photos(tmp_path, auk=2, owl=1, owlet=3, wren=1)
    found = open_set("folder", root, classes=("wren", "owl*"))
    assert found.train.classes == ("owl", "owlet", "wren") and found.train.labels.tolist() == [0, 1, 1, 1, 2]
    assert found.test.labels.tolist() == found.train.labels.tolist()
    assert "data.classes: 3 of 4 classes" in found.notes
    with pytest.raises(ValueError, match=r"data.classes: no class is called 'heron'; the classes are auk, owl, owlet, wren$"):
        open_set("folder", root, classes=("heron",))


def test_classes_of_an_official_set_and_of_photos_without_any(tmp_path):
    found = open_set("cub", make("cub", tmp_path / "cub"), classes=("*Albatross",))
    assert len(found.train) == 6
    picture(tmp_path / "flat" / "1.png")
    with pytest.raises(ValueError, match="data.classes: .*flat has no classes to choose from"):
        open_set("folder", tmp_path / "flat", classes=("owl",))


def test_a_fraction_is_drawn_from_each_class_and_grows(tmp_path):
    root = photos(tmp_path, auk=10, owl=20, wren=1)
    whole = open_set("folder", root)
    some = {f: open_set("folder", root, fraction=f, seed=3) for f in (0.01, 0.3, 0.6, 1.0)}
    assert [np.bincount(found.train.labels).tolist() for found in some.values()] == [[1, 1, 1], [3, 6, 1], [6, 12, 1], [10, 20, 1]]
    names = [set(found.train.names) for found in some.values()]
    assert names[0] < names[1] < names[2] < names[3] == set(whole.train.names)
    assert all(len(found.test) == 31 for found in some.values())
    assert list(some[0.3].train.names) == sorted(names[1])
    assert some[0.3].train.identity != open_set("folder", root, fraction=0.3, seed=4).train.identity
    assert "data.fraction=0.3: 10 of 31 training photos, drawn by seed 3" in some[0.3].notes


def test_another_root_joins_by_class_names(tmp_path):
    root, more = photos(tmp_path / "a", auk=2, owl=1), photos(tmp_path / "b", owl=2, wren=1)
    found = open_set("folder", root, extra_roots=(str(more),))
    assert found.train.classes == ("auk", "owl", "wren") and found.train.labels.tolist() == [0, 0, 1, 1, 1, 2]
    assert found.train.names[-1] == "../b/train/wren/0.png" and found.train.path(5) == root / "../b/train/wren/0.png"
    assert found.test.labels.tolist() == found.train.labels.tolist()
    assert f"{more}: 3 more training photos in 2 classes" in found.notes


def test_photos_without_labels_join_an_official_set_for_training_alone(tmp_path):
    root = make("cub", tmp_path / "cub")
    for i in range(3):
        picture(tmp_path / "inbox" / f"{i}.png", seed=i)
    photos(tmp_path / "more", owl=2)
    found = open_set("cub", root, extra_roots=(str(tmp_path / "inbox"), str(tmp_path / "more")))
    plain = open_set("cub", root)
    assert len(found.train) == len(plain.train) + 5 and found.train.labels is None
    assert found.labelled.names[:6] == plain.train.names and len(found.labelled) == 8
    assert found.labelled.labels[:6].tolist() == plain.train.labels.tolist() and found.labelled.labels[6:].tolist() == [3, 3]
    assert found.test.names == plain.test.names and found.test.labels.tolist() == plain.test.labels.tolist()
    assert f"{tmp_path}/more: 2 test photos are not used: the test split is that of data.root alone" in found.notes


def test_roots_that_cannot_be_joined(tmp_path):
    root = photos(tmp_path / "a", owl=1)
    with pytest.raises(FileNotFoundError, match="data.extra_roots: nowhere is not a folder"):
        open_set("folder", root, extra_roots=("nowhere",))
    with pytest.raises(ValueError, match="data.extra_roots: .*/train and .* lie in one another"):
        open_set("folder", root, extra_roots=(str(root / "train"),))


@pytest.mark.parametrize(("text", "match"), [
    ("data: {fraction: 0.0}", r"data.fraction: got 0.0, must be in \(0, 1\]"),
    ("data: {name: aircraft, crop_banner: true, extra_roots: [a]}", "data.crop_banner: .* would cut"),
    ("data: {classes: '[*a]'}", r"data.classes: got '\[\*a\]' \(str\), expected a list of text; quote"),
    ("data: {fraction: 1.5}", "data.fraction: got 1.5"),
    ("data: {classes: [a, a]}", r"data.classes: got \['a', 'a'\], must name text, each once"),
])  # fmt: skip
def test_values_out_of_range(text, match):
    with pytest.raises(ConfigError, match=match):
        from_yaml(text)


def test_a_further_root_that_says_nothing_or_two_things(tmp_path):
    root = photos(tmp_path / "a", owl=1)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="data.extra_roots: .*none holds no photos"):
        open_set("folder", root, extra_roots=(str(tmp_path / "none"),))
    picture(tmp_path / "two" / "train" / "1.png", seed=1)
    picture(tmp_path / "two" / "more" / "2.png", seed=2)
    with pytest.raises(ValueError, match=r"data.extra_roots: .*two: more/ lies beside train/\. No setting") as error:
        open_set("folder", root, extra_roots=(str(tmp_path / "two"),))
    assert "data.train" not in str(error.value) and "data.root" not in str(error.value)
    for i, name in enumerate(("auk", "wren")):
        picture(tmp_path / "inbox" / name / "1.png", seed=i)
    notes = open_set("folder", root, extra_roots=(str(tmp_path / "inbox"),)).notes
    assert any(note.endswith("auk/ and wren/ are classes, move them into train/") for note in notes)
