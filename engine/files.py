"""Files of every room: atomic writes, and the folder for what may be computed again. Needs no torch."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open


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
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
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
