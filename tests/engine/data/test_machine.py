"""Cores and memory under control groups of both versions, nested and in containers, and under limits of the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.data import machine

GIB, MIB = 1 << 30, 1 << 20
V2 = "29 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = """35 31 0:32 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
36 31 0:33 {root} /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct
"""
NONE = (1 << 63) - 4096


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A machine with 21 GiB available, to be filled with control groups."""
    monkeypatch.setattr(machine, "_ROOT", tmp_path)
    put(tmp_path / "proc", meminfo=f"MemTotal: {32 * MIB} kB\nMemAvailable: {21 * MIB} kB\n")
    return tmp_path


def put(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def v2(folder: Path, limit: object, used: int, files: int = 0, high: object = "max") -> None:
    put(folder, memory__max=limit, memory__high=high, memory__current=used, memory__stat=f"anon 1\ninactive_file {files}")


def v1(folder: Path, limit: int, used: int, files: int = 0, above: int = NONE) -> None:
    text = f"inactive_file 0\nhierarchical_memory_limit {above}\ntotal_inactive_file {files}"
    put(folder, memory__limit_in_bytes=limit, memory__usage_in_bytes=used, memory__stat=text)


def test_without_control_groups_it_is_what_the_system_has(root) -> None:
    assert machine.free_host_bytes() == 21 * GIB
    assert machine.cores() == len(os.sched_getaffinity(0))


@pytest.mark.parametrize("limited", ["own", "above", "top", "high", "nowhere"])
def test_every_group_above_the_process_counts(root, limited) -> None:
    put(root / "proc/self", cgroup="0::/slurm/job_7/step_0", mountinfo=V2)
    top = root / "sys/fs/cgroup"
    v2(
        top / "slurm/job_7/step_0",
        3 * GIB // 2 if limited == "own" else "max",
        GIB // 2,
        100 * MIB,
        GIB if limited == "high" else "max",
    )
    v2(top / "slurm/job_7", 2 * GIB if limited == "above" else 30 * GIB, GIB)
    v2(top / "slurm", 4 * GIB if limited == "top" else "max", GIB)
    expected = {"own": GIB + 100 * MIB, "above": GIB, "top": 3 * GIB, "high": GIB // 2 + 100 * MIB, "nowhere": 21 * GIB}
    assert machine.free_host_bytes() == expected[limited]


def test_version_1_follows_the_process_s_own_path(root) -> None:
    put(root / "proc/self", cgroup="9:name=systemd:/\n4:memory:/jobs/a\n1:cpu,cpuacct:/jobs/a\n0::/", mountinfo=V1.format(root="/"))
    memory = root / "sys/fs/cgroup/memory"
    v1(memory, NONE, 9 * GIB)
    v1(memory / "jobs", NONE, 5 * GIB)
    v1(memory / "jobs/a", 3 * GIB // 2, GIB, 200 * MIB)
    assert machine.free_host_bytes() == GIB // 2 + 200 * MIB


@pytest.mark.parametrize("path", ["/docker/abc", "/", "/../../elsewhere"])
def test_in_a_container_the_mount_shows_the_group_itself(root, path) -> None:
    put(root / "proc/self", cgroup=f"4:memory:{path}\n", mountinfo=V1.format(root="/docker/abc"))
    v1(root / "sys/fs/cgroup/memory", NONE, GIB, above=4 * GIB)  # the limit stands above what can be seen
    assert machine.free_host_bytes() == 3 * GIB


def test_more_than_the_limit_leaves_nothing(root) -> None:
    put(root / "proc/self", cgroup="0::/a", mountinfo=V2)
    v2(root / "sys/fs/cgroup/a", GIB, 2 * GIB)
    assert machine.free_host_bytes() == 0


@pytest.mark.parametrize("version", [1, 2])
def test_cores_are_no_more_than_the_time_that_is_given(root, version, monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    put(
        root / "proc/self",
        cgroup="0::/a/b" if version == 2 else "1:cpu,cpuacct:/a/b",
        mountinfo=V2 if version == 2 else V1.format(root="/"),
    )

    def give(folder: str, quota: int) -> None:
        if version == 2:
            put(root / "sys/fs/cgroup" / folder, cpu__max=f"{'max' if quota < 0 else quota} 100000")
        else:
            put(root / "sys/fs/cgroup/cpu" / folder, cpu__cfs_quota_us=quota, cpu__cfs_period_us=100000)

    give("a", -1), give("a/b", -1)
    assert machine.cores() == 16
    give("a", 350_000)
    assert machine.cores() == 4
    give("a/b", 20_000)
    assert machine.cores() == 1


@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_a_limit_of_the_process_counts(kind) -> None:
    code = f"import resource as r; from engine.data import machine; r.setrlimit(r.{kind}, (1 << 29,) * 2)"
    code += "; print(machine.free_host_bytes())"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    found = int(subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout)
    assert 0 <= found < 1 << 29


MAPPED = """
import ctypes, sys, torch
from engine.data import keep_freed_memory

class mallinfo(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_int) for name in names.split()]

library = ctypes.CDLL(None)
library.mallinfo.restype = mallinfo

def mapped():  # blocks that a tensor of 64 MiB makes the C library map for it alone
    before = library.mallinfo().hblks
    tensor = torch.ones(16 * 2**20)
    return library.mallinfo().hblks - before

print(mapped(), keep_freed_memory(torch.device(sys.argv[1])), mapped(), mapped())
"""


@pytest.mark.parametrize(
    ("device", "options", "kept"),
    [
        ("cpu", {}, True),
        ("meta", {}, False),
        ("cpu", {"MALLOC_TOP_PAD_": "0"}, False),
        ("cpu", {"GLIBC_TUNABLES": "glibc.malloc.perturb=0"}, False),
    ],
)
def test_what_large_tensors_free_is_kept_unless_the_user_chose(device: str, options: dict[str, str], kept: bool) -> None:
    if "glibc" not in os.confstr("CS_GNU_LIBC_VERSION"):
        pytest.skip("another C library")
    environment = {name: value for name, value in os.environ.items() if name not in machine._OPTIONS and name != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-c", MAPPED, device], env=environment | options, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["1", str(kept), *["0" if kept else "1"] * 2]
