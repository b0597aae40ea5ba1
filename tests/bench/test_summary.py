"""bench.summary: the lines of benchmarks become a result file, and result files a table."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path

import pytest

from bench import summary


def raw(folder: Path, name: str, when: str, commit: str, seconds: dict[str, float]) -> Path:
    """What bench/conftest.py writes, as far as it is read."""
    info = {"device": "Test GPU 9", "torch": "2.11.0", "commit": commit}
    rows = [
        {"name": f"test_gradcam[image-nchw-{provider}]", "stats": {"min": value}, "extra_info": info | {"cold_ms": 1e3 * value}}
        for provider, value in seconds.items()
    ]
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"name": "cut o')
    moment = datetime.datetime.fromisoformat(when).timestamp()
    os.utime(path, (moment, moment))
    return path


def test_results_are_collected_by_device_and_the_newest_tabulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(summary, "RESULTS", tmp_path / "results")
    (tmp_path / "results" / "methods").mkdir(parents=True)
    (tmp_path / "results" / "methods" / "main.json").write_text('{"study": "main", "rows": [], "records": []}')
    with pytest.raises(SystemExit) as exit:
        summary.main(["table"])  # a study of methods is not a result of a device
    assert exit.value.code == 2
    capsys.readouterr()
    first = raw(tmp_path, "a.json", "2026-01-02T10:00:00", "aaaaaaa", {"eager": 0.004, "ours": 0.004})
    second = raw(tmp_path, "b.json", "2026-01-02T11:00:00", "0000000", {"eager": 0.004, "ours": 0.001})
    for path in (first, second):
        assert summary.main(["collect", str(path)]) == 0
    kept = tmp_path / "results" / "test-gpu-9"
    assert sorted(path.name for path in kept.iterdir()) == ["2026-01-02_0000000.json", "2026-01-02_aaaaaaa.json"]
    capsys.readouterr()
    assert summary.main(["table"]) == 0
    shown = capsys.readouterr().out
    assert "Test GPU 9" in shown and "0000000" in shown and "aaaaaaa" not in shown and "4.0×" in shown
