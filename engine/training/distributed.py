"""Many processes: who this one is (torchrun or SLURM), its device and group, and the few things that all of them agree on.

A run of one process never starts a group. Weights stay equal without being sent: all processes begin with the first one's, see
the same averaged gradient, and SGD is a function of the two.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.console import console, say
from engine.errors import ConfigError
from ppssl.ops import all_reduce_mean, gather, group_name

DEVICE = re.compile(r"cpu|cuda(?::(\d+))?|mps")
"""How a device is named, beside ``auto``."""
TIMEOUT = timedelta(hours=2)
"""How long processes wait for each other: the first may be checking or drawing a data set."""


def choose_device(asked: str = "auto", key: str = "run.device") -> torch.device:
    """The device that ``asked`` names: ``auto`` is the first CUDA GPU, else the CPU; ``cpu``, ``cuda``, ``cuda:N``, ``mps``.

    key: what the error names, a key of the config or an option.
    Raises ``ConfigError`` naming the devices that are there for one that is not, or that is no device.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "auto":
        return torch.device("cuda" if gpus else "cpu")
    match = DEVICE.fullmatch(asked)
    if match and (asked == "cpu" or asked.startswith("cuda") and int(match[1] or 0) < gpus):
        return torch.device(asked)
    if asked == "mps" and torch.backends.mps.is_available():
        say(
            "device mps: not tested by this project; amp does nothing on it, and evaluation uses the CPU for what needs float64. "
            "Where an operation is missing, PYTORCH_ENABLE_MPS_FALLBACK=1 lets torch run it on the CPU; device cpu runs everything"
        )
        return torch.device("mps")
    there = ["cpu", *(f"cuda:{n} ({torch.cuda.get_device_name(n)})" for n in range(gpus))]
    there += ["mps"] * torch.backends.mps.is_available()
    reason = "is not there" if match else "is no device; write auto, cpu, cuda, cuda:N or mps"
    raise ConfigError(f"{key}: {asked!r} {reason}; this machine has {', '.join(there)}{_why_no_gpu() * (not gpus)}")


def _why_no_gpu() -> str:
    """What stands in the way of a GPU as far as torch can tell."""
    if torch.version.cuda is None:
        return f"; torch {torch.__version__} is built without CUDA"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "; no GPU is visible" + ("" if hidden is None else f" (CUDA_VISIBLE_DEVICES={hidden!r})") + ", see engine.doctor"


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """``--device``, for ``option_device``."""
    parser.add_argument(
        "--device",
        default="auto",
        metavar="DEVICE",
        help="auto (the first GPU, else the CPU), cpu, cuda, cuda:N or mps (default: auto)",
    )


def option_device(asked: str) -> torch.device:
    """``choose_device`` for the option ``--device``; a GPU becomes the current one, which kernels and streams go to."""
    device = choose_device(asked, "--device")
    _make_current(device)
    return device


def _make_current(device: torch.device) -> None:
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


@dataclass
class World:
    """The processes of a run, seen from one of them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Position on this machine."""
    local_size: int = 1
    device: torch.device = field(default_factory=lambda: choose_device())
    group: str = ""
    """Name for the ops of kernels/group.py; "" when this process is alone."""
    _asked: tuple[Tensor, Any] | None = None

    @property
    def first(self) -> bool:
        """True in the process that writes files and talks."""
        return self.rank == 0

    def barrier(self) -> None:
        """Waits for all processes, on the host."""
        if self.group:
            dist.all_reduce(torch.zeros(()))

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """What is inside is done by the first process alone, then by the others, who find its files."""
        if not self.first:
            self.barrier()
        yield
        if self.first:
            self.barrier()

    def vote(self, number: int) -> int:
        """The largest ``number`` that any process gave at its last call; called by all once per step. It is read one step late,
        so nobody waits for the others, and on the host, so nobody waits for a device."""
        if not self.group:
            return number
        agreed = self._collect_votes()
        votes = torch.tensor(number)
        self._asked = votes, dist.all_reduce(votes, dist.ReduceOp.MAX, async_op=True)
        return agreed

    def _collect_votes(self) -> int:
        if self._asked is None:
            return 0
        votes, work = self._asked
        work.wait()
        self._asked = None
        return int(votes)

    def broadcast_object(self, value: Any) -> Any:
        """The first process's plain ``value``."""
        if not self.group:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    @torch.no_grad()
    def broadcast_module(self, module: nn.Module) -> None:
        """Gives every process the first one's parameters and buffers: random numbers may differ in their last bit between
        machines."""
        if self.group:
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor.detach(), src=0)

    def leave(self) -> None:
        """Ends the group."""
        if self.group:
            self._collect_votes()
            dist.destroy_process_group()


ALONE = World()


