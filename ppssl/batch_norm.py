"""Batch-norm whose statistics are taken over parts of a batch, or over the batches of several processes; fused; or frozen."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.nn.modules._functions import SyncBatchNorm as FusedSync
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.resnet import BasicBlock, Bottleneck

from ppssl.ops import all_reduce_mean, all_to_all, batch_norm, rank, world_size


class GroupedBatchNorm(_BatchNorm):
    """Batch-norm whose statistics are taken over ``groups`` equal parts of the batch: what as many processes without SyncBN
    compute. The running statistics move towards the mean of the groups'."""

    groups = 1

    def _check_input_dim(self, x: Tensor) -> None:
        """[B, C] and [B, C, H, W] alike."""

    def forward(self, x: Tensor) -> Tensor:
        return activated(self, self.normalized(x))

    def normalized(self, x: Tensor) -> Tensor:
        """The batch-norm alone."""
        if not self.training or self.groups == 1 or x.shape[0] < self.groups:
            return super().forward(x)
        if x.shape[0] % self.groups:
            raise ValueError(f"bn.groups: {self.groups} does not divide the batch of {x.shape[0]}; choose a divisor")
        mean, var = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        parts = []
        for part in x.chunk(self.groups):
            # with momentum 1 the buffers become this part's own mean and unbiased variance
            m, v = torch.zeros_like(mean), torch.ones_like(var)
            parts.append(F.batch_norm(part, m, v, self.weight, self.bias, True, 1.0, self.eps))
            mean, var = mean + m / self.groups, var + v / self.groups
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var, self.momentum)
        return torch.cat(parts)


