"""The inference feature of a run (trunk, mask, pooling, L2) as a graph with a free batch size, in ONNX or of torch.export, compared
with the network before it is kept."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.console import say
from engine.pretrained import model_card
from engine.pretrained.run import Run
from ppssl.encoder import FeatureNet, global_average_pool, scale_to_unit

TOLERANCE = 1e-4
"""Largest difference of a unit feature's entry between an exported file and the run's network, both float32."""
_BATCHES = (1, 5)  # what a graph is checked with; it is traced with another size
_NEEDED = ("onnx", "onnxscript", "onnxruntime")


class Options(NamedTuple):
    """What a graph can be asked for."""

    normalize: bool = False
    """It takes RGB in [0, 1] and subtracts the mean and divides by the standard deviation itself."""
    map: bool = False
    """Its second output is the map [B, C, h, w] whose mean is the feature before L2: A * F with a mask, F without."""
    opset: int | None = None
    """Of ONNX; None takes torch's default."""


class Plain(nn.Module):
    """What ``network`` computes, in PyTorch's own operations: a graph of it needs nothing of this project.

    mean, std: of images [B, 3, S, S] in [0, 1], which it then takes; None takes normalized images. with_map: gives the map too.
    """

    def __init__(
        self,
        network: FeatureNet,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        *,
        with_map: bool = False,
    ):
        super().__init__()
        self.trunk, self.mask, self.with_map = network.trunk, network.mask, with_map
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, None if values is None else torch.tensor(values).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """[B, 3, S, S] -> unit rows [B, C], and the map [B, C, h, w] where it is asked for."""
        if self.mean is not None:
            images = (images - self.mean) / self.std
        feature = self.trunk(images)
        if self.mask is not None:
            strongest = torch.relu(self.mask.bn(self.mask.conv(feature))).amax(1)
            feature = scale_to_unit(strongest, self.mask.minmax)[:, None] * feature
        rows = F.normalize(global_average_pool(feature), dim=1)
        return (rows, feature) if self.with_map else rows


def write_onnx(run: Run, temporary: str, options: Options) -> None:
    """Writes the ONNX file ``temporary``. Raises ``ImportError`` where a package is missing, ``ValueError`` for an opset that the
    installed exporter does not write, ``RuntimeError`` where the features are not the run's."""
    missing = [name for name in _NEEDED if not _importable(name)]
    if missing:
        raise ImportError(f"--to onnx: {', '.join(missing)} cannot be imported; pip install '.[export]' (or ppssl-engine[export])")
    import onnxruntime  # an extra

    lowest, highest = opsets()
    if options.opset is not None and not lowest <= options.opset <= highest:
        raise ValueError(
            f"--opset {options.opset}: the exporter of torch {torch.__version__} writes opsets {lowest} to {highest}; use one of "
            f"them, or leave it out"
        )
    program = torch.onnx.export(
        _plain(run, options), (_images(run, 2, options),), input_names=["images"],
        output_names=["features", "map"] if options.map else ["features"],
        dynamic_shapes=({0: torch.export.Dim("batch")},), dynamo=True, verbose=False, opset_version=options.opset,
    )  # fmt: skip
    written = program.model.opset_imports[""]
    if options.opset not in (None, written):  # torch keeps its own version where it cannot convert, and only warns
        raise ValueError(f"--opset {options.opset}: this network could only be written as opset {written}; use --opset {written}")
    program.model.metadata_props.update(model_card.metadata(run, graph=True, normalize=options.normalize))
    program.save(temporary, external_data=False)  # one file: ONNX allows 2 GB
    try:
        session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])
    except Exception as error:  # of onnxruntime's own types
        raise RuntimeError(
            f"onnxruntime {onnxruntime.__version__} does not read what was written as opset {written} ({str(error)[:300]}); give a "
            f"lower --opset ({lowest} to {highest}), or install a newer onnxruntime; nothing was written"
        ) from error

    def outputs(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(array) for array in session.run(None, {"images": images.numpy()})]

    _compare(run, options, outputs, f"onnxruntime, opset {written}")


def opsets() -> tuple[int, int]:
    """The lowest and the highest opset that the installed torch and onnxscript write."""

    def constant(module: str, name: str, default: int) -> int:
        try:  # neither package tells it by a public name
            return getattr(importlib.import_module(module), name, default)
        except ImportError:
            return default

    lowest = constant("torch.onnx._internal.exporter._constants", "TORCHLIB_OPSET", 18)
    return lowest, constant("onnxscript.version_converter._version_converter", "SUPPORTED_MAX_ONNX_OPSET", 23)


def write_torch_export(run: Run, temporary: str, options: Options) -> None:
    """Writes the file ``temporary`` of torch.export. Raises ``RuntimeError`` where the features are not the run's."""
    program = torch.export.export(
        _plain(run, options), (_images(run, 2, options),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )  # fmt: skip
    buffer = io.BytesIO()  # torch wants a name that ends in .pt2, which a temporary file's does not
    about = model_card.metadata(run, graph=True, normalize=options.normalize)
    torch.export.save(program, buffer, extra_files={f"{key}.json": value for key, value in about.items()})
    Path(temporary).write_bytes(buffer.getvalue())
    buffer.seek(0)
    module = torch.export.load(buffer).module()

    def outputs(images: Tensor) -> list[Tensor]:
        made = module(images)
        return [made] if isinstance(made, Tensor) else list(made)

    _compare(run, options, outputs, "torch.export")


def _plain(run: Run, options: Options) -> Plain:
    how = model_card.image_input_of(run)
    constants = (how.mean, how.std) if options.normalize else (None, None)
    return Plain(run.network, *constants, with_map=options.map).eval()


def _importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def _images(run: Run, batch: int, options: Options) -> Tensor:
    """Noise as the graph takes it."""
    size, generator = run.config.data.image_size, torch.Generator().manual_seed(batch)
    make = torch.rand if options.normalize else torch.randn
    return make(batch, 3, size, size, generator=generator)


@torch.no_grad()
def _compare(run: Run, options: Options, exported: Callable[[Tensor], list[Tensor]], runtime: str) -> None:
    """Says the largest difference between the outputs of the file and of the network."""
    how = model_card.image_input_of(run)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (how.mean, how.std))
    worst = of_map = 0.0
    for batch in _BATCHES:
        images = _images(run, batch, options)
        features, *maps = exported(images)
        wanted = run.network((images - mean) / std if options.normalize else images)
        worst = max(worst, float((features - wanted).abs().max()))
        for found in maps:
            of_map = max(of_map, float((F.normalize(global_average_pool(found), dim=1) - wanted).abs().max()))
    if not max(worst, of_map) <= TOLERANCE:
        raise RuntimeError(
            f"the exported graph gives features that differ by {max(worst, of_map):.1e} from the run's under {runtime}; nothing "
            f"was written"
        )
    more = f", pooled maps by {of_map:.1e}" if options.map else ""
    say(f"checked with {runtime}, batches of {' and '.join(map(str, _BATCHES))}: features differ by at most {worst:.1e}{more}")
