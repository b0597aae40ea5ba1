"""One writer per run folder: the lock, who may enter again, and that it ends with its process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from engine.run_folder import RunFolder, RunFolderInUse

HOLD = """
import sys, time
from pathlib import Path
from engine.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).locked():
    if len(sys.argv) > 2:  # a child that lives on
        import os
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder: Path, *options: str) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), *options], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout.readline() == b"held\n"
    return process


def end(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_another_process_is_named(tmp_path: Path) -> None:
    holder = hold(tmp_path / "run")
    try:
        with (
            pytest.raises(RunFolderInUse, match=rf"pid {holder.pid} on .*since .*--out") as refused,
            RunFolder(tmp_path / "run").locked(),
        ):
            pass
        assert str(tmp_path / "run") in str(refused.value)
    finally:
        end(holder)


@pytest.mark.parametrize("options", [[], ["with a child"]], ids=["alone", "a child lives on"])
def test_the_lock_ends_with_its_process(tmp_path: Path, options: list[str]) -> None:
    holder = hold(tmp_path / "run", *options)
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    try:
        started = time.monotonic()
        with RunFolder(tmp_path / "run").locked():
            assert time.monotonic() - started < 5
    finally:
        if options:
            os.killpg(holder.pid, signal.SIGKILL)


def test_the_same_thread_may_enter_again_and_another_may_not(tmp_path: Path) -> None:
    refused = []

    def enter() -> None:
        try:
            with RunFolder(tmp_path / "run").locked():
                pass
        except RunFolderInUse as error:
            refused.append(str(error))

    with RunFolder(tmp_path / "run").locked():
        enter()
        assert refused == []
        other = threading.Thread(target=enter)
        other.start()
        other.join()
    assert len(refused) == 1 and "another thread" in refused[0]
    enter()
    assert len(refused) == 1


def test_a_folder_that_is_moved_aside_stays_locked(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("old")
    check = (
        "import sys; from pathlib import Path; from engine.run_folder import *\nwith RunFolder(Path(sys.argv[1])).locked(): pass"
    )
    with RunFolder(run).locked():
        RunFolder(run).move_aside()
        assert (tmp_path / "run.1" / "config.yaml").read_text() == "old" and RunFolder(run).is_empty()
        tried = subprocess.run([sys.executable, "-c", check, str(run)], capture_output=True, text=True)
        assert tried.returncode == 1 and f"pid {os.getpid()}" in tried.stderr
    subprocess.run([sys.executable, "-c", check, str(run)], check=True)


def test_nothing_is_left_of_a_run_that_wrote_nothing(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run").locked():
        pass
    assert not (tmp_path / "run").exists()
    (tmp_path / "mine").mkdir()
    with RunFolder(tmp_path / "mine").locked():
        pass
    assert RunFolder(tmp_path / "mine").is_empty()


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def none(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", none)
    with RunFolder(tmp_path / "run").locked():
        pass
    assert "gives no locks" in capsys.readouterr().err
