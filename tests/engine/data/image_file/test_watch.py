"""The check goes on whatever a file does to its decoder, and remembers only what is the file's own fault."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import threading
import time
from pathlib import Path

import numpy as np
import odd_files
import pytest
from miniatures import open_set, picture

from engine.data.image_file import Watch, watch

RGB, PALETTE = odd_files.picture(), odd_files.picture("P")
SOUND = {
    "jpg": odd_files.encoded(RGB, "JPEG"),
    "progressive.jpg": odd_files.encoded(RGB, "JPEG", progressive=True),
    "png": odd_files.encoded(odd_files.picture("RGBA"), "PNG"),
    "palette.png": odd_files.encoded(PALETTE, "PNG"),
    "tif": odd_files.encoded(RGB, "TIFF", compression="tiff_lzw"),
    "jpeg.tif": odd_files.encoded(RGB, "TIFF", compression="jpeg"),
    "gif": odd_files.encoded(PALETTE, "GIF"),
    "bmp": odd_files.encoded(RGB, "BMP"),
    "webp": odd_files.encoded(RGB, "WEBP"),
    "avif": odd_files.encoded(RGB, "AVIF"),
    "jp2": odd_files.encoded(RGB, "JPEG2000"),
    "ppm": odd_files.encoded(RGB, "PPM"),
    "12 bits.pgm": odd_files.every()["12 bits.pgm"],
}


def mutated(rng: np.random.Generator, whole: bytes) -> bytes:
    """Cut, bytes overwritten, repeated or removed; most changes lie where the headers are."""
    data = bytearray(whole)
    for _ in range(int(rng.integers(1, 6))):
        at = int(len(data) * rng.random() ** 3)
        length = int(rng.integers(1, 9))
        match int(rng.integers(0, 5)):
            case 0:
                data[at : at + length] = rng.integers(0, 256, length, np.uint8).tobytes()
            case 1:
                data[at : at + length] = b"\xff" * length
            case 2:
                data[at:at] = data[at : at + 50 * length]
            case 3:
                del data[at : at + length]
            case 4:
                del data[max(at, 12) :]
    return bytes(data)


@pytest.mark.parametrize("kind", SOUND)
def test_mutated_images_are_judged_in_bounded_time_and_memory(kind, tmp_path):
    rng = np.random.default_rng(len(kind))
    refused = 0
    started = time.process_time()
    with Watch() as watched:
        for i in range(40):
            path = tmp_path / f"{i}.{kind}"
            path.write_bytes(mutated(rng, SOUND[kind]))
            verdict = watched.judge(path)
            assert verdict.lasting and (verdict.reason is None or verdict.reason.strip())
            assert verdict.reason is not None or min(verdict.height, verdict.width) > 0
            refused += verdict.reason is not None
    assert refused > 0 and time.process_time() - started < 40
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert peak < 3 << 20  # KiB: one file as it is and decoded, and the process


def odd(path: Path) -> Path:
    """A file that goes to a process of its own."""
    odd_files.picture("P").save(path)
    return path


def test_ordinary_photographs_need_no_process(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "_Child", lambda: pytest.fail("a process was started"))
    with Watch() as watched:
        for name in ("a.jpg", "b.png", "c.jpg"):
            assert watched.judge(picture(tmp_path / name)).plain
        (tmp_path / "d.jpg").write_bytes(b"<html>")
        assert "HTML" in watched.judge(tmp_path / "d.jpg").reason


def hostile(tmp_path: Path, monkeypatch, code: str) -> None:
    """Runs ``code`` in the processes in place of decoding a file whose name begins with x."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if any('watch' in a for a in sys.orig_argv):\n"
        "    from engine.data.image_file import watch\n"
        "    real = watch.read_bytes\n"
        f"    def read(path):\n        if '/x' in str(path):\n            {code}\n        return real(path)\n"
        "    watch.read_bytes = read\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.parametrize(
    ("code", "reason", "lasting"),
    [
        ("while True: pass", "takes more than 1 s to decode", True),
        ("import os; os.kill(os.getpid(), 11)", r"crashes the decoder \(SIGSEGV\)", True),
        ("import os; os.kill(os.getpid(), 9)", "ended by SIGKILL; was there too little memory", False),
        ("bytearray(8 << 30)", "not enough memory", False),
        ("import time; time.sleep(60)", "could not be read within 2 s", False),
    ],
)
def test_a_file_that_ends_or_hangs_its_process_is_a_reason_and_the_next_is_read(code, reason, lasting, tmp_path, monkeypatch):
    hostile(tmp_path, monkeypatch, code)
    monkeypatch.setattr(watch, "_WAIT", 2 if "sleep" in code else 30)
    monkeypatch.setattr(watch, "SECONDS", 1)
    with Watch() as watched:
        bad, good = watched.judge(odd(tmp_path / "x.png")), watched.judge(odd(tmp_path / "good.png"))
        assert good.reason is None and good.lasting
    assert re.search(reason, bad.reason) and bad.lasting == lasting


def test_processes_end_with_the_check_and_with_their_parent(tmp_path):
    with Watch() as watched:
        threads = [threading.Thread(target=watched.judge, args=(odd(tmp_path / f"{i}.png"),)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        children = [watched._idle.get_nowait() for _ in range(watched._idle.qsize())]
        assert 1 <= len(children) <= 3
        for child in children:
            watched._idle.put(child)
    assert all(child._process.returncode == 0 for child in children)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.ENOMEM])
def test_a_failure_to_read_is_not_remembered(number, folder, tmp_path, monkeypatch):
    real = watch.read_bytes

    def failing(path: Path) -> bytes:
        if path.name == "2.png":
            raise OSError(number, os.strerror(number))
        return real(path)

    monkeypatch.setattr(watch, "read_bytes", failing)
    bad = open_set("folder", folder, cache_dir=tmp_path / "cache").bad
    assert [(b.name, b.reason) for b in bad] == [("train/a b/2.png", f"cannot be read now ({os.strerror(number)})")]
    (cache,) = (tmp_path / "cache").iterdir()
    assert "train/a b/2.png" not in json.loads(cache.read_text().partition("\n")[2])["files"]
    monkeypatch.setattr(watch, "read_bytes", real)
    assert not open_set("folder", folder, cache_dir=tmp_path / "cache").bad


def test_a_verdict_on_content_is_remembered(folder, tmp_path, monkeypatch):
    (folder / "train/a b/cut.jpg").write_bytes((folder / "train/a b/1.jpg").read_bytes()[:-50])
    first = open_set("folder", folder, cache_dir=tmp_path / "cache").bad
    monkeypatch.setattr(Watch, "judge", lambda self, path: pytest.fail(f"{path} was opened again"))
    assert first and open_set("folder", folder, cache_dir=tmp_path / "cache").bad == first


def test_signals_that_end_a_decoder_are_told_apart():
    assert watch._died(-signal.SIGABRT, False).lasting and not watch._died(-signal.SIGTERM, False).lasting
    assert not watch._died(1, False).lasting and "code 1" in watch._died(1, False).reason


@pytest.mark.parametrize("fault", ["no process", "a process that does not start"])
def test_without_a_process_files_are_read_in_the_thread(fault, tmp_path, monkeypatch):
    if fault == "no process":

        def refused(*arguments, **options):
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

        monkeypatch.setattr(watch.subprocess, "Popen", refused)
    else:
        monkeypatch.setattr(watch.sys, "executable", "/bin/false")
    with Watch() as watched:
        assert watched.judge(odd(tmp_path / "a.png")).height == odd_files.SIDE
