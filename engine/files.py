"""Files of every room: atomic writes, locks, and the folder for what may be computed again. Needs no torch."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import safe_open

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def write_atomically(path: Path, write: Callable[[str], object]) -> None:
    """Calls ``write(temporary name)``, flushes that file to the disk and renames it to ``path``: readers see the old file or the
    whole new one, and a full disk leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp gives 0600
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)  # a full disk does not say which file it was
        raise
    if os.name == "nt":
        return  # Windows opens no folders
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def inside(folder: Path, path: Path) -> Path:
    """``path``, which is to be written below ``folder``. Raises ``OSError`` where a link leads out of it: a folder that somebody
    else made decides nothing outside of itself."""
    if not path.parent.resolve().is_relative_to(folder.resolve()):
        raise OSError(f"{path} would be written to {path.parent.resolve()}, outside of {folder}, through a link; remove the link")
    return path


def write_text(path: Path, text: str) -> None:
    """``write_atomically`` of a text in UTF-8."""
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


@contextlib.contextmanager
def locked(path: Path, on_wait: Callable[[str], object] | None) -> Iterator[None]:
    """Holds the lock file ``path``, which is made where it is missing, within the block; it ends with the process.

    on_wait: called once with the holder, as far as it is known, before waiting for another process; None does not wait.
    Raises BlockingIOError where it may not wait, OSError for a link or anything else that is no plain file: what lies under a
    predictable name may have been put there by somebody else. Where the system has no such locks (Windows) nothing is held.
    """
    if fcntl is None:
        yield
        return
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if on_wait is None:
                    raise
                on_wait(os.pread(file, 200, 0).decode(errors="replace").strip() or "another process")
                fcntl.flock(file, fcntl.LOCK_EX)
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
                raise OSError(f"{path} is no plain file of its own, as a lock should be; remove it")
            if not found.st_nlink:  # removed between opening and locking: whoever comes next locks another file
                continue
            os.ftruncate(file, 0)
            os.write(file, f"pid {os.getpid()} on {socket.gethostname()}".encode())
            yield
            return
        finally:
            os.close(file)


def remove_temporary_files(folder: Path) -> None:
    """Removes what writers that died left in ``folder``: their temporary files. Nobody may be writing there meanwhile."""
    for left in folder.glob(".*.tmp") if folder.is_dir() else ():
        left.unlink(missing_ok=True)


def cache_folder() -> Path:
    """$PPSSL_CACHE, else $XDG_CACHE_HOME/ppssl-engine, else ~/.cache/ppssl-engine."""
    if own := os.environ.get("PPSSL_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ppssl-engine"


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    with safe_open(path, "np") as file:
        return file.metadata() or {}