class SyncBatchNorm(_BatchNorm):
    """Batch-norm over the batches of all processes of ``group`` together, which must be equally large.

    On a GPU it is torch's own. On a CPU, where torch has none, and inside a compiled graph, where torch's would wait for the
    device, it is the same formula on averages over the processes, which autograd differentiates.
    """

    group = ""

    def _check_input_dim(self, x: Tensor) -> None:
        """[B, C] and [B, C, H, W] alike."""

    def forward(self, x: Tensor) -> Tensor:
        return activated(self, self.normalized(x))

    def normalized(self, x: Tensor) -> Tensor:
        """The batch-norm alone."""
        if not self.training or not self.group:
            return super().forward(x)
        if x.is_cuda and not torch.compiler.is_compiling():
            return FusedSync.apply(
                x, self.weight, self.bias, self.running_mean, self.running_var, self.eps, self.momentum,
                _resolve_process_group(self.group), world_size(self.group),
            )  # fmt: skip
        rows = x.to(torch.promote_types(x.dtype, torch.float32)).movedim(1, -1)  # [..., C]
        dims = tuple(range(rows.dim() - 1))
        mean = all_reduce_mean(rows.mean(dims), self.group)
        centered = rows - mean
        var = all_reduce_mean(centered.square().mean(dims), self.group)
        update_running_statistics(self, mean, var, x.numel() // x.shape[1] * world_size(self.group))
        return (centered * (torch.rsqrt(var + self.eps) * self.weight) + self.bias).movedim(-1, 1).to(x.dtype)


def fused_batch_norm(bn: _BatchNorm, x: Tensor, *, residual: Tensor | None = None, relu: bool = True) -> Tensor:
    """``relu(bn(x) + residual)`` in training mode by one op, [B, C, H, W] in channels_last on CUDA (``bn.impl: fused``). What the
    op has no kernel for, statistics over processes and those of a frozen ``bn``, is computed by ``bn`` and torch."""
    if type(bn) not in (nn.BatchNorm2d, GroupedBatchNorm) or not bn.training:
        y = bn(x) if residual is None else bn(x) + residual
        return F.relu(y) if relu else y
    groups = getattr(bn, "groups", 1)
    groups = groups if x.shape[0] >= groups else 1
    moves = bn.training and bn.track_running_stats
    out = batch_norm(
        x, bn.weight, bn.bias, residual=residual, relu=relu, eps=bn.eps, groups=groups, impl="triton",
        running_mean=bn.running_mean if moves else None, running_var=bn.running_var if moves else None, momentum=bn.momentum,
    )  # fmt: skip
    if moves:
        with torch.no_grad():
            bn.running_mean.copy_(out.running_mean)
            bn.running_var.copy_(out.running_var)
    if groups == 1 and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
    return out.y


class Fusing(nn.Module):
    """Mixed into a block of torchvision's: where ``fused``, batch-norm takes along what follows it while training."""

    fused = False

    def forward(self, x: Tensor) -> Tensor:
        if not (self.fused and self.training):
            return super().forward(x)
        out, shortcut = x, x
        for i in range(1, self.depth):
            out = fused_batch_norm(self.get_submodule(f"bn{i}"), self.get_submodule(f"conv{i}")(out))
        if self.downsample is not None:
            conv, bn = self.downsample
            shortcut = fused_batch_norm(bn, conv(x), relu=False)
        out = self.get_submodule(f"conv{self.depth}")(out)
        return fused_batch_norm(self.get_submodule(f"bn{self.depth}"), out, residual=shortcut)


class FusingBasicBlock(Fusing, BasicBlock):
    depth = 2


class FusingBottleneck(Fusing, Bottleneck):
    depth = 3


def activated(bn: nn.Module, x: Tensor) -> Tensor:
    """What ``bn`` does after its batch-norm: timm's ``BatchNormAct2d`` is one with a dropout and an activation inside."""
    return bn.act(bn.drop(x)) if "act" in bn._modules else x


def convert(module: nn.Module, make: type[_BatchNorm], **attributes: int | str) -> nn.Module:
    """Replaces every plain batch-norm in ``module``, and timm's with an activation, by a ``make`` with these attributes, the same
    tensors and the same activation."""
    for name, child in module.named_children():
        if type(child) in (nn.BatchNorm1d, nn.BatchNorm2d) or type(child).__name__ == "BatchNormAct2d":
            new = make(child.num_features, eps=child.eps, momentum=child.momentum)
            new.weight, new.bias = child.weight, child.bias
            new.running_mean, new.running_var = child.running_mean, child.running_var
            new.num_batches_tracked = child.num_batches_tracked
            for part, inner in child.named_children():
                setattr(new, part, inner)
            new._forward_hooks.update(child._forward_hooks)
            for attribute, value in attributes.items():
                setattr(new, attribute, value)
            setattr(module, name, new.train(child.training))
        else:
            convert(child, make, **attributes)
    return module


def group_batch_norm(module: nn.Module, groups: int) -> nn.Module:
    """``module`` with batch statistics of ``groups`` parts of the batch; 1 changes nothing."""
    return module if groups == 1 else convert(module, GroupedBatchNorm, groups=groups)


def distribute_batch_norm(module: nn.Module, group: str, *, sync: bool) -> None:
    """Makes ``module``'s batch-norm that of one of the processes of ``group``: over all of them, or over this one's parts."""
    if sync:
        convert(module, SyncBatchNorm, group=group)
    for norm in module.modules():
        if isinstance(norm, GroupedBatchNorm):
            norm.groups = parts_here(norm.groups, group, sync=sync)


def parts_here(groups: int, group: str, *, sync: bool) -> int:
    """How many of the ``groups`` parts of the global batch one process has; with ``sync`` there are none."""
    if sync:
        return 1
    if groups % world_size(group):
        raise ValueError(
            f"bn.groups: {groups} parts of the batch do not divide among {world_size(group)} processes; use a multiple of them, or "
            f"bn.sync=true"
        )
    return groups // world_size(group)


class Freezable(nn.Module):
    """A trunk of which parts can be frozen: they are not trained, and their batch-norms stay in eval mode."""

    arch: str
    sources: tuple[str, ...]
    frozen: tuple[str, ...] = ()
    """The parts that are not trained; see ``freeze``."""
    constant: tuple[str, ...] = ()
    """The sources up to which no weight is trained: a gradient by such a map needs images that require one."""
    _still: tuple[str, ...] = ()
    """Names of the batch-norms that stay in eval mode: ``convert`` puts others in their places."""

    def parts(self) -> dict[str, tuple[str, ...]]:
        """What ``freeze`` takes, from the image on: the names of the modules of each part, every one without those inside it. They
        are the whole trunk; the part of a source's name ends where that map is."""
        raise NotImplementedError(f"{type(self).__name__}.parts")

    def freeze(self, parts: Sequence[str]) -> None:
        """Ends the training of ``parts``: of ``self.parts()``, and ``bn``, every batch-norm. Their parameters get no gradient;
        their batch-norms stay in eval mode, which uses the running statistics and does not move them. To be called before the
        trunk is handed to a method. Raises ``ValueError`` for a part that the trunk does not have."""
        if not parts:
            return
        known, norms = self.parts(), [n for n, m in self.named_modules() if isinstance(m, _BatchNorm)]
        known = known | {"bn": tuple(norms)} if norms else known
        if unknown := [part for part in parts if part not in known]:
            raise ValueError(f"encoder.freeze: {unknown[0]!r} is no part of {self.arch}; use {', '.join(known)}")
        names = {name for part in parts for name in known[part]}
        for name in names:
            for parameter in self.get_submodule(name).parameters(recurse=False):
                parameter.requires_grad_(False)
        self.frozen, self._still = tuple(parts), tuple(name for name in norms if name in names)
        trained = [part for part, inside in known.items() if part != "bn" and any(map(self._trains, inside))]
        order = [part for part in known if part != "bn"]
        self.constant = tuple(source for source in self.sources if source in order[: order.index(trained[0]) if trained else None])
        self.train(self.training)

    def _trains(self, name: str) -> bool:
        return any(parameter.requires_grad for parameter in self.get_submodule(name).parameters(recurse=False))

    def train(self, mode: bool = True) -> Freezable:
        super().train(mode)
        for norm in self.frozen_norms():
            norm.eval()
        return self

    def frozen_norms(self) -> list[nn.Module]:
        """The batch-norms whose running statistics do not move."""
        return [self.get_submodule(name) for name in self._still]


@torch.no_grad()
def update_running_statistics(bn: _BatchNorm, mean: Tensor, var: Tensor, count: int) -> None:
    """Moves ``bn``'s buffers by its momentum towards a batch's mean and biased variance over ``count`` values per channel."""
    if bn.training:
        bn.running_mean.lerp_(mean.to(bn.running_mean.dtype), bn.momentum)
        bn.running_var.lerp_((var * (count / max(1, count - 1))).to(bn.running_var.dtype), bn.momentum)


def shuffle(x: Tensor, groups: int, group: str) -> Tensor:
    """Deals the images of the global batch, [B, ...] here or a shard of it on every process, out to the ``groups`` parts that
    have batch statistics of their own: image i goes to part i mod ``groups``.

    A query and its key then share their statistics no more than any other two images do, so the statistics do not give the
    positive away (MoCo, section 3.3). MoCo draws the parts at random; the order of the images is random already. Only the
    images that change places travel: B / processes per process, not the B that a gather would bring.
    """
    routes = _routes(len(x) * world_size(group), groups, world_size(group), rank(group), x.device)
    rows = x.movedim(1, -1)[routes.leave]  # the memory order of channels_last
    return (all_to_all(rows, routes.sent, routes.received, group) if group else rows)[routes.arrive].movedim(-1, 1)


def unshuffle(rows: Tensor, groups: int, group: str) -> Tensor:
    """The reverse of ``shuffle`` for what was made of the images, rows [b, D]."""
    routes = _routes(len(rows) * world_size(group), groups, world_size(group), rank(group), rows.device)
    rows = rows[routes.arrive.argsort()]
    return (all_to_all(rows, routes.received, routes.sent, group) if group else rows)[routes.leave.argsort()]


class Routes(NamedTuple):
    """How one process's images change places."""

    sent: list[int]
    """Images that go to each process."""
    received: list[int]
    """Images that come from each."""
    leave: Tensor
    """[b] int64: the order in which this process's images leave."""
    arrive: Tensor
    """[b] int64: the position among the arrived images of each image of its new shard."""


@functools.cache
def _routes(batch: int, groups: int, processes: int, me: int, device: torch.device) -> Routes:
    size = batch // processes
    dealt = [i for part in range(groups) for i in range(part, batch, groups)]  # the images in their new order
    wanted = [dealt[p * size : (p + 1) * size] for p in range(processes)]
    leaving = [[i - me * size for i in images if i // size == me] for images in wanted]
    sources = [i // size for i in wanted[me]]
    by_source = torch.tensor(sources).argsort(stable=True)
    return Routes(
        [len(images) for images in leaving],
        [sources.count(p) for p in range(processes)],
        torch.tensor([i for images in leaving for i in images], device=device),
        by_source.argsort().to(device),
    )