def join(environment: Mapping[str, str] = os.environ, device: str = "auto", key: str = "run.device") -> World:
    """The world that torchrun's or SLURM's variables describe, joined; one process without them.

    device: ``run.device``, or the option that an error is to name as ``key``.
    Of several processes, each takes the GPU of its place on the machine (``auto``, ``cuda``), or all
    compute on the CPU.
    Raises ``ConfigError`` naming the variable that is missing or does not fit this machine, or a device that is not there.
    """
    found = described(environment)
    if found is None:
        alone = World(device=choose_device(device, key))
        _make_current(alone.device)
        return alone
    world, address, port = found
    end_with_parent()
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(
            f"{key}: {device} names one device, and there are {world.size} processes: use auto, cuda (each takes the GPU of "
            f"its local rank) or cpu; CUDA_VISIBLE_DEVICES chooses among the GPUs"
        )
    world.device = choose_device(device, key)
    if world.device.type == "cuda":
        world.device = torch.device("cuda", gpu_of(world.local_rank, torch.cuda.device_count(), environment))
        torch.cuda.set_device(world.device)
    method = "env://" if "TORCHELASTIC_RUN_ID" in environment else f"tcp://{address}:{port}"
    store, _, _ = next(dist.rendezvous(method, world.rank, world.size, timeout=TIMEOUT))
    # torchrun's store outlives a restart: processes would look for each other at the addresses of the dead
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo",
        store=dist.PrefixStore(f"attempt {attempt}", store),
        rank=world.rank,
        world_size=world.size,
        timeout=TIMEOUT,
    )
    world.group = group_name(dist.group.WORLD)
    if not world.first:
        console.quiet = True
        warnings.simplefilter("ignore")  # the first process has the same ones
    return world


@functools.cache
def end_with_parent() -> None:
    """From now on this process ends within a second of the one that started it: a launcher that was killed cannot end its
    processes, and they would go on in the run folder of whoever starts the run again."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        try:
            say(f"the launcher (process {parent}) is gone: process {os.getpid()} ends")
        finally:  # nobody may be there to read it
            os._exit(1)  # spoils nothing: files are replaced whole

    threading.Thread(target=watch, name="parent", daemon=True).start()


def described(environment: Mapping[str, str]) -> tuple[World, str, str] | None:
    """(the processes, address and port of the first) as torchrun (``RANK``, ``WORLD_SIZE``, ...) or ``srun`` (``SLURM_PROCID``,
    ``SLURM_NTASKS``, ...) describe them; None for one process."""

    def number(name: str, default: str | None = None) -> int:
        text = environment.get(name, default)
        if text is None or not text.isdecimal():
            state = "is not set" if text is None else f"is {text!r}, not a number"
            raise ConfigError(f"{name}: {state}; start with torchrun --nproc-per-node=N -m engine.train ..., or with srun")
        return int(text)

    if "WORLD_SIZE" in environment:
        size = number("WORLD_SIZE")
        names = "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"
    elif "SLURM_STEP_ID" in environment or "SLURM_STEPID" in environment:  # a batch script itself has the other variables too
        size = number("SLURM_NTASKS", "1")
        names = "SLURM_PROCID", "SLURM_LOCALID", None
    else:
        return None
    if size == 1:
        return None
    rank, local = number(names[0]), number(names[1])
    # "8(x3),4": SLURM's tasks on each node
    each = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", "1")))
    local_size = number(names[2]) if names[2] else int(each[0]) if each else 1
    if not rank < size:
        raise ConfigError(f"{names[0]}: {rank} is not below the number of processes, {size}; start all with one launcher")
    address = environment.get("MASTER_ADDR") or first_host(
        environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", ""))
    )
    if not address:
        raise ConfigError("MASTER_ADDR: not set, and there is no SLURM node list; set it to the machine of rank 0")
    # every task of a job computes the same port, other jobs most likely another
    port = environment.get("MASTER_PORT") or str(20000 + int(environment.get("SLURM_JOB_ID", "0")) % 20000)
    return World(rank, size, local, local_size, torch.device("cpu")), address, port


def first_host(nodes: str) -> str:
    """The first machine of a SLURM node list such as ``gpu[03-07,12],big1``: ``gpu03``."""
    match = re.match(r"([^\[,]*)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodes)
    return "".join(part or "" for part in match.groups()) if match else ""


def gpu_of(local_rank: int, count: int, environment: Mapping[str, str]) -> int:
    """The index of this process's GPU among the ``count`` that it sees (SLURM may show each task only its own)."""
    if count == 1 and "LOCAL_RANK" not in environment:
        return 0
    if local_rank >= count:
        raise ConfigError(
            f"LOCAL_RANK: {local_rank}, but this machine shows {count} GPU{'s' * (count > 1)}; start at most "
            f"--nproc-per-node={count}"
        )
    return local_rank


def restarted(environment: Mapping[str, str] = os.environ) -> bool:
    """True when torchrun or SLURM started this run again after a failure: it is then to go on, whatever ``resume`` says."""
    return any(int(environment.get(name) or 0) > 0 for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def average_all(tensors: list[Tensor], group: str) -> list[Tensor]:
    """The means over the processes, in one collective per dtype; each in the memory order of its tensor."""
    means = list(tensors)
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        places = [i for i, t in enumerate(tensors) if t.dtype == dtype]
        flat = all_reduce_mean(torch.cat([tensors[i].reshape(-1) for i in places]), group)
        for i, piece in zip(places, flat.split([tensors[i].numel() for i in places]), strict=True):
            means[i] = torch.empty_like(tensors[i]).copy_(piece.view(tensors[i].shape))
    return means


def gather_rows(rows: Tensor, total: int, each: int, group: str) -> Tensor:
    """[total, ...] of all processes in the order of their ranks, where all but the last hold ``each`` rows."""
    if not group:
        return rows
    padded = rows.new_zeros((each, *rows.shape[1:]))
    padded[: len(rows)] = rows
    return gather(padded, group)[:total]
