"""What a method can be told: the sections of its settings, their ranges, and what the variants of a method differ in.

A section is a group of dotted keys (``queue.size``); ``engine.config`` composes them into the whole configuration. A method's
settings class names the sections it reads, the module it lives in and its variants. A method with hyper-parameters of its own adds
its section and its settings class here, its module, and its test. This module needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar

from annotated_types import Ge, Gt, Le, Lt, MinLen

_SOURCES = ("image", *(f"layer{i}" for i in range(1, 5)), *(f"stage{i}" for i in range(1, 41)))
Source: TypeAlias = Literal[_SOURCES]  # type: ignore[valid-type]
"""Where a CAM can be taken: layers are a ResNet's, stages those of a timm model. The trunk says which it has."""


@dataclass(frozen=True)
class Resume:
    """Whether a run that continues a checkpoint may have another value: ``free``, ``said`` (with a line in the log) or ``refused``,
    which is what a field without this mark is."""

    policy: Literal["free", "said", "refused"]


FREE, SAID = Resume("free"), Resume("said")


@dataclass(frozen=True)
class Distinct:
    """Each value once."""


@dataclass(frozen=True)
class MethodConfig:
    """Which method is trained, and its switches; ``null`` takes what ``variant`` says."""

    name: str = "ppssl"
    """A registered method."""
    variant: Literal["published", "guided"] = "published"
    """Of methods that have variants. published: what the authors' code computes. guided: what the paper's text aims at."""
    minmax: Literal["batch", "image"] | None = None
    """Range over which the mask is scaled to [0, 1]. published: batch, guided: image."""
    maxout_width: Annotated[int, Ge(1)] = 32
    """Channels of the 1x1 projection whose maximum is the mask."""
    contrast_mask: bool | None = None
    """Contrast gap(F) of query and key (published), or the masked gap(A * F), to which A is a constant (guided)."""
    mask_reach: Literal["trunk", "branch"] | None = None
    """What a gradient through the mask reaches: the trunk too (both variants), or the mask's own 1x1 projection alone."""


@dataclass(frozen=True)
class EncoderConfig:
    """The network that is kept."""

    arch: str = "resnet50"
    """A ResNet, NAME[_w<base width>][_s<stride>], as resnet50 or resnet18_w32_s16; or a model of timm, timm/NAME[_s<stride>]."""
    weights: str = "IMAGENET1K_V1"
    """torchvision weight tag; timm or timm:TAG of a timm model; none; or the path of a .safetensors/.pth file."""
    head: Literal["mlp2", "mlp3_bn"] = "mlp2"
    """Projection head: Linear-ReLU-Linear, or (Linear-BN-ReLU) x 2 - Linear-BN."""
    dim: Annotated[int, Ge(1)] = 256
    """Width D of the contrastive embedding."""
    partial: Annotated[bool, FREE] = False
    """Take from weights of another network what fits, and leave the rest random; otherwise they are refused."""


@dataclass(frozen=True)
class QueueConfig:
    """The queue of negatives."""

    size: Annotated[int, Ge(1)] = 65536
    """Rows K; any positive number, no multiple of the batch needed."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Storage type; auto is 16-bit on CUDA under amp, float32 otherwise."""
    sharded: Annotated[bool, FREE] = False
    """Keep K / world_size rows per process."""
    exclude_same_image: bool = False
    """Leave out a query's own stale keys (same image, earlier epochs); on a GPU this takes the pass without a Triton kernel."""


@dataclass(frozen=True)
class EmaConfig:
    """The key network."""

    decay: Annotated[float, Ge(0), Lt(1)] = 0.999
    """theta_k <- decay * theta_k + (1 - decay) * theta_q, before every step."""


@dataclass(frozen=True)
class ContrastConfig:
    """InfoNCE."""

    temperature: Annotated[float, Gt(0)] = 0.2
    """T in lse(q.k / T)."""


@dataclass(frozen=True)
class BatchNormConfig:
    """Batch statistics."""

    groups: Annotated[int, Ge(1)] = 1
    """Split the batch into this many groups with statistics of their own (imitates as many GPUs)."""
    sync: bool = False
    """Statistics over the batch of all processes (SyncBN)."""
    impl: Annotated[Literal["auto", "torch", "fused"], SAID] = "auto"
    """Batch-norm of the trunk while training: torch's, or one fused op with the ReLU and the shortcut's sum, on CUDA, where sync
    is false. auto takes torch's: the fused op has not been measured on a GPU."""


