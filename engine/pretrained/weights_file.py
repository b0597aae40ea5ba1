"""A network's tensors as a safetensors file."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor

from engine.console import printable
from engine.files import write_atomically
from engine.pretrained.file_kind import AGAIN, is_safetensors, other_kind


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
    """Reads a safetensors file. Raises ``FileNotFoundError``, or ``ValueError`` naming the file, what it is, and what helps."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there")
    try:
        return load_file(path)
    except Exception as error:
        if is_safetensors(path):
            reason = f"cut short or damaged ({printable(str(error))}); {AGAIN}"
        else:
            reason = other_kind(path) or "of torch.save; give its name another ending than .safetensors"
        raise ValueError(f"{path} is not a safetensors file: it is {reason}") from error


def refuse_not_finite(tensors: dict[str, Tensor], what: str) -> None:
    """Raises ``ValueError`` naming the first of ``tensors`` with a NaN or an infinity, and ``what`` file they are of."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and (count := int((~torch.isfinite(tensor)).sum())):
            raise ValueError(
                f"{what}: {count:,} of the {tensor.numel():,} numbers of {printable(name)} are not finite, as of a training that "
                f"diverged; give an earlier checkpoint, or weights from elsewhere"
            )
