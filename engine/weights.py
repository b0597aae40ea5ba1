"""Starting weights for the trunk: torchvision's by tag, or a file under the names that other projects give their encoders."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from engine.checkpoint import load_weights

# Longest first. MoCo and LCR: module.encoder_q.; moco-v3: module.base_encoder.; solo-learn, mmpretrain, lightly: backbone.;
# torch.compile: _orig_mod.; DDP: module.; this project's training state: encoder_q.trunk.
_PREFIXES = (
    "encoder_q.trunk.",
    "base_encoder.",
    "encoder_q.",
    "_orig_mod.",
    "backbone.",
    "encoder.",
    "trunk.",
    "module.",
    "model.",
)


def initialise(trunk: nn.Module, weights: str) -> str:
    """Loads ``encoder.weights`` into ``trunk`` in place and returns a sentence for the log.

    weights: ``none``, a torchvision tag of the trunk's architecture such as ``IMAGENET1K_V1`` (downloaded by torchvision when it
    is not in its cache), or the path of a .safetensors/.pth/.pth.tar file.
    Raises ``ValueError`` when a name is unknown or nothing in the file matches, ``RuntimeError`` when a download fails,
    ``FileNotFoundError``.
    """
    if weights == "none":
        return "random initial weights"
    if Path(weights).suffix or "/" in weights:
        tensors = _read(Path(weights))
    else:
        tensors = _torchvision(trunk.arch, weights)
    matched = match_names(trunk.state_dict(), tensors)
    parameters = [name for name, _ in trunk.named_parameters()]
    found = sum(name in matched for name in parameters)
    if found == 0:
        first = ", ".join(list(tensors)[:3]) or "none"
        raise ValueError(f"encoder.weights: nothing in {weights} matches {trunk.arch}; its first names are {first}")
    trunk.load_state_dict(matched, strict=False)
    return f"{weights}: {found} of {len(parameters)} parameters matched"


def match_names(own: dict[str, Tensor], foreign: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of ``foreign`` whose name, without the known prefixes, and shape are in ``own``."""
    matched = {}
    for name, tensor in foreign.items():
        short = name
        while prefix := next((p for p in _PREFIXES if short.startswith(p)), None):
            short = short[len(prefix) :]
        if short in own and own[short].shape == tensor.shape and "encoder_k." not in name and "momentum_encoder." not in name:
            matched[short] = tensor
    return matched


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"encoder.weights: {path} is not there; give none, a torchvision tag, or an existing file")
    if path.suffix == ".safetensors":
        return load_weights(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"encoder.weights: {path} cannot be read without running code from it ({type(error).__name__}); re-save its tensors "
            f"with safetensors.torch.save_file where you trust it"
        ) from error
    for key in ("state_dict", "model"):  # the wrappers in use
        if isinstance(tensors, dict) and isinstance(tensors.get(key), dict):
            tensors = tensors[key]
    if not isinstance(tensors, dict):
        raise ValueError(f"encoder.weights: {path} holds a {type(tensors).__name__}, not a dictionary of tensors")
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}


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
