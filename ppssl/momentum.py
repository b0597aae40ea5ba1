"""The momentum side of MoCo: the key network that follows the query network, and the queue of its past keys."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppssl.ops import enqueue


def key_copy(module: nn.Module) -> nn.Module:
    """A copy that no gradient reaches; the engine moves it by ``parameter_pairs``."""
    return copy.deepcopy(module).requires_grad_(False)


def parameter_pairs(online: nn.Module, target: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters of both, paired by position. Buffers stay apart: the key network's batch statistics are its own (MoCo)."""
    pairs = list(online.parameters()), list(target.parameters())
    if [p.shape for p in pairs[0]] != [p.shape for p in pairs[1]]:
        raise ValueError("online and target networks differ in structure; make the target with key_copy(online)")
    return pairs


class KeyQueue(nn.Module):
    """A ring of the last K keys, ``rows`` [K, D] unit rows, and the device-side ``pointer`` to the oldest one.

    It starts with random directions, as MoCo's does. With ``remember`` it also holds whose keys they are: ``index`` [K] int64,
    the image of each row, -1 for a random one.
    """

    def __init__(self, size: int, dim: int, dtype: torch.dtype = torch.float32, *, remember: bool = False):
        super().__init__()
        if size < 1:
            raise ValueError(f"queue.size: {size} rows; at least 1 is needed")
        self.register_buffer("rows", F.normalize(torch.randn(size, dim), dim=1).to(dtype))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.register_buffer("index", torch.full((size,), -1, dtype=torch.int64) if remember else None)

    @torch.no_grad()
    def push(self, keys: Tensor, index: Tensor, skip: Tensor | None = None) -> None:
        """Overwrites the oldest rows by ``keys`` [B, D] of the images ``index`` [B]; any B. Nothing changes where the 0-d bool
        ``skip`` is true."""
        if self.index is not None:
            size, count = len(self.index), len(index)
            slots = ((self.pointer + torch.arange(count, device=index.device)) % size)[-size:]
            whose = index[-size:] if skip is None else torch.where(skip, self.index[slots], index[-size:])
            self.index.index_copy_(0, slots, whose)
        enqueue(self.rows, self.pointer, keys, skip)

    def own(self, index: Tensor) -> tuple[Tensor, Tensor] | None:
        """What ``queue_infonce`` needs to leave out the rows of the queries' own images ``index`` [B]; None unless remembered."""
        return None if self.index is None else (index, self.index)
