"""The momentum side of MoCo: the key network that follows the query network, and the queue of its past keys."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _resolve_process_group

from ppssl.ops import enqueue, rank, world_size


def key_copy(module: nn.Module) -> nn.Module:
    """A copy that no gradient reaches; the engine moves it by ``parameter_pairs``."""
    return copy.deepcopy(module).requires_grad_(False)


def parameter_pairs(online: nn.Module, target: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters of both, paired by position, without those that are frozen: they are equal and stay so. Buffers stay apart: the
    key network's batch statistics are its own (MoCo)."""
    ours, theirs = list(online.parameters()), list(target.parameters())
    if [p.shape for p in ours] != [p.shape for p in theirs]:
        raise ValueError("online and target networks differ in structure; make the target with key_copy(online)")
    trained = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.requires_grad]
    return [a for a, _ in trained], [b for _, b in trained]


class KeyQueue(nn.Module):
    """A ring of the last K keys, ``rows`` [K, D] unit rows, and the device-side ``pointer`` to the oldest one.

    It starts with random directions, as MoCo's does, which count as negatives until keys have replaced them; with ``empty`` they do
    not: ``filled``, a 0-d int64, is the number of rows that are keys. With ``remember`` it also holds whose keys they are:
    ``index`` [K] int64, the image of each row, -1 for a random one. After ``shard`` each of n processes holds an n-th of the ring;
    the state dict is that of the whole ring whoever holds it, so that any number of processes continues it.
    """

    def __init__(self, size: int, dim: int, dtype: torch.dtype = torch.float32, *, remember: bool = False, empty: bool = False):
        super().__init__()
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"queue.size: {size!r} rows; a number of at least 1 is needed")
        self.size, self.group = size, ""
        self.register_buffer("rows", F.normalize(torch.randn(size, dim), dim=1).to(dtype))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.register_buffer("index", torch.full((size,), -1, dtype=torch.int64) if remember else None)
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64) if empty else None)

    @property
    def held(self) -> Tensor:
        """The rows that this process holds: all of them, or its part."""
        return self.rows[:-1] if self.group else self.rows

    @property
    def count(self) -> Tensor | None:
        """How many of the first rows of ``held`` are keys, 0-d int64 on the device; None where every row counts."""
        if self.filled is None or not self.group:
            return self.filled
        first, last = self._bounds()
        return (self.filled - first).clamp(0, last - first)

    def same_image(self, index: Tensor) -> tuple[Tensor, Tensor] | None:
        """What ``queue_infonce`` needs to leave out the rows of the queries' own images ``index`` [B]; None unless remembered."""
        return None if self.index is None else (index, self.index[:-1] if self.group else self.index)

    def shard(self, group: str) -> None:
        """Keeps this process's part: rows first <= j < last of the ring, and a spare row that takes what belongs to others."""
        self.group = group
        for name in self._ring():
            setattr(self, name, self._part(getattr(self, name)))

    def _ring(self) -> list[str]:
        return ["rows"] if self.index is None else ["rows", "index"]

    def _bounds(self) -> tuple[int, int]:
        n, r = world_size(self.group), rank(self.group)
        return r * self.size // n, (r + 1) * self.size // n

    def _part(self, whole: Tensor) -> Tensor:
        first, last = self._bounds()
        return torch.cat([whole[first:last], whole[:1]])

    @torch.no_grad()
    def push(self, keys: Tensor, index: Tensor, skip: Tensor | None = None) -> None:
        """Overwrites the oldest rows by ``keys`` [B, D] of the images ``index`` [B]; any B. Nothing changes where the 0-d bool
        ``skip`` is true. Where the ring is shared, every process pushes the keys of all."""
        count, (first, last) = len(keys), self._bounds()
        slots = ((self.pointer + torch.arange(count, device=keys.device)) % self.size)[-self.size :]
        if self.group:
            slots = torch.where((slots >= first) & (slots < last), slots - first, last - first)
        if self.index is not None:
            whose = index[-self.size :]
            self.index.index_copy_(0, slots, whose if skip is None else torch.where(skip, self.index[slots], whose))
        if self.filled is not None:
            self.filled.add_(count if skip is None else count * ~skip).clamp_(max=self.size)
        if not self.group:
            enqueue(self.rows, self.pointer, keys, skip)
            return
        rows = keys[-self.size :].to(self.rows.dtype)
        self.rows.index_copy_(0, slots, rows if skip is None else torch.where(skip, self.rows[slots], rows))
        self.pointer.add_(count if skip is None else count * ~skip).remainder_(self.size)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.group:  # every process calls this together; the first one has the ring, in host memory
            for name in self._ring():
                destination[prefix + name] = collect(getattr(self, name)[:-1], self.size, self.group)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: object) -> None:
        if self.group:
            names = [prefix + name for name in self._ring() if prefix + name in state_dict]
            state_dict = state_dict | {name: self._part(state_dict[name]) for name in names}
        super()._load_from_state_dict(state_dict, prefix, *rest)


def collect(part: Tensor, size: int, group: str) -> Tensor:
    """[size, ...] on the CPU of the first process, part by part so that no device holds it; [0, ...] on the others."""
    processes = _resolve_process_group(group)
    n, first = processes.size(), processes.rank() == 0
    whole = part.new_empty((size if first else 0, *part.shape[1:]), device="cpu")
    mine = part.cpu()
    for r in range(n):
        begin, end = r * size // n, (r + 1) * size // n
        if first and r == 0:
            whole[begin:end] = mine
        elif first:  # as bytes: not every backend sends every type
            dist.recv(whole[begin:end].view(torch.uint8), group=processes, group_src=r)
        elif r == processes.rank():
            dist.send(mine.contiguous().view(torch.uint8), group=processes, group_dst=0)
    return whole
