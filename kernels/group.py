"""Batch statistics over several processes: each gathers all partial results and merges them as if they were its own.

A group is named by a string, because custom ops take no objects; "" is this process alone. Processes must hold equally
many images.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group


def group_name(group: dist.ProcessGroup | None) -> str:
    """The name by which a custom op finds ``group``; "" for None or a group of one."""
    return group.group_name if group is not None and group.size() > 1 else ""


def world(name: str) -> int:
    """Processes in the group."""
    return _resolve_process_group(name).size() if name else 1


def gather(tensor: Tensor, name: str) -> Tensor:
    """The processes' tensors one after the other along the first axis, in the order of their ranks."""
    if not name:
        return tensor
    group = _resolve_process_group(name)
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor, group=group)
    return torch.cat(parts)


def own(tensor: Tensor, name: str) -> Tensor:
    """This process's share of a gathered tensor."""
    if not name:
        return tensor
    group = _resolve_process_group(name)
    return tensor.chunk(group.size())[group.rank()]


def is_first(name: str) -> bool:
    """True in one process of the group: the one that accounts for what all of them share."""
    return not name or _resolve_process_group(name).rank() == 0
