"""The records of cells: which specification each is of, and the JSON of a table, from which a study goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.config import Config, flatten, history
from engine.errors import ConfigError

_ABSENT = {key: json.loads(json.dumps(value)) for key, value in flatten(Config()).items()}
"""What a key that a record does not name stood for: it came later, with a default that keeps what was."""
_OPTIONAL = ("world", "variant")
"""What older records do not state."""


def differences(stored: dict[str, Any], wanted: dict[str, Any]) -> Iterator[str]:
    """How the specification of a record differs from ``wanted``, as ``optim.lr 0.03, now 0.06``. Former names of keys and values
    are read as today's; a key that the record does not name has its default."""
    there: dict[str, Any] = {}
    for key, value in stored.items():
        key = history.KEYS.get(key, key)
        there[key] = history.VALUES.get((key, value), value) if isinstance(value, str) else value
    for key in sorted(there.keys() | wanted.keys()):
        if key in _OPTIONAL and key not in there:
            continue
        found, asked = there.get(key, _ABSENT.get(key)), wanted.get(key, _ABSENT.get(key))
        if found != asked:
            yield f"{key} {found}, now {asked}"


def is_of(record: dict[str, Any], cell: str, specification: dict[str, Any]) -> bool:
    """Whether ``record`` is of that cell with that specification, its seed included."""
    return record["cell"] == cell and next(differences(record["specification"], specification), None) is None


def read(path: Path) -> list[dict[str, Any]]:
    """The records of STUDY.json, each with its whole specification; [] where there is none. Raises ``ConfigError`` for a file that
    is none."""
    if not path.is_file():
        return []
    try:
        return whole(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: no table of python -m bench.methods ({error}); move it away, or restore it with git") from error


def whole(table: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of a table with what all of them have in common."""
    common = table.get("common", {})
    return [record | {"specification": common | record["specification"]} for record in table["records"]]


def compact(records: list[dict[str, Any]]) -> dict[str, Any]:
    """``common``, the part of the specification that all ``records`` share, and ``records`` with the rest."""
    first, *others = [record["specification"] for record in records] or [{}]
    common = {key: value for key, value in first.items() if all(key in other and other[key] == value for other in others)}
    rest = [
        record | {"specification": {key: value for key, value in record["specification"].items() if key not in common}}
        for record in records
    ]
    return {"common": common, "records": rest}


def one_record_per_line(table: dict[str, Any]) -> str:
    """JSON in which a list has a line for each of its entries, so that a change of one record is a change of one line."""
    lines = []
    for key, value in table.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        else:
            value = json.dumps(value)
        lines.append(f" {json.dumps(key)}: {value}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
