"""What the machine gives to this process: cores and memory."""

from __future__ import annotations

import os
from pathlib import Path

HARDWARE_DECODER_SHARE = 0.65
"""Share of a batch that the GPU's JPEG engine takes, where it has one; CUDA cores take the rest."""


def cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_host_bytes() -> int:
    """Memory that this process may still take: what the system says is available, or less where a control group caps it; 0 where
    the system does not say."""
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = 1024 * int(fields["MemAvailable"].split()[0])
    except OSError:  # macOS: all of it; Windows does not say
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    group = Path("/sys/fs/cgroup")
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        try:
            cap, taken = (int((group / name).read_text()) for name in (limit, used))
            statistics = dict(line.split() for line in (group / used).with_name("memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such group, or "max"
            continue
        free = min(free, cap - taken + int(statistics.get("inactive_file", 0)))  # files that were read count as taken
    return max(free, 0)
