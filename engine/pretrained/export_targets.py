"""A run's network in the files that other programs read, checked against the network itself, with a model card beside it.

``torchvision``, ``timm`` and ``moco`` hold the trunk under the names of those projects; ``onnx`` and ``torch-export`` the whole
inference feature (trunk, mask, pooling, L2) as a graph with a free batch size, compared with the network before it is kept.
"""

from __future__ import annotations

import io
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.console import say
from engine.files import inside, write_atomically
from engine.pretrained import model_card
from engine.pretrained.run import Run, load_run
from ppssl.encoder import FeatureNet, global_average_pool, scale_to_unit
from ppssl.timm_trunk import PREFIX, TimmTrunk

TOLERANCE = 1e-4
"""Largest difference of a unit feature's entry between a graph file and the run's network, both float32."""
_BATCHES = (1, 5)  # what a graph is checked with; it is traced with another size


class Plain(nn.Module):
    """What ``network`` computes, in PyTorch's own operations: a graph of it needs nothing of this project."""

    def __init__(self, network: FeatureNet):
        super().__init__()
        self.trunk, self.mask = network.trunk, network.mask

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] -> unit rows [B, C]."""
        feature = self.trunk(images)
        if self.mask is not None:
            strongest = torch.relu(self.mask.bn(self.mask.conv(feature))).amax(1)
            feature = scale_to_unit(strongest, self.mask.minmax)[:, None] * feature
        return F.normalize(global_average_pool(feature), dim=1)


def _write_torchvision(run: Run, temporary: str) -> None:
    save_file(_trunk(run), temporary, metadata={"format": "pt"} | _metadata(run))


def _metadata(run: Run) -> dict[str, str]:
    """How an image enters the network, as JSON by key, for files that have room for it: the card may be lost."""
    return {key: json.dumps(value) for key, value in model_card.preprocessing(run).items()}


def _write_moco(run: Run, temporary: str) -> None:
    state = {f"module.encoder_q.{name}": tensor for name, tensor in _trunk(run).items()}
    torch.save({"epoch": run.epoch, "arch": run.config.encoder.arch, "state_dict": state}, temporary)


def _trunk(run: Run) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in run.network.trunk.state_dict().items()}


def _write_onnx(run: Run, temporary: str) -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if not _importable(name)]
    if missing:
        raise ImportError(f"--to onnx: {', '.join(missing)} cannot be imported; pip install '.[export]' (or ppssl-engine[export])")
    import onnxruntime

    program = torch.onnx.export(
        Plain(run.network), (_images(run, 2),), input_names=["images"], output_names=["features"],
        dynamic_shapes=({0: torch.export.Dim("batch")},), dynamo=True, verbose=False,
    )  # fmt: skip
    program.model.metadata_props.update(_metadata(run))
    program.save(temporary, external_data=False)  # one file: ONNX allows 2 GB
    session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])
    _compare(run, lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), "onnxruntime")


def _write_torch_export(run: Run, temporary: str) -> None:
    program = torch.export.export(
        Plain(run.network), (_images(run, 2),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )  # fmt: skip
    buffer = io.BytesIO()  # torch wants a name that ends in .pt2, which a temporary file's does not
    torch.export.save(program, buffer, extra_files={f"{key}.json": value for key, value in _metadata(run).items()})
    Path(temporary).write_bytes(buffer.getvalue())
    buffer.seek(0)
    _compare(run, torch.export.load(buffer).module(), "torch.export")


def _importable(name: str) -> bool:
    try:
        __import__(name)
    except ImportError:
        return False
    return True


def _images(run: Run, batch: int) -> Tensor:
    size = run.config.data.image_size
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


@torch.no_grad()
def _compare(run: Run, exported: Callable[[Tensor], Tensor], runtime: str) -> None:
    worst = 0.0
    for batch in _BATCHES:
        images = _images(run, batch)
        worst = max(worst, float((exported(images) - run.network(images)).abs().max()))
    if not worst <= TOLERANCE:
        raise RuntimeError(
            f"the exported graph gives features that differ by {worst:.1e} from the run's under {runtime}; nothing was written"
        )
    say(f"checked with {runtime}, batches of {' and '.join(map(str, _BATCHES))}: features differ by at most {worst:.1e}")


@dataclass(frozen=True)
class Format:
    """One way out."""

    suffix: str
    write: Callable[[Run, str], None]
    graph: bool
    """The whole inference feature as a graph; otherwise the trunk's tensors alone."""
    use: str
    """How the file is read, in Python; {file}, {arch} and {timm} (what ``timm.create_model`` takes) are filled in."""


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
    "onnx": Format(
        ".onnx",
        _write_onnx,
        True,
        'session = onnxruntime.InferenceSession("{file}")\n'
        "how = {{key: json.loads(text) for key, text in session.get_modelmeta().custom_metadata_map.items()}}   # mean, sizes\n"
        'features = session.run(None, {{"images": images}})[0]   # float32 [B, 3, S, S] -> [B, C]',
    ),
    "torch-export": Format(
        ".pt2", _write_torch_export, True, 'features = torch.export.load("{file}").module()(images)   # [B, 3, S, S] -> [B, C]'
    ),
}


