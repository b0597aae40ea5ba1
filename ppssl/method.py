"""The interface between methods and the engine: what a method takes, returns and owns, and the registry by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ppssl.encoder import BaseTrunk, FeatureNet
from ppssl.ops import gather
from ppssl.settings import SETTINGS, Sections, Settings
from ppssl.teacher import Teacher


class Batch(NamedTuple):
    """What one step sees. Images are normalized, on the device, channels_last."""

    x_q: Tensor
    """[B, 3, S, S] query views."""
    x_k: Tensor
    """[B, 3, S, S] key views."""
    index: Tensor
    """[B] int64, position in the training list."""
    x_clean: Tensor | None = None
    """[B, 3, S, S] the same images clean (not augmented), for methods that ask for them."""
    teacher: Tensor | None = None
    """[B, E] cached teacher image embeddings (teacher view ``clean``)."""


class Output(NamedTuple):
    """What a method's forward pass returns."""

    total: Tensor
    """Scalar to minimize."""
    terms: dict[str, Tensor]
    """Its parts by name, detached scalars, before weighting."""
    keys: Tensor | None = None
    """[B, D] detached unit rows for the queue; None where there is none, and ``enqueue`` is not called."""
    stats: dict[str, Tensor] = {}
    """Detached scalars worth a curve, e.g. contrast_top1. ``spread`` is watched by the engine, which tells of a collapse."""


class StepContext(NamedTuple):
    """What the engine tells a method about the step; the defaults are those of a call outside of training."""

    progress: Tensor | None = None
    """Fraction of the run that is done, 0-d float32 in [0, 1]; for warm-ups."""
    loss_scale: Tensor | None = None
    """fp16 only: factor for gradients that are taken inside ``forward`` (they are divided by it in float32)."""
    share: float = 1.0
    """The part of the global batch that ``forward`` sees, 1 / N on N processes. The engine averages losses and gradients over the
    processes: a term that is a sum over images is divided by it, the gradient of a mean over images multiplied."""


NO_CONTEXT = StepContext()


@torch.no_grad()
def spread(rows: Tensor, group: str = "") -> dict[str, Tensor]:
    """``{"spread": s}`` for ``Output.stats``: how far the unit rows [B, D] of the global batch lie apart, as the standard deviation
    of a dimension times sqrt(D). 1 where they point everywhere, 0 where all are one (Chen and He 2021, arXiv 2011.10566, section
    4.1). Nothing for a single row."""
    rows = gather(rows.detach(), group)
    return {"spread": rows.std(0).mean() * rows.shape[1] ** 0.5} if len(rows) > 1 else {}


