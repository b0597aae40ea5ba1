"""Checkpoints are written whole or not at all, sealed, pruned, saved beside the training, and never run code."""

import os
import pickle
import signal
import threading
from pathlib import Path

import pytest
import torch

from engine import files
from engine.files import read_metadata
from engine.pretrained import weights_file
from engine.training import checkpoint


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
        files.write_atomically(path, full_disk)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def tiny(step: int) -> dict:
    return {"step": step, "weights": torch.arange(600.0), "info": {}}


def test_a_checkpoint_of_an_earlier_step_does_not_fall_to_those_of_later_ones(tmp_path: Path) -> None:
    for step in (10, 20, 30, 15):  # resumed from an older one
        checkpoint.save(tmp_path, tiny(step), keep=2)
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == [f"step_{s:09d}.pt" for s in (15, 20, 30)]


@pytest.mark.parametrize("damage", ["flip", "cut", "append", "empty", "seal"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_found(damage: str, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        path = checkpoint.save(tmp_path, tiny(step), keep=9)
    content = bytearray(path.read_bytes())
    if damage in ("flip", "seal"):
        content[len(content) // 2 if damage == "flip" else -1] ^= 4
    changed = {"cut": content[:-100], "append": content + b"x", "empty": b""}.get(damage, content)
    path.write_bytes(changed)
    with pytest.raises(ValueError, match=path.name):
        checkpoint.load(path)
    said: list[str] = []
    found, state = checkpoint.newest(tmp_path, said.append)
    assert found.name == "step_000000002.pt" and state["step"] == 2 and any(str(path) in line for line in said)
    assert not path.exists() and path.with_suffix(".damaged").read_bytes() == changed  # not among those that are kept


def test_when_every_checkpoint_is_damaged_none_is_touched(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path, print) is None and checkpoint.newest(tmp_path / "absent", print) is None
    paths = [checkpoint.save(tmp_path, tiny(step), keep=9) for step in (1, 2)]
    for path in paths:
        path.write_bytes(b"no")
    with pytest.raises(ValueError, match="none of the 2 checkpoints.*--resume none"):
        checkpoint.newest(tmp_path, lambda text: None)
    assert checkpoint.list_checkpoints(tmp_path) == paths


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_writer_that_is_killed_leaves_the_old_checkpoint_and_a_temporary_that_is_cleaned(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, tiny(1), keep=2)
    before = path.read_bytes()
    child = os.fork()
    if child == 0:
        write = checkpoint._Hashed.write
        checkpoint._Hashed.write = lambda self, data: (write(self, data), self.flush(), os.kill(os.getpid(), signal.SIGKILL))[0]
        checkpoint.save(tmp_path, tiny(1), keep=2)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (left,) = tmp_path.glob(".*.tmp")
    assert path.read_bytes() == before and checkpoint.load(path)["step"] == 1 and checkpoint.list_checkpoints(tmp_path) == [path]
    files.remove_temporary_files(tmp_path)
    assert not left.exists() and list(tmp_path.iterdir()) == [path]


def test_a_save_in_the_background_holds_the_values_of_its_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, write = threading.Event(), checkpoint.write
    monkeypatch.setattr(checkpoint, "write", lambda *arguments: (gate.wait(), write(*arguments)))
    norm = torch.nn.BatchNorm1d(3)
    weight = torch.zeros(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    with checkpoint.Saver(tmp_path, keep=2) as saver:
        saver.save({"step": 1, "method": norm.state_dict(), "w": weight, "again": weight}, {"w": weight}, {"step": "1"})
        weight.fill_(7.0)  # training goes on
        norm.running_mean.fill_(7.0)
        saver.poll()
        assert saver.saved is None
        gate.set()
    state = checkpoint.load(saver.saved)
    assert float(state["w"].abs().max()) == 0 and state["w"].is_contiguous(memory_format=torch.channels_last)
    assert state["w"].data_ptr() == state["again"].data_ptr()  # each tensor once
    norm.load_state_dict(state["method"])  # with the version that a state_dict remembers
    assert float(norm.running_mean.abs().max()) == 0
    assert float(weights_file.load_weights(tmp_path / "weights.safetensors")["w"].abs().max()) == 0
    buffers = [t.data_ptr() for same in saver.buffers.values() for t in same]
    saver.save({"step": 2, "method": norm.state_dict(), "w": weight, "again": weight}, {"w": weight}, {})
    saver.wait()
    assert sorted(buffers) == sorted(t.data_ptr() for same in saver.buffers.values() for t in same)  # no new memory
    assert float(checkpoint.load(saver.saved)["w"].min()) == 7.0


def test_the_error_of_a_save_in_the_background_is_raised_at_the_next_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = checkpoint.Saver(tmp_path, keep=2)
    saver.save(tiny(1), {"w": torch.zeros(2)}, {})
    saver.wait()
    for look in (saver.poll, saver.wait, lambda: saver.save(tiny(3), {}, {})):
        monkeypatch.setattr(checkpoint._Hashed, "write", lambda self, data: (_ for _ in ()).throw(OSError(28, "No space left")))
        saver.save(tiny(2), {"w": torch.zeros(2)}, {})
        saver.thread.join()
        with pytest.raises(OSError, match=r"step 2 .*No space left.*last good checkpoint: .*step_000000001\.pt; free .*run\.keep"):
            look()
        saver.poll()  # once
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()].count("step_000000001.pt") == 1 and not list(
        tmp_path.rglob("*.tmp")
    )


def test_a_save_for_which_no_thread_can_be_started_is_made_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with checkpoint.Saver(tmp_path, keep=2) as saver:
        saver.save(tiny(1), {"w": torch.zeros(2)}, {})
    assert checkpoint.load(saver.saved)["step"] == 1 and (tmp_path / "weights.safetensors").is_file()


def test_states_in_doubt_leave_the_last_good_one(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "checkpoints"
    with checkpoint.Saver(tmp_path, keep=1) as saver:
        saver.save(tiny(1), {"w": torch.zeros(2)}, {})
        for step in (2, 3, 4):
            saver.save(tiny(step), None, {}, doubt="the loss is 1e9")
    assert [p.name for p in checkpoint.list_checkpoints(folder)] == ["step_000000001.pt", "step_000000004.pt"]
    assert capsys.readouterr().err.count("the loss is 1e9") == 1  # not at every save
    assert saver.last_good() == folder / "step_000000001.pt" and saver.saved == folder / "step_000000004.pt"
    again = checkpoint.Saver(tmp_path, keep=1)  # a process that goes on from the newest
    again.resume(saver.saved, checkpoint.load(saver.saved))
    assert again.last_good() == folder / "step_000000001.pt"
    assert checkpoint.Saver(tmp_path, keep=1, writes=False).last_good() == folder / "step_000000004.pt"  # looks what is there
    again.set_aside()
    assert [p.name for p in sorted(folder.iterdir())] == ["step_000000001.pt", "step_000000004.suspect"]


def test_a_process_that_does_not_write_names_the_checkpoint_that_lies_there(tmp_path: Path) -> None:
    saver = checkpoint.Saver(tmp_path, keep=1, writes=False)
    assert saver.last_good() == "none"
    path = checkpoint.save(tmp_path / "checkpoints", tiny(3), keep=1)
    assert saver.last_good() == path


class Malice:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_malicious_file_is_refused_and_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint.write(Path("evil.pt"), {"step": 1, "x": Malice()})  # its seal is in order
    with pytest.raises(ValueError, match=r"evil\.pt cannot be read"):
        checkpoint.load(Path("evil.pt"))
    Path("evil2.pt").write_bytes(pickle.dumps(Malice()))
    with pytest.raises(ValueError, match=r"evil2\.pt"):
        checkpoint.load(Path("evil2.pt"))
    assert not Path("executed").exists()


def test_random_state_round_trip() -> None:
    state = checkpoint.rng_state(torch.device("cpu"))
    first = torch.rand(3)
    checkpoint.load_rng_state(state, torch.device("cpu"))
    assert torch.equal(first, torch.rand(3))


def test_weights_file_round_trip_and_errors(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    weights_file.save_weights(path, {"a": torch.arange(6.0).view(2, 3).T}, {"step": "3"})
    assert torch.equal(weights_file.load_weights(path)["a"], torch.arange(6.0).view(2, 3).T)
    assert read_metadata(path) == {"step": "3"}
    path.write_bytes(b"no")
    with pytest.raises(ValueError, match=r"weights\.safetensors"):
        weights_file.load_weights(path)
    with pytest.raises(FileNotFoundError):
        weights_file.load_weights(tmp_path / "absent.safetensors")
