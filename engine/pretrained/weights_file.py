"""A network's tensors as a safetensors file."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor

from engine.files import write_atomically


def save_weights(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes ``tensors`` as safetensors, atomically. Raises ``OSError``, as when the disk is full."""
    content = serialize({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata)
    write_atomically(path, lambda temporary: Path(temporary).write_bytes(content))


def load_weights(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file. Raises ``FileNotFoundError``, or ``ValueError`` naming the file when it is not one."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there")
    try:
        return load_file(path)
    except Exception as error:
        raise ValueError(f"{path} is not a safetensors file ({error})") from error
