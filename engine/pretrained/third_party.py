"""Starting weights for the trunk: torchvision's by tag, or a file under the names that other projects give their encoders."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.pretrained.weights_file import load_weights

# Put between the names of modules by torch.compile and by (Distributed)DataParallel.
_WRAPPERS = ("_orig_mod", "module")
# Children of torchvision's ResNet by position: how lightly's nn.Sequential(*list(resnet.children())[:-1]) counts them.
_CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
# A network that follows the trained one has the same names; between the two the trained one is taken.
_FOLLOWER = re.compile(r"(^|[._])(encoder_k|key|momentum|target|teacher|ema)([._]|$)")


class Match(NamedTuple):
    """What of a file fits a network."""

    tensors: dict[str, Tensor]
    """By the network's own names."""
    prefix: str
    """What stood before these names in the file."""
    left_over: list[str]
    """Names of the file that are not used."""
    misshapen: dict[str, tuple[list[int], list[int]]]
    """Own name: (shape in the file, shape wanted)."""


def initialize(trunk: nn.Module, weights: str) -> str:
    """Loads ``encoder.weights`` into ``trunk`` in place and returns a sentence for the log: how many of its parameters and buffers
    were found, under which names, and what of the file was left over.

    weights: ``none``, a torchvision tag of the trunk's architecture such as ``IMAGENET1K_V1`` (downloaded by torchvision when it
    is not in its cache), or the path of a .safetensors/.pth/.pth.tar/.ckpt file. Read are torchvision, timm, MoCo (also v3), LCR
    and LearnMat, solo-learn, lightly, DINO and whatever else keeps torchvision's names below a prefix, with or without the
    prefixes of DistributedDataParallel and torch.compile, and this engine's weights and checkpoints.
    Raises ``ValueError`` when a name is unknown, nothing in the file matches, a tensor has another shape, or the file cannot be
    read without running code from it; ``RuntimeError`` when a download fails; ``FileNotFoundError``.
    """
    if weights == "none":
        return "random initial weights"
    tree = read(Path(weights)) if Path(weights).suffix or "/" in weights else _torchvision(trunk.arch, weights)
    own = trunk.state_dict()
    matches = [match_names(own, tensors, path) for path, tensors in _containers(tree)]
    if not matches:
        raise ValueError(f"encoder.weights: {weights} holds a {type(tree).__name__} without named tensors")
    # the most tensors win; of equals the trained network, then the first
    found = max(matches, key=lambda m: (len(m.tensors), not _FOLLOWER.search(m.prefix), len(m.misshapen)))
    if found.misshapen:
        name, (there, here) = next(iter(found.misshapen.items()))
        more = f" and {len(found.misshapen) - 1} more differ" if len(found.misshapen) > 1 else ""
        raise ValueError(
            f"encoder.weights: {weights} is of another network than {trunk.arch}: its {name} is {there}, here it is {here}{more}; "
            f"set encoder.arch to what the file was trained with"
        )
    parameters = [name for name, _ in trunk.named_parameters()]
    buffers = [name for name, _ in trunk.named_buffers()]
    missing = [name for name in parameters if name not in found.tensors]
    if len(missing) == len(parameters):
        first = ", ".join(found.left_over[:3]) or "none"
        raise ValueError(f"encoder.weights: nothing in {weights} matches {trunk.arch}; its first names are {first}")
    trunk.load_state_dict(found.tensors, strict=False)
    note = (
        f"{weights}: {len(parameters) - len(missing)} of {len(parameters)} parameters and "
        f"{sum(name in found.tensors for name in buffers)} of {len(buffers)} buffers matched"
    )
    note += f" (below {found.prefix})" if found.prefix else ""
    note += f"; not in the file and still random: {_summary(missing)}" if missing else ""
    return note + (f"; left over in the file: {_summary(found.left_over)}" if found.left_over else "")


