"""``--profile N``: N steady steps under torch.profiler, or between the marks that Nsight waits for; and how fast a device is."""

from __future__ import annotations

import collections
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType

from engine.console import say

# torch.profiler and Nsight cannot listen to the same GPU: CUPTI takes one subscriber. nsys and ncu set such variables.
_NSIGHT = ("NSYS_", "NSYSDK_", "QUADD_INJECTION", "NV_NSIGHT_INJECTION")
_SHOWN = 25


class Profile:
    """Records ``steps`` steps, once ``warm_up`` others have passed (compilers, allocators, algorithms, capture).

        with Profile(out / "profile", steps=5) as profile:
            for batch in batches:
                step(batch)
                profile.step()

    Writes ``trace.json.gz`` (ui.perfetto.dev) and ``table.txt`` into ``out``, from torch.profiler. Under nsys or ncu it
    writes nothing, but brackets the same steps by cudaProfilerStart and cudaProfilerStop. ``steps`` 0 does nothing.
    ``done`` turns true when everything is recorded. Raises ``ValueError`` for negative ``steps``.
    """

    def __init__(self, out: Path, *, steps: int, warm_up: int | None = None, device: torch.device | str | None = None):
        if steps < 0:
            raise ValueError(f"--profile: {steps} steps; give a number of steps of at least 1, or 0 for none")
        self.out, self.steps = Path(out), steps
        self.on_gpu = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type == "cuda"
        # the graph of a captured step is made in its fourth call
        self.warm_up = (8 if self.on_gpu else 2) if warm_up is None else warm_up
        self.under_nsight = self.on_gpu and any(name.startswith(_NSIGHT) for name in os.environ)
        self.seen = 0
        self.done = steps == 0
        self.profiler: torch.profiler.profile | None = None
        self.began = 0.0

    def __enter__(self) -> Profile:
        self._begin_if_due()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self.done:
            return
        recorded = self.seen - self.warm_up
        if error is None and recorded > 0:
            self._finish(recorded)
            return
        if error is None:
            say(f"--profile: the run ended after {self.seen} steps, within the {self.warm_up} steps of warm-up")
        if self.profiler is not None:
            if not self.began:  # prepared only, which cannot be taken back
                self.profiler.start_trace()
            self.profiler.stop_trace()

    def step(self) -> None:
        """Called after every training step."""
        if self.done:
            return
        self.seen += 1
        self._begin_if_due()
        if self.seen == self.warm_up + self.steps:
            self._finish(self.steps)

    def _begin_if_due(self) -> None:
        if self.done:
            return
        if self.profiler is None and not self.under_nsight and self.seen >= self.warm_up - 1:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self.on_gpu:
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self.profiler = torch.profiler.profile(activities=activities, record_shapes=True, acc_events=True)
            self.profiler.prepare_trace()  # one step early: starting the tracer is slow and would be seen
        if self.seen == self.warm_up:
            self._synchronize()
            if self.profiler is None:
                torch.cuda.profiler.start()
            else:
                self.profiler.start_trace()
            self.began = time.perf_counter()

    def _finish(self, steps: int) -> None:
        self._synchronize()
        seconds = time.perf_counter() - self.began
        self.done = True
        if self.profiler is None:
            torch.cuda.profiler.stop()
            say(f"--profile: {steps} steps were marked for Nsight")
            return
        self.profiler.stop_trace()
        self.out.mkdir(parents=True, exist_ok=True)
        self.profiler.export_chrome_trace(str(self.out / "trace.json.gz"))
        text = report(self.profiler.events(), steps, seconds)
        (self.out / "table.txt").write_text(text, encoding="utf-8")
        say(text)
        say(f"profile: {self.out / 'table.txt'}, {self.out / 'trace.json.gz'} (open in https://ui.perfetto.dev)")

    def _synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


class Row(NamedTuple):
    """One kernel (on a CPU, one operator's own time) of the recorded steps."""

    kind: str
    name: str
    calls: int
    microseconds: float


