"""The whole configuration as frozen dataclasses: every key, its type, its default and its range.

Values run one way: the defaults here, then a recipe (engine/config/recipe.py), then the command line (engine/config/command_line.py). Every
error is a ``ConfigError`` that names the key (or the file), the value that was found and what is expected.

``null`` in the file means "what the method's form says" or "not set"; ``auto`` means "choose by what the machine has,
and say so in the log". The list of keys is frozen by ``tests/test_config.py``: add to it on purpose only.
"""

from __future__ import annotations

import functools
import math
import re
import typing
from dataclasses import dataclass, field, fields, is_dataclass
from types import NoneType
from typing import Any, Iterable, Literal, NoReturn

from engine.errors import ConfigError


@dataclass(frozen=True)
class MethodConfig:
    """Which method is trained, and its switches; ``null`` takes what ``form`` says (``FORMS`` in ppssl/ppssl.py, lcr.py)."""

    name: str = "ppssl"
    """Registered method: byol, lcr, ldfs, moco, ppssl, simclr."""
    form: Literal["published", "guided"] = "published"
    """Of ppssl and lcr. published: what the authors' code computes. guided: what the paper's text aims at."""
    minmax: Literal["batch", "image"] | None = None
    """Range over which the mask is scaled to [0, 1]. published: batch, guided: image."""
    maxout_width: int = 32
    """Channels of the 1x1 projection whose maximum is the mask."""
    contrast_mask: bool | None = None
    """Contrast gap(F) of query and key (published), or the masked gap(A * F), to which A is a constant (guided)."""
    mask_reach: Literal["trunk", "branch"] | None = None
    """What a gradient through the mask reaches: the trunk too (both forms), or the mask's own 1x1 projection alone."""

    @property
    def title(self) -> str:
        """The name, with the form where the method has forms."""
        return f"{self.name} ({self.form})" if self.name in ("ppssl", "lcr") else self.name


@dataclass(frozen=True)
class EncoderConfig:
    """The network that is kept."""

    arch: str = "resnet50"
    """A torchvision ResNet, or a narrower and finer one: NAME[_w<base width>][_s<stride>], as resnet18_w32_s16."""
    weights: str = "IMAGENET1K_V1"
    """torchvision weight tag, none, or the path of a .safetensors/.pth file."""
    head: Literal["mlp2", "mlp3_bn"] = "mlp2"
    """Projection head: Linear-ReLU-Linear, or (Linear-BN-ReLU) x 2 - Linear-BN."""
    dim: int = 256
    """Width D of the contrastive embedding."""


@dataclass(frozen=True)
class QueueConfig:
    """The queue of negatives."""

    size: int = 65536
    """Rows K; any positive number, no multiple of the batch needed."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Storage type; auto is 16-bit on CUDA under amp, float32 otherwise."""
    sharded: bool = False
    """Keep K / world_size rows per process."""
    mask_own: bool = False
    """Leave out a query's own stale keys (same image, earlier epochs); on a GPU this takes the pass without a Triton kernel."""


@dataclass(frozen=True)
class EmaConfig:
    """The key network."""

    decay: float = 0.999
    """theta_k <- decay * theta_k + (1 - decay) * theta_q, before every step."""


@dataclass(frozen=True)
class ContrastConfig:
    """InfoNCE."""

    temperature: float = 0.2
    """T in lse(q.k / T)."""


@dataclass(frozen=True)
class BatchNormConfig:
    """Batch statistics."""

    groups: int = 1
    """Split the batch into this many groups with statistics of their own (imitates as many GPUs)."""
    sync: bool = False
    """Share statistics between processes (SyncBN)."""


@dataclass(frozen=True)
class AisConfig:
    """Text-guided distillation (alignment of the image with the teacher's image-text similarities)."""

    weight: float = 1.2
    """alpha."""
    temperature: float = 1.0
    """tau of both softmaxes."""
    scale: float = 100.0
    """Factor on the student's cosine similarities before the softmax."""
    warmup: float = 0.0
    """Share of all steps over which the weight rises linearly from 0."""
    prompts: str = "birds"
    """Corpus in ppssl/prompts, or the path of a YAML file."""
    count: int = 8
    """Number of descriptions, the relevant one first."""


