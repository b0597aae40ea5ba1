"""The compilers' folders: chosen before torch chooses, nobody else's, and free of what a killed compiler left."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from engine import compiler_cache
from engine.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess:
    """Runs ``code`` with a cache folder and a temporary folder of its own, under a umask that lets the group write."""
    (tmp_path / "temporary").mkdir(exist_ok=True)
    clean = {name: value for name, value in os.environ.items() if name not in compiler_cache.FOLDERS}
    clean |= {"PPSSL_CACHE": str(tmp_path / "cache"), "TMPDIR": str(tmp_path / "temporary"), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True, umask=0o002, timeout=280
    )


def test_the_engine_chooses_before_torch_does(tmp_path) -> None:
    code = "import os, sys, engine; assert 'torch' not in sys.modules; import engine.train; print(*map(os.environ.get, {}))"
    folder = tmp_path / "cache/compiled"
    found = python(code.format(tuple(compiler_cache.FOLDERS)), tmp_path)
    assert found.stdout.split() == [f"{folder}/inductor", f"{folder}/triton"], found.stderr
    assert [path.stat().st_mode & 0o777 for path in (folder, *sorted(folder.iterdir()))] == [0o700] * 3
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize("first", ["torchvision, engine", "engine, torchvision"])
def test_what_torch_chose_before_is_replaced(tmp_path, first) -> None:
    show = f"import {first}\nfrom engine import compiler_cache\ncompiler_cache.prepare()\nimport os\n"
    show += "from torch._inductor.codecache import cache_dir\nprint(cache_dir(), os.environ['TRITON_CACHE_DIR'])"
    folder = tmp_path / "cache/compiled"
    assert python(show, tmp_path).stdout.split() == [f"{folder}/inductor", f"{folder}/triton"]


def test_what_a_person_chose_is_kept_and_made_private(tmp_path, monkeypatch) -> None:
    own = tmp_path / "above/own"
    monkeypatch.setenv("PPSSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(own))
    monkeypatch.delenv("TRITON_CACHE_DIR")
    before = os.umask(0o002)
    try:
        compiler_cache.choose()
    finally:
        os.umask(before)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(own) and own.stat().st_mode & 0o777 == 0o700
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "cache/compiled/triton")


def test_a_process_started_by_one_in_which_torch_chose_chooses_itself(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PPSSL_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / "torchinductor_somebody"))
    compiler_cache.choose()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "compiled/inductor")


def test_without_a_cache_folder_the_folders_are_temporary_and_private(tmp_path) -> None:
    (tmp_path / "file").touch()
    code = "import os, engine, torchvision; f = os.environ['TORCHINDUCTOR_CACHE_DIR']; print(f, oct(os.stat(f).st_mode & 0o777))"
    found = python(code, tmp_path, PPSSL_CACHE=str(tmp_path / "file"))
    folder, mode = found.stdout.split()
    assert folder.startswith(str(tmp_path / "temporary/ppssl-engine-")) and mode == "0o700"
    assert list((tmp_path / "temporary").iterdir()) == []  # gone with the process


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The folder of torch's compiler."""
    monkeypatch.setenv("PPSSL_CACHE", str(tmp_path / "cache"))
    for name in compiler_cache.FOLDERS:
        monkeypatch.delenv(name)
    compiler_cache.choose()
    return tmp_path / "cache/compiled/inductor"


@pytest.mark.parametrize("name", ["inductor", "triton"])
def test_a_folder_that_others_may_write_into_is_refused(folder, name) -> None:
    compiler_cache.prepare()
    for mode in (0o770, 0o707):
        folder.with_name(name).chmod(mode)
        with pytest.raises(ConfigError, match=rf"others may write into .*{name} \(mode {mode:04o}\).*; remove it, or set"):
            compiler_cache.prepare()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
@pytest.mark.parametrize("through", ["folder", "link"])
def test_a_folder_of_somebody_else_is_refused(folder, through) -> None:
    if through == "link":
        folder.rename(folder.with_name("theirs"))
        folder.symlink_to(folder.with_name("theirs"))
    os.chown(folder, 4321, -1, follow_symlinks=False)
    with pytest.raises(ConfigError, match="TORCHINDUCTOR_CACHE_DIR: .* belongs to user 4321"):
        compiler_cache.prepare()


@pytest.fixture
def library(folder) -> Path:
    """A whole library where torch keeps one."""
    path = folder / "ab/cabc.main.so"
    path.parent.mkdir()
    shutil.copy(next(p for p in Path(sys.prefix).rglob("*.so") if p.stat().st_size < 1 << 20), path)
    return path


@pytest.mark.parametrize("size", [0, 40, 64, 4000, -1])
def test_a_library_that_was_not_finished_is_removed(folder, library, size) -> None:
    assert compiler_cache.remove_unfinished(folder) == []
    os.truncate(library, size % library.stat().st_size)
    assert compiler_cache.remove_unfinished(folder) == [library] and not library.exists()


def test_a_library_whose_header_is_not_yet_written_is_removed(folder, library) -> None:
    library.write_bytes(bytes(5000))
    assert compiler_cache.remove_unfinished(folder) == [library]


def test_a_library_that_is_being_written_stays(folder, library) -> None:
    os.truncate(library, 0)
    (folder / "locks").mkdir()
    with (folder / "locks/cabc.lock").open("w") as lock:  # as torch holds it
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert compiler_cache.remove_unfinished(folder) == [] and library.exists()
    assert compiler_cache.remove_unfinished(folder) == [library]


COMPILE = """
import os, sys, tempfile
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event in ("open", "ctypes.dlopen", "os.mkdir") else None)
from engine import compiler_cache
from engine.training.step import _how
import torch
import torch._inductor.config
torch._inductor.config.cpp.simdlen = 1  # does not look for the processor's vector instructions, which takes long
compiler_cache.prepare()
print(torch.compile(lambda x: (x.sin().relu() * 2).sum(), **_how("inductor"))(torch.ones(1000)).item())
shared = [path for path in opened if path.startswith(tempfile.gettempdir() + "/torchinductor_")]
assert not shared, shared
"""


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_compiling_uses_no_shared_folder_and_its_libraries_are_told_from_unfinished_ones(tmp_path) -> None:
    found = python(COMPILE, tmp_path)
    assert not found.returncode, found.stderr
    folder = tmp_path / "cache/compiled/inductor"
    libraries = sorted(folder.glob("*/*.so"))
    assert libraries and compiler_cache.remove_unfinished(folder) == []
    for library in libraries:
        os.truncate(library, 0)
    assert sorted(compiler_cache.remove_unfinished(folder)) == libraries  # torch compiles what is not there
