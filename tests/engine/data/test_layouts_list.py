"""data.name=list: CSV files with paths and labels."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from miniatures import open_set, picture

from engine.config import from_yaml
from engine.data.layouts.tables import read
from engine.errors import ConfigError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for i, name in enumerate(("a/1.jpg", "a/2.jpg", "b, c/3.jpg", "4.png")):
        picture(tmp_path / name, seed=i)
    return tmp_path


def test_lists_with_a_header(root):
    (root / "train.csv").write_text('\ufeffpath,label\na/1.jpg,owl\r\n"b, c/3.jpg",auk\n\n')
    (root / "test.csv").write_text("id;label;image\n7;2;a/2.jpg\n8;owl;./4.png\n")
    train, test, bad, notes, *_ = open_set("list", root, train="train.csv", test="test.csv")
    assert train.names == ("a/1.jpg", "b, c/3.jpg") and train.classes == ("2", "auk", "owl") and train.labels.tolist() == [2, 1]
    assert test.names == ("a/2.jpg", "4.png") and test.labels.tolist() == [0, 2] and bad == ()
    assert notes == ("train: 2 photos in 2 classes from train.csv", "test: 2 photos in 2 classes from test.csv")


def test_a_list_without_a_header_or_labels(root):
    (root / "pairs.csv").write_text("a/1.jpg,10\n4.png,9\n")
    train = open_set("list", root, train="pairs.csv").train
    assert train.classes == ("9", "10") and train.labels.tolist() == [1, 0]
    (root / "names.txt").write_text("a/1.jpg\n4.png\n")
    assert open_set("list", root, train="names.txt").train.labels is None


def test_photos_without_a_label_among_others_are_trained_on_alone(root):
    (root / "train.csv").write_text("path,label\na/1.jpg,owl\na/2.jpg,\n4.png,auk\n")
    found = open_set("list", root, train="train.csv")
    assert found.train.names == ("a/1.jpg", "a/2.jpg", "4.png") and found.train.labels is None
    assert found.labelled.names == ("a/1.jpg", "4.png") and found.labelled.labels.tolist() == [1, 0]
    assert found.notes[0] == "train: 3 photos without labels from train.csv; with labels: 2 photos in 2 classes"
    (root / "test.csv").write_text("path,label\na/1.jpg,owl\na/2.jpg,\n")
    with pytest.raises(ValueError, match="data.test=test.csv: has no label in row 3, and without"):
        open_set("list", root, train="train.csv", test="test.csv")


def test_parquet_lists_read_like_csv(root):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def table(name: str, **columns: list) -> str:
        parquet.write_table(arrow.table(columns), root / name)
        return name

    rows = {
        "features": [[0.0] * 4] * 3,
        "file": ["a/1.jpg", "a/2.jpg", "4.png"],
        "label": [10, None, 9],
        "split": ["train", "train", "test"],
    }
    train, test, _, notes, labelled, *_ = open_set("list", root, train=table("all.parquet", **rows))
    assert train.names == ("a/1.jpg", "a/2.jpg") and labelled.names == ("a/1.jpg",) and test.names == ("4.png",)
    assert train.classes == ("9", "10") and test.labels.tolist() == [0] and "from all.parquet" in notes[0]
    with pytest.raises(ValueError, match="more.parquet: its columns, features, name none with the files"):
        open_set("list", root, train=table("more.parquet", features=[1]))
    with pytest.raises(ValueError, match="none.parquet:2: no file"):
        open_set("list", root, train=table("none.parquet", path=["4.png", None]))


def test_parquet_without_pyarrow_says_what_to_install(root, monkeypatch):
    (root / "train.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        ImportError, match="train.parquet is a Parquet file, which needs pyarrow: pip install pyarrow; or save it as CSV"
    ):
        open_set("list", root, train="train.parquet")


def test_words_win_over_numbers(root):
    (root / "train.csv").write_text("filename,Labels,Classes\n4.png,0,707-320\n")
    assert open_set("list", root, train="train.csv").train.classes == ("707-320",)


def test_names_may_be_absolute_or_relative_to_the_list_and_lists_may_lie_elsewhere(root, monkeypatch, tmp_path_factory):
    (root / "absolute.csv").write_text(f"path\n{root}/a/1.jpg\n")
    (root / "a/near.csv").write_text("path\n2.jpg\n")
    elsewhere = tmp_path_factory.mktemp("lists")
    (elsewhere / "far.csv").write_text("path\n4.png\n")
    monkeypatch.chdir(elsewhere)
    lists = {"absolute.csv": "a/1.jpg", "a/near.csv": "a/2.jpg", "far.csv": "4.png", str(elsewhere / "far.csv"): "4.png"}
    for name, first in lists.items():
        assert open_set("list", root, train=name).train.names == (first,), name


def test_one_list_with_a_column_of_splits(root):
    (root / "all.csv").write_text("filepaths,labels,data set\na/1.jpg,x,train\na/2.jpg,x,Test\n4.png,y,valid\n")
    train, test, _, notes, *_ = open_set("list", root, train="all.csv")
    assert train.names == ("a/1.jpg",) and test.names == ("a/2.jpg",)
    assert notes[2] == "1 photos of the split val in all.csv are not used: test is the test split"
    (root / "all.csv").write_text("path,label,split\na/1.jpg,x,train\na/2.jpg,x,7\n")
    with pytest.raises(ValueError, match="all.csv:3: split '7'; expected train, test or val"):
        open_set("list", root, train="all.csv")


def test_a_test_list_alone_is_for_evaluation(root):
    (root / "test.csv").write_text("path,label\na/1.jpg,x\n")
    assert len(open_set("list", root, test="test.csv", training=False).test) == 1
    with pytest.raises(ValueError, match="no training files"):
        open_set("list", root, test="test.csv")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"", "train.csv: lists nothing; expected a row path,label"),
        (b"colour,shape\nred,round\n", "first row, colour,shape, names no column with the files; call the columns path and label"),
        (b"PAR1 and no more", "train.csv: not a Parquet file that can be read"),
        (b"path,label\na/1.jpg\n", "train.csv:2: 1 columns; the first row has 2"),
        (b"path,label\n,x\n", "train.csv:2: no file"),
        (b"path,label\n../x.jpg,x\n", r"'../x.jpg' leads out of the data folder.* \(line 2\)"),
        (b"path,label\n/etc/x.jpg,x\n", r"'/etc/x.jpg' leads out .*data.root=.* must hold every file"),
        (b"path,label\na\xe9.jpg,x\n", "train.csv: not UTF-8"),
        (b'path,label\n"a/1.jpg,x\n', "train.csv:2: not CSV"),
        (b"path,label\nno.jpg,x\n", "no.jpg is listed but not there"),
    ],
)
def test_a_wrong_list_is_named(text, match, root):
    (root / "train.csv").write_bytes(text)
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        open_set("list", root, train="train.csv")


def test_what_is_missing_is_said(root):
    (root / "mine.csv").write_text("path\na/1.jpg\n")
    with pytest.raises(ValueError, match="data.train: not set; .*data.root has mine.csv"):
        open_set("list", root)
    with pytest.raises(FileNotFoundError, match="data.train=my.csv: no such list"):
        open_set("list", root, train="my.csv")
    with pytest.raises(ValueError, match="data.test=mine.csv: has no column of labels"):
        open_set("list", root, train="mine.csv", test="mine.csv")
    with pytest.raises(ConfigError, match="data.test: got 'val', data.name=cub has a split of its own"):
        from_yaml("data: {name: cub, test: val}")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.binary(max_size=60) | st.text('path,label\n\r";\t./a1\0é', max_size=60).map(str.encode))
def test_any_bytes_are_a_list_below_the_root_or_an_error_with_its_name(tmp_path_factory, content):
    root = tmp_path_factory.getbasetemp() / "lists"
    root.mkdir(exist_ok=True)
    (root / "train.csv").write_bytes(content)
    try:
        layout = read(root, "train.csv")
    except ValueError as error:
        assert "train.csv" in str(error)
    else:
        assert not any(n.startswith("/") or ".." in n.split("/") or "\0" in n for n in layout.train.names)
