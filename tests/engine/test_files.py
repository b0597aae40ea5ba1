"""Locks: held by one process, never through a link, and nothing under their name is written over."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.files import locked
from engine.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys
from pathlib import Path
from engine.files import locked
with locked(Path(sys.argv[1]), None):
    print(flush=True)
    input()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock ``tmp_path``/lock."""
    command = [sys.executable, "-c", HOLD, tmp_path / "lock"]
    process = subprocess.Popen(command, stdin=-1, stdout=-1, env=os.environ | {"PYTHONPATH": str(ROOT)})
    process.stdout.readline()
    yield process
    process.kill()
    process.communicate()


def test_a_held_lock_names_its_holder_once_and_ends_with_it(tmp_path, holder) -> None:
    with pytest.raises(BlockingIOError), locked(tmp_path / "lock", None):
        pass
    said = []

    def waits(who: str) -> None:
        said.append(who)
        holder.kill()

    with locked(tmp_path / "lock", waits):
        assert said == [f"pid {holder.pid} on {os.uname().nodename}"]
        assert (tmp_path / "lock").read_text() == f"pid {os.getpid()} on {os.uname().nodename}"
    with locked(tmp_path / "lock", None):
        pass


@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link", "pipe", "folder"])
def test_what_lies_under_a_lock_s_name_is_not_touched(tmp_path, kind) -> None:
    mine, lock = tmp_path / "thesis.tex", tmp_path / "lock"
    mine.write_text("precious")
    if kind == "pipe":
        os.mkfifo(lock)
    elif kind == "folder":
        lock.mkdir()
    elif kind == "hard link":
        os.link(mine, lock)
    else:
        lock.symlink_to(mine if kind == "link" else tmp_path / "new")
    began = time.monotonic()
    with pytest.raises(OSError, match="lock"), locked(lock, None):
        pass
    assert mine.read_text() == "precious" and not (tmp_path / "new").exists() and time.monotonic() - began < 5


def test_a_run_folder_s_lock_is_no_link(tmp_path) -> None:
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match=r"\.lock"), RunFolder(tmp_path / "run").locked():
        pass
    assert (tmp_path / "mine").read_text() == "precious"
