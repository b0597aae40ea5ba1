"""Starting weights for the trunk: torchvision's by tag, or a file under the names that other projects give their encoders."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.console import printable
from engine.pretrained import foreign_file, model_folder, timm_weights, weights_file
from ppssl.encoder import RESNETS
from ppssl.timm_trunk import PREFIX, TimmTrunk, image_input

# Put between the names of modules by torch.compile and by (Distributed)DataParallel.
_WRAPPERS = ("_orig_mod", "module")
# Children of torchvision's ResNet by position: how lightly's nn.Sequential(*list(resnet.children())[:-1]) counts them.
_CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
# A network that follows the trained one has the same names; between the two the trained one is taken.
_FOLLOWER = re.compile(r"(^|[._])(encoder_k|key|momentum|target|teacher|ema)([._]|$)")
# First parts of names that belong to the trunk itself: what is left over of these is a block of another network.
_FAMILY = re.compile(r"(conv|bn|layer|maxpool)\d?")
# First parts of names whose rest belongs to a classifier, though some trunks keep a norm there.
_HEAD = re.compile(r"head|head_dist|classifier|fc|norm_head")
# Networks of timm with the tensors of a ResNet that compute something else.
_SAME_TENSORS = re.compile(r"resnet(?:blur|aa)\d+")
# What is left over, by what it is for: the first that is found in a name counts.
_MEANINGS = {
    "optimizer": r"optimizer|momentum_buffer|exp_avg|grad_scaler|(^|\.)(guard|rng)\.",
    "momentum network": _FOLLOWER.pattern,
    "queue": r"queue",
    "predictor": r"predict",
    "prototypes": r"prototype",
    "head": r"(^|[._])(fc|head|heads|classifier|linear|last_layer|mlp)\d*\.",
    "mask branch": r"mask|(conv|bn)16\.",
    "text model": r"(^|[._])(clip|text)",
    "projection head": r"proj",
    "decoder": r"decoder",
}


class Match(NamedTuple):
    """What of a file fits a network."""

    tensors: dict[str, Tensor]
    """By the network's own names."""
    prefix: str
    """What stood before these names in the file."""
    named: dict[str, str]
    """Own name: name in the file, of what fits and of what has another shape."""
    misshapen: dict[str, Tensor]
    """By the network's own names: what has another shape, or holds no plain numbers."""
    blocks: dict[str, str]
    """Name in the file: name as in torchvision, of what belongs to the trunk there and has no place in this one."""