@dataclass(frozen=True)
class IadmConfig:
    """GradCAM guidance of ppssl, and of lcr but for ``sources``, ``image``, ``pool``, ``mask`` and ``image_bn``; ``null`` takes
    what ``method.form`` says."""

    weight: float | None = None
    """beta. published: 0.01 (of a sum), guided: 1.28 (of a mean)."""
    sources: tuple[Literal["image", "layer1", "layer2", "layer3", "layer4"], ...] = ("image",)
    """Where the CAM is taken; several are averaged."""
    image: Literal["query", "orig"] = "query"
    """The image whose CAM is taken: the query view, or the un-augmented original (one more forward pass)."""
    sign: Literal["plus", "minus"] | None = None
    """relu(+x * G) (published) or relu(-x * G) (guided: what supports agreement)."""
    temperature: float | None = None
    """Of both spatial softmaxes. published: 1, guided: 0.4."""
    softmax: Literal["rows", "cells"] | None = None
    """Softmax over the columns of each row (published) or over all cells (guided)."""
    cam_scale: Literal["none", "max"] | None = None
    """Leave the CAM as it is (published) or divide it by its per-image maximum (guided)."""
    cam_loss: Literal["mean", "sum"] | None = None
    """Gradient of the batch mean (published) or of every sample's own loss (guided)."""
    pool: Literal["max", "mean"] | None = None
    """How image-sized maps are pooled to the feature map's size. published: max, guided: mean."""
    mask: Literal["image", "feature"] | None = None
    """Which mask is fitted to the CAM: the image branch's (published) or the encoder's own (guided)."""
    image_bn: Literal["shared", "own"] | None = None
    """Batch-norm of the image branch: the feature branch's (published) or its own (guided)."""
    reduction: Literal["sum", "mean"] | None = None
    """KL summed over the batch (published) or averaged (guided)."""


@dataclass(frozen=True)
class LcrConfig:
    """What lcr has beside ``iadm``; ``null`` takes what ``method.form`` says."""

    detach: bool | None = None
    """The CAM is a constant. published: false (the feature in it carries gradient), guided: true."""
    updates: Literal["one", "three"] | None = None
    """Moves of the mask's batch-norm a step: query map; or query, key and query map. published: three, guided: one."""


@dataclass(frozen=True)
class LdfsConfig:
    """Method ldfs. Its authors did not publish these values: the defaults are ours."""

    reconstruction: float = 0.05
    """alpha, weight of the decoder's squared error."""
    pair: float = 0.5
    """nu, weight of the contrast of drawn images."""
    share: float = 0.2
    """Share of the feature's dimensions that count as not discriminative, by each of the two criteria."""
    noise: float = 1.0
    """Noise on those dimensions, in standard deviations of each."""
    warmup: float = 0.2
    """Share of the run in which the decoder learns before its images are contrasted."""


@dataclass(frozen=True)
class TeacherConfig:
    """The frozen image-text model."""

    model: str = "ViT-B-32-quickgelu"
    """open_clip model name; birds is the demo's own small model."""
    weights: str = "openai"
    """open_clip tag, the path of a .safetensors file, or birds (shipped with the package)."""
    view: Literal["query", "clean"] | None = None
    """What the teacher sees: the query view (published) or the clean image, embedded once and cached (guided)."""


