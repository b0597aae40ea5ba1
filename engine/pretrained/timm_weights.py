"""Starting weights of timm's models: by tag from the Hugging Face hub or its cache, and other projects' files in timm's names."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from engine.console import printable, say
from ppssl.timm_trunk import PREFIX, TimmTrunk, create

_SHOWN = 8
"""Tags that an error names."""


def wanted(weights: str) -> bool:
    """Whether ``encoder.weights`` asks for a download of timm's."""
    return weights == "timm" or weights.startswith("timm:")


def tags(trunk: TimmTrunk) -> list[str]:
    """The weights that timm has for the model, by tag."""
    import timm  # heavy

    return [name.partition(".")[2] for name in timm.list_pretrained(f"{trunk.name}.*")]


def download(trunk: TimmTrunk, weights: str) -> dict[str, Tensor]:
    """The tensors of ``timm`` (the tag of ``encoder.arch``, or timm's default) or ``timm:TAG``, from the cache if they are there.

    Raises ``ValueError`` for a tag that timm does not have, ``OSError`` naming file, folder and remedy where a download fails.
    """
    import timm  # heavy

    tag, known = weights.removeprefix("timm").removeprefix(":") or trunk.tag, tags(trunk)
    if not known:
        raise ValueError(f"encoder.weights: timm has no weights for {trunk.name}; use none or a file")
    if tag not in known:
        raise ValueError(f"encoder.weights: timm has no weights {tag!r} for {trunk.name}; use {choices(trunk)}, none or a file")
    name = f"{trunk.name}.{tag}"
    say(f"weights {name}: from the cache or the Hugging Face hub; HF_HUB_OFFLINE=1 asks the cache alone")
    try:
        return create(PREFIX + name, name, {"pretrained": True}).state_dict()
    except Exception as error:  # of several libraries, httpx and huggingface_hub among them
        config = timm.get_pretrained_cfg(name)
        raise OSError(
            f"encoder.weights: {weights}: {_place(config)} could not be read or downloaded ({type(error).__name__}: "
            f"{printable(str(error)).strip()[:200]}); on a machine with a network: hf download {config.hf_hub_id or name}, and "
            f"copy the folder here; or set encoder.weights=PATH to a file of it, or encoder.weights=none for random weights"
        ) from error


def choices(trunk: TimmTrunk) -> str:
    """What ``encoder.weights`` can be told of timm's weights for this trunk."""
    known = tags(trunk)
    more = f" ({len(known)} in all)" if len(known) > _SHOWN else ""
    return ", ".join(["timm", *(f"timm:{tag}" for tag in known[:_SHOWN])]) + more if known else "none of timm's"


def tag_with_input(trunk: TimmTrunk, wanted: dict[str, list[float]]) -> str | None:
    """The tag of timm's weights for the model whose images are normalized by ``mean`` and ``std`` of ``wanted``."""
    import timm  # heavy

    for tag in tags(trunk):
        config = timm.get_pretrained_cfg(f"{trunk.name}.{tag}")
        if all(max(abs(a - b) for a, b in zip(getattr(config, key), wanted[key], strict=True)) < 1e-3 for key in wanted):
            return tag
    return None


def _place(config) -> str:
    """File and folder of a download."""
    if config.hf_hub_id:
        from huggingface_hub.constants import HF_HUB_CACHE

        file = config.hf_hub_filename or "model.safetensors"
        return f"{file} of {config.hf_hub_id} (folder {Path(HF_HUB_CACHE) / ('models--' + config.hf_hub_id.replace('/', '--'))})"
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    return f"{(config.url or '').rpartition('/')[2]} (folder {folder})"


def translated(trunk: TimmTrunk, tensors: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor], dict[str, str]]]:
    """``tensors`` of a file in the names of ``trunk``, in the ways that there are: (a sentence for the log, tensors by own name,
    the name in the file by own name where that is known)."""
    own_class = type(trunk).__bases__[1]  # beside TimmTrunk
    convert = getattr(inspect.getmodule(own_class), "checkpoint_filter_fn", None)
    if convert is not None:
        try:
            found = convert(dict(tensors), trunk)
        except Exception:  # not a file that it knows
            found = {}
        yield "its names and sizes were converted by timm", found, {name: name for name in found}
    if ordered := by_order(trunk.state_dict(), tensors):
        sentence = (
            f"its names are another project's: all {len(ordered)} tensors of the trunk matched by their order, each with the kind "
            f"and the shape that timm's has"
        )
        yield sentence, {name: tensors[there] for name, there in ordered.items()}, ordered


def by_order(own: dict[str, Tensor], foreign: dict[str, Tensor]) -> dict[str, str]:
    """{own name: name in the file} where the file has the tensors of ``own`` in the same order, each of the same kind (the last
    part of its name) and shape, from its first tensor on; what follows them there is a head. {} where one differs.

    Two projects' versions of one network mostly agree in this, and in nothing else. ``num_batches_tracked`` does not count.
    """
    ours, theirs = (
        [(n, n.rpartition(".")[2], tuple(t.shape)) for n, t in tensors.items() if not n.endswith("num_batches_tracked")]
        for tensors in (own, foreign)
    )
    alike = len(theirs) >= len(ours) > 0 and all(a[1:] == b[1:] for a, b in zip(ours, theirs, strict=False))
    # a head has a weight and a bias or two: more is a longer network, whose first part fits by chance
    if not alike or len(theirs) - len(ours) > 4:
        return {}
    pairs = {a[0]: b[0] for a, b in zip(ours, theirs, strict=False)}
    count = "num_batches_tracked"
    counts = {a[:-11] + count: b[:-11] + count for a, b in pairs.items() if a.endswith("running_var")}
    return pairs | {a: b for a, b in counts.items() if a in own and b in foreign}
