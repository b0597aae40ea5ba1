"""A run's network in the files that other programs read, checked against the network itself, with a model card beside it.

``torchvision``, ``timm`` and ``moco`` hold the trunk under the names of those projects, ``huggingface`` is a folder with it as
timm and the hub keep models; ``onnx`` and ``torch-export`` are the whole inference feature as a graph (``graph.py``).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.console import say
from engine.files import inside, write_atomically
from engine.pretrained import graph, model_card, model_folder
from engine.pretrained.graph import Options
from engine.pretrained.run import Run, load_run
from ppssl.encoder import FeatureNet
from ppssl.timm_trunk import PREFIX, TimmTrunk


def _write_torchvision(run: Run, temporary: str, options: Options) -> None:
    save_file(_trunk(run), temporary, metadata={"format": "pt"} | model_card.metadata(run, graph=False))


def _write_moco(run: Run, temporary: str, options: Options) -> None:
    state = {f"module.encoder_q.{name}": tensor for name, tensor in _trunk(run).items()}
    torch.save({"epoch": run.epoch, "arch": run.config.encoder.arch, "state_dict": state}, temporary)


def _trunk(run: Run) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in run.network.trunk.state_dict().items()}


@dataclass(frozen=True)
class Format:
    """One way out."""

    suffix: str
    """Of the file; "" for a folder."""
    write: Callable[[Run, str, Options], None] | None
    """Writes the file; None for a folder."""
    graph: bool
    """The whole inference feature as a graph; otherwise the trunk's tensors alone."""
    use: str
    """How the file is read, in Python; {file}, {arch}, {images}, {outputs} and {timm} (what ``timm.create_model`` takes) are filled
    in. A folder has its own."""


FORMATS = {
    "torchvision": Format(
        ".safetensors",
        _write_torchvision,
        False,
        "from safetensors.torch import load_file\n"
        "model = torchvision.models.{arch}()\n"
        "model.fc = torch.nn.Identity()\n"
        'model.load_state_dict(load_file("{file}"))',
    ),
    "timm": Format(
        ".safetensors",
        _write_torchvision,  # timm keeps torchvision's names in its ResNets, and a timm trunk timm's own
        False,
        "from safetensors.torch import load_file\n"
        "model = timm.create_model({timm}, num_classes=0)\n"
        'model.load_state_dict(load_file("{file}"))',
    ),
    "moco": Format(
        ".pth.tar",
        _write_moco,
        False,
        "# facebookresearch/moco: python main_lincls.py -a {arch} --pretrained {file} DATA",
    ),
    "huggingface": Format("", None, False, ""),
    "onnx": Format(
        ".onnx",
        graph.write_onnx,
        True,
        'session = onnxruntime.InferenceSession("{file}")\n'
        "how = {{key: json.loads(text) for key, text in session.get_modelmeta().custom_metadata_map.items()}}   # mean, sizes\n"
        '{outputs} = session.run(None, {{"images": images}})   # {images} -> {shapes}',
    ),
    "torch-export": Format(
        ".pt2",
        graph.write_torch_export,
        True,
        '{outputs} = torch.export.load("{file}").module()(images)   # {images} -> {shapes}',
    ),
}
SHORT = {"hf": "huggingface"}
"""Other names of formats."""