@dataclass(frozen=True)
class OptimConfig:
    """SGD."""

    lr: float = 0.03
    """Peak learning rate for the global batch; never rescaled behind your back."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 1e-4
    """L2, on every parameter."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """cosine: half a period from lr to 0 over the whole run, by step."""
    backend: Literal["auto", "torch", "apex"] = "auto"
    """auto: NVIDIA apex's FusedSGD when it is importable, torch's fused SGD otherwise."""


@dataclass(frozen=True)
class DataConfig:
    """Images and views."""

    name: Literal["birds", "cub", "cars", "aircraft", "nabirds", "flowers", "butterfly", "dogs", "folder"] = "cub"
    """Layout of the data set; birds is the demo world, folder is anybody's photos."""
    root: str | None = None
    """Folder of the unpacked data set."""
    loader: Literal["auto", "dali", "torch"] = "auto"
    """auto: DALI when it is importable."""
    resident: Literal["auto", "device", "host", "off"] = "auto"
    """Keep the decoded set on the device or in host memory, made smaller if it must be; auto: where it fits as it is, else off."""
    aug: Literal["parity", "dali"] = "parity"
    """Colour jitter by torchvision's formulas (parity) or by DALI's own operators (dali)."""
    image_size: int = 224
    """Side of a view in pixels."""
    crop_banner: bool = False
    """Cut the photographer's banner, 20 rows, off the bottom of FGVC-Aircraft's images; published results mostly keep it."""
    workers: int | None = None
    """Loader threads or processes; null takes the machine's cores."""


@dataclass(frozen=True)
class RunConfig:
    """How the run is executed."""

    compile: Literal["auto", "off", "encoder", "step"] = "auto"
    """torch.compile: nothing, the encoders, or the whole step."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Capture the step as a CUDA graph."""
    log_every: int = 10
    """Steps between log lines (each is one host sync)."""
    save_every_steps: int | None = None
    """Steps between checkpoints; null is once an epoch."""
    keep: int = 2
    """Checkpoints kept."""
    max_bad_steps: int = 10
    """Steps with a non-finite loss or gradient in a row (each is skipped) that stop the run and write a replay bundle."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on the labelled test split."""

    every: int | Literal["auto"] = 0
    """Epochs between evaluations during training; 0 is before and after only, auto as often as 2 % of the time allows."""
    batch_size: int = 128
    """Images a batch; part of the result in form published, whose mask is scaled over the batch."""
    protocols: tuple[Literal["retrieval", "knn", "linear"], ...] = ("retrieval",)
    """What is measured; knn and linear need the features of the training images too."""


