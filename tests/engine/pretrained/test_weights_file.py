"""A network's tensors as a file."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.files import read_metadata
from engine.pretrained import load_weights, save_weights


def test_equal_weights_are_equal_bytes(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.zeros(3, dtype=torch.int64), "none": torch.zeros(0)}
    metadata = {name: name.upper() for name in "qwertyuiop"}
    files = [tmp_path / f"{n}.safetensors" for n in range(8)]
    for path in files:
        save_weights(path, tensors, metadata)
    assert len({path.read_bytes() for path in files}) == 1
    found = load_weights(files[0])
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], value) for name, value in tensors.items())
    assert read_metadata(files[0]) == metadata
