"""What each method is told: the sections that only it reads, its settings class, and what its variants differ in. Needs no torch.

A settings class names the sections that its method reads, the module that the method lives in, and its variants. A method with
hyper-parameters of its own adds its section and its settings class here, its module, and its test.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from annotated_types import Ge, Le

from ppssl.settings.sections import (
    OF_RUN,
    AisConfig,
    BatchNormConfig,
    ContrastConfig,
    EmaConfig,
    EncoderConfig,
    IadmConfig,
    MethodConfig,
    QueueConfig,
    TeacherConfig,
)


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
    warmup: Annotated[float, Ge(0), Le(1), OF_RUN] = 0.2
    """Fraction of the run in which the decoder learns before its images are contrasted."""


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
        """The method listens to a teacher."""
        return False

    @property
    def uses_text(self) -> bool:
        """The method listens to what a teacher says of descriptions."""
        return False

    @property
    def keys_per_image(self) -> int:
        """Keys of an image that enter the queue in a step; 0 where no queue is kept."""
        return int(hasattr(self, "queue"))

    def logits(self, batch_size: int, queue_size: int) -> int | None:
        """Logits of a query of the global batch once the queue is full, its key's own among them; None without a contrast."""
        return 1 + queue_size if hasattr(self, "queue") else None

    def idle(self) -> dict[str, str]:
        """{a key, or a section followed by a dot: why} of what the method reads but has no use for with its other settings."""
        return {}


AnySections = TypeVar("AnySections", bound=Sections)
_CONTRASTS = ("contrast.negatives", "contrast.symmetric", "contrast.gradient")
# of a guidance of weight 0, what neither the loss nor the CAM of the pictures (``Method.attention``) reads
_ONLY_GUIDES = ("iadm.temperature", "iadm.cam_temperature", "iadm.softmax", "iadm.reduction")
_ONLY_GUIDES_PPSSL = (*_ONLY_GUIDES, "iadm.image", "iadm.mask", "iadm.image_bn")
_NOT_OF_LCR = (
    "method.contrast_mask", "method.mask_reach", "iadm.sources", "iadm.image", "iadm.pool", "iadm.mask", "iadm.image_bn",
)  # fmt: skip


def _idle_guidance(iadm: IadmConfig, keys: tuple[str, ...]) -> dict[str, str]:
    return {} if iadm.weight else dict.fromkeys(keys, "iadm.weight is 0")


@dataclass(frozen=True)
class MoCoSettings(Settings):
    """MoCo v2, and what every method with a queue shares."""

    name = "moco"
    module = "ppssl.moco"
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    queue: QueueConfig = field(default_factory=QueueConfig)
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    bn: BatchNormConfig = field(default_factory=BatchNormConfig)

    @property
    def keys_per_image(self) -> int:
        if self.contrast.negatives == "batch":
            return 0
        return 2 if self.contrast.symmetric else 1

    def logits(self, batch_size: int, queue_size: int) -> int | None:
        return {"queue": 1 + queue_size, "batch": batch_size, "both": batch_size + queue_size}[self.contrast.negatives]

    def idle(self) -> dict[str, str]:
        found = {}
        if self.contrast.negatives == "batch":
            found["queue."] = "contrast.negatives=batch keeps no queue"
        if self.contrast.gradient == "both":
            found["ema."] = "with contrast.gradient=both there is no key network"
        return found


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

    @property
    def uses_text(self) -> bool:
        return self.uses_teacher and self.ais.target == "text"

    def idle(self) -> dict[str, str]:
        found = super().idle() | _idle_guidance(self.iadm, _ONLY_GUIDES_PPSSL)
        if not self.uses_teacher:
            return found | dict.fromkeys(("ais.", "teacher."), "ais.weight is 0") | {"ais.weight": ""}
        if not self.uses_text:
            found |= dict.fromkeys(("ais.prompts", "ais.count", "ais.scale"), f"ais.target={self.ais.target} has no descriptions")
        if self.ais.target == "image":
            found["ais.temperature"] = "ais.target=image has no softmax"
        return found


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

    def idle(self) -> dict[str, str]:
        found = super().idle() | _idle_guidance(self.iadm, (*_ONLY_GUIDES, "lcr.updates"))
        return found | dict.fromkeys(_NOT_OF_LCR, "method lcr does not read it")


@dataclass(frozen=True)
class LDFSSettings(MoCoSettings):
    """LDFS."""

    name = "ldfs"
    module = "ppssl.ldfs"
    divides_image = True
    ldfs: LdfsConfig = field(default_factory=LdfsConfig)
    image_size: int = 224
    """Side of a view in pixels."""

    @property
    def keys_per_image(self) -> int:
        return 1

    def logits(self, batch_size: int, queue_size: int) -> int | None:
        return 1 + queue_size

    def idle(self) -> dict[str, str]:
        return dict.fromkeys(_CONTRASTS, "ldfs contrasts with the queue as MoCo v2 does")


@dataclass(frozen=True)
class SimCLRSettings(Settings):
    """SimCLR."""

    name = "simclr"
    module = "ppssl.simclr"
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    bn: BatchNormConfig = field(default_factory=BatchNormConfig)

    def logits(self, batch_size: int, queue_size: int) -> int | None:
        return 2 * batch_size - 1

    def idle(self) -> dict[str, str]:
        found = dict.fromkeys(_CONTRASTS, "simclr is symmetric, with the batch's negatives and gradient through all views")
        return found | {"ema.": "method simclr has no key network"}


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


def idle_keys(sections: Sections) -> dict[str, list[str]]:
    """{why: dotted keys} of what has another value than the default and does nothing with the method and its settings.
    ``queue.dtype`` and ``ais.count`` are left out: what ``auto`` or null became is not told from what was set."""
    settings, method = method_settings(sections), MethodConfig(name=sections.method.name)
    if settings.variants:
        method = replace(method, variant=sections.method.variant)
    default = resolve_variant(Sections(method=method))
    why = {f"{e.name}.": f"method {settings.name} does not read it" for e in fields(Sections) if not hasattr(settings, e.name)}
    for engines in ("encoder.", "ema.", "bn."):  # the engine reads them too
        why.pop(engines, None)
    why |= settings.idle()
    found: dict[str, list[str]] = {}
    for section in fields(Sections):
        for entry in fields(getattr(sections, section.name)):
            key = f"{section.name}.{entry.name}"
            reason = why.get(key, why.get(f"{section.name}."))
            if reason and key not in ("queue.dtype", "ais.count") and get_key(sections, key) != get_key(default, key):
                found.setdefault(reason, []).append(key)
    return found


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
