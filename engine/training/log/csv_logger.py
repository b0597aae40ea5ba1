"""``metrics.csv``: the numbers of training and evaluation as one flat table, for pandas and spreadsheets."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.files import write_text
from engine.run_folder import RunFolder, read_metrics

_KINDS = ("train", "eval", "validation")


class Csv:
    """A row per record of training and evaluation, a column per number, empty where a record has none: ``kind``, ``step``,
    ``epoch``, then the others in the order in which they came. Texts stay in metrics.jsonl.

    It is made from metrics.jsonl when it is opened, which a resumed run has rewound: no row stands twice, and a run that takes
    it up later has its earlier rows too. A new column writes the file anew.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], resumed: int | None):
        self.out, self.path = out, RunFolder(out).metrics_csv
        self.columns: list[str] = []

    def write(self, record: Mapping[str, Any], names: Sequence[str]) -> None:
        """The record already stands in metrics.jsonl."""
        if record["kind"] not in _KINDS:
            return
        if any(name not in self.columns for name in _cells(record)):
            self._write_anew()
            return
        try:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                file.write(self._rows([record]))
        except OSError as error:
            error.filename = error.filename or str(self.path)  # a full disk does not say which file it was
            raise

    def _write_anew(self) -> None:
        records = [r for r in read_metrics(self.out) if r.get("kind") in _KINDS]
        self.columns = list(dict.fromkeys(["kind", "step", "epoch", *(name for r in records for name in _cells(r))]))
        write_text(self.path, ",".join(self.columns) + "\n" + self._rows(records))

    def _rows(self, records: Iterable[Mapping[str, Any]]) -> str:
        text = io.StringIO()
        csv.DictWriter(text, self.columns, restval="", lineterminator="\n").writerows(map(_cells, records))
        return text.getvalue()

    def picture(self, name: str, pixels: npt.NDArray[np.uint8], step: int) -> None:
        pass

    def close(self) -> None:
        self.columns = []  # what is written by then may have been edited: the next row makes it anew

    def finish(self) -> None:
        pass


def _cells(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name == "kind" or isinstance(value, (int, float))}
