"""Tries launch configurations on this GPU and writes the fastest into kernels/configs.json.

    python -m bench.gpu.sweep [--kernel infonce] [--entry "bfloat16 256 128"] [--minutes 8]

One entry of the table is one regime: kernel, operand type, width bucket and batch bucket. Each candidate is put into
the table in memory, its result compared with what the committed configuration computes, the public op timed with a cold
L2. Candidates that do not compile or ask for too much shared memory are skipped. Those of a step with
ResNet-50 in bf16 come first, those not reached in time stay as they were. ``build/sweep_done.json`` records the progress:
delete it to start over.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import kernels
from kernels import configs, registry

PROGRESS = Path(__file__).resolve().parents[2] / "build" / "sweep_done.json"


def candidates(kernel: str, entry: dict) -> Iterator[dict]:
    """Configurations worth trying, the committed one first."""
    yield entry
    for config in registry.table_module(kernel).candidates(kernel, configs.Config(**entry)):
        if config._asdict() != entry:
            yield config._asdict()


def workload(
    kernel: str, operand: str, width: int, batch: int, device: str = "cuda", impl: str = "triton"
) -> Callable[[], list[torch.Tensor]]:
    """The public op in the regime of one entry: its differentiable results and their gradients, all results where it has none."""
    torch.manual_seed(0)
    name, arguments = registry.table_module(kernel).workload(kernel, operand, width, batch, device)
    function = getattr(kernels, name)
    leaves = [value for value in arguments.values() if isinstance(value, torch.Tensor) and value.requires_grad]

    def run() -> list[torch.Tensor]:
        results = function(**arguments, impl=impl)
        results = [results] if isinstance(results, torch.Tensor) else list(results)
        if not leaves:
            return results
        results = [result for result in results if result.requires_grad]
        return results + list(torch.autograd.grad(results, leaves, [torch.ones_like(result) for result in results]))

    return run


def agrees(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(
        torch.isfinite(a).all() and (a.float() - b.float()).abs().max() <= 2e-2 * b.float().abs().max() + 1e-6
        for a, b in zip(ours, theirs, strict=True)
    )


def best(kernel: str, operand: str, width: str, batch: str, buckets: dict) -> tuple[dict, float, float]:
    """(fastest configuration, its milliseconds, those of the committed one)."""
    import triton.testing

    committed = buckets[batch]
    run = workload(kernel, operand, int(width), int(batch))
    configs.lookup.cache_clear()
    expected = run()
    times = []
    for candidate in candidates(kernel, committed):
        buckets[batch] = candidate
        configs.lookup.cache_clear()
        try:
            if agrees(run(), expected):
                times.append((triton.testing.do_bench(run, rep=30, quantiles=[0.5]), candidate))
        except Exception as error:  # the compiler's and the driver's errors share no base class
            print(f"    {candidate}: {type(error).__name__}", flush=True)
    first = times[0][0]
    fastest, chosen = min(times, key=lambda pair: pair[0])
    buckets[batch] = chosen
    return chosen, fastest, first


def is_used(kernel: str, operand: str, width: str, batch: str) -> bool:
    """Whether a step with ResNet-50 in bf16 runs this entry."""
    return operand in ("bfloat16", "any") and (kernel != "infonce" or (width in ("128", "256") and batch == "128"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", default="", help="only kernels whose name begins with this")
    parser.add_argument("--entry", help="operand, width and batch of one entry, e.g. 'bfloat16 256 128'")
    parser.add_argument("--minutes", type=float, default=8.0, help="stop after so long")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("the sweep times kernels: it needs a CUDA GPU")
    arch = configs.architecture(torch.device("cuda"))
    table = configs.table()
    done = json.loads(PROGRESS.read_text()) if PROGRESS.exists() else []
    deadline = time.monotonic() + 60 * options.minutes
    entries = [
        (kernel, operand, width, batch)
        for kernel, operands in table[arch].items() if kernel.startswith(options.kernel)
        for operand, widths in operands.items()
        for width, buckets in widths.items()
        for batch in buckets
    ]  # fmt: skip
    if options.entry:
        entries = [entry for entry in entries if " ".join(entry[1:]) == options.entry]
        if not entries:
            parser.error(f"--entry {options.entry!r}: no such entry; an entry is operand, width and batch, e.g. 'bfloat16 256 128'")
    left = sorted((entry for entry in entries if [arch, *entry] not in done), key=lambda entry: not is_used(*entry))
    for kernel, operand, width, batch in left:
        if time.monotonic() > deadline:
            print("out of time: run again for the rest")
            break
        chosen, fastest, first = best(kernel, operand, width, batch, table[arch][kernel][operand][width])
        print(f"{kernel} {operand} {width} {batch}: {first:.4f} -> {fastest:.4f} ms {chosen}", flush=True)
        configs.TABLE.write_text(json.dumps(table, indent=1) + "\n")
        done.append([arch, kernel, operand, width, batch])
        PROGRESS.parent.mkdir(exist_ok=True)
        PROGRESS.write_text(json.dumps(done))
    return 0


if __name__ == "__main__":
    sys.exit(main())