def export(
    folder: str | Path,
    to: str,
    out: str | Path | None = None,
    *,
    minmax: str | None = None,
    normalize: bool = False,
    with_map: bool = False,
    opset: int | None = None,
    network: FeatureNet | None = None,
    best: bool = False,
) -> Path:
    """Writes the network of the run ``folder`` as ``to`` and its card (FILE.json, FILE.md) beside it; returns the file, or the
    folder of ``huggingface``, in which the card is README.md.

    out: a file with the format's suffix, or a folder that gets it; of ``huggingface`` the model's folder itself; None is below
    ``folder``/export.
    minmax: scale the mask over each ``image`` instead of over the ``batch``, as variant ``published`` does, so that the feature
    of an image does not depend on the rest of its batch (graphs of networks with a mask only).
    normalize: the graph takes RGB in [0, 1] and normalizes it. with_map: its second output is the map that is pooled. opset: of
    ONNX.
    network: takes the weights of a method or a trunk of your own, as in ``engine.load``.
    best: the weights of the run's best evaluation (``eval.keep_best``), not the last.
    Raises ``FileNotFoundError`` for a folder that is no run, ``ValueError`` for a request that cannot be met, ``ImportError``
    without ONNX, ``RuntimeError`` when what was written does not give the run's features.
    """
    folder, out, to = Path(folder), None if out is None else Path(out), SHORT.get(to, to)
    if to not in FORMATS:
        raise ValueError(f"--to {to}: not known; use {', '.join(FORMATS)}")
    target, options = FORMATS[to], Options(normalize, with_map, opset)
    run = load_run(folder, network=network, best=best)
    arch, mask = model_card.arch_of(run), run.network.mask
    run.network.to(memory_format=torch.contiguous_format)
    timm = run.network.trunk if isinstance(run.network.trunk, TimmTrunk) else None
    if not target.graph and not (to in ("timm", "huggingface") if timm else re.fullmatch(r"resnet\d+", arch)):
        theirs = "timm" if to == "huggingface" else to
        others = "timm, huggingface, " * bool(timm)
        raise ValueError(f"--to {to}: {arch} is not one of {theirs}'s networks; use --to {others}onnx or torch-export")
    for word, value in (("--normalize", normalize), ("--map", with_map)):
        if value and not target.graph:
            raise ValueError(
                f"{word}: --to {to} writes the trunk's tensors and no graph; leave it out, or use --to onnx or torch-export"
            )
    if opset is not None and to != "onnx":
        raise ValueError(f"--opset {opset}: goes with --to onnx only; leave it out")
    if minmax is not None:
        if mask is None or not target.graph:
            raise ValueError(f"--minmax {minmax}: there is no mask in what --to {to} writes of this run; leave it out")
        mask.minmax = minmax
    path = _place(folder, to, out, arch)
    notes = _notes(run, target, to, minmax)
    for note in notes:
        say(f"note: {note}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporters warn of their own insides
        if target.write is None:
            model_folder.write(run, folder, path, notes)
            return path
        write_atomically(path, lambda temporary: target.write(run, temporary, options))
    use = _use(target, path, run, options)
    facts = model_card.describe(path, run, folder, to=to, graph=target.graph, use=use, notes=notes, normalize=normalize)
    model_card.write(path, facts)
    return path


def _use(target: Format, path: Path, run: Run, options: Options) -> str:
    """``target.use`` for this file."""
    arch, trunk = model_card.arch_of(run), run.network.trunk
    made_by = (trunk.name, trunk.options) if isinstance(trunk, TimmTrunk) else (arch, {})
    return target.use.format(
        file=path.name,
        arch=arch,
        images=f"float32 [B, 3, S, S], {'RGB in [0, 1]' if options.normalize else 'normalized'}",
        outputs="features, map" if options.map else "features" if target.suffix == ".pt2" else "[features]",
        shapes="[B, C], [B, C, h, w]" if options.map else "[B, C]",
        timm=", ".join([f'"{made_by[0]}"', *(f"{key}={value}" for key, value in made_by[1].items())]),
    )


def _notes(run: Run, target: Format, to: str, minmax: str | None) -> list[str]:
    """What a user of the file must know."""
    mask = run.network.mask
    if mask is not None and not target.graph:
        return [
            "The run's own feature is l2(gap(A * F)) with a mask A. This file is the trunk alone, whose pooled output is gap(F); "
            "the mask is in the run's weights.safetensors and in the formats onnx and torch-export."
        ]
    if mask is not None and mask.minmax == "batch":
        return [
            "The mask is scaled by the smallest and largest value of the whole batch, as the published variant does: an image's "
            "feature depends on the images it is computed with. Compare features of equal batches only, or export with "
            "--minmax image, which is another feature than the one that was evaluated."
        ]
    if minmax == "image":
        return ["The mask is scaled per image (--minmax image). The metrics below may be of the run's own scaling."]
    return []


def _place(folder: Path, to: str, out: Path | None, arch: str) -> Path:
    suffix = FORMATS[to].suffix
    name = re.sub(r"[^\w.-]+", "_", f"{arch.removeprefix(PREFIX)}_{to.replace('-', '_')}") + suffix
    if not suffix:
        path = inside(folder, folder / "export" / name) if out is None else out
        model_folder.refuse_other_content(path)
        return path
    if out is not None and out.name.endswith(suffix):
        return out
    if out is not None and not out.is_dir() and out.suffix:
        raise ValueError(f"--out {out}: --to {to} writes {suffix} files; give a folder or a name that ends so")
    return inside(folder, folder / "export" / name) if out is None else out / name
