"""Checkpoints: everything the loop mutates, as tensors and plain data, never replaced by half a file; and a run's network."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 1
_NAME = re.compile(r"step_(\d{9})\.pt")


def write_atomically(path: Path, write: Callable[[str], None]) -> None:
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


def save(folder: Path, state: dict[str, Any], *, keep: int) -> Path:
    """Writes ``folder/step_<state["step"]>.pt`` and removes all but the newest ``keep``. Only tensors and plain data may be in
    ``state``. Raises ``OSError`` when the disk is full; the checkpoints before it are untouched."""
    path = folder / f"step_{state['step']:09d}.pt"
    write_atomically(path, lambda temporary: torch.save({"format": FORMAT, **state}, temporary))
    for old in list_checkpoints(folder)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in ``folder``, oldest first."""
    return sorted(p for p in folder.glob("step_*.pt") if _NAME.fullmatch(p.name)) if folder.is_dir() else []


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU without running any code from it.

    Raises ``FileNotFoundError``, or ``ValueError`` naming the file when it is not one of ours or is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"resume: there is no checkpoint {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several types for damaged or foreign files
        raise ValueError(f"resume: {path} cannot be read as a checkpoint ({type(error).__name__}); give an older one") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"resume: {path} is not a checkpoint of this trainer (format {FORMAT}); for weights use encoder.weights=")
    return state


def rng_state() -> dict[str, Any]:
    """The state of torch's generators, for ``load_rng_state``."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def load_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def save_weights(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes ``tensors`` as safetensors, atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def load_weights(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file. Raises ``FileNotFoundError``, or ``ValueError`` naming the file when it is not one."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there")
    try:
        return load_file(path)
    except Exception as error:
        raise ValueError(f"{path} is not a safetensors file ({error})") from error


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}
