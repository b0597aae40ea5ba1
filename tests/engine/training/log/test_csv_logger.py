"""metrics.csv: what pandas reads of it is what metrics.jsonl holds."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest

from engine.training.log.records import Records

TRAIN = {"kind": "train", "epoch": 0, "loss": 1.5, "collapsed": True}
EVAL = {"kind": "eval", "epoch": 1, "rank1": 0.25, "protocol": "a, b", "seconds": 2.0}


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_per_record_and_a_column_per_number(tmp_path: Path) -> None:
    records = Records(tmp_path, loggers=["csv"])
    records.write(EVAL | {"step": 0})
    records.write(TRAIN | {"step": 10})
    records.write({"kind": "summary", "step": 10, "seconds": 1.0})
    records.write(TRAIN | {"step": 20, "loss": math.inf, "grad_norm": math.nan})
    found = rows(tmp_path)
    assert list(found[0]) == ["kind", "step", "epoch", "rank1", "seconds", "loss", "collapsed", "grad_norm"]
    assert [(r["kind"], r["step"], r["loss"], r["rank1"]) for r in found] == [
        ("eval", "0", "", "0.25"), ("train", "10", "1.5", ""), ("train", "20", "inf", ""),
    ]  # fmt: skip
    assert found[1]["collapsed"] == "True" and found[2]["grad_norm"] == "nan"


def test_pandas_reads_it(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    records = Records(tmp_path, loggers=["csv"])
    for step in (10, 20):
        records.write(TRAIN | {"step": step})
    records.write(EVAL | {"step": 20})
    table = pandas.read_csv(tmp_path / "metrics.csv")
    assert table[table.kind == "train"].loss.tolist() == [1.5, 1.5] and table[table.kind == "eval"].rank1.tolist() == [0.25]


def test_it_grows_on_resume_without_a_row_twice(tmp_path: Path) -> None:
    def steps(found: list[dict[str, Any]]) -> list[int]:
        return [int(r["step"]) for r in found]

    records = Records(tmp_path, loggers=["csv"])
    for step in (10, 20, 30):
        records.write(TRAIN | {"step": step})
    records.close()
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("train,4")  # a line that a kill cut off
    again = Records(tmp_path, loggers=["csv"])
    again.rewind(20)
    again.write(TRAIN | {"step": 30, "loss": 9.0, "new": 1})
    again.write(TRAIN | {"step": 40})
    found = rows(tmp_path)
    assert steps(found) == [10, 20, 30, 40] and [r["loss"] for r in found] == ["1.5", "1.5", "9.0", "1.5"]
    assert [r["new"] for r in found] == ["", "", "1", ""]


def test_a_run_that_takes_it_up_later_has_its_earlier_rows(tmp_path: Path) -> None:
    Records(tmp_path, loggers=[]).write(TRAIN | {"step": 10})
    assert not (tmp_path / "metrics.csv").exists()
    later = Records(tmp_path, loggers=["csv"])
    later.rewind(10)
    later.write(TRAIN | {"step": 20})
    assert [r["step"] for r in rows(tmp_path)] == ["10", "20"]


def test_a_run_that_leaves_it_says_that_the_table_is_no_longer_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    Records(tmp_path, loggers=["csv"]).write(TRAIN | {"step": 10})
    Records(tmp_path, loggers=["csv"]).rewind(10)
    assert "metrics.csv" not in capsys.readouterr().err
    Records(tmp_path, loggers=[]).rewind(10)
    assert "metrics.csv stays as it was left: run.loggers has no csv any more" in " ".join(capsys.readouterr().err.split())
