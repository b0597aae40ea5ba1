"""How the op benchmarks measure: alternating minima for ratios, cold and replayed times on a GPU, peak extra memory."""

from __future__ import annotations

import contextlib
import functools
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import yaml

from bench.gpu.cards import CARDS, card

GUARDS = yaml.safe_load((Path(__file__).parent / "guards.yaml").read_text())
ROUNDS = 9
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SHORT_TURN = 2e-3
"""Seconds that a turn on a GPU lasts at least: the host's clock is too coarse for one kernel."""

_CORES = torch.get_num_threads()  # what torch takes by itself: the machine's, or OMP_NUM_THREADS
torch.set_num_threads(1)


@contextlib.contextmanager
def all_cores() -> Iterator[None]:
    """For times that are stated of a whole machine; everything else here is measured with one thread."""
    torch.set_num_threads(_CORES)
    try:
        yield
    finally:
        torch.set_num_threads(1)


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def alternate(sides: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Seconds of each side: the minimum of ``rounds`` turns taken in alternation, after two that do not count. On a GPU a turn is
    as many calls as SHORT_TURN holds, timed by the device's own events."""
    best = dict.fromkeys(sides, float("inf"))
    calls = dict.fromkeys(sides, 1)
    for turn in range(-2, rounds):
        for name, side in sides.items():
            seconds = _turn(side, calls[name])
            if turn == -1 and CUDA:
                calls[name] = max(1, min(1000, round(SHORT_TURN / seconds)))
            if turn >= 0:
                best[name] = min(best[name], seconds)
    return best


def _turn(side: Callable[[], object], calls: int) -> float:
    """Seconds of one of ``calls`` calls."""
    if not CUDA:
        start = time.perf_counter()
        side()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(calls):
        side()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def guard(benchmark, key: str, measure: Callable[[], dict[str, float]], goals: dict[str, dict]) -> None:
    """``measure`` gives ratios by name; each must reach its bound, and one bad turn of the machine is forgiven."""
    benchmark.extra_info.update(facts())
    ratios = measure()
    if short(ratios, goals):
        again = measure()
        ratios = {name: max(ratios[name], again[name]) for name in ratios}
    benchmark.extra_info["ratios"] = ratios
    missed = short(ratios, goals)
    assert not missed, f"{key}: " + "; ".join(missed)


def short(ratios: dict[str, float], goals: dict[str, dict]) -> list[str]:
    """The ratios that stay below their bound, in words."""
    return [
        f"{name} is {ratio:.2f}, bound {goals[name]['bound']} (goal {goals[name]['goal']})"
        for name, ratio in ratios.items()
        if ratio < goals[name]["bound"]
    ]


def peak_extra_bytes(function: Callable[[], object]) -> int:
    """Most bytes alive at once beyond those alive before."""
    function()
    if CUDA:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = function()
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = function()
        del kept
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


def measure(
    benchmark, function: Callable[[], object], *, moved: int, flop: float, memory: bool = True, replay: bool = True
) -> None:
    """Time ``function`` under pytest-benchmark and note rates, memory and where it ran.

    Args:
        moved: bytes that must cross the memory bus once, for GB/s (1e9).
        flop: floating-point operations of the matrix products, for TFLOP/s.
        replay: also time it on a GPU as a CUDA graph. Not for a backward pass whose graph was built before, on another stream: its
            kernels run on that stream, which ends the capture.
    """

    def run():
        function()
        synchronize()

    if CUDA:
        import triton.testing

        cold, low, high = triton.testing.do_bench(function, quantiles=[0.5, 0.2, 0.8])
        info = {"cold_ms": cold, "cold_ms_p20": low, "cold_ms_p80": high}
        try:
            info["replayed_ms"] = triton.testing.do_bench_cudagraph(function) if replay else None
        except RuntimeError as error:  # eager code that synchronizes cannot be captured
            info["replayed_ms"] = None
            info["not_captured"] = str(error).splitlines()[0]
        seconds = cold / 1e3
        benchmark.pedantic(run, rounds=30, warmup_rounds=5)
    else:
        info = {}
        benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=1)
        seconds = benchmark.stats.stats.min
    info |= {"gb_s": moved / seconds / 1e9, "tflop_s": flop / seconds / 1e12}
    if CUDA and (known := card(torch.cuda.get_device_name())):
        info |= {f"percent_of_{name}": 100 * info[name] / value for name, value in CARDS[known]._asdict().items()}
    if memory:
        info["peak_extra_mib"] = peak_extra_bytes(function) / 2**20
    benchmark.extra_info.update(facts() | info)


@functools.cache
def facts() -> dict[str, str]:
    """Device, versions and commit."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    found = {
        "device": torch.cuda.get_device_name() if CUDA else platform.processor() or platform.machine(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or "unknown",
    }
    if CUDA:
        import triton

        found |= {"triton": triton.__version__, "cuda": torch.version.cuda or ""}
    return found


def modes(forward: Callable[[], torch.Tensor], inputs: list[torch.Tensor]) -> dict[str, Callable[[], object]]:
    """forward (no gradient kept), backward (of one graph, again and again) and both, for a scalar ``forward``."""

    def forward_only():
        with torch.no_grad():
            return forward()

    graph = forward()

    def backward_only():
        return torch.autograd.grad(graph, inputs, retain_graph=True)

    def both():
        return torch.autograd.grad(forward(), inputs)

    return {"forward": forward_only, "backward": backward_only, "both": both}


def compiled(function: Callable) -> Callable:
    """``function`` under torch.compile for one shape: functions that were compiled for another are forgotten, since a second shape
    would be compiled with sizes that are not known."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def close(name: str, ours, theirs, tolerance: float) -> None:
    """The gate before any timing: ``max |a - b| <= tolerance * max |b|``."""
    for mine, true in zip(ours, theirs, strict=True):
        error = (mine.double() - true.double()).abs().max().item()
        scale = true.double().abs().max().item()
        assert error <= tolerance * scale + 1e-12, f"{name} is wrong by {error:.2e} of {scale:.2e}: not timed"
