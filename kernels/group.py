"""What one step tells the other processes: small collectives as custom ops, so that they run inside a compiled graph too.

A group is named by a string, because custom ops take no objects; "" is this process alone. Processes must hold equally
many images. Gradients are those of the sum of all processes' losses.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group


def group_name(group: dist.ProcessGroup | str | None) -> str:
    """The name by which a custom op finds ``group``; "" for None or a group of one."""
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
    """The processes' tensors one after the other along the first axis, in the order of their ranks. Differentiable."""
    return torch.ops.ppssl.gather(tensor, name) if name else tensor


def local_shard(tensor: Tensor, name: str) -> Tensor:
    """This process's part of a gathered tensor."""
    return tensor.chunk(world_size(name))[rank(name)] if name else tensor


def all_reduce_mean(tensor: Tensor, name: str) -> Tensor:
    """The mean of the processes' tensors, the same bits in each. Differentiable."""
    return torch.ops.ppssl.all_reduce_mean(tensor, name) if name else tensor


def all_to_all(tensor: Tensor, sent: list[int], received: list[int], name: str) -> Tensor:
    """Sends ``sent[r]`` rows to process r, in the order of the rows; returns what the others send here, in the order of
    their ranks, ``received[r]`` rows each. Not differentiable."""
    return torch.ops.ppssl.all_to_all(tensor, sent, received, name)


def is_first(name: str) -> bool:
    """True in one process of the group: the one that accounts for what all of them share."""
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
def _average(tensor: Tensor, group: str) -> Tensor:
    processes = _resolve_process_group(group)
    mean = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(mean, group=processes)
    return mean.div_(processes.size())


@_average.register_fake
def _(tensor, group):
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


@torch.library.custom_op("ppssl::all_to_all", mutates_args=())
def _exchange(tensor: Tensor, sent: list[int], received: list[int], group: str) -> Tensor:
    result = tensor.new_empty((sum(received), *tensor.shape[1:]))
    dist.all_to_all_single(result, tensor.contiguous(), received, sent, group=_resolve_process_group(group))
    return result


@_exchange.register_fake
def _(tensor, sent, received, group):
    return tensor.new_empty((sum(received), *tensor.shape[1:]))


def _remember_group(ctx, inputs, output):
    ctx.group = inputs[1]


def _gather_backward(ctx, grad):
    return local_shard(all_reduce_mean(grad, ctx.group), ctx.group) * world_size(ctx.group), None


def _average_backward(ctx, grad):
    return all_reduce_mean(grad, ctx.group), None  # every process's loss sees the mean, and 1/n of each tensor is in it


_gather.register_autograd(_gather_backward, setup_context=_remember_group)
_average.register_autograd(_average_backward, setup_context=_remember_group)
