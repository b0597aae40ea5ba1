"""Where torch's and Triton's compilers keep what they have made: where nobody else may write. Needs no torch.

They unpickle and run what lies in their folders. Left alone, torch takes one of a predictable name in the system's temporary
directory, which whoever comes first can own, and it does so when torchvision is imported. Therefore ``import engine`` chooses.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import stat
import struct
import tempfile
from pathlib import Path

from engine.errors import ConfigError
from engine.files import cache_folder, locked

FOLDERS = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
"""Environment variables that name the folders, and their names below ``cache_folder()``/compiled."""
OPTIONS = {"cpp_cache_precompile_headers": False}
"""Of ``torch.compile``: precompiled headers are kept in the system's temporary directory whatever the environment says."""


def choose() -> None:
    """Names the compilers' folders in the environment, where nobody has; makes them, mode 0700. Where the cache folder cannot be
    used, they are temporary ones of this process."""
    todo = {name: folder for name, folder in FOLDERS.items() if _is_open(os.environ.get(name))}
    for name in FOLDERS.keys() - todo.keys():
        with contextlib.suppress(OSError):  # `prepare` says it
            Path(os.environ[name]).mkdir(mode=0o700, parents=True, exist_ok=True)
    if not todo:
        return
    try:
        above = cache_folder().absolute() / "compiled"
        for folder in todo.values():
            _make(above / folder)
    except (OSError, RuntimeError):  # read-only, somebody else's, or there is no home
        try:
            above = Path(tempfile.mkdtemp(prefix="ppssl-engine-"))
        except OSError:
            return
        atexit.register(shutil.rmtree, above, ignore_errors=True)
        for folder in todo.values():
            _make(above / folder)
    os.environ.update({name: str(above / folder) for name, folder in todo.items()})


def prepare() -> None:
    """Before anything is compiled: chooses again where torch has chosen meanwhile, as in a program that imported it before the
    engine; then refuses folders that others may have written into, and removes libraries that a killed compiler left unfinished.

    Raises ``ConfigError`` naming the folder and the remedy.
    """
    choose()
    for name in FOLDERS:
        if name in os.environ:
            _check(name, Path(os.environ[name]))
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        remove_unfinished(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]))


def remove_unfinished(folder: Path) -> list[Path]:
    """Removes the libraries and object files in torch's ``folder`` that are empty or cut off, so that they are compiled again; not
    those that a compiler is writing. Returns them. Without it torch would try to load them at every start."""
    removed = []
    for path in (*folder.glob("*/*.so"), *folder.glob("*/*.o")):
        lock = folder / "locks" / f"{path.name.partition('.')[0]}.lock"
        with contextlib.suppress(OSError):  # held by its compiler, or gone: another process came first
            if not _is_whole(path):
                lock.parent.mkdir(exist_ok=True)
                with locked(lock, None):
                    if not _is_whole(path):
                        path.unlink()
                        removed.append(path)
    return removed


def _is_open(value: str | None) -> bool:
    """Whether a variable is unset, or torch has set it, here or in the process that started this one."""
    return not value or (Path(value).parent == Path(tempfile.gettempdir()) and Path(value).name.startswith("torchinductor_"))


def _make(folder: Path) -> None:
    """``folder`` and the one above it with mode 0700, what is missing. Raises OSError where this process cannot write into it."""
    folder.parent.parent.mkdir(parents=True, exist_ok=True)
    for path in (folder.parent, folder):
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written")


def _check(name: str, folder: Path) -> None:
    """Raises ``ConfigError`` for a folder that somebody else owns or may write into."""
    try:
        found = folder.stat()
    except OSError as error:
        raise ConfigError(
            f"{name}: {folder} cannot be used ({error}); set it to a folder of your own, or run.compile=off"
        ) from error
    owners = {found.st_uid, folder.lstat().st_uid} - {os.geteuid(), 0}
    if owners:
        raise ConfigError(
            f"{name}: {folder} belongs to user {owners.pop()}, and compiled code is run from there; remove it, or set {name} "
            "to a folder of yours"
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(
            f"{name}: others may write into {folder} (mode {stat.S_IMODE(found.st_mode):04o}), and compiled code is run from "
            f"there; remove it, or set {name} to a folder of mode 0700"
        )


def _is_whole(path: Path) -> bool:
    """Whether ``path`` is as long as its ELF header says: linkers put the table of sections at the end and the header first."""
    with path.open("rb") as file:
        header = file.read(64)
        size = os.fstat(file.fileno()).st_size
    if len(header) < 64 or header[:5] != b"\x7fELF\x02":
        return bool(header) and not header.startswith((b"\x7fELF", bytes(4)))  # another system's format
    order = "<" if header[5] == 1 else ">"
    (start,), (each, count) = struct.unpack_from(f"{order}Q", header, 40), struct.unpack_from(f"{order}HH", header, 58)
    return start > 0 and size >= start + each * count
