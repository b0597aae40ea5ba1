"""Tries launch configurations on this GPU and writes the fastest into kernels/configs.json.

    python -m bench.gpu.sweep [--kernel infonce] [--minutes 8]

One entry of the table is one regime: kernel, operand type, width bucket and batch bucket. Each candidate is put into
the table in memory, its result compared with what the committed configuration computes, the public op timed with a cold
L2. Candidates that do not compile or ask for too much shared memory are skipped. Entries not reached in time stay as
they were; ``build/sweep_done.json`` records the progress: delete it to start over.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

import kernels
from kernels import configs

PROGRESS = Path(__file__).resolve().parents[2] / "build" / "sweep_done.json"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "ieee": torch.float32, "tf32": torch.float32}
SIZE = 65536


def candidates(kernel: str, entry: dict) -> Iterator[dict]:
    """Configurations worth trying, the committed one first."""
    yield entry
    if kernel == "infonce":
        grid = itertools.product((16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3, 4))
    elif kernel.startswith("maxout ") or kernel in ("gradcam map", "gradcam mean", "gradcam scale"):
        rows = (entry["rows"],) if kernel.startswith("maxout ") else (8, 16, 32, 64)
        grid = itertools.product(rows, (64, 128, 256, 512), (4, 8), (1, 2, 3))
    else:
        grid = itertools.product((1, 2, 4, 8, 16), (entry["cols"],), (2, 4, 8), (1,))
    for values in grid:
        found = dict(zip(("rows", "cols", "warps", "stages"), values, strict=True))
        if found != entry:
            yield found


def workload(kernel: str, operand: str, width: int, batch: int) -> Callable[[], list[torch.Tensor]]:
    """The public op, forward and backward, in the regime of one entry."""
    torch.manual_seed(0)
    dtype = DTYPES.get(operand, torch.bfloat16)

    def draw(*shape):
        return torch.randn(*shape, device="cuda")

    if kernel == "infonce":
        batch = {16: 16, 64: 64}.get(batch, 128)
        q, k, queue = (F.normalize(draw(rows, width), dim=1).to(dtype) for rows in (batch, batch, SIZE))
        q.requires_grad_()
        precision = operand if operand == "tf32" else "ieee"

        def run():
            loss = kernels.queue_infonce(q, k, queue, temperature=0.2, precision=precision, impl="triton")
            return [loss, *torch.autograd.grad(loss, q)]
    elif kernel.startswith("maxout "):
        feature = torch.relu(draw(128, width, 7, 7)).to(dtype).to(memory_format=torch.channels_last)
        weight, gamma, beta = draw(32, width) * width**-0.5, torch.ones(32, device="cuda"), draw(32)
        leaves = [tensor.requires_grad_() for tensor in (feature, weight, gamma, beta)]

        def run():
            out = kernels.maxout(*leaves, minmax="batch", impl="triton")
            return [out.mask, out.pooled, *torch.autograd.grad(out.mask.sum() + out.pooled.sum(), leaves)]
    elif kernel.startswith("maxout_image"):
        image = draw(128, 3, 224, 224).bfloat16()
        leaves = [tensor.requires_grad_() for tensor in (draw(32, 3), torch.ones(32, device="cuda"), draw(32))]

        def run():
            mask = kernels.maxout_image(image, *leaves, minmax="batch", impl="triton").mask
            return [mask, *torch.autograd.grad(mask.sum(), leaves)]
    else:
        shape, size = ((128, 3, 224, 224), (7, 7)) if kernel == "gradcam image" else ((128, 2048, 7, 7), (7, 7))
        act, grad = (draw(*shape).bfloat16() for _ in range(2))
        if kernel != "gradcam image":
            act, grad = (tensor.to(memory_format=torch.channels_last) for tensor in (act, grad))
        act.requires_grad_()
        weighting = "channel" if kernel == "gradcam mean" else "elementwise"

        def run():
            cam = kernels.gradcam(act, grad, size=size, weighting=weighting, impl="triton")
            return [cam, *(torch.autograd.grad(cam.sum(), act) if kernel != "gradcam image" else ())]

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", default="", help="only kernels whose name begins with this")
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
    left = [entry for entry in entries if [arch, *entry] not in done]
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
