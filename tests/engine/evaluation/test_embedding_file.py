"""The three formats of an embedding: what is written is read, whatever the names; what is damaged is refused."""

from __future__ import annotations

import csv
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from engine.evaluation import embedding_file
from engine.evaluation.embedding_file import Rows

NAMES = ["a.jpg", 'with, comma and "quotes".png', "Ürban/鳥.png", embedding_file.text_of("broken\udcff.jpg"), "e.png"]
LABELS = ["kite", "", "blue, tit", "kite", "x"]


def parts(dtype: type):
    rows = np.random.default_rng(0).normal(size=(5, 7)).astype(dtype)

    def made():
        yield Rows({"path": NAMES[:2], "label": LABELS[:2]}, rows[:2])
        yield Rows({"path": NAMES[2:], "label": LABELS[2:]}, rows[2:])

    return made, rows


def about(dtype: type) -> dict:
    return {
        "weights_sha256": "12",
        "arch": "resnet50",
        "dim": 7,
        "dtype": np.dtype(dtype).name,
        "mean": [0.5, 0.25, 1.0],
        "root": "/x",
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_what_is_written_is_read(suffix: str, dtype: type, tmp_path: Path) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    made, rows = parts(dtype)
    embedding_file.write(tmp_path / f"e{suffix}", made, about(dtype))
    found = embedding_file.read(tmp_path / f"e{suffix}")
    assert found.path == NAMES and found.label == LABELS and found.split is None and found.about == about(dtype)
    assert found.feature.dtype == dtype and np.array_equal(found.feature, rows) and found.feature.flags.writeable
    assert [p.name for p in tmp_path.iterdir()] == [f"e{suffix}"]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_csv_has_every_bit_and_says_beside_it_how_it_was_made(dtype: type, tmp_path: Path) -> None:
    made, rows = parts(dtype)
    embedding_file.write(tmp_path / "e.csv", made, about(dtype))
    table = list(csv.DictReader((tmp_path / "e.csv").open(encoding="utf-8", newline="")))
    assert [r["path"] for r in table] == NAMES and [r["label"] for r in table] == LABELS
    assert np.array_equal(np.array([[r[f"f{i}"] for i in range(7)] for r in table], np.float64).astype(dtype), rows)
    assert json.loads((tmp_path / "e.csv.json").read_text()) == about(dtype)


def test_parquet_has_one_fixed_size_list_for_each_row(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    made, _ = parts(np.float32)
    embedding_file.write(tmp_path / "e.parquet", made, about(np.float32))
    schema = parquet.read_schema(tmp_path / "e.parquet")
    assert schema.names == ["path", "label", "feature"] and schema.field("feature").type == pa.list_(pa.float32(), 7)
    assert schema.metadata[b"arch"] == b"resnet50" and json.loads(schema.metadata[b"mean"]) == [0.5, 0.25, 1.0]


def test_what_is_no_embedding(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    np.savez(tmp_path / "objects.npz", about=np.array([{}], object))
    for name in ("other.npz", "objects.npz"):
        with pytest.raises(ValueError, match="is not an embedding of engine.embed"):
            embedding_file.read(tmp_path / name)
    made, _ = parts(np.float32)
    embedding_file.write(tmp_path / "e.npz", made, about(np.float32))
    with np.load(tmp_path / "e.npz") as found:
        arrays = {name: found[name] for name in ("about", "feature")}
    np.savez(tmp_path / "short.npz", **arrays)
    with zipfile.ZipFile(tmp_path / "short.npz", "a") as archive, archive.open("path.npy", "w") as file:
        np.lib.format.write_array(file, np.array(NAMES[:3]))
    with pytest.raises(ValueError, match=r"damaged: features \[5, 7\] for 3 files"):
        embedding_file.read(tmp_path / "short.npz")
    with pytest.raises(ValueError, match="the ending names the format"):
        embedding_file.check_name(tmp_path / "e.pickle")
