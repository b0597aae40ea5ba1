"""Launch configurations of the Triton kernels, from a committed table. Nothing is tuned during training.

``configs.json`` is keyed by architecture, kernel, operand type, width bucket and batch bucket. A bucket is named by the
largest size it serves: a lookup takes the smallest bucket that holds the size. ``bench/gpu/sweep.py`` writes the table.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

TABLE = Path(__file__).with_name("configs.json")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")


class Config(NamedTuple):
    """Tile sizes and launch options of one kernel."""

    rows: int
    """Rows of a program's tile: queries, positions or pixel rows, depending on the kernel."""
    cols: int
    """Columns that the loop advances by: queue rows or channels, depending on the kernel."""
    warps: int
    stages: int


@functools.cache
def table() -> dict:
    return json.loads(TABLE.read_text())


@functools.cache
def architecture(device: torch.device) -> str:
    """The newest architecture in the table that is not newer than that of ``device``."""
    major, minor = torch.cuda.get_device_capability(device)
    known = [name for name in ARCHITECTURES if int(name[3:]) <= 10 * major + minor]
    return known[-1] if known else ARCHITECTURES[0]


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def bucket(buckets: dict, size: int) -> str:
    """The key of the smallest bucket that holds ``size``, or of the largest bucket if none does."""
    fitting = [int(key) for key in buckets if int(key) >= size]
    return str(min(fitting)) if fitting else max(buckets, key=int)


@functools.cache
def lookup(arch: str, kernel: str, operand: str, width: int, batch: int) -> Config:
    """The configuration of ``kernel`` for operands of type ``operand`` (bfloat16, float16, ieee, tf32)."""
    by_width = table()[arch][kernel][operand]
    by_batch = by_width[bucket(by_width, width)]
    return Config(**by_batch[bucket(by_batch, batch)])


def operand_dtype(operand: str) -> torch.dtype:
    """The dtype of tensors that a kernel multiplies as ``operand``; bfloat16 for ``"any"``."""
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "ieee": torch.float32, "tf32": torch.float32}
    return dtypes.get(operand, torch.bfloat16)


class Workload(NamedTuple):
    """A call of a public op that runs the kernel of one table entry, for ``bench/gpu/sweep.py`` to time."""

    function: str
    """Name of the op in ``kernels``."""
    arguments: dict[str, Any]
    """Its keyword arguments, without ``impl``. Gradients are taken with respect to the tensors that require one."""


class Variant(NamedTuple):
    """One compiled form of a kernel, as :mod:`kernels.aot` builds it without a GPU."""

    name: str
    kernel: object
    """The ``triton.jit`` function."""
    types: dict[str, str]
    """Argument name -> Triton type, in the order of the kernel's arguments, without the constants."""
    constants: dict[str, object]
    aligned: tuple[str, ...]
    """Integer arguments that are multiples of 16, as in real launches (pointers always are)."""
    warps: int
    stages: int
    kind: str
    """What the machine code must have: dot (tensor cores), stream (wide loads), ieee and small (neither)."""