def initialize(trunk: nn.Module, weights: str, *, partial: bool = False) -> str:
    """Loads ``encoder.weights`` into ``trunk`` in place and returns a sentence for the log: what was found, under which names, and
    what else is in the file.

    weights: ``none``; a torchvision tag of the trunk's architecture such as ``IMAGENET1K_V1``, or of a timm trunk ``timm`` or
    ``timm:TAG`` (downloaded by torchvision or timm when it is not in its cache); or the path of a
    .safetensors/.pth/.pth.tar/.ckpt file, or of a folder as timm and the Hugging Face hub keep a model. Read are torchvision,
    timm, MoCo (also v3), LCR and LearnMat, solo-learn, lightly, DINO and whatever else keeps torchvision's names below a prefix,
    with or without the prefixes of DistributedDataParallel and torch.compile, and this engine's weights and checkpoints. A timm
    trunk also takes the original files that timm can convert, and those that agree with it in order, kind and shape of all
    tensors.
    partial: take what fits of another network; the sentence says what stays random.
    Raises ``ValueError`` when a name is unknown, the file is of another network or cannot be read without running code from it, or
    a number is not finite; ``OSError`` when a download fails; ``FileNotFoundError``.
    """
    if weights == "none":
        return "random initial weights"
    file = Path(weights)
    if isinstance(trunk, TimmTrunk) and timm_weights.wanted(weights):
        contents = foreign_file.Contents(timm_weights.download(trunk, weights), [])
    elif file.suffix or "/" in weights or file.exists():
        file = model_folder.weights_in(file) if file.is_dir() else file
        contents = foreign_file.read(file)
    else:
        contents = foreign_file.Contents(_torchvision(trunk, weights), [])
    own = trunk.state_dict()
    held = list(foreign_file.containers(contents.tree))
    if not held and contents.unbuilt:
        raise ValueError(f"encoder.weights: {weights} holds {foreign_file.whole_model(contents.unbuilt)}")
    if not held:
        raise ValueError(f"encoder.weights: {weights} holds a {type(contents.tree).__name__} without named tensors")
    # the most tensors win; of equals the trained network, then the first
    matches = [(match_names(own, tensors, path), path) for path, tensors in held]
    found, place = max(matches, key=lambda m: (len(m[0].tensors), not _FOLLOWER.search(m[0].prefix), len(m[0].misshapen)))
    # files of PyTorch before 0.4.1, and our checkpoints, do not count batches
    needed = [name for name in own if not name.endswith("num_batches_tracked")]
    how = ""
    if isinstance(trunk, TimmTrunk) and (found.blocks or not set(needed) <= set(found.tensors)):
        for path, tensors in held:
            for sentence, renamed, names in timm_weights.translated(trunk, tensors):
                match = match_names(own, renamed)
                if not how and not match.prefix and not match.blocks and set(needed) <= set(match.tensors):
                    found, place, how = match._replace(named=names), path, sentence
    parameters = [name for name, _ in trunk.named_parameters()]
    buffers = [name for name, _ in trunk.named_buffers()]
    some = bool(set(parameters) & set(found.tensors))
    if not some and not found.misshapen:
        if contents.unbuilt:
            raise ValueError(f"encoder.weights: {weights} holds {foreign_file.whole_model(contents.unbuilt)}")
        first = ", ".join([printable(name) for _, tensors in held for name in tensors][:3])
        raise ValueError(f"encoder.weights: nothing in {weights} matches {trunk.arch}; its first names are {first}")
    missing = [name for name in needed if name not in found.named]
    config = model_folder.config_beside(file)
    label = _label(file, contents.tree, config)
    differences = _differences(trunk.arch, own, found, missing, label if label not in trunk.arch.split("/")[-1:] else None)
    if differences and not (partial and some):
        partly = ", or encoder.partial=true to take what fits and leave the rest random" if some else ""
        raise ValueError(
            f"encoder.weights: {weights} is of another network than {trunk.arch}: {differences[0]}; set {_remedy(found)}{partly}"
        )
    tensors = {name: tensor.to(own[name].dtype) for name, tensor in found.tensors.items()}
    weights_file.refuse_not_finite({found.named[name]: t for name, t in tensors.items()}, f"encoder.weights: {weights}")
    trunk.load_state_dict(tensors, strict=False)
    note = (
        f"{weights}: {sum(name in tensors for name in parameters)} of {len(parameters)} parameters and "
        f"{sum(name in tensors for name in buffers)} of {len(buffers)} buffers matched"
    )
    note += f" (below {printable(found.prefix)})" if found.prefix else ""
    note += f"; {how}" if how else ""
    note += _config_note(trunk, weights, config)
    if differences:
        note += f"; encoder.partial: {'; '.join(differences)}; what was not found is still random"
    used = {f"{place}.{name}" for own_name, name in found.named.items() if own_name in tensors}
    rest = [name for path, held_there in held for name in (f"{path}.{key}" for key in held_there) if name not in used]
    note += f"; not used of the file: {_meanings(rest)}" if rest else ""
    unbuilt = ", ".join(printable(name) for name in contents.unbuilt[:4])
    return note + (f"; objects in it that were not built: {unbuilt}" if unbuilt else "")


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
                    group = groups.setdefault(".".join(parts[:i]), {})
                    if first == part or tail not in group:  # a name counts before a position
                        group[tail] = name

    def fitting(prefix: str) -> dict[str, Tensor]:
        return {n: foreign[f] for n, f in groups[prefix].items() if _fits(foreign[f], own[n])}

    prefix = max(groups, key=lambda p: (len(fitting(p)), not _FOLLOWER.search(p), len(groups[p])))
    named, tensors = groups[prefix], fitting(prefix)
    misshapen = {n: foreign[f] for n, f in named.items() if n not in tensors}
    before = prefix.split(".") if prefix else []
    blocks, stems = {}, {name.split(".")[0] for name in own}
    for name in foreign.keys() - {*named.values()} if named else ():
        parts = [part for part in name.split(".") if part not in _WRAPPERS]
        first, *rest = parts[len(before) :] or [""]
        first = _CHILDREN.get(first, first)
        ours = first in stems and not _HEAD.fullmatch(first) and name.endswith((".weight", ".bias", ".gamma"))
        if parts[: len(before)] == before and (ours or _FAMILY.fullmatch(first)):
            blocks[name] = ".".join([first, *rest])
    blocks = {name: blocks[name] for name in foreign if name in blocks}  # in the order of the file
    return Match(tensors, ".".join(filter(None, (path, prefix))), named, misshapen, blocks)


def _fits(tensor: Tensor, own: Tensor) -> bool:
    """Whether one holds the numbers of the other: quantized, complex, sparse and integer weights do not."""
    alike = tensor.is_floating_point() == own.is_floating_point() and not tensor.is_complex() and not tensor.is_quantized
    return alike and tensor.layout == torch.strided and tensor.shape == own.shape


def _differences(arch: str, own: dict[str, Tensor], found: Match, missing: list[str], label: str | None) -> list[str]:
    """How the network of a file differs from the trunk, one sentence a kind, in the file's own names."""
    made = []
    if found.misshapen:
        name, there = next(iter(found.misshapen.items()))
        more = f" and {len(found.misshapen) - 1} more differ" if len(found.misshapen) > 1 else ""
        kinds = [list(there.shape), list(own[name].shape)]
        if kinds[0] == kinds[1]:
            kinds = [there.dtype, own[name].dtype] if there.layout == torch.strided else [there.layout, own[name].layout]
        made.append(f"its {printable(found.named[name])} is {kinds[0]}, here it is {kinds[1]}{more}")
    if found.blocks:
        made.append(f"it also has {_listed(found.blocks)}, for which {arch} has no place")
    if missing:
        made.append(f"it lacks {_listed(missing)}")
    if label:
        made.append(f"it is named {printable(label)}, which has the same tensors and computes something else")
    return made