@dataclass(frozen=True)
class Config:
    """Everything a run depends on."""

    seed: int = 0
    """One seed for weights, order and views."""
    epochs: int = 100
    """Passes over the training images."""
    batch_size: int = 128
    """Images a step, over all processes."""
    amp: Literal["bf16", "fp16"] | None = None
    """Automatic mixed precision."""
    out: str | None = None
    """Run folder; null is runs/<recipe>."""
    resume: str = "auto"
    """auto continues the run folder's newest checkpoint, none starts afresh, a path continues that checkpoint."""
    method: MethodConfig = field(default_factory=MethodConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    queue: QueueConfig = field(default_factory=QueueConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    bn: BatchNormConfig = field(default_factory=BatchNormConfig)
    ais: AisConfig = field(default_factory=AisConfig)
    iadm: IadmConfig = field(default_factory=IadmConfig)
    lcr: LcrConfig = field(default_factory=LcrConfig)
    ldfs: LdfsConfig = field(default_factory=LdfsConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    run: RunConfig = field(default_factory=RunConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


@functools.cache
def key_types() -> dict[str, Any]:
    """Every dotted key with its resolved type annotation, in the order of the dataclasses."""

    def walk(cls: type, prefix: str) -> Iterable[tuple[str, Any]]:
        hints = typing.get_type_hints(cls)
        for entry in fields(cls):
            if is_dataclass(hints[entry.name]):
                yield from walk(hints[entry.name], f"{prefix}{entry.name}.")
            else:
                yield prefix + entry.name, hints[entry.name]

    return dict(walk(Config, ""))


def flatten(config: Config) -> dict[str, Any]:
    """Every dotted key with its value, in the order of the dataclasses."""
    values = {}
    for key in key_types():
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        values[key] = value
    return values


def union_members(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the type alone."""
    return typing.get_args(annotation) if typing.get_origin(annotation) not in (None, Literal, tuple) else (annotation,)


def expected_type(annotation: Any) -> str:
    """A type in the words of a recipe."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
    parts = []
    for option in union_members(annotation):
        if typing.get_origin(option) is Literal:
            parts += [str(choice) for choice in typing.get_args(option)]
        elif typing.get_origin(option) is tuple:
            parts.append(f"a list of {expected_type(typing.get_args(option)[0])}")
        else:
            parts.append(words[option])
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} or {parts[-1]}"


_AT_LEAST: dict[str, int] = {
    "seed": 0, "epochs": 1, "batch_size": 1, "method.maxout_width": 1, "encoder.dim": 1, "queue.size": 1,
    "bn.groups": 1, "ais.weight": 0, "ais.count": 2, "iadm.weight": 0, "ldfs.reconstruction": 0, "ldfs.pair": 0,
    "ldfs.noise": 0, "optim.lr": 0, "optim.weight_decay": 0,
    "data.image_size": 1, "data.workers": 0, "run.log_every": 1, "run.save_every_steps": 1, "run.keep": 1, "run.max_bad_steps": 1,
    "eval.every": 0, "eval.batch_size": 1,
}  # fmt: skip
_ABOVE_ZERO = ("contrast.temperature", "ais.temperature", "ais.scale", "iadm.temperature")
_BELOW_ONE = ("ema.decay", "optim.momentum")


def validate(config: Config) -> None:
    """Checks ranges and combinations; ``null`` passes, it stands for a value that is chosen later.

    Raises:
        ConfigError: names the key, its value and the allowed range.
    """
    values = flatten(config)

    def refuse(key: str, remedy: str) -> NoReturn:
        raise ConfigError(f"{key}: got {values[key]!r}, {remedy}")

    for key, value in values.items():
        if value is None:
            continue
        if isinstance(value, float) and not math.isfinite(value):
            refuse(key, "must be finite")
        if key in _AT_LEAST and value != "auto" and value < _AT_LEAST[key]:
            refuse(key, f"must be at least {_AT_LEAST[key]}")
        if key in _ABOVE_ZERO and value <= 0:
            refuse(key, "must be above 0")
        if key in _BELOW_ONE and not 0 <= value < 1:
            refuse(key, "must be in [0, 1)")
        if isinstance(value, str) and not value:
            refuse(key, "must not be empty")
    for key in ("ais.warmup", "ldfs.warmup", "ldfs.share"):
        if not 0 <= values[key] <= 1:
            refuse(key, "must be in [0, 1]: it is a share")
    if config.seed >= 2**63:
        refuse("seed", "must be below 2**63")
    if config.data.crop_banner and config.data.name != "aircraft":
        refuse("data.crop_banner", f"only images of data.name=aircraft have a banner, not those of {config.data.name}")
    if not config.iadm.sources or len(set(config.iadm.sources)) < len(config.iadm.sources):
        refuse("iadm.sources", f"must name at least one of {expected_type(key_types()['iadm.sources'])}, each once")
    if not config.eval.protocols or len(set(config.eval.protocols)) < len(config.eval.protocols):
        refuse("eval.protocols", f"must name {expected_type(key_types()['eval.protocols'])}, each once")
    if config.queue.size < config.batch_size:
        refuse("queue.size", f"must be at least batch_size ({config.batch_size}): a batch's keys must fit")
    if config.bn.sync and config.bn.groups > 1:
        refuse("bn.groups", "must be 1 with bn.sync: statistics are shared, or of each part")
    if config.batch_size % config.bn.groups:
        refuse("bn.groups", f"must divide batch_size ({config.batch_size})")
    stride = re.search(r"_s(\d+)(?:_|$)", config.encoder.arch)
    cell = int(stride[1]) if stride else 32
    if config.method.name in ("ppssl", "ldfs") and (cell == 0 or config.data.image_size % cell):
        refuse("data.image_size", f"must be a multiple of {cell}, the stride of {config.encoder.arch}'s map")