@dataclass(frozen=True)
class AisConfig:
    """Text-guided distillation (alignment of the image with the teacher's image-text similarities)."""

    weight: Annotated[float, Ge(0)] = 1.2
    """alpha."""
    temperature: Annotated[float, Gt(0)] = 1.0
    """tau of both softmaxes."""
    scale: Annotated[float, Gt(0)] = 100.0
    """Factor on the student's cosine similarities before the softmax."""
    warmup: Annotated[float, Ge(0), Le(1)] = 0.0
    """Fraction of all steps over which the weight rises linearly from 0."""
    prompts: str = "birds"
    """Corpus in ppssl/prompts, or the path of a YAML file."""
    count: Annotated[int, Ge(2)] | None = None
    """Number of descriptions, the relevant one first; null takes 8 of a shipped corpus and all of a file of your own."""


@dataclass(frozen=True)
class IadmConfig:
    """GradCAM guidance of ppssl, and of lcr but for ``sources``, ``image``, ``pool``, ``mask`` and ``image_bn``; ``null`` takes
    what ``method.variant`` says."""

    weight: Annotated[float, Ge(0)] | None = None
    """beta. published: 0.01 (of a sum), guided: 1.28 (of a mean)."""
    sources: Annotated[tuple[Source, ...], MinLen(1), Distinct()] = ("image",)
    """Where the CAM is taken; several are averaged."""
    image: Literal["query", "clean"] = "query"
    """The image whose CAM is taken: the query view, or the clean image (one more forward pass)."""
    sign: Literal["plus", "minus"] | None = None
    """relu(+x * G) (published) or relu(-x * G) (guided: what supports agreement)."""
    temperature: Annotated[float, Gt(0)] | None = None
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
    image_bn: Literal["shared", "separate"] | None = None
    """Batch-norm of the image branch: the feature branch's (published) or a separate one (guided)."""
    reduction: Literal["sum", "mean"] | None = None
    """KL summed over the batch (published) or averaged (guided)."""


@dataclass(frozen=True)
class LcrConfig:
    """What lcr has beside ``iadm``; ``null`` takes what ``method.variant`` says."""

    detach: bool | None = None
    """The CAM is a constant. published: false (the feature in it carries gradient), guided: true."""
    updates: Literal["one", "three"] | None = None
    """Updates of the mask's batch-norm per step: query map; or query, key and query map. published: three, guided: one."""


@dataclass(frozen=True)
class LdfsConfig:
    """Method ldfs. Its authors did not publish these values: the defaults are ours."""

    reconstruction: Annotated[float, Ge(0)] = 0.05
    """alpha, weight of the decoder's squared error."""
    pair: Annotated[float, Ge(0)] = 0.5
    """nu, weight of the contrast of drawn images."""
    share: Annotated[float, Ge(0), Le(1)] = 0.2
    """Fraction of the feature's dimensions that count as not discriminative, by each of the two criteria."""
    noise: Annotated[float, Ge(0)] = 1.0
    """Noise on those dimensions, in standard deviations of each."""
    warmup: Annotated[float, Ge(0), Le(1)] = 0.2
    """Fraction of the run in which the decoder learns before its images are contrasted."""


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
class Sections:
    """Every section that a method may read."""

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


