"""The layout of a run folder and the records in it. Needs no torch."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from engine.files import write_atomically


def append_metrics(out: Path, record: dict[str, Any]) -> None:
    """Appends one JSON line to ``out``/metrics.jsonl."""
    with (out / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The records of ``out``/metrics.jsonl; a line cut off by a kill, or otherwise damaged, is left out."""
    path = out / "metrics.jsonl"
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step", 0), int):
            records.append(record)
    return records


def rewind_metrics(out: Path, step: int) -> None:
    """Drops the records after ``step``, so that a resumed run's log reads as one run."""
    records = [r for r in read_metrics(out) if r.get("step", 0) <= step]
    text = "".join(json.dumps(r) + "\n" for r in records)
    write_atomically(out / "metrics.jsonl", lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def commit() -> str | None:
    """The commit of this source tree, with ``-dirty`` where files differ from it; None where it is no git clone."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # an installed package inside somebody else's repository
        return None
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=root, capture_output=True, text=True, timeout=10, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
