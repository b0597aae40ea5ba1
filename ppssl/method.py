"""The seam between methods and the engine: what a method takes, returns and owns, and the registry by name."""

from __future__ import annotations

from typing import Any, Callable, NamedTuple

import torch
from torch import Tensor, nn

from ppssl.encoder import FeatureNet, Trunk
from ppssl.teacher import Teacher


class Batch(NamedTuple):
    """What one step sees. Images are normalised, on the device, channels_last."""

    x_q: Tensor
    """[B, 3, S, S] query views."""
    x_k: Tensor
    """[B, 3, S, S] key views."""
    index: Tensor
    """[B] int64, position in the training list."""
    x_o: Tensor | None = None
    """[B, 3, S, S] the same images un-augmented, for methods that ask for them."""
    teacher: Tensor | None = None
    """[B, E] cached teacher image embeddings (teacher view ``clean``)."""


class Output(NamedTuple):
    """What a method's forward pass returns."""

    total: Tensor
    """Scalar that is minimised."""
    terms: dict[str, Tensor]
    """Its parts by name, detached scalars, before weighting."""
    keys: Tensor
    """[B, D] detached unit rows for the queue."""
    stats: dict[str, Tensor]
    """Detached scalars worth a curve, e.g. contrast_top1."""


class Method(nn.Module):
    """One self-supervised method. ``forward`` has no side effects but statistics in 1-d buffers; the engine moves the key network
    (``ema_pairs``) before it and calls ``enqueue`` after the optimiser."""

    needs_image_grad: tuple[str, ...] = ()
    """Fields of the batch that the engine hands over as leaves that require grad, made outside any compiled region."""
    needs_original = False
    """True: the loader also makes ``batch.x_o``."""
    needs_teacher_embeddings = False
    """True: the engine fills ``batch.teacher`` from its cache of clean-image embeddings."""
    loss_scale: Tensor | None = None
    """fp16 only, set by the engine: factor for gradients taken inside ``forward`` (they are divided by it in float32)."""
    progress: Tensor | None = None
    """Share of the run that is done, 0-d float32 in [0, 1], set by the engine; for warm-ups."""
    group = ""
    """Name of the processes that share each batch (kernels/group.py), "" for this one alone; see ``distribute``."""

    def distribute(self, group: str, *, sync_bn: bool, shard_queue: bool) -> None:
        """Makes this one of the processes of ``group``, called before the first step: from then on ``forward`` gets an equal share
        of the global batch in the order of the ranks, ``enqueue`` this share's keys, and the engine averages losses, gradients
        and running statistics. A loss that is a mean needs nothing; one that is a sum is to be multiplied by the processes.
        sync_bn: batch statistics over all processes; shard_queue: each holds a part of the queue.
        """
        raise NotImplementedError(f"{type(self).__name__}.distribute: this method runs in one process only")

    skip: Tensor | None = None
    """0-d bool, set by the engine: true where this step's numbers are not finite and ``enqueue`` is to change nothing."""

    def forward(self, batch: Batch) -> Output:
        raise NotImplementedError(f"{type(self).__name__}.forward")

    @classmethod
    def from_config(cls, cfg: Any, network: FeatureNet, teacher: Teacher | None) -> Method:
        """Builds the method around ``network`` (from ``build_network``); ``cfg`` is read by attribute only and carries the
        names of ``engine.config.Config``."""
        raise NotImplementedError(f"{cls.__name__}.from_config")

    @classmethod
    def build_network(cls, cfg: Any, trunk: Trunk) -> FeatureNet:
        """The inference network of this method around ``trunk``; the plain pooled feature unless overridden."""
        return FeatureNet(trunk)

    @property
    def network(self) -> FeatureNet:
        """The inference network: what is evaluated, exported and kept."""
        raise NotImplementedError(f"{type(self).__name__}.network")

    def attention(self, images: Tensor) -> dict[str, Tensor]:
        """Optional: where the method looks, as maps [B, h, w] by name, detached, for pictures; nothing unless overridden.

        images: [B, 3, S, S] float32, normalised, un-augmented. Called in eval mode, without autocast and outside any compiled
        region. Must leave the method as it was: no random numbers, no buffer moved, nothing enqueued. A method that contrasts
        takes the mirrored image as the second view. Values are any non-negative numbers; a reader scales them.
        """
        return {}

    def ema_pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """(online, target) tensors in the same order; the engine moves target towards online."""
        return [], []

    @torch.no_grad()
    def enqueue(self, keys: Tensor, index: Tensor) -> None:
        """Called after the optimiser with ``Output.keys`` and ``Batch.index``."""


METHODS: dict[str, type[Method]] = {}


def register(name: str) -> Callable[[type[Method]], type[Method]]:
    """Class decorator: makes a method available as ``method.name: <name>``."""

    def add(cls: type[Method]) -> type[Method]:
        METHODS[name] = cls
        return cls

    return add