# Methods. The published values are those of the authors' code; the guided ones were chosen on tuning seeds of the synthetic dataset
# (bench/results/methods/choice.md). 1.28 = 0.01 x the published batch of 128: the weight of one image is kept and no longer depends
# on the batch.
_PUBLISHED = {
    "method.minmax": "batch", "iadm.weight": 0.01, "iadm.sign": "plus", "iadm.temperature": 1.0, "iadm.softmax": "rows",
    "iadm.cam_scale": "none", "iadm.cam_loss": "mean", "iadm.reduction": "sum",
}  # fmt: skip
_GUIDED = {
    "method.minmax": "image", "iadm.weight": 1.28, "iadm.sign": "minus", "iadm.temperature": 0.4, "iadm.softmax": "cells",
    "iadm.cam_scale": "max", "iadm.cam_loss": "sum", "iadm.reduction": "mean",
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What one method is told: a field per section that it reads, and ``image_size`` where it needs that."""

    name: ClassVar[str]
    """``method.name``."""
    module: ClassVar[str]
    """Where the method's class is."""
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """By ``method.variant``: the value of each dotted key that is null in the config."""
    has_mask: ClassVar[bool] = False
    """The network has a mask branch."""
    divides_image: ClassVar[bool] = False
    """The side of the image must be a multiple of the feature map's stride."""

    @property
    def uses_teacher(self) -> bool:
        """The method listens to an image-text teacher."""
        return False


AnySections = TypeVar("AnySections", bound=Sections)


@dataclass(frozen=True)
class MoCoSettings(Settings):
    """MoCo v2, and what every method with a queue shares."""

    name = "moco"
    module = "ppssl.moco"
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    queue: QueueConfig = field(default_factory=QueueConfig)
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    bn: BatchNormConfig = field(default_factory=BatchNormConfig)


@dataclass(frozen=True)
class PPSSLSettings(MoCoSettings):
    """PP-SSL."""

    name = "ppssl"
    module = "ppssl.ppssl"
    variants = {
        "published": _PUBLISHED
        | {
            "method.contrast_mask": False, "method.mask_reach": "trunk", "iadm.pool": "max", "iadm.mask": "image",
            "iadm.image_bn": "shared", "teacher.view": "query",
        },
        "guided": _GUIDED
        | {
            "method.contrast_mask": True, "method.mask_reach": "trunk", "iadm.pool": "mean", "iadm.mask": "feature",
            "iadm.image_bn": "separate", "teacher.view": "clean",
        },
    }  # fmt: skip
    has_mask = divides_image = True
    method: MethodConfig = field(default_factory=MethodConfig)
    ais: AisConfig = field(default_factory=AisConfig)
    iadm: IadmConfig = field(default_factory=IadmConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)

    @property
    def uses_teacher(self) -> bool:
        return self.ais.weight != 0


@dataclass(frozen=True)
class LCRSettings(MoCoSettings):
    """LCR."""

    name = "lcr"
    module = "ppssl.lcr"
    variants = {
        "published": _PUBLISHED | {"lcr.detach": False, "lcr.updates": "three"},
        "guided": _GUIDED | {"lcr.detach": True, "lcr.updates": "one"},
    }
    has_mask = True
    method: MethodConfig = field(default_factory=MethodConfig)
    iadm: IadmConfig = field(default_factory=IadmConfig)
    lcr: LcrConfig = field(default_factory=LcrConfig)


@dataclass(frozen=True)
class LDFSSettings(MoCoSettings):
    """LDFS."""

    name = "ldfs"
    module = "ppssl.ldfs"
    divides_image = True
    ldfs: LdfsConfig = field(default_factory=LdfsConfig)
    image_size: int = 224
    """Side of a view in pixels."""


@dataclass(frozen=True)
class SimCLRSettings(Settings):
    """SimCLR."""

    name = "simclr"
    module = "ppssl.simclr"
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    bn: BatchNormConfig = field(default_factory=BatchNormConfig)


@dataclass(frozen=True)
class BYOLSettings(Settings):
    """BYOL."""

    name = "byol"
    module = "ppssl.byol"
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    bn: BatchNormConfig = field(default_factory=BatchNormConfig)


SETTINGS: dict[str, type[Settings]] = {
    kind.name: kind for kind in (BYOLSettings, LCRSettings, LDFSSettings, MoCoSettings, PPSSLSettings, SimCLRSettings)
}
"""The settings class of every registered method by ``method.name``; ``ppssl.register`` adds a user's own."""


def settings_class(name: str) -> type[Settings]:
    """The settings class of the method ``name``. Raises ``ValueError`` naming the methods that are registered."""
    if name not in SETTINGS:
        raise ValueError(f"method.name: {name!r} is not known; use one of {', '.join(sorted(SETTINGS))}")
    return SETTINGS[name]


def resolve_variant(sections: AnySections) -> AnySections:
    """``sections`` in which every null that the method's variant decides has the variant's value."""
    kind = SETTINGS.get(sections.method.name)
    values = kind.variants.get(sections.method.variant, {}) if kind else {}
    return replace_keys(sections, {key: value for key, value in values.items() if get_key(sections, key) is None})


def method_settings(sections: Sections, image_size: int = 224) -> Settings:
    """The settings object of ``sections.method.name``, its variant resolved; ``image_size`` in pixels.

    Raises ``ValueError`` for a method that is not registered.
    """
    kind, sections = settings_class(sections.method.name), resolve_variant(sections)
    return kind(**{e.name: image_size if e.name == "image_size" else getattr(sections, e.name) for e in fields(kind)})


def variant(name: str, variant: str = "published", values: Mapping[str, Any] | None = None) -> Any:
    """The settings object of the method ``name`` in that variant, with the ``values`` of some dotted keys."""
    start = Sections(method=MethodConfig(name=name, variant=variant))  # type: ignore[arg-type]
    return method_settings(replace_keys(start, values or {}))


def title(sections: Sections) -> str:
    """The method's name, with the variant where the method has variants."""
    kind = SETTINGS.get(sections.method.name)
    return f"{sections.method.name} ({sections.method.variant})" if kind and kind.variants else sections.method.name


def get_key(holder: Any, key: str) -> Any:
    """The value of a dotted key."""
    for part in key.split("."):
        holder = getattr(holder, part)
    return holder


def replace_keys(holder: Any, values: Mapping[str, Any]) -> Any:
    """A copy of a dataclass of sections with the values of some dotted keys."""
    changes: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        changes[section or name] = replace(changes.get(section, getattr(holder, section)), **{name: value}) if section else value
    return replace(holder, **changes)