def export(folder: Path, to: str, out: Path | None = None, *, minmax: str | None = None, best: bool = False) -> Path:
    """Writes the network of the run ``folder`` as ``to`` and its card (FILE.json, FILE.md) beside it; returns the file.

    out: a file with the format's suffix, or a folder; None is ``folder``/export.
    minmax: scale the mask over each ``image`` instead of over the ``batch``, as variant ``published`` does, so that the feature
    of an image does not depend on the rest of its batch (graphs of networks with a mask only).
    best: the weights of the run's best evaluation (``eval.keep_best``), not the last.
    Raises ``FileNotFoundError`` for a folder that is no run, ``ValueError`` for a request that cannot be met, ``ImportError``
    without ONNX, ``RuntimeError`` when the graph's features are not the run's.
    """
    target = FORMATS[to]
    run = load_run(folder, best=best)
    arch, mask = run.config.encoder.arch, run.network.mask
    run.network.to(memory_format=torch.contiguous_format)
    timm = run.network.trunk if isinstance(run.network.trunk, TimmTrunk) else None
    if not target.graph and not (to == "timm" if timm else re.fullmatch(r"resnet\d+", arch)):
        raise ValueError(f"--to {to}: {arch} is not one of {to}'s networks; use --to {'timm, ' * bool(timm)}onnx or torch-export")
    if minmax is not None:
        if mask is None or not target.graph:
            raise ValueError(f"--minmax {minmax}: there is no mask in what --to {to} writes of this run; leave it out")
        mask.minmax = minmax
    path = _place(folder, to, out, arch)
    notes = []
    if mask is not None and not target.graph:
        notes.append(
            "The run's own feature is l2(gap(A * F)) with a mask A. This file is the trunk alone, whose pooled output is gap(F); "
            "the mask is in the run's weights.safetensors and in the formats onnx and torch-export."
        )
    elif mask is not None and mask.minmax == "batch":
        notes.append(
            "The mask is scaled by the smallest and largest value of the whole batch, as the published variant does: an image's "
            "feature depends on the images it is computed with. Compare features of equal batches only, or export with "
            "--minmax image, which is another feature than the one that was evaluated."
        )
    elif minmax == "image":
        notes.append("The mask is scaled per image (--minmax image). The metrics below may be of the run's own scaling.")
    create = ", ".join([f'"{timm.name if timm else arch}"', *(f"{k}={v}" for k, v in (timm.options if timm else {}).items())])
    use = target.use.format(file=path.name, arch=arch, timm=create)
    for note in notes:
        say(f"note: {note}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporters warn of their own insides
        write_atomically(path, lambda temporary: target.write(run, temporary))
    model_card.write(path, run, folder, to=to, graph=target.graph, use=use, notes=notes)
    return path


def _place(folder: Path, to: str, out: Path | None, arch: str) -> Path:
    suffix = FORMATS[to].suffix
    if out is not None and out.name.endswith(suffix):
        return out
    if out is not None and not out.is_dir() and out.suffix:
        raise ValueError(f"--out {out}: --to {to} writes {suffix} files; give a folder or a name that ends so")
    name = f"{arch.removeprefix(PREFIX)}_{to.replace('-', '_')}{suffix}"
    return inside(folder, folder / "export" / name) if out is None else out / name
