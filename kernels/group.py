"""Collectives as custom ops, so that they also run inside a compiled graph.

A group is identified by its name, because custom ops take no objects; "" is this process alone. All processes must hold the
same number of images. Gradients are those of the sum of the losses of all processes.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group


def group_name(group: dist.ProcessGroup | str | None) -> str:
    """The name by which a custom op finds ``group``; "" for None and for a group of one process."""
    if isinstance(group, str):
        return group
    return group.group_name if group is not None and group.size() > 1 else ""


@torch.compiler.assume_constant_result
def world_size(name: str) -> int:
    """The number of processes in the group."""
    return _resolve_process_group(name).size() if name else 1


@torch.compiler.assume_constant_result
def rank(name: str) -> int:
    """This process's rank in the group."""
    return _resolve_process_group(name).rank() if name else 0


def gather(tensor: Tensor, name: str) -> Tensor:
    """The tensors of all processes, concatenated along the first axis in rank order. Differentiable."""
    return torch.ops.ppssl.gather(tensor, name) if name else tensor


def local_shard(tensor: Tensor, name: str) -> Tensor:
    """This process's part of a gathered tensor: the inverse of :func:`gather`."""
    return tensor.chunk(world_size(name))[rank(name)] if name else tensor


def all_reduce_mean(tensor: Tensor, name: str) -> Tensor:
    """The mean of the tensors of all processes, bit-identical in each of them. Differentiable."""
    return torch.ops.ppssl.all_reduce_mean(tensor, name) if name else tensor


def all_to_all(tensor: Tensor, sent: list[int], received: list[int], name: str) -> Tensor:
    """Sends the next ``sent[r]`` rows to each rank r in turn, and returns the rows received, ``received[r]`` from each rank r, in
    rank order. Differentiable: the gradients go back the same way."""
    return torch.ops.ppssl.all_to_all(tensor, sent, received, name)


def is_first(name: str) -> bool:
    """Whether this is the first process of the group, which accounts for terms that all processes share."""
    return rank(name) == 0


@torch.library.custom_op("ppssl::gather", mutates_args=())
def _gather(tensor: Tensor, group: str) -> Tensor:
    processes = _resolve_process_group(group)
    whole = tensor.new_empty((processes.size() * tensor.shape[0], *tensor.shape[1:]))
    dist.all_gather_into_tensor(whole, tensor.contiguous(), group=processes)
    return whole


@_gather.register_fake
def _(tensor, group):
    return tensor.new_empty((world_size(group) * tensor.shape[0], *tensor.shape[1:]))


@torch.library.custom_op("ppssl::all_reduce_mean", mutates_args=())
def _all_reduce_mean(tensor: Tensor, group: str) -> Tensor:
    processes = _resolve_process_group(group)
    mean = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(mean, group=processes)
    return mean.div_(processes.size())


@_all_reduce_mean.register_fake
def _(tensor, group):
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


@torch.library.custom_op("ppssl::all_to_all", mutates_args=())
def _all_to_all(tensor: Tensor, sent: list[int], received: list[int], group: str) -> Tensor:
    result = tensor.new_empty((sum(received), *tensor.shape[1:]))
    dist.all_to_all_single(result, tensor.contiguous(), received, sent, group=_resolve_process_group(group))
    return result


@_all_to_all.register_fake
def _(tensor, sent, received, group):
    return tensor.new_empty((sum(received), *tensor.shape[1:]))


def _remember_group(ctx, inputs, output):
    ctx.group = inputs[1]


def _gather_backward(ctx, grad):
    return local_shard(all_reduce_mean(grad, ctx.group), ctx.group) * world_size(ctx.group), None


def _all_reduce_mean_backward(ctx, grad):
    return all_reduce_mean(grad, ctx.group), None  # the loss of every process depends on the mean, of which each tensor is 1/n


def _remember_routes(ctx, inputs, output):
    _, ctx.sent, ctx.received, ctx.group = inputs


def _all_to_all_backward(ctx, grad):
    return all_to_all(grad, ctx.received, ctx.sent, ctx.group), None, None, None


_gather.register_autograd(_gather_backward, setup_context=_remember_group)
_all_reduce_mean.register_autograd(_all_reduce_mean_backward, setup_context=_remember_group)
_all_to_all.register_autograd(_all_to_all_backward, setup_context=_remember_routes)
