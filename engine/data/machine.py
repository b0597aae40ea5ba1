"""What the machine gives to this process: cores and memory, where its control groups and limits leave less than there is; and how
the C library takes that memory."""

from __future__ import annotations

import ctypes
import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

HARDWARE_DECODER_SHARE = 0.65
"""Share of a batch that the GPU's JPEG engine takes, where it has one; CUDA cores take the rest."""
_ROOT = Path("/")
"""Of /proc and /sys; tests have their own."""


def cores() -> int:
    """Cores this process may use: those it may run on, or less where a control group gives less time (rounded up)."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in _groups("cpu"):
        quota, period = _numbers(group, "cpu.max") or _numbers(group, "cpu.cfs_quota_us", "cpu.cfs_period_us") or (-1, 1)
        if quota > 0:
            found = min(found, math.ceil(quota / period))
    return max(found, 1)


def free_host_bytes() -> int:
    """Memory that this process may still take: what the system says is available, or less where one of its control groups or a
    limit of its own (``ulimit -v``, ``-d``) leaves less; 0 where the system does not say."""
    try:
        free = 1024 * int(_fields(_ROOT / "proc/meminfo")["MemAvailable:"])
    except (OSError, KeyError):  # macOS: all of it; Windows does not say
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    for group in _groups("memory"):
        limits = [_numbers(group, name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
        used = _numbers(group, "memory.current") or _numbers(group, "memory.usage_in_bytes")
        try:
            statistics = _fields(group / "memory.stat")
        except OSError:
            continue
        if "hierarchical_memory_limit" in statistics:  # v1 counts in limits of groups that a container does not show
            limits.append((int(statistics["hierarchical_memory_limit"]),))
        # files that were read count as taken; in v1 inactive_file leaves out the groups below
        files = int(statistics.get("total_inactive_file", statistics.get("inactive_file", 0)))
        if used:
            free = min([free, *(limit - used[0] + files for (limit,) in filter(None, limits))])
    try:
        mine = _fields(_ROOT / "proc/self/status")
        for kind, name in ((resource.RLIMIT_AS, "VmSize:"), (resource.RLIMIT_DATA, "VmData:")) if resource else ():
            if (limit := resource.getrlimit(kind)[0]) != resource.RLIM_INFINITY:
                free = min(free, limit - 1024 * int(mine[name]))
    except (OSError, KeyError):
        pass
    return max(free, 0)


_OPTIONS = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_TRIM_THRESHOLD_")
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""As malloc.h numbers them."""


def keep_freed_memory(device: torch.device) -> bool:
    """Has glibc keep what the tensors of a CPU free, for the next tensors; returns whether it does from now on.

    By its defaults a block of 32 MiB or more is mapped anew each time, and a step faults all of its activations in page by page:
    half of the time of an EfficientNet's forward pass. The process then holds on to its peak. A user's own choice of an
    allocator or of its options is left alone, and nothing is done where the C library is another one.
    """
    return device.type == "cpu" and _keep_freed_memory()


@functools.cache
def _keep_freed_memory() -> bool:
    if any(name in os.environ for name in _OPTIONS) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 2**30)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))


def _groups(controller: str) -> Iterator[Path]:
    """Folders of the control groups of this process that have ``controller``, in version 1 and 2, from its own up to the topmost
    that can be seen: each of them limits it."""
    try:
        mounts = [line.split() for line in (_ROOT / "proc/self/mountinfo").read_text().splitlines() if " - " in line]
        memberships = [line.split(":", 2) for line in (_ROOT / "proc/self/cgroup").read_text().splitlines() if line]
    except OSError:
        return
    for fields in mounts:
        after = fields.index("-")
        kind, options = fields[after + 1], fields[-1].split(",")
        if kind != "cgroup2" and (kind != "cgroup" or controller not in options):
            continue
        top = _ROOT / fields[4].lstrip("/")
        for _, controllers, path in memberships:
            if controller in controllers.split(",") if kind == "cgroup" else not controllers:
                # the mount may show a part of the tree only, as in a container: its root is field 3
                inside = Path(path).relative_to(fields[3]) if Path(path).is_relative_to(fields[3]) else Path()
                folder = top if ".." in inside.parts else top / inside
                yield from (place for place in (folder, *folder.parents) if place.is_relative_to(top) and place.is_dir())


def _numbers(group: Path, *names: str) -> tuple[int, ...] | None:
    """The numbers in files of ``group``; None where there is no such file or it says ``max``."""
    try:
        return tuple(int(word) for name in names for word in (group / name).read_text().split())
    except (OSError, ValueError):
        return None


def _fields(path: Path) -> dict[str, str]:
    """First and second word of every line."""
    return {words[0]: words[1] for line in path.read_text().splitlines() if len(words := line.split()) > 1}
