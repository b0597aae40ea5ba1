"""``python -m engine.doctor``: what this machine has, what a run will use of it, how fast to expect it, what to change."""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.table import Table

from engine.errors import ConfigError

if TYPE_CHECKING:
    import torch

_ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = {
    # distribution: (module, what breaks without it or None where it is an option, how to get it)
    "torch": ("torch", "everything", "pip install torch"),
    "torchvision": ("torchvision", "everything", "pip install torchvision"),
    "triton": ("triton", None, "comes with torch on Linux; without it a GPU runs neither our kernels nor torch.compile"),
    "nvidia-dali-cuda130": ("nvidia.dali", None, "pip install nvidia-dali-cuda130; without it the torchvision loader runs"),
    "open_clip_torch": ("open_clip", "teachers", "pip install open_clip_torch"),
    "numpy": ("numpy", "everything", "pip install numpy"),
    "safetensors": ("safetensors", "checkpoints", "pip install safetensors"),
}
IMAGE_GFLOP = 40.9
"""Of one ResNet-50 step at 224 pixels, an image: 2 forward, 2 data-gradient, 1 weight-gradient passes of 8.18 each."""
IMAGE_GB = 0.716
"""Bytes that such a step moves an image in 16 bit with element-wise work fused; its floor is 1.12 times their time."""
OF_FLOOR = 0.75
"""Share of the floor that the step is built to reach on a GPU."""
CPU_EFFICIENCY = 0.7
"""Rate of a whole step on a CPU over the rate of its 3x3 convolutions: 0.161 over 0.234 TFLOP/s on one core with AVX512-BF16."""
CORE_IMAGES_PER_S = 70.0
"""Images decoded and augmented twice by one core in a second (500 x 375 JPEG)."""


