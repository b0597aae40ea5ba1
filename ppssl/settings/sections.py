"""The sections of settings that methods share: groups of dotted keys with type, default, range, and whether a resumed run may have
another value. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from annotated_types import Ge, Gt, Le, Lt, MinLen

_SOURCES = ("image", *(f"layer{i}" for i in range(1, 5)), *(f"stage{i}" for i in range(1, 41)))
Source: TypeAlias = Literal[_SOURCES]  # type: ignore[valid-type]
"""Where a CAM can be taken: layers are a ResNet's, stages those of a timm model. The trunk says which it has."""

Part: TypeAlias = Literal[("stem", *_SOURCES[1:], "bn")]  # type: ignore[valid-type]
"""A part of a trunk that can be frozen. The trunk says which it has."""


@dataclass(frozen=True)
class Resume:
    """Whether a run that continues a checkpoint may have another value: ``free``, ``said`` (with a line in the log) or ``refused``,
    which is what a field without this mark is."""

    policy: Literal["free", "said", "refused"]


FREE, SAID = Resume("free"), Resume("said")


@dataclass(frozen=True)
class OfRun:
    """A fraction of the whole run: where that gets longer, so does what the key says."""


OF_RUN = OfRun()


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
    freeze: Annotated[tuple[Part, ...], Distinct()] = ()
    """Parts of the trunk that are not trained: stem, layer1 ... of a ResNet, stage1 ... of a timm model, bn (every batch-norm).
    Their batch-norms use the running statistics and do not move them."""


@dataclass(frozen=True)
class QueueConfig:
    """The queue of negatives."""

    size: Annotated[int, Ge(1)] | Literal["auto"] = 65536
    """Rows K; any number that holds the keys of a step. auto: a row for each training photo, at most 65536."""
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], SAID] = "auto"
    """Storage type; auto is 16-bit on CUDA under amp, float32 otherwise."""
    sharded: Annotated[bool, FREE] = False
    """Keep K / world_size rows per process."""
    exclude_same_image: bool = False
    """Leave out a query's own stale keys (same image, earlier epochs); on a GPU this takes the pass without a Triton kernel."""
    start: Literal["random", "empty"] = "random"
    """random: the random rows of a new queue count as negatives until keys replace them (as published); empty: they do not."""


@dataclass(frozen=True)
class EmaConfig:
    """The key network."""

    decay: Annotated[float, Ge(0), Lt(1)] = 0.999
    """theta_k <- decay * theta_k + (1 - decay) * theta_q, before every step."""
    schedule: Literal["constant", "cosine"] = "constant"
    """cosine: decay rises to 1 by half a period over the whole run, by step (BYOL, MoCo v3)."""


@dataclass(frozen=True)
class ContrastConfig:
    """InfoNCE."""

    temperature: Annotated[float, Gt(0)] = 0.2
    """T in lse(q.k / T)."""
    negatives: Literal["queue", "batch", "both"] = "queue"
    """Of moco, lcr, ppssl: earlier keys, the keys of the other images of the global batch (no queue is kept; MoCo v3), or both."""
    symmetric: bool = False
    """Of moco, lcr, ppssl: each view is query and key, the mean of both directions (MoCo v3); all keys enter the queue."""
    gradient: Literal["query", "both"] = "query"
    """Of moco, lcr, ppssl: keys are constants of the key network, or of the query network and carry gradient (SimCLR)."""


@dataclass(frozen=True)
class BatchNormConfig:
    """Batch statistics."""

    groups: Annotated[int, Ge(1)] = 1
    """Split the batch into this many groups with statistics of their own (imitates as many GPUs)."""
    sync: bool = False
    """Statistics over the batch of all processes (SyncBN)."""
    impl: Annotated[Literal["auto", "torch", "fused"], SAID] = "auto"
    """Batch-norm of the trunk while training: torch's, or one fused op with the ReLU and the shortcut's sum, on CUDA, where sync
    is false. auto: fused for a ResNet on CUDA, by its bytes and launches (it has not been timed on a GPU), otherwise torch."""


@dataclass(frozen=True)
class AisConfig:
    """Distillation of the teacher; in the paper, of its image-text similarities."""

    weight: Annotated[float, Ge(0)] = 1.2
    """alpha."""
    temperature: Annotated[float, Gt(0)] = 1.0
    """tau of both softmaxes, of targets text and relations; with relations 1 is nearly uniform, 0.1 tells images apart."""
    scale: Annotated[float, Gt(0)] = 100.0
    """Factor on the student's cosine similarities before the softmax, of target text."""
    warmup: Annotated[float, Ge(0), Le(1), OF_RUN] = 0.0
    """Fraction of all steps over which the weight rises linearly from 0."""
    prompts: str = "birds"
    """Corpus in ppssl/prompts, or the path of a YAML file."""
    count: Annotated[int, Ge(2)] | None = None
    """Number of descriptions, the relevant one first; null takes 8 of a shipped corpus and all of a file of your own."""
    target: Literal["text", "image", "relations"] = "text"
    """What is learned of the teacher: its softmax over the descriptions, its image embedding, or which images of a batch it finds
    alike."""


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
    cam_temperature: Annotated[float, Gt(0)] | None = None
    """Of the CAM's spatial softmax alone; null is iadm.temperature, as in both variants."""


@dataclass(frozen=True)
class TeacherConfig:
    """The frozen image-text model, or a frozen image model."""

    model: str = "ViT-B-32-quickgelu"
    """open_clip model name; birds is the demo's own small model; timm/NAME is one of timm, for ais.target=image and relations."""
    weights: str = "openai"
    """open_clip tag, the path of a .safetensors file, or birds (shipped); of a timm model timm, timm:TAG or the path of a file."""
    view: Literal["query", "clean"] | None = None
    """What the teacher sees: the query view (published) or the clean image, embedded once and cached (guided)."""
    image_size: Annotated[int, Ge(1)] | None = None
    """Side in pixels of the images that the teacher sees; null is the model's own."""
