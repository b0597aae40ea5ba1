"""Compiles every shipped kernel for sm_80, sm_90 and sm_100 without a GPU, and checks the machine code.

    python -m kernels.aot [--arch sm_80,sm_90,sm_100] [--check [--if-changed] | --update]

prints one row per variant: registers, spilled bytes, shared memory, tensor-core instructions, widest global load,
instruction count. ``--check`` fails on a spill, a 16-bit product without tensor cores, shared memory over the limit, a
streaming kernel without 16-byte loads, or an instruction count 10 % above the committed ``aot.json``. ``--update``
rewrites that file, with a hash of what it was compiled from: with ``--if-changed`` nothing is compiled where that is still the
same. ``EXCEPTIONS`` of an op lists what is let through and why; the table marks it.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path

from kernels.configs import ARCHITECTURES, Variant
from kernels.registry import exceptions, variants

COMMITTED = Path(__file__).with_name("aot.json")
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448}
"""Bytes of shared memory that a block may use."""
TENSOR_CORE = ("HGMMA", "UTCHMMA", "HMMA")
GROWTH = 1.10
"""An instruction count may exceed the committed one by this factor."""


@dataclass(frozen=True)
class Report:
    """The machine code of one variant on one architecture."""

    name: str
    arch: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_core: str
    """The tensor-core instruction and its count, or "-"."""
    load_bytes: int
    """The widest global load of a thread."""
    instructions: int


@functools.cache
def _cuobjdump() -> str:
    import triton.backends.nvidia as nvidia

    return str(Path(nvidia.__file__).parent / "bin" / "cuobjdump")


def compile_variant(variant: Variant, arch: str) -> Report:
    """Compile and disassemble."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    signature = {name: "constexpr" if name in variant.constants else variant.types[name] for name in names}
    attributes = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(names)
        if name in variant.aligned or signature[name].startswith("*")
    }
    source = ASTSource(fn=variant.kernel, signature=signature, constexprs=variant.constants, attrs=attributes)
    target = GPUTarget("cuda", int(arch[3:]), 32)
    compiled = triton.compile(source, target=target, options={"num_warps": variant.warps, "num_stages": variant.stages})
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        command = [_cuobjdump(), "-res-usage", "-sass", str(binary)]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # LOCAL is 0 even when the compiler spilled; the stack and the local loads and stores show it.
    registers, stack = (int(re.search(rf"\b{key}:(\d+)", code)[1]) for key in ("REG", "STACK"))
    local = len(re.findall(r"\b(?:LDL|STL)\b", code))
    products = {name: len(re.findall(rf"\b{name}\b", code)) for name in TENSOR_CORE}
    tensor_core = next((f"{name} {count}" for name, count in products.items() if count), "-")
    loads = set(re.findall(r"\bLDG(?:STS)?\.E[\w.]*", code))
    widths = [int(bits) // 8 for load in loads for bits in ("64", "128") if bits in load.split(".")]
    return Report(
        name=variant.name,
        arch=arch,
        registers=registers,
        spill_bytes=max(stack, 4 * local) if stack or local else 0,
        shared_bytes=compiled.metadata.shared,
        tensor_core=tensor_core,
        load_bytes=max(widths, default=4),
        instructions=code.count(";"),
    )


def faults(report: Report, kind: str, committed: dict[str, int]) -> dict[str, str]:
    """Check -> what is wrong, whether or not an exception allows it."""
    found = {}
    if report.spill_bytes:
        found["spill"] = f"spills {report.spill_bytes} bytes"
    if report.shared_bytes > SHARED_LIMIT[report.arch]:
        found["shared"] = f"{report.shared_bytes} bytes of shared memory, limit {SHARED_LIMIT[report.arch]}"
    if kind == "dot" and report.tensor_core == "-":
        found["tensor cores"] = "no tensor-core instruction"
    if kind == "stream" and report.load_bytes < 16:
        found["loads"] = f"widest load {report.load_bytes} bytes"
    expected = committed.get(f"{report.arch}/{report.name}")
    if expected is None:
        found["growth"] = "not in aot.json, run --update"
    elif report.instructions > GROWTH * expected:
        found["growth"] = f"{report.instructions} instructions, committed {expected}"
    return found


def exception(report: Report, check: str) -> str | None:
    """Why this fault is let through, or None if it is not."""
    for (name, arch, excepted), reason in exceptions().items():
        if excepted == check and fnmatch(report.name, name) and fnmatch(report.arch, arch):
            return reason
    return None


def source() -> str:
    """A hash over what the machine code follows from: this folder's modules and configurations, and the version of Triton."""
    digest = hashlib.sha256(importlib.metadata.version("triton").encode())
    folder = Path(__file__).parent
    for path in [*sorted(folder.glob("*.py")), folder / "configs.json"]:
        digest.update(path.name.encode() + b"\n" + path.read_text(encoding="utf-8").encode())
    return digest.hexdigest()[:16]


def _compile_named(job: tuple[str, int]) -> tuple[Report, str]:
    arch, position = job
    variant = variants(arch)[position]
    return compile_variant(variant, arch), variant.kind


def run(archs: list[str]) -> list[tuple[Report, str]]:
    """(report, kind) of every variant, compiled on all cores."""
    jobs = [(arch, position) for arch in archs for position in range(len(variants(arch)))]
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        return list(pool.map(_compile_named, jobs))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default=",".join(ARCHITECTURES), help="comma-separated, default: %(default)s")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--check", action="store_true", help="exit 1 on a fault that has no exception")
    group.add_argument("--update", action="store_true", help="rewrite aot.json's instruction counts")
    parser.add_argument("--if-changed", action="store_true", help="with --check: nothing, where aot.json is of these very sources")
    options = parser.parse_args(arguments)
    archs = options.arch.split(",")
    if unknown := sorted(set(archs) - set(ARCHITECTURES)):
        parser.error(f"--arch: unknown {', '.join(unknown)}; choose from {', '.join(ARCHITECTURES)}")
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the compiler: unset it")

    committed = json.loads(COMMITTED.read_text()) if COMMITTED.exists() else {}
    if options.check and options.if_changed and committed.get("source") == source():
        print(f"{len(committed) - 1} variants of aot.json were compiled from these sources by this Triton: nothing to check")
        return 0
    results = run(archs)
    if options.update:
        committed |= {f"{report.arch}/{report.name}": report.instructions for report, _ in results}
        known = {f"{arch}/{variant.name}" for arch in ARCHITECTURES for variant in variants(arch)}
        committed = {key: committed[key] for key in sorted(committed) if key in known}
    failures = _print(results, committed)
    if options.update:
        # a fault must be found by every check that follows
        clean = {"source": source()} if archs == list(ARCHITECTURES) and not failures else {}
        COMMITTED.write_text(json.dumps(clean | committed, indent=1) + "\n")
    print(f"{len(results)} variants, {failures} faults")
    return 1 if options.check and failures else 0


def _print(results: list[tuple[Report, str]], committed: dict[str, int]) -> int:
    columns = ["variant", "arch", "regs", "spill", "shared", "tensor cores", "load", "instr", ""]
    rows, failures = [columns], 0
    for report, kind in results:
        remarks = []
        for check, fault in faults(report, kind, committed).items():
            reason = exception(report, check)
            failures += reason is None
            remarks.append(f"{fault}: {reason}" if reason else f"FAULT {fault}")
        values = asdict(report) | {"load": f"{report.load_bytes} B"}
        cells = ["name", "arch", "registers", "spill_bytes", "shared_bytes", "tensor_core", "load", "instructions"]
        rows.append([str(values[cell]) for cell in cells] + ["; ".join(remarks)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(columns))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return failures


if __name__ == "__main__":
    sys.exit(main())