class Finding(NamedTuple):
    """One line of the answer. ``state``: ok, note (works, could be better) or broken (a run needs it)."""

    what: str
    state: str
    text: str
    remedy: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the findings; returns 1 if something that a run needs is broken, else 0; usage errors exit with 2."""
    parser = argparse.ArgumentParser("python -m engine.doctor", description="what this machine has, what a run will use")
    parser.add_argument(
        "--device",
        default="auto",
        metavar="DEVICE",
        help="what a run would use: auto (the first GPU, else the CPU), cpu, cuda, cuda:N or mps (default: auto)",
    )
    findings = examine(parser.parse_args(argv).device)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    colours = {"ok": "green", "note": "yellow", "broken": "red"}
    for finding in findings:
        text = finding.text + (f"\n-> {finding.remedy}" if finding.remedy else "")
        table.add_row(finding.what, f"[{colours[finding.state]}]{finding.state}[/]", text.replace("[", r"\["))
    console = Console(highlight=False)
    console.print(table)
    broken = [finding.what for finding in findings if finding.state == "broken"]
    untested = "" if platform.system() == "Linux" else f", as far as can be told: {platform.system()} is not tested"
    console.print(f"broken: {', '.join(broken)}" if broken else f"ready to train{untested}")
    return 1 if broken else 0


def examine(asked: str = "auto") -> list[Finding]:
    """Every finding, for a run on the device ``asked`` (``run.device``); a check that fails is itself one."""
    checks: list[Callable[[], list[Finding]]] = [system, python, packages, names, imports, apex, machine, cache, gpu]
    findings = [finding for check in checks for finding in _guarded(check)]
    if any(f.state == "broken" and f.what in ("torch", "torchvision", "numpy", "kernels", "engine") for f in findings):
        return findings
    from engine.training import choose_device

    try:
        device = choose_device(asked, "--device")
    except ConfigError as error:
        return [*findings, Finding("device", "broken", str(error), "leave --device out")]
    findings.append(Finding("device", "ok", f"{device} ({asked})"))
    for check_on in (precision, compilers, jpeg, speed):
        findings += _guarded(functools.partial(check_on, device), check_on.__name__)
    return findings


def _guarded(check: Callable[[], list[Finding]], name: str = "") -> list[Finding]:
    try:
        return check()
    except Exception as error:  # whatever is wrong with a machine, the other lines are still worth having
        return [Finding(name or check.__name__, "broken", f"{type(error).__name__}: {error}")]


def system() -> list[Finding]:
    """Linux is where this is built and tested; what others lack."""
    name = platform.system()
    if name == "Linux":
        return [Finding("system", "ok", f"Linux {platform.release()}")]
    lacks = {
        "Windows": "a run folder is not locked, SIGUSR1 does not exist, memory cannot be measured, no DALI",
        "Darwin": "no CUDA, DALI or Triton: training runs on the CPU with the torchvision loader",
    }
    remedy = "train in Linux: a container, or WSL 2 on Windows"
    return [Finding("system", "note", f"{name}, which is not tested; {lacks.get(name, 'everything may differ')}", remedy)]


def imports() -> list[Finding]:
    """Whether all that a run imports is there on this system."""
    try:
        importlib.import_module("engine.run")
    except Exception as error:  # a module of the system's raises anything
        return [Finding("engine", "broken", f"does not import: {type(error).__name__}: {error}", "install ppssl-engine again")]
    return [Finding("engine", "ok", "all that a run imports is there")]


def python() -> list[Finding]:
    version = platform.python_version()
    if sys.version_info[:2] in ((3, 11), (3, 12)):
        return [Finding("python", "ok", version)]
    return [Finding("python", "broken", version, "use Python 3.11 or 3.12")]


def packages() -> list[Finding]:
    """Versions against what the distribution requires and against the set that is tested."""
    required, tested = requirements(), tested_versions()
    findings = []
    for name, (module, breaks, remedy) in _PACKAGES.items():
        try:
            importlib.import_module(module)
            version = importlib.metadata.version(name)
        except Exception as error:  # a broken binary raises anything
            absent = isinstance(error, (ModuleNotFoundError, importlib.metadata.PackageNotFoundError))
            text = "not installed" if absent else f"does not import: {type(error).__name__}: {error}"
            state = "broken" if breaks else "note"
            findings.append(Finding(name, state, text + (f" (needed by {breaks})" if breaks else ""), remedy))
            continue
        least = required.get(name)
        if least and numbers(version) < numbers(least):
            remedy = f"pip install -U '{name}>={least}'"
            findings.append(Finding(name, "broken", f"{version}, {least} or later is needed", remedy))
        elif name in tested and numbers(version) != numbers(tested[name]):
            remedy = f"pip install -c constraints.txt {name}, if something misbehaves"
            findings.append(Finding(name, "note", f"{version}; tested with {tested[name]}", remedy))
        else:
            findings.append(Finding(name, "ok", version))
    return findings


def numbers(version: str) -> tuple[int, ...]:
    """``2.11.0+cu130`` -> (2, 11, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def requirements() -> dict[str, str]:
    """Least versions by distribution, from our own metadata; empty in a clone that is not installed."""
    try:
        lines = importlib.metadata.requires("ppssl-engine") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = (re.match(r"([\w.-]+)\s*>=\s*([\d.]+)", line) for line in lines if "extra ==" not in line)
    return {match[1]: match[2] for match in found if match}


def tested_versions(path: Path = _ROOT / "constraints.txt") -> dict[str, str]:  # noqa: PT028  (no test)
    """The exact set that is tested, where the clone is available."""
    if not path.is_file():
        return {}
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return dict(line.split("==") for line in lines if "==" in line)


def names() -> list[Finding]:
    """Another distribution installs a package ``kernels`` too, which wins over an editable install outside the clone."""
    spec = importlib.util.find_spec("kernels")
    where = Path(spec.origin).resolve().parent.parent if spec and spec.origin else None
    if where == _ROOT:
        return [Finding("kernels", "ok", f"ours, {_ROOT / 'kernels'}")]
    if where is None:
        return [Finding("kernels", "broken", "no package of this name", "install ppssl-engine again")]
    owners = importlib.metadata.packages_distributions().get("kernels", [])
    other = next((owner for owner in owners if owner != "ppssl-engine"), "OTHER")
    text = f"'import kernels' gives {where / 'kernels'}, which is another package of that name"
    return [Finding("kernels", "broken", text, f"pip uninstall {other}, or start from {_ROOT}")]


def apex() -> list[Finding]:
    from engine.training import apex_missing

    missing = apex_missing()
    if missing is None:
        return [Finding("apex", "ok", "NVIDIA's FusedSGD will be used on a GPU (optim.backend: auto)")]
    if "not NVIDIA's" in missing:
        return [Finding("apex", "note", missing, "pip uninstall apex; nothing needs it")]
    return [Finding("apex", "ok", f"{missing}; torch's fused SGD will be used, nothing needs apex")]


def machine() -> list[Finding]:
    """Cores and memory that this process may use, and shared memory for loader workers."""
    from engine.data import cores

    if (memory := memory_bytes()) is None:
        return [Finding("cores, memory", "note", f"{cores()} cores; this system does not say how much memory it has")]
    gib = memory / 2**30
    state = "note" if gib < 8 else "ok"
    remedy = "close other programs, or lower batch_size and queue.size" if gib < 8 else ""
    findings = [Finding("cores, memory", state, f"{cores()} cores, {gib:.0f} GiB", remedy)]
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).total < 2**30:
        size = shutil.disk_usage(shared).total / 2**20
        remedy = "docker run --shm-size=8g (or --ipc=host), or data.workers=0"
        text = f"/dev/shm has {size:.0f} MiB: worker processes of the torchvision loader may be killed by a bus error"
        findings.append(Finding("shared memory", "note", text, remedy))
    return findings


