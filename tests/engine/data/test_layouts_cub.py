"""CUB-200-2011's lists, and layouts that are not there."""

from __future__ import annotations

from pathlib import Path

import pytest
from miniatures import open_set, picture


@pytest.fixture
def cub(tmp_path: Path) -> Path:
    root = tmp_path / "cub"
    names = ["001.Auk/Auk 1.jpg", "001.Auk/Auk_2.jpg", "002.Bee_eater/b1.jpg", "002.Bee_eater/b2.jpg"]
    for i, name in enumerate(names):
        picture(root / "images" / name, seed=i)
    (root / "images.txt").write_text("".join(f"{i} {n}\n" for i, n in enumerate(names, 1)))
    (root / "image_class_labels.txt").write_text("1 1\n2 1\n3 2\n4 2\n")
    (root / "train_test_split.txt").write_text("1 1\n2 0\n3 1\n4 0\n")
    (root / "classes.txt").write_text("1 001.Auk\n2 002.Bee_eater\n")
    return root


def test_cub(cub, recwarn):
    train, test, bad, *_ = open_set("birds", cub)
    assert train.names == ("images/001.Auk/Auk 1.jpg", "images/002.Bee_eater/b1.jpg")
    assert test.names == ("images/001.Auk/Auk_2.jpg", "images/002.Bee_eater/b2.jpg")
    assert train.labels.tolist() == test.labels.tolist() == [0, 1] and train.classes == ("001.Auk", "002.Bee_eater")
    assert bad == () and not recwarn.list
    (cub / "classes.txt").unlink()
    assert open_set("birds", cub).train.classes == ("001.Auk", "002.Bee_eater")


def test_the_folder_inside_the_archive_is_found(cub, tmp_path):
    cub.rename(tmp_path / "CUB_200_2011")
    with pytest.warns(UserWarning, match="official split"):
        assert len(open_set("cub", tmp_path).train) == 2


@pytest.mark.parametrize(
    ("file", "old", "new", "error", "match"),
    [
        ("images.txt", "b1.jpg", "gone.jpg", FileNotFoundError, r"images/002.Bee_eater/gone.jpg is listed but not there \(1 of 4"),
        (
            "images.txt",
            "002.Bee_eater/b1.jpg",
            "../../b1.jpg",
            ValueError,
            r"'../../b1.jpg' leads out of the data folder",
        ),
        (
            "images.txt",
            "002.Bee_eater/b1.jpg",
            "/etc/b1.jpg",
            ValueError,
            r"'/etc/b1.jpg' leads out of the data folder",
        ),
        ("images.txt", "3 002.Bee_eater/b1.jpg", "3", ValueError, r"images.txt:3: '3' is not '<id> <value>'"),
        ("images.txt", "3 ", "2 ", ValueError, r"images.txt:3: id 2 appears twice"),
        (
            "image_class_labels.txt",
            "3 2\n",
            "",
            ValueError,
            r"class_labels.txt: no line for image 3 \(002.Bee_eater/b1",
        ),
        ("image_class_labels.txt", "3 2", "3 two", ValueError, r"image 3 has class 'two'"),
        ("train_test_split.txt", "3 1\n", "", ValueError, r"train_test_split.txt: no line for image 3"),
        ("train_test_split.txt", "3 1", "3 2", ValueError, r"image 3 has '2'; expected 1 \(train\) or 0 \(test\)"),
    ],
)
def test_a_wrong_list_is_named(cub, file, old, new, error, match):
    text = (cub / file).read_text()
    assert old in text
    (cub / file).write_text(text.replace(old, new, 1))
    with pytest.raises(error, match=match):
        open_set("birds", cub)


def test_missing_folders_and_wrong_layouts(cub, folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="data.root=.*nowhere is not a folder.*CUB_200_2011.tgz"):
        open_set("cub", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="data.root is not set.*train/<class>"):
        open_set("folder", None)
    with pytest.raises(FileNotFoundError, match="has no images.txt, image_class_labels.txt, train_test_split.txt, images/"):
        open_set("cub", folder)
    (cub / "train_test_split.txt").unlink()
    with pytest.raises(FileNotFoundError, match="has no train_test_split.txt, which data.name=birds needs: remove .* drawn again"):
        open_set("birds", cub)
    with pytest.raises(ValueError, match="data.name=cubs: unknown; known are .*birds, cub, cars"):
        open_set("cubs", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no training files.*expected your own photos"):
        open_set("folder", tmp_path / "empty")


def test_an_empty_class_of_cub_is_named(cub):
    with (cub / "classes.txt").open("a") as file:
        file.write("3 003.Cuckoo\n")
    (cub / "images/001.Auk/Auk 1.jpg").write_bytes(b"")
    result = open_set("birds", cub)
    assert result.train.classes == ("001.Auk", "002.Bee_eater", "003.Cuckoo") and result.train.labels.tolist() == [1]
    assert [b.name for b in result.bad] == [
        "images/001.Auk/Auk 1.jpg",
        "train: class 001.Auk",
        "train: class 003.Cuckoo",
        "test: class 003.Cuckoo",
    ]


def test_lists_with_every_separator_but_a_line_feed_in_a_name(cub):
    odd = "002.Bee_eater/it's \u2028 \x0c 'odd' \"größe\".jpg"
    (cub / "images/002.Bee_eater/b1.jpg").rename(cub / "images" / odd)
    text = (cub / "images.txt").read_text().replace("002.Bee_eater/b1.jpg", odd)
    (cub / "images.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert open_set("birds", cub).train.names == ("images/001.Auk/Auk 1.jpg", f"images/{odd}")