# In this order, by kernel or operator name. cuDNN runs 1x1 convolutions as matrix products: they count as matmul.
_KINDS = tuple(
    (kind, re.compile(pattern, re.IGNORECASE))
    for kind, pattern in {
        "infonce": r"ppssl::infonce|^_(split|merge)_kernel",
        # gradcam has a _scale_kernel too, which runs only where a CAM is differentiated
        "maxout_image": r"ppssl::maxout_image|^_(moments|affine|search|scale|grad_cells|grad_affine)_kernel",
        "maxout": r"ppssl::maxout|^_(project|statistics|activate|pool|grad_mask|grad_projection|grad_feature)_kernel",
        "gradcam": r"ppssl::gradcam|^_(image|mean|map)_kernel",
        "enqueue": r"ppssl::enqueue",
        "optimizer": r"optimizer\.step|multi_tensor_apply|fused_?(?:sgd|adam)|_foreach_",
        "bn": r"batch_?norm|^_?bn_|bn_[fb]w|bnfw|bnbw",
        "conv": r"conv(?!ert)|fprop|dgrad|wgrad|winograd|implicit_gemm",
        "layout": r"nchwtonhwc|nhwctonchw|reorder",
        "matmul": r"gemm|mm\b|matmul|::linear|nvjet|cublas|einsum",
        "attention": r"attention|flash|fmha",
        "pool": r"pool",
        "copy": r"memcpy|memset|copy|::to$|::clone|::contiguous|::zero|::fill|fill_?kernel|::cat$|catarray",
        "random": r"rand|bernoulli|philox|dropout",
        "reduction": r"reduce|softmax|norm|::sum|::mean|amax|amin|logsumexp|::max|::min|triton_(red|per)|topk|sort",
        "elementwise": r"elementwise|triton_poi|::(add|sub|mul|div|relu|threshold|clamp|where|exp|log|lerp|sqrt|neg)"
        r"|::(pow|eq|lt|gt|ge|le|isfinite|bitwise|logical|sign|abs|gelu|sigmoid|kl_div|xlogy)",
    }.items()
)
# Work launched below these belongs to them, whatever its own name is.
_OWNERS = ("infonce", "maxout_image", "maxout", "gradcam", "enqueue", "optimizer")


def kernel_kind(name: str, parents: Iterable[str] = ()) -> str:
    """The class of a kernel or operator by its name and the names of the operators that it ran in, innermost first."""
    above = tuple(parents)
    for owner in (*(parent for parent in above if parent.startswith("ppssl::")), name, *above):
        kind = _by_name(owner)
        if kind in _OWNERS:
            return kind
    return _by_name(name)


def _by_name(name: str) -> str:
    return next((kind for kind, pattern in _KINDS if pattern.search(name)), "other")


def kernels(events: Iterable[Any]) -> list[Row]:
    """The kernels of torch.profiler's ``events``, the longest first; a CPU's operators where no GPU was recorded."""
    events = list(events)
    on_device = [e for e in events if e.device_type != DeviceType.CPU and not e.is_user_annotation]
    totals: dict[tuple[str, str], list[float]] = collections.defaultdict(lambda: [0, 0.0])
    if on_device:
        measured = _with_launchers(on_device, events)
    else:
        measured = ((e, e.cpu_parent, e.self_cpu_time_total) for e in events if not e.is_user_annotation)
    for event, parent, microseconds in measured:
        total = totals[kernel_kind(event.name, _names_above(parent)), event.name]
        total[0] += 1
        total[1] += microseconds
    rows = [Row(kind, name, calls, spent) for (kind, name), (calls, spent) in totals.items() if spent > 0]
    return sorted(rows, key=lambda row: -row.microseconds)