def memory_bytes() -> int | None:
    """Of the machine, or what its control group grants; None on Windows, which does not say."""
    if not hasattr(os, "sysconf"):
        return None
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if os.path.isfile(path) and (text := Path(path).read_text().strip()).isdigit():
            limits.append(int(text))
    return min(limits)


def cache() -> list[Finding]:
    """The cache folder: teacher embeddings, checked image lists, compiled steps."""
    from engine.files import cache_folder

    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        remedy = "set PPSSL_CACHE to a folder that can be written"
        return [Finding("cache folder", "broken", f"{folder} cannot be written: {error}", remedy)]
    free = shutil.disk_usage(folder).free / 2**30
    remedy = "free some, or set PPSSL_CACHE to another disk" if free < 2 else ""
    return [Finding("cache folder", "note" if free < 2 else "ok", f"{folder}, {free:.0f} GiB free", remedy)]


def nvidia_smi(*fields: str) -> list[str] | None:
    """Values of the first GPU as the driver's own tool gives them; None where it is absent or fails."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (subprocess.SubprocessError, OSError):
        return None
    lines = done.stdout.strip().splitlines()
    return [value.strip() for value in lines[0].split(",")] if lines else None


def gpu() -> list[Finding]:
    import torch

    driver = nvidia_smi("name", "driver_version")
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        text = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor}"
        text += f", CUDA {torch.version.cuda}" + (f", driver {driver[1]}" if driver else "")
        if torch.cuda.device_count() > 1:
            text += f"; {torch.cuda.device_count()} GPUs, a run uses one (run.device=cuda:N) or torchrun all"
        if properties.major < 8:
            return [Finding("gpu", "note", text, "before Ampere there is no bf16: --amp will mean fp16")]
        return [Finding("gpu", "ok", text)]
    if driver:
        text = f"{driver[0]} is there (driver {driver[1]}), but torch {torch.__version__} cannot use it"
        remedy = (
            "install PyPI's torch, which is built for CUDA"
            if torch.version.cuda is None
            else f"install a driver for CUDA {torch.version.cuda}, and check CUDA_VISIBLE_DEVICES"
        )
        return [Finding("gpu", "broken", text, remedy)]
    return [Finding("gpu", "note", "none: everything runs on the CPU")]


def precision(device: torch.device) -> list[Finding]:
    import torch

    from engine.training import precision as precisions

    chosen = precisions.resolve("bf16", device)
    if chosen.dtype is torch.bfloat16:
        return [Finding("--amp", "ok", chosen.note)]
    return [Finding("--amp", "note", chosen.note)]


def compilers(device: torch.device) -> list[Finding]:
    """What run.compile and run.cuda_graph can do here."""
    from engine.training import choose
    from engine.training import precision as precisions

    on_gpu = device.type == "cuda"
    chosen = choose("auto", "auto", precisions.resolve("bf16", device))
    findings = [Finding("run.compile: auto", "ok", chosen.note)]
    c = next((name for name in (os.environ.get("CC"), "gcc", "clang", "cc") if name and shutil.which(name)), None)
    cxx = next((name for name in (os.environ.get("CXX"), "g++", "clang++", "c++") if name and shutil.which(name)), None)
    has_triton = importlib.util.find_spec("triton") is not None
    if on_gpu and not (has_triton and c):
        lacking = "triton" if not has_triton else "a C compiler, with which Triton builds its launchers"
        remedy = "pip install triton" if not has_triton else "install gcc (apt install build-essential), or set CC"
        text = f"no {lacking}: kernels and run.compile fail; run.compile=off alone does not help"
        findings.append(Finding("compile", "broken", text, remedy))
    elif on_gpu:
        text = f"triton and {c} are there; whole-step graphs can be captured (run.cuda_graph=on)"
        findings.append(Finding("compile", "ok", text))
    else:
        text = f"Inductor would use {cxx}" if cxx else "no C++ compiler, which run.compile=step would need"
        findings.append(Finding("compile", "ok", f"{text}; eager is faster on a CPU"))
    return findings


def jpeg(device: torch.device) -> list[Finding]:
    """Which decoder the loader uses."""
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        return [Finding("JPEG decoder", "note", "PIL in the torchvision loader", "pip install nvidia-dali-cuda130")]
    if device.type != "cuda":
        return [Finding("JPEG decoder", "ok", "DALI on the CPU")]
    from engine.data import HARDWARE_DECODER_SHARE

    used = nvidia_smi("utilization.jpeg")
    share = f"{100 * HARDWARE_DECODER_SHARE:.0f} %"
    if used is None or "unknown" in used[0].lower() or "not" in used[0].lower():
        return [Finding("JPEG decoder", "ok", f"DALI on the GPU; its JPEG engine, if it has one, takes {share} of a batch")]
    if "n/a" in used[0].lower():
        return [Finding("JPEG decoder", "ok", "DALI on the GPU's cores (this GPU has no JPEG engine)")]
    return [Finding("JPEG decoder", "ok", f"DALI on the GPU: its JPEG engine takes {share} of a batch, its cores the rest")]


def speed(device: torch.device) -> list[Finding]:
    """Two seconds of measuring, and what they promise for ResNet-50 at 224 pixels."""
    import torch

    from engine.data import cores
    from engine.training import precision as precisions
    from engine.training import profiling

    on_gpu = device.type == "cuda"
    dtype = precisions.resolve("bf16", device).dtype or torch.float32
    rate = profiling.convolution_tflop_s(device, dtype)
    if on_gpu:
        bandwidth = profiling.copy_tb_s(device)
        step, limit = expected_gpu(rate, bandwidth)
        text = f"convolutions {rate:.0f} TFLOP/s, copies {bandwidth:.2f} TB/s"
    else:
        step, limit = CPU_EFFICIENCY * rate * 1e3 / IMAGE_GFLOP, "convolutions"
        text = f"convolutions {rate:.2f} TFLOP/s in {str(dtype).removeprefix('torch.')} on {torch.get_num_threads()} threads"
    data = CORE_IMAGES_PER_S * cores()
    text += f"; expect about {step:.3g} images/s of the ppssl step (ResNet-50, 224 px, --amp, teacher cached)"
    findings = [Finding("speed", "ok", text)]
    if not on_gpu and hasattr(os, "getloadavg") and os.getloadavg()[0] > cores():
        text += f"; other programs have the cores (load {os.getloadavg()[0]:.1f}), so this is too low"
        findings = [Finding("speed", "note", text, "measure again when the machine is idle")]
    if step > data and on_gpu:
        text = f"decoding on {cores()} cores alone gives about {data:.0f} images/s, less than the step takes"
        remedy = "let DALI decode on the GPU (data.loader=dali), or get more cores; watch 'data wait' in the log"
        findings.append(Finding("bottleneck", "note", text, remedy))
    else:
        text = f"the step, by its {limit}; the loader could give about {data:.0f} images/s"
        findings.append(Finding("bottleneck", "ok", text))
    return findings


def expected_gpu(tflop_s: float, tb_s: float) -> tuple[float, str]:
    """Images/s to expect of the compiled step, and what limits it."""
    by_memory = 1.12 * IMAGE_GB / tb_s / 1e3
    by_products = IMAGE_GFLOP / tflop_s / 1e3
    limit = "memory traffic" if by_memory >= by_products else "convolutions"
    return OF_FLOOR / max(by_memory, by_products), limit


if __name__ == "__main__":
    sys.exit(main())