def _listed(names: Iterable[str]) -> str:
    """The first and the last of ``names`` and how many lie between them."""
    shown = [printable(name) for name in names]
    return ", ".join(shown) if len(shown) < 4 else f"{shown[0]}, {shown[1]} ... {shown[-1]} ({len(shown)} tensors)"


def _remedy(found: Match) -> str:
    """The setting that takes the file as it is, where its blocks tell which network it is."""
    shapes = {name: list(tensor.shape) for name, tensor in (found.tensors | found.misshapen).items()}
    inside = [*shapes, *found.blocks.values()]
    numbers = [re.match(r"layer(\d)\.(\d+)\.", name) for name in inside]
    stages = tuple(max((int(m[2]) + 1 for m in numbers if m and m[1] == stage), default=0) for stage in "1234")
    expansion = 4 if "layer1.0.conv3.weight" in inside else 1
    stem = shapes.get("conv1.weight", [])
    known = [name for name, (block, depths) in RESNETS.items() if depths == stages and block.expansion == expansion]
    if not known or stem[1:] != [3, 7, 7] or any(re.search(r"\.(se|attn|aa)\.", name) for name in inside):
        return "encoder.weights to a file of this network"
    return f"encoder.arch={known[0]}" + (f"_w{stem[0]}" if stem[0] != 64 else "")


def _config_note(trunk: nn.Module, weights: str, config: dict[str, Any]) -> str:
    """What the config.json beside the file says otherwise than this network does."""
    note, name = "", config.get("architecture")
    if isinstance(name, str) and isinstance(trunk, TimmTrunk) and name != trunk.name:
        note += f"; its config.json is of {printable(name)}"
    how = image_input(trunk.arch, weights)
    if wanted := model_folder.other_input(config, how):
        told = ", ".join(f"{key} {value}" for key, value in wanted.items())
        note += f"; its config.json normalizes images by {told}, this network by mean {[*how.mean]}, std {[*how.std]}"
        tag = timm_weights.tag_with_input(trunk, wanted) if isinstance(trunk, TimmTrunk) else None
        note += f" (encoder.arch={PREFIX}{trunk.name}.{tag} does as the file's)" if tag else ""
    return note


def _label(file: Path, tree: Any, config: dict[str, Any]) -> str | None:
    """The name of another network that the tensors cannot tell from a ResNet, where the file bears one: in its own name, in what
    training scripts store beside the tensors, or in the config.json that timm's models come with."""
    holders = [tree if isinstance(tree, dict) else {}]
    args = holders[0].get("args")
    holders.append(args.state if isinstance(args, foreign_file.Unbuilt) else args)
    holders.append(config)
    values = [file.name, *(h.get(key) for h in holders if isinstance(h, dict) for key in ("arch", "architecture", "model"))]
    matches = [_SAME_TENSORS.search(value) for value in values if isinstance(value, str)]
    return next((m[0] for m in matches if m), None)


def _meanings(names: list[str]) -> str:
    """What ``names`` are for, or, where that cannot be told, the modules that they begin with."""
    found: dict[str, None] = {}
    for name in names:
        parts = [p for p in name.split(".") if p and p not in (*_WRAPPERS, "state_dict", "model")]
        meaning = next((text for text, pattern in _MEANINGS.items() if re.search(pattern, name.lower())), None)
        found[meaning or printable(parts[0] if parts else name)] = None
    return ", ".join([*found][:8]) + (", ..." if len(found) > 8 else "")


def _torchvision(trunk: nn.Module, tag: str) -> dict[str, Tensor]:
    from torchvision.models import get_model_weights, list_models

    arch = trunk.arch
    if isinstance(trunk, TimmTrunk):
        raise ValueError(
            f"encoder.weights: {tag} is not of timm, as encoder.arch={arch} is; use {timm_weights.choices(trunk)}, none or a file"
        )
    if arch not in list_models():
        raise ValueError(f"encoder.weights: torchvision has no weights for {arch}; use none or a file")
    known = get_model_weights(arch).__members__
    if tag not in known:
        raise ValueError(f"encoder.weights: torchvision's {arch} has no weights {tag!r}; use {', '.join(known)}, none or a file")
    entry = known[tag]
    cached = Path(torch.hub.get_dir()) / "checkpoints" / entry.url.rsplit("/", 1)[-1]
    if cached.is_file():  # torch reads it without a look at its checksum
        return foreign_file.read(cached).tree
    try:
        return entry.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: the checksum of what came is wrong
        raise OSError(
            f"encoder.weights: {tag} of {arch} is not at {cached} and could not be downloaded ({error}); put {cached.name} there, "
            f"or set encoder.weights=PATH, or encoder.weights=none to start from random weights"
        ) from error
