"""A model as a folder, as timm and the Hugging Face hub keep one: ``model.safetensors``, ``config.json`` and ``README.md``."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.console import printable, say
from engine.pretrained import model_card
from engine.pretrained.graph import TOLERANCE
from engine.pretrained.run import Run
from ppssl.encoder import global_average_pool
from ppssl.timm_trunk import ImageInput, TimmTrunk

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
_PREFERRED = (WEIGHTS, "pytorch_model.bin", "pytorch_model.pth", "model.pth")
"""Names of weights in such folders, in the order in which timm looks for them."""
_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
_CONFIG_SIZE = 2**20
"""Bytes of a config.json, at most."""


class Reading(NamedTuple):
    """How timm's model computes the trunk's pooled output: it is tried, not known."""

    code: str
    compute: Callable[[nn.Module, Tensor], Tensor]


READINGS = (
    Reading("model(images)", lambda model, x: model(x)),
    Reading("model.forward_features(images).mean((2, 3))", lambda model, x: model.forward_features(x).mean((2, 3))),
    Reading("model.forward_features(images).mean((1, 2))", lambda model, x: model.forward_features(x).mean((1, 2))),
    Reading(
        "model.forward_features(images)[:, model.num_prefix_tokens:].mean(1)",
        lambda model, x: model.forward_features(x)[:, model.num_prefix_tokens :].mean(1),
    ),
    Reading("model.forward_features(images).mean(1)", lambda model, x: model.forward_features(x).mean(1)),
)


def is_model_folder(folder: Path) -> bool:
    """Whether ``folder`` holds a model and is no run's: a ``config.json`` and no ``config.yaml``."""
    return (folder / CONFIG).is_file() and not (folder / "config.yaml").is_file()


def weights_in(folder: Path) -> Path:
    """The weights file of the model that ``folder`` holds. Raises ``FileNotFoundError`` where there is none or it is in parts,
    ``ValueError`` where there are several to choose from."""
    if (folder / "config.yaml").is_file() and (folder / "weights.safetensors").is_file():
        raise FileNotFoundError(
            f"encoder.weights: {folder} is a folder of a run; give the file that is meant, {folder / 'weights.safetensors'}"
        )
    for name in _PREFERRED:
        if (folder / name).is_file():
            return folder / name
    if parts := sorted(folder.glob("*.index.json")):
        raise FileNotFoundError(
            f"encoder.weights: {folder} holds weights in several files ({parts[0].name}); load them with the library that they are "
            f"of and save them as one: safetensors.torch.save_file(model.state_dict(), {WEIGHTS!r})"
        )
    found = sorted(path for path in folder.iterdir() if path.is_file() and path.name.endswith(_SUFFIXES))
    if not found:
        raise FileNotFoundError(
            f"encoder.weights: the folder {folder} holds no {WEIGHTS} or other weights file; give the file or a folder as timm and "
            f"the Hugging Face hub keep one"
        )
    if len(found) > 1:
        names = ", ".join(printable(path.name) for path in found[:4])
        raise ValueError(f"encoder.weights: the folder {folder} holds several weights files ({names}); give the one that is meant")
    return found[0]


def config_beside(file: Path) -> dict[str, Any]:
    """The ``config.json`` beside a weights file; {} where there is none, or none that can be read."""
    path = file.with_name(CONFIG)
    try:
        if file.is_file() and path.is_file() and path.stat().st_size < _CONFIG_SIZE:
            found = json.loads(path.read_text(encoding="utf-8"))
            return found if isinstance(found, dict) else {}
    except (OSError, ValueError, RecursionError):
        pass
    return {}


def other_input(config: dict[str, Any], how: ImageInput) -> dict[str, list[float]] | None:
    """``mean`` and ``std`` of the model of a ``config.json``, where they are not those of ``how``; None where they are, or are not
    said."""
    told = config.get("pretrained_cfg") if isinstance(config.get("pretrained_cfg"), dict) else config
    wanted = {name: told.get(name) for name in ("mean", "std") if _is_color(told.get(name))}
    same = all(max(abs(a - b) for a, b in zip(value, getattr(how, name), strict=True)) < 1e-3 for name, value in wanted.items())
    return None if same else wanted


