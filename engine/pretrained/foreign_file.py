"""What somebody else's weights file holds: as tensors and plain data, without running code from it and without letting it take more
memory than it is long; and for what is no weights file, what it is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.console import printable
from engine.pretrained.file_kind import AGAIN, is_safetensors, other_kind
from engine.pretrained.weights_file import load_weights

AUTHOR = (
    "Whoever made it can save the tensors alone, where the model is at hand: torch.save(model.state_dict(), 'weights.pth'), or "
    "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
)
"""The remedy for what is more than tensors."""
_OBJECTS = 64
"""Kinds of objects that a file may hold beside its tensors."""
_PATH = 200
"""Characters from which a path into a file is not made longer."""


class Contents(NamedTuple):
    """A weights file that has been read."""

    tree: Any
    """Tensors and plain data; ``Unbuilt`` where an object of some class stood."""
    unbuilt: list[str]
    """The classes of these objects."""


class Unbuilt:
    """Stands for an object of the class or function ``name`` of a file, which is neither imported nor called."""

    name = ""

    def __new__(cls, *_: object, **__: object) -> Unbuilt:
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def read(path: Path) -> Contents:
    """What the file ``path`` holds; its first bytes decide how it is read, not its name.

    Raises ``FileNotFoundError``, or ``ValueError`` that names the file, says what it is and what helps.
    """
    if path.is_dir():
        raise FileNotFoundError(f"encoder.weights: {path} is a folder; of a run folder give {path / 'weights.safetensors'}")
    if not path.is_file():
        raise FileNotFoundError(f"encoder.weights: {path} is not there; give none, a torchvision tag, or an existing file")
    if is_safetensors(path):
        return Contents(load_weights(path), [])
    if reason := other_kind(path):
        raise ValueError(f"encoder.weights: {path} is {reason}")
    unbuilt: dict[str, type[Unbuilt]] = {}
    while True:
        try:
            with torch.serialization.safe_globals([(kind, name) for name, kind in unbuilt.items()]):
                tree = torch.load(path, map_location="cpu", weights_only=True)
            return Contents(tree, [kind.name for kind in unbuilt.values()])
        except Exception as error:  # torch raises several types
            wanted = re.search(r"Unsupported global: GLOBAL (\S+) was not", str(error))
            name = wanted[1] if wanted else ""
            key = name if "." in name else f"builtins.{name}"
            if not name or key in unbuilt or len(unbuilt) == _OBJECTS:
                if unbuilt and "persistent_load" in str(error):  # before PyTorch 1.6 a module was stored with its source
                    reason = f"holds {whole_model([kind.name for kind in unbuilt.values()])}"
                else:
                    reason = _unreadable(error, path.stat().st_size)
                raise ValueError(f"encoder.weights: {path} {reason}") from error
            unbuilt[key] = type("Unbuilt", (Unbuilt,), {"name": key})


def _unreadable(error: Exception, size: int) -> str:
    text = str(error)
    if isinstance(error, EOFError) or "Ran out of input" in text or "unexpected EOF" in text or "PytorchStreamReader" in text:
        return f"is cut short or damaged ({size:,} bytes); {AGAIN}"
    asked = re.search(r"GLOBAL (\S+)", text)
    if asked:
        return f"cannot be read without running code from it (it asks for {printable(asked[1])}), which is not done. {AUTHOR}"
    if "Unsupported operand" in text:  # of a pickle protocol that torch does not write
        return f"is a pickle that is not of torch.save and cannot be read without running code from it, which is not done. {AUTHOR}"
    # what torch says around it advises to run the file's code
    inner = text.partition("WeightsUnpickler error:")[2] or text.partition("\n\n\n")[2] or text
    reason = printable(inner.strip().partition("\n")[0])[:200]
    return f"cannot be read ({type(error).__name__}: {reason}). {AUTHOR}"


def whole_model(unbuilt: list[str]) -> str:
    """What a file holds that has objects of classes in place of named tensors, and what helps."""
    return f"a whole model ({printable(unbuilt[0])}) and not its named tensors. {AUTHOR}"


def containers(tree: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every dictionary in ``tree`` that holds tensors, with the keys that lead to it: files wrap their state in ``state_dict``,
    ``model``, ``student`` and other names, beside the optimizer's. Each is given once, however deep it lies."""
    waiting, seen = [("", tree)], set()
    while waiting:
        path, node = waiting.pop()
        if not isinstance(node, dict) or id(node) in seen:
            continue
        seen.add(id(node))
        tensors = {str(key): value for key, value in node.items() if isinstance(value, Tensor)}
        if tensors:
            yield path, tensors
        for key, value in reversed(node.items()):
            if isinstance(value, dict):
                waiting.append((path if len(path) > _PATH else f"{path}.{key}" if path else str(key), value))
