"""Checkpoints are written whole or not at all, pruned, and never run code."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from engine import checkpoint


def test_round_trip_and_pruning(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        checkpoint.save(tmp_path, {"step": step, "weights": torch.full((2,), float(step)), "info": {"a": [1, "b", None]}}, keep=2)
    kept = checkpoint.list_checkpoints(tmp_path)
    assert [p.name for p in kept] == ["step_000000002.pt", "step_000000010.pt"]
    state = checkpoint.load(kept[-1])
    assert state["step"] == 10 and torch.equal(state["weights"], torch.full((2,), 10.0)) and state["info"] == {"a": [1, "b", None]}
    assert sorted(p.name for p in tmp_path.iterdir()) == [p.name for p in kept]  # no temporary files


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def full_disk(temporary: str) -> None:
        Path(temporary).write_text("ha")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        checkpoint.write_atomically(path, full_disk)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


class Malice:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_malicious_file_is_refused_and_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": checkpoint.FORMAT, "x": Malice()}, "evil.pt")
    with pytest.raises(ValueError, match=r"evil\.pt"):
        checkpoint.load(Path("evil.pt"))
    Path("evil2.pt").write_bytes(pickle.dumps(Malice()))
    with pytest.raises(ValueError, match=r"evil2\.pt"):
        checkpoint.load(Path("evil2.pt"))
    assert not Path("executed").exists()


def test_random_state_round_trip() -> None:
    state = checkpoint.rng_state()
    first = torch.rand(3)
    checkpoint.load_rng_state(state)
    assert torch.equal(first, torch.rand(3))


def test_weights_file_round_trip_and_errors(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    checkpoint.save_weights(path, {"a": torch.arange(6.0).view(2, 3).T}, {"step": "3"})
    assert torch.equal(checkpoint.load_weights(path)["a"], torch.arange(6.0).view(2, 3).T)
    assert checkpoint.read_metadata(path) == {"step": "3"}
    path.write_bytes(b"no")
    with pytest.raises(ValueError, match=r"weights\.safetensors"):
        checkpoint.load_weights(path)
    with pytest.raises(FileNotFoundError):
        checkpoint.load_weights(tmp_path / "absent.safetensors")