def _is_color(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(isinstance(v, int | float) for v in value)


def refuse_other_content(out: Path) -> None:
    """Raises ``ValueError`` where writing a model to the folder ``out`` would replace what is none's."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file; --to huggingface writes a folder, give its name")
    if (out / "config.yaml").is_file():
        raise ValueError(f"--out {out}: is a run folder; --to huggingface writes a folder of its own, give another name")
    card, config = out / CARD, out / CONFIG
    if card.is_file() and not card.read_bytes().startswith(b"---"):
        raise ValueError(f"--out {out}: its {CARD} is no model card and would be replaced; give another folder")
    if config.is_file() and "architecture" not in config_beside(config):
        raise ValueError(f"--out {out}: its {CONFIG} is no model's of timm and would be replaced; give another folder")


def write(run: Run, folder: Path, out: Path, notes: list[str]) -> None:
    """Writes the trunk of ``run``, of the run folder ``folder``, as the model folder ``out``, which ``timm.create_model`` reads as
    ``local-dir:OUT`` or, uploaded, as ``hf-hub:OWNER/NAME``. It is read back by timm and compared before anything is replaced.

    notes: sentences for the card. Raises ``RuntimeError`` where timm does not compute the run's features with it.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.", suffix=".tmp") as made:
        staging = Path(made)
        tensors = {name: tensor.contiguous() for name, tensor in run.network.trunk.state_dict().items()}
        save_file(tensors, staging / WEIGHTS, metadata={"format": "pt"} | model_card.metadata(run, graph=False))
        config = _config(run)
        (staging / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        reading = _check(run, staging)
        facts = model_card.describe(
            staging / WEIGHTS, run, folder, to="huggingface", graph=False, use=_use(out.name, reading), notes=notes
        ) | {"name": out.name}
        config["ppssl_engine"] = facts  # timm and the hub pass over keys that they do not know
        (staging / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (staging / CARD).write_text(_front_matter(run) + model_card.markdown(facts), encoding="utf-8")
        out.mkdir(exist_ok=True)
        for name in (WEIGHTS, CONFIG, CARD):
            os.chmod(staging / name, 0o644)
            os.replace(staging / name, out / name)


def _config(run: Run) -> dict[str, Any]:
    """``config.json`` as timm writes it: the model, the arguments that build it, and how images enter it."""
    import timm  # heavy

    trunk, size, how = run.network.trunk, run.config.data.image_size, model_card.image_input_of(run)
    if isinstance(trunk, TimmTrunk):
        name, known, arguments = trunk.name, trunk.pretrained_cfg, {k: v for k, v in trunk.options.items() if k != "num_classes"}
    else:  # timm keeps torchvision's names in its ResNets, and computes the same
        name, arguments = run.config.encoder.arch, {}
        known = timm.get_pretrained_cfg(name).to_dict()
    flexible = arguments.get("dynamic_img_size") or arguments.get("strict_img_size") is False
    return {
        "architecture": name,
        "num_classes": 0,
        "num_features": trunk.channels,
        **({"model_args": arguments} if arguments else {}),
        "pretrained_cfg": {
            "tag": re.sub(r"\W+", "_", run.config.data.name),
            "custom_load": False,
            "input_size": [3, size, size],
            "fixed_input_size": bool(known.get("fixed_input_size")) and not flexible,
            "interpolation": how.interpolation,
            "crop_pct": crop_fraction(size, how.resize(size), how.crop),
            "crop_mode": "center",
            "mean": list(how.mean),
            "std": list(how.std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": known.get("first_conv"),
            "classifier": known.get("classifier"),
        },
    }


def crop_fraction(size: int, resized: int, usual: float) -> float:
    """The ``crop_pct`` by which timm, whose short side is floor(size / crop_pct), resizes to ``resized``: ``usual`` where that
    does, else the shortest number that does."""
    near = [round(size / side, digits) for digits in range(2, 9) for side in (resized, resized + 0.5)]
    return next(fraction for fraction in (usual, *near) if 0 < fraction <= 1 and math.floor(size / fraction) == resized)


@torch.no_grad()
def _check(run: Run, folder: Path) -> Reading:
    """How timm's model computes the feature, found by having timm read ``folder`` and comparing the two."""
    import timm  # heavy

    size = run.config.data.image_size
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(3))
    wanted = F.normalize(global_average_pool(run.network.trunk(images)), dim=1)
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except Exception as error:  # of whatever timm calls
        raise RuntimeError(f"timm {timm.__version__} cannot read what was exported ({error}); nothing was written") from error
    worst = []
    for reading in READINGS:
        try:
            found = reading.compute(model, images)
        except (RuntimeError, IndexError, AttributeError, TypeError):  # of another kind of output
            continue
        if found.shape == wanted.shape:
            worst.append(float((F.normalize(found, dim=1) - wanted).abs().max()))
            if worst[-1] <= TOLERANCE:
                say(f"checked with timm {timm.__version__}: {reading.code} differs by at most {worst[-1]:.1e} (unit rows)")
                return reading
    closest = f"differ by {min(worst):.1e}" if worst else "have another shape"
    raise RuntimeError(f"the features that timm {timm.__version__} computes {closest} from the run's; nothing was written")


def _use(name: str, reading: Reading) -> str:
    return (
        "import timm, torch\n\n"
        f'model = timm.create_model("local-dir:{name}", pretrained=True).eval()   # uploaded: "hf-hub:OWNER/{name}"\n'
        "how = timm.data.resolve_model_data_config(model)\n"
        "transform = timm.data.create_transform(**how, is_training=False)   # a PIL image -> [3, S, S]\n"
        "images = torch.stack([transform(image) for image in pictures])\n"
        f"features = torch.nn.functional.normalize({reading.code}, dim=1)   # unit rows [B, C]"
    )


def _front_matter(run: Run) -> str:
    """What the hub reads of a model card, between two lines of dashes."""
    free = not model_card.sources(run)
    facts: dict[str, Any] = {
        "library_name": "timm",
        "pipeline_tag": "image-feature-extraction",
        "license": "mit" if free else "other",
        **({} if free else {"license_name": "see-the-section-license"}),
        "tags": ["timm", "image-feature-extraction", "self-supervised-learning", run.config.method.name],
    }
    return f"---\n{yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)}---\n\n"