def _with_launchers(on_device: list[Any], events: list[Any]) -> Iterator[tuple[Any, Any, float]]:
    """(kernel, the operator that launched it or None, microseconds). An operator knows its kernels by name and duration
    only; the replay of a CUDA graph has no operators."""
    launchers: dict[tuple[str, float], list[Any]] = collections.defaultdict(list)
    for event in events:
        for kernel in event.kernels if event.device_type == DeviceType.CPU else ():
            launchers[kernel.name, kernel.duration].append(event)
    for event in on_device:
        found = launchers[event.name, event.time_range.end - event.time_range.start]
        yield event, found.pop() if found else None, event.self_device_time_total


def _names_above(event: Any) -> Iterator[str]:
    while event is not None:
        yield event.name
        event = event.cpu_parent


def report(events: Iterable[Any], steps: int, seconds: float) -> str:
    """The readable account of ``steps`` steps that took ``seconds``: classes, longest kernels, named parts."""
    events = list(events)
    rows = kernels(events)
    busy = sum(row.microseconds for row in rows)
    device = "GPU kernels" if any(e.device_type != DeviceType.CPU for e in events) else "CPU operators"
    text = f"{steps} steps, {1e3 * seconds / steps:.2f} ms each while recorded: {device} {busy / 1e3 / steps:.2f} ms"

    kinds: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0])
    for row in rows:
        kinds[row.kind][0] += row.calls
        kinds[row.kind][1] += row.microseconds
    by_kind = sorted(((kind, *total) for kind, total in kinds.items()), key=lambda entry: -entry[2])
    tables = [_table("class", by_kind, steps, busy)]
    longest = [(f"{row.kind}: {row.name[:90]}", row.calls, row.microseconds) for row in rows[:_SHOWN]]
    tables.append(_table(f"the {len(longest)} longest of {len(rows)}", longest, steps, busy))

    parts: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0])
    for event in events:
        if event.is_user_annotation and event.device_type == DeviceType.CPU and "#" not in event.name:
            parts[event.name][0] += 1
            parts[event.name][1] += event.cpu_time_total
    if parts:
        spent = sorted(((name, *total) for name, total in parts.items()), key=lambda entry: -entry[2])
        tables.append(_table("part of the step (the host's time in it)", spent, steps, 1e6 * seconds))
    return "\n".join((text, *tables))


def _table(title: str, entries: Iterable[tuple[str, float, float]], steps: int, whole: float) -> str:
    table = Table(box=None, pad_edge=False)
    for name, justify in ((title, "left"), ("calls/step", "right"), ("ms/step", "right"), ("share", "right")):
        table.add_column(name, justify=justify, no_wrap=True)
    for name, calls, microseconds in entries:
        share = 100 * microseconds / whole if whole else 0.0
        table.add_row(name, f"{calls / steps:.4g}", f"{microseconds / 1e3 / steps:.3f}", f"{share:.1f} %")
    console = Console(width=140, color_system=None, highlight=False, markup=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def convolution_tflop_s(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Rate of a 3x3 convolution of ResNet-50's third stage, forward and backward, channels_last, on ``device``."""
    batch = 64 if device.type == "cuda" else 8
    x = torch.randn(batch, 256, 14, 14, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(256, 256, 3, 3, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    x.requires_grad_(), weight.requires_grad_()

    def once() -> None:
        y = torch.nn.functional.conv2d(x, weight, padding=1)
        torch.autograd.grad(y, (x, weight), torch.ones_like(y))

    flop = 3 * 2 * batch * 14 * 14 * 256 * 256 * 9
    return flop / _fastest(once, device, seconds) / 1e12


def copy_tb_s(device: torch.device, seconds: float = 0.5) -> float:
    """Bytes read and written by a large copy on ``device``."""
    source = torch.empty(2**28, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source), device, seconds) / 1e12


def _fastest(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of the fastest of the calls that fit into ``seconds``, after one that does not count."""

    def once() -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / repeats

    repeats = 1
    once()
    repeats = max(1, round(0.01 / max(once(), 1e-6)))  # launches and one wait, spread over many calls
    until = time.perf_counter() + seconds
    best = once()
    while time.perf_counter() < until:
        best = min(best, once())
    return best