class Method(nn.Module):
    """One self-supervised method. ``forward`` has no side effects but statistics in 1-d buffers; the engine updates the key network
    (``ema_pairs``) before it and calls ``enqueue`` after the optimizer. The class attributes say what a method needs."""

    needs_image_grad: tuple[str, ...] = ()
    """Fields of the batch that the engine hands over as leaves that require grad, made outside any compiled region."""
    needs_clean = False
    """True: the loader also makes ``batch.x_clean``."""
    needs_teacher_embeddings = False
    """True: the engine fills ``batch.teacher`` from its cache of clean-image embeddings."""
    group = ""
    """Name of the processes that share each batch (kernels/group.py), "" for this one alone; see ``distribute``."""

    def distribute(self, group: str, *, sync_bn: bool, shard_queue: bool) -> None:
        """Makes this one of the processes of ``group``, called before the first step: from then on ``forward`` gets an equal part
        of the global batch in the order of the ranks (``StepContext.share``), ``enqueue`` the keys of that part, and the engine
        averages losses, gradients and running statistics.
        sync_bn: batch statistics over all processes; shard_queue: each holds a part of the queue.
        """
        raise NotImplementedError(f"{type(self).__name__}.distribute: this method runs in one process only")

    def forward(self, batch: Batch, context: StepContext = NO_CONTEXT) -> Output:
        """The loss of one batch. The engine passes ``context`` by name; a method that needs none may leave that parameter out."""
        raise NotImplementedError(f"{type(self).__name__}.forward")

    @classmethod
    def from_settings(cls, settings: Settings, network: FeatureNet, teacher: Teacher | None = None) -> Method:
        """Builds the method around ``network`` (from ``build_network``). settings: of the class that it is registered with."""
        raise NotImplementedError(f"{cls.__name__}.from_settings")

    @classmethod
    def build_network(cls, settings: Settings, trunk: BaseTrunk) -> FeatureNet:
        """The inference network of this method around ``trunk``; the plain pooled feature unless overridden."""
        return FeatureNet(trunk)

    @property
    def network(self) -> FeatureNet:
        """The inference network: what is evaluated, exported and kept."""
        raise NotImplementedError(f"{type(self).__name__}.network")

    def attention(self, images: Tensor) -> dict[str, Tensor]:
        """Optional: where the method looks, as maps [B, h, w] by name, detached, for pictures; nothing unless overridden.

        images: [B, 3, S, S] float32, normalized, clean. Called in eval mode, without autocast and outside any compiled
        region. Must leave the method as it was: no random numbers, no buffer moved, nothing enqueued. A method that contrasts
        takes the mirrored image as the second view. Values are any non-negative numbers; a reader scales them.
        """
        return {}

    def ema_pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """(online, target) tensors in the same order; the engine moves target towards online."""
        return [], []

    def trained_parameters(self) -> list[nn.Parameter]:
        """The parameters that the optimizer moves: all that require a gradient and are no target of ``ema_pairs``."""
        targets = {id(tensor) for tensor in self.ema_pairs()[1]}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in targets]

    @torch.no_grad()
    def enqueue(self, keys: Tensor, index: Tensor, skip: Tensor | None = None) -> None:
        """Called after the optimizer with ``Output.keys`` and ``Batch.index``. Must change nothing where the 0-d bool ``skip`` is
        true."""

    @torch.no_grad()
    def renumber(self, places: Tensor) -> None:
        """Called where a run goes on with another training list: what remembers images by their index takes ``places[index]``,
        [N + 1] int64 on the CPU, -1 where an image is gone; its last row, -1, stands for no image."""


class _Methods(Mapping[str, type[Method]]):
    """The registered methods by name; a method's module is imported when it is asked for."""

    def __init__(self) -> None:
        self.classes: dict[str, type[Method]] = {}

    def __getitem__(self, name: str) -> type[Method]:
        if name not in self.classes and name in SETTINGS:
            importlib.import_module(SETTINGS[name].module)
        return self.classes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*SETTINGS, *self.classes}))

    def __len__(self) -> int:
        return len({*SETTINGS, *self.classes})

    def name_of(self, kind: type[Method]) -> str | None:
        """The name that ``kind`` is registered under."""
        return next((name for name, known in self.classes.items() if known is kind), None)


METHODS = _Methods()
AnyMethod = TypeVar("AnyMethod", bound=type[Method])


def register(name: str, settings: type[Settings] | None = None) -> Callable[[AnyMethod], AnyMethod]:
    """Class decorator: makes a method available as ``method.name: <name>``.

    settings: the class of what ``from_settings`` is given, for a method outside of this package; its fields name sections of the
    configuration. None takes that of the registered method that it extends. A method of this package has its settings class in
    ``ppssl/settings/methods.py``. Raises ``ValueError`` for a field of ``settings`` that is no section, and for the name of
    a method of this package.
    """
    sections = (*(entry.name for entry in fields(Sections)), "image_size")
    for entry in fields(settings) if settings else ():
        if entry.name not in sections:
            raise ValueError(
                f"{settings.__name__}.{entry.name}: not a section of the configuration; use {', '.join(sections)}, or add the "
                f"section to ppssl/settings/methods.py"
            )

    def add(cls: AnyMethod) -> AnyMethod:
        shipped = name in SETTINGS and SETTINGS[name].module.startswith("ppssl.")
        if shipped and cls.__module__ != SETTINGS[name].module:  # whichever is imported last would win
            raise ValueError(f"method.name: {name!r} is the name of {SETTINGS[name].module}; register {cls.__name__} under another")
        above = (METHODS.name_of(base) for base in cls.__mro__[1:])
        METHODS.classes[name] = cls
        if settings is not None or name not in SETTINGS:
            base = settings or next((SETTINGS[known] for known in above if known), Settings)
            SETTINGS[name] = type(f"{cls.__name__}Settings", (base,), {"name": name, "module": cls.__module__})
        return cls

    return add
