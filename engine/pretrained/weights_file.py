"""A network's tensors as a safetensors file."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor

from engine.files import write_atomically


def save_weights(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes ``tensors`` as safetensors, atomically. Raises ``OSError``, as when the disk is full."""
    content = serialize({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata)
    write_atomically(path, lambda temporary: Path(temporary).write_bytes(_with_sorted_metadata(content)))


def _with_sorted_metadata(content: bytes) -> bytes:
    """The file with its metadata in order, so that equal weights are equal bytes (the library hashes it with a random key). A
    file is the length of its header (8 bytes, little-endian), the header as JSON padded to 8 bytes, and the data."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[end:]


def load_weights(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file. Raises ``FileNotFoundError``, or ``ValueError`` naming the file when it is not one."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there")
    try:
        return load_file(path)
    except Exception as error:
        raise ValueError(f"{path} is not a safetensors file ({error})") from error