def match_names(own: dict[str, Tensor], foreign: dict[str, Tensor], path: str = "") -> Match:
    """The tensors of ``foreign`` that are named like those of ``own``, below whichever prefix finds the most of them.

    path: where ``foreign`` lies in its file; it only counts in the choice between a network and its follower.
    """
    groups: dict[str, dict[str, str]] = {"": {}}  # prefix: {own name: name in the file}
    for name in foreign:
        parts = [part for part in name.split(".") if part not in _WRAPPERS]
        for i, part in enumerate(parts):
            for first in (part, _CHILDREN.get(part)):
                if first and (tail := ".".join([first, *parts[i + 1 :]])) in own:
                    groups.setdefault(".".join(parts[:i]), {})[tail] = name

    def fitting(prefix: str) -> dict[str, Tensor]:
        return {n: foreign[f] for n, f in groups[prefix].items() if own[n].shape == foreign[f].shape}

    prefix = max(groups, key=lambda p: (len(fitting(p)), not _FOLLOWER.search(p), len(groups[p])))
    used = groups[prefix]
    tensors = fitting(prefix)
    misshapen = {n: (list(foreign[f].shape), list(own[n].shape)) for n, f in used.items() if n not in tensors}
    left_over = sorted(set(foreign) - set(used.values()))
    return Match(tensors, ".".join(filter(None, (path, prefix))), left_over, misshapen)


def read(path: Path) -> Any:
    """What a weights file holds, as tensors and plain data, without running code from it.

    Raises ``FileNotFoundError``, or ``ValueError`` naming the file and the remedy.
    """
    if not path.is_file():
        raise FileNotFoundError(f"encoder.weights: {path} is not there; give none, a torchvision tag, or an existing file")
    if path.suffix == ".safetensors":
        return load_weights(path)
    try:
        # timm and many scripts keep their command line beside the tensors; a Namespace only holds attributes
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several types
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {wanted[1]}" if wanted else type(error).__name__
        raise ValueError(
            f"encoder.weights: {path} cannot be read without running code from it ({reason}). Where you trust it, keep its tensors "
            f"alone, once: python -c \"import torch; f = torch.load('{path}', 'cpu', weights_only=False); "
            f"torch.save(f.get('state_dict', f), '{path.with_suffix('.tensors.pth')}')\""
        ) from error


def _containers(tree: Any, path: str = "") -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every dictionary in ``tree`` that holds tensors, with the keys that lead to it: files wrap their state in ``state_dict``,
    ``model``, ``student`` and other names, beside the optimizer's."""
    if not isinstance(tree, dict):
        return
    tensors = {str(key): value for key, value in tree.items() if isinstance(value, Tensor)}
    if tensors:
        yield path, tensors
    for key, value in tree.items():
        yield from _containers(value, f"{path}.{key}" if path else str(key))


def _summary(names: list[str]) -> str:
    """How many names begin with which module."""
    counts = Counter(next((p for p in name.split(".") if p not in _WRAPPERS), name) for name in names)
    return ", ".join(f"{module} {count}" for module, count in counts.most_common(8)) + (", ..." if len(counts) > 8 else "")


def _torchvision(arch: str, tag: str) -> dict[str, Tensor]:
    from torchvision.models import get_model_weights, list_models

    if arch not in list_models():
        raise ValueError(f"encoder.weights: torchvision has no weights for {arch}; use none or a file")
    known = get_model_weights(arch).__members__
    if tag not in known:
        raise ValueError(f"encoder.weights: torchvision's {arch} has no weights {tag!r}; use {', '.join(known)}, none or a file")
    entry = known[tag]
    cached = Path(torch.hub.get_dir()) / "checkpoints" / entry.url.rsplit("/", 1)[-1]
    try:
        return entry.get_state_dict(progress=True, check_hash=True)
    except OSError as error:
        raise RuntimeError(
            f"encoder.weights: {tag} of {arch} is not at {cached} and could not be downloaded ({error}); put {cached.name} there, "
            f"or set encoder.weights=PATH, or encoder.weights=none to start from random weights"
        ) from error
