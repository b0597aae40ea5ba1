"""The whole training step, rung by rung: from the published structure in float32 to the engine's fastest, and MoCo.

    pytest bench/bench_step.py --benchmark-only   a small network on a CPU, ResNet-50 at 224 pixels on a GPU
    python -m bench.bench_step full               the ladder as a table: ResNet-50, 224 px, B 128 (CPU: 16, all cores)
    python -m bench.bench_step full:256 "teacher cached" compiled       another batch, some rungs

PPSSL_BENCH_STEP=small|full[:BATCH] sets the size for pytest. The table's ratios are to the first rung that ran. Before
any timing, rungs of one precision must give the same first loss. Operations: useful convolution passes (2 forward, 2
data gradients, 1 weight gradient; MoCo and LCR one data gradient less; LDFS twice MoCo's, its decoder not counted) x the
trunk's forward operations. The rung "pruned" is our step with the ops in their eager definitions, which are float32 throughout.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import sys
import unittest.mock
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ppssl.encoder
import ppssl.moco
import ppssl.ppssl
from bench.gpu.cards import CARDS, card
from bench.published_style import PublishedStyle, default_sgd, train_step
from bench.timing import CUDA, DEVICE, GUARDS, alternate, facts, guard, peak_extra_bytes, synchronize
from engine.data.machine import cores
from engine.training import inductor, optim, precision
from engine.training.step import Step
from ppssl import LCR, LDFS, PPSSL, Batch, MoCo, Teacher
from ppssl.encoder import FeatureNet, MaskBranch, Trunk, projection_head
from ppssl.method import Method
from ppssl.settings import variant
from ppssl.timm_trunk import DilatedDepthwise

LEARNING_RATE = 1e-3
"""Small: one batch is trained on again and again."""
PASSES = {"ppssl": 5, "moco": 4, "lcr": 4, "ldfs": 8}


class Size(NamedTuple):
    """What is trained on what. ``teacher``: pixels of a patch, width and depth of its vision transformer."""

    arch: str
    side: int
    batch: int
    queue: int
    dim: int
    teacher: tuple[int, int, int]


def size_of(text: str) -> Size:
    """``small`` or ``full``, optionally with ``:BATCH``."""
    name, _, batch = text.partition(":")
    sizes = {
        "small": Size("resnet18_w16_s16", 64, 16, 16384, 128, (16, 128, 2)),
        "full": Size("resnet50", 224, 128 if CUDA else 16, 65536, 256, (32, 768, 12)),
    }
    if name not in sizes or (batch and not batch.isdigit()):
        raise ValueError(f"size {text!r} is not known; use small or full, optionally with a batch as in full:256")
    return sizes[name]._replace(batch=int(batch)) if batch else sizes[name]


class Rung(NamedTuple):
    """One way of running the step."""

    method: str = "ppssl"
    structure: str = "ours"
    amp: str | None = "bf16"
    channels_last: bool = True
    fused: bool = True
    teacher: str = "query"
    fused_bn: bool = False
    compile: str = "off"
    combo: bool = True
    graph: bool = False


RUNGS = {
    "published fp32": Rung(structure="published", amp=None, channels_last=False),
    "bf16": Rung(structure="published", channels_last=False),
    "channels_last": Rung(structure="published"),
    "pruned": Rung(fused=False),
    "fused ops": Rung(),
    "teacher cached": Rung(teacher="clean"),
    "compiled, torch batch-norm": Rung(teacher="clean", compile="step"),
    "compiled": Rung(teacher="clean", compile="step", fused_bn=True),
    "compiled, uncombined kernels": Rung(teacher="clean", compile="step", fused_bn=True, combo=False),
    "graphed": Rung(teacher="clean", compile="step", fused_bn=True, graph=True),
    "compiled, teacher on the view": Rung(compile="step", fused_bn=True),
    "graphed, teacher on the view": Rung(compile="step", fused_bn=True, graph=True),
    "moco": Rung("moco"),
    "moco compiled, torch batch-norm": Rung("moco", compile="step"),
    "moco compiled": Rung("moco", compile="step", fused_bn=True),
    "moco compiled, uncombined kernels": Rung("moco", compile="step", fused_bn=True, combo=False),
    "moco graphed": Rung("moco", compile="step", fused_bn=True, graph=True),
    "lcr": Rung("lcr"),
    "lcr compiled": Rung("lcr", compile="step", fused_bn=True),
    "ldfs": Rung("ldfs"),
    "ldfs compiled": Rung("ldfs", compile="step", fused_bn=True),
}
HERE = [name for name, rung in RUNGS.items() if CUDA or rung.compile == "off"]
"""Compiling makes a CPU's step slower and takes minutes."""


def build_method(size: Size, rung: Rung) -> Method:
    """The same weights for every rung."""
    torch.manual_seed(0)
    trunk = Trunk(size.arch)
    if rung.fused_bn:
        trunk.fuse_batch_norm()
    head = projection_head("mlp2", trunk.channels, size.dim)
    narrow = CUDA and rung.structure == "ours"
    contrast = dict(dim=size.dim, queue_size=size.queue, queue_dtype=torch.bfloat16 if narrow else torch.float32)
    if rung.method == "moco":
        return MoCo(FeatureNet(trunk), head, **contrast)
    if rung.method == "ldfs":
        return LDFS(FeatureNet(trunk), head, side=size.side, **contrast)
    network = FeatureNet(trunk, MaskBranch(trunk.channels, 32, minmax="batch"))
    if rung.method == "lcr":
        return LCR(network, head, **contrast)
    teacher = build_teacher(size)
    settings = variant("ppssl", "published", {"teacher.view": rung.teacher})
    return PPSSL(network, head, teacher.text_features, settings=settings, embed=teacher.to(DEVICE).embed, **contrast)


def build_teacher(size: Size) -> Teacher:
    """An image encoder of CLIP's shape, built by timm, which is where a benchmark runs more often than open_clip; its speed does
    not depend on its weights."""
    from timm.models.vision_transformer import VisionTransformer

    patch, width, layers = size.teacher
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        visual = VisionTransformer(
            size.side, patch, num_classes=512, embed_dim=width, depth=layers, num_heads=width // 64, pre_norm=True
        )
        text = torch.randn(8, 512)
    return Teacher(visual, text, logit_scale=100.0, image_size=size.side, mean=(0.5,) * 3, std=(0.25,) * 3)


def build_step(size: Size, rung: Rung) -> Callable[[], float | torch.Tensor]:
    """A call that trains on one batch and returns the total loss, on the device for our steps."""
    generator = torch.Generator().manual_seed(2)
    views = torch.randn(2, size.batch, 3, size.side, size.side, generator=generator)
    layout = torch.channels_last if rung.channels_last else torch.contiguous_format
    x_q, x_k = (view.to(DEVICE).contiguous(memory_format=layout) for view in views)
    how = precision.resolve(rung.amp, DEVICE)
    method = build_method(size, rung).to(DEVICE).train()
    if rung.structure == "published":
        model = PublishedStyle(method).to(memory_format=layout).train()
        optimizer = default_sgd(model, LEARNING_RATE)
        return lambda: train_step(model, optimizer, x_q, x_k, how.autocast)["total"]
    method = method.to(memory_format=layout)
    with unittest.mock.patch.dict(inductor.COMBINED, combo_kernels=rung.combo):
        step = Step(
            method,
            optim.sgd(method.trained_parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=1e-4),
            lr=lambda _: LEARNING_RATE,
            decay=0.999,
            precision=how,
            total_steps=10**6,
            compile=rung.compile,
            graph=rung.graph,
        )
    images = (x.half() if CUDA else x for x in (x_q, x_k))  # what the loaders give
    batch = Batch(*images, torch.arange(size.batch, device=DEVICE))
    if method.needs_teacher_embeddings:
        with how.autocast():  # so that its loss is that of the teacher on the view
            batch = batch._replace(teacher=build_teacher(size).to(DEVICE).embed(x_q))
    ops = contextlib.nullcontext if rung.fused else eager_ops

    def run() -> torch.Tensor:
        with ops():
            return step(batch).total

    return run


@contextlib.contextmanager
def eager_ops() -> Iterator[None]:
    """Our step with the ops in their eager definitions."""
    used = {
        ppssl.moco: ("queue_infonce",),
        ppssl.encoder: ("maxout", "maxout_image"),
        ppssl.ppssl: ("gradcam",),
    }
    with contextlib.ExitStack() as stack:
        for module, names in used.items():
            for name in names:
                eager = functools.partial(getattr(module, name), impl="reference")
                stack.enter_context(unittest.mock.patch.object(module, name, eager))
        yield


class Ready(NamedTuple):
    """A rung past its first steps."""

    run: Callable[[], object]
    peak_bytes: int
    """On a GPU all that the rung holds at its peak, on a CPU what a step needs beyond what lives between steps."""


def ready(name: str, size: Size, first: dict[tuple, float]) -> Ready:
    """The rung ``name``; its first loss must be that of its kin, or it is not timed."""
    rung = RUNGS[name]
    before = torch.cuda.memory_allocated() if CUDA else 0
    run = build_step(size, rung)
    loss = float(run())
    known = first.setdefault((rung.method, rung.amp), loss)
    tolerance = 5e-2 if rung.amp else 1e-5
    assert math.isclose(loss, known, rel_tol=tolerance), f"{name}: loss {loss}, want {known}: not timed"
    if not CUDA:
        return Ready(run, peak_extra_bytes(run))
    torch.cuda.reset_peak_memory_stats()
    for _ in range(9):  # algorithms are chosen, graphs captured
        run()
    synchronize()
    return Ready(run, torch.cuda.max_memory_allocated() - before)


@functools.cache
def forward_flop(arch: str, side: int) -> float:
    """Operations of the trunk's forward pass for one image (a multiplication and an addition are two)."""
    with torch.device("meta"):
        trunk, image = Trunk(arch), torch.empty(1, 3, side, side)
    with FlopCounterMode(display=False) as counter:
        trunk(image)
    return float(counter.get_total_flops())


def account(name: str, size: Size, seconds: float, peak_bytes: int) -> dict[str, float]:
    """What a time means: images/s, rates, fraction of the hardware's peak and of the floor."""
    method = RUNGS[name].method
    tflop_s = PASSES[method] * size.batch * forward_flop(size.arch, size.side) / seconds / 1e12
    row = {
        "ms": 1e3 * seconds,
        "images_per_s": size.batch / seconds,
        "peak_mib": peak_bytes / 2**20,
        "useful_tflop_s": tflop_s,
    }
    known = card(torch.cuda.get_device_name()) if CUDA else None
    if known:
        row["mfu"] = tflop_s / CARDS[known].tflop_s
    full = json.loads((Path(__file__).parent / "gpu/budget.json").read_text()).get("full", {})
    if known and method in full and size == size_of("full")._replace(batch=size.batch):
        row["of_floor"] = full[method]["ms"][known]["floor"] * size.batch / 128 / row["ms"]  # by arithmetic, no measurement
    return row


@pytest.fixture(scope="module")
def size() -> Size:
    torch.backends.cudnn.benchmark = True
    return size_of(os.environ.get("PPSSL_BENCH_STEP", "full" if CUDA else "small"))


@pytest.fixture(scope="module")
def first() -> dict:
    return {}


@pytest.mark.parametrize("name", HERE)
def test_rung(benchmark, size: Size, first: dict, name: str):
    run, peak_bytes = ready(name, size, first)

    def timed() -> None:
        run()
        synchronize()

    benchmark.pedantic(timed, rounds=rounds_of(size), warmup_rounds=0)
    row = account(name, size, benchmark.stats.stats.min, peak_bytes)
    shape = "ViT-B-32's shape, timm" if size.teacher == (32, 768, 12) else f"patch, width, depth {size.teacher}, timm"
    benchmark.extra_info.update(facts() | size._asdict() | row | {"teacher": shape})


def rounds_of(size: Size) -> int:
    if size.arch != "resnet50":
        return 5
    return 30 if CUDA else 2


def test_step_guard(benchmark, size: Size, first: dict):
    pair = ("published fp32", "graphed" if CUDA else "teacher cached")
    sides = {name: ready(name, size, first).run for name in pair}

    def ratios() -> dict[str, float]:
        seconds = alternate(sides, 9 if CUDA or size.arch != "resnet50" else 2)
        return {"over_published": seconds[pair[0]] / seconds[pair[1]]}

    where = "cuda" if CUDA else "cpu_full" if size.arch == "resnet50" else "cpu"
    guard(benchmark, "step", ratios, GUARDS["step"][where])
    benchmark.pedantic(sides[pair[1]], rounds=1)


def test_methods_guard(benchmark, size: Size, first: dict):
    """LCR's and LDFS's steps against PP-SSL's, all eager on a CPU and compiled on a GPU."""
    names = ("compiled", "lcr compiled", "ldfs compiled") if CUDA else ("teacher cached", "lcr", "ldfs")
    sides = {name: ready(name, size, first).run for name in names}

    def ratios() -> dict[str, float]:
        seconds = alternate(sides, 9 if CUDA or size.arch != "resnet50" else 2)
        return {f"ppssl_over_{RUNGS[name].method}": seconds[names[0]] / seconds[name] for name in names[1:]}

    guard(benchmark, "step_methods", ratios, GUARDS["step_methods"])
    benchmark.pedantic(sides[names[0]], rounds=1)


@pytest.mark.skipif(CUDA, reason="a GPU computes them as any other convolution")
def test_dilated_depthwise_guard(benchmark):
    """Forward and both gradients of a convolution of EfficientNet-Lite0's last stage at output stride 16, 96 px, over torch's."""
    theirs = torch.nn.Conv2d(1152, 1152, 5, padding=4, dilation=2, groups=1152, bias=False)
    ours = torch.nn.Conv2d(1152, 1152, 5, padding=4, dilation=2, groups=1152, bias=False)
    ours.__class__ = DilatedDepthwise
    images = torch.randn(16, 1152, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()

    def run(conv: torch.nn.Conv2d) -> None:
        y = conv(images)
        torch.autograd.grad(y, [images, conv.weight], y)

    sides = {"theirs": functools.partial(run, theirs), "ours": functools.partial(run, ours)}

    def ratios() -> dict[str, float]:
        seconds = alternate(sides)
        return {"over_torch": seconds["theirs"] / seconds["ours"]}

    guard(benchmark, "dilated_depthwise", ratios, GUARDS["dilated_depthwise"])
    benchmark.pedantic(sides["ours"], rounds=1)


def main() -> None:
    """Prints the ladder."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", nargs="?", default="full", help="small or full, optionally with :BATCH")
    parser.add_argument("rungs", nargs="*", help=f"default: {', '.join(HERE)}")
    parser.add_argument("--rounds", type=int, help="turns of which the fastest counts")
    parser.add_argument("--threads", type=int, default=cores(), help="of a CPU (default: all cores)")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_intermixed_args()
    if unknown := [name for name in args.rungs if name not in RUNGS]:
        sys.exit(f"rung {unknown[0]!r} is not known; use some of: {', '.join(RUNGS)}")
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True
    size, first = size_of(args.size), {}
    rungs = {name: ready(name, size, first) for name in args.rungs or HERE}
    seconds = alternate({name: rung.run for name, rung in rungs.items()}, args.rounds or rounds_of(size))
    rows = {name: account(name, size, seconds[name], rung.peak_bytes) for name, rung in rungs.items()}
    slowest = next(iter(rows.values()))["ms"]
    table = Table(title=f"{size.arch} {size.side} px, B {size.batch}, K {size.queue}, D {size.dim}")
    for heading in ("rung", "ms", "img/s", "times", "peak MiB", "TFLOP/s", "MFU", "of floor"):
        table.add_column(heading, justify="left" if heading == "rung" else "right")
    for name, row in rows.items():
        fractions = (f"{100 * row[key]:.0f} %" if key in row else "-" for key in ("mfu", "of_floor"))
        table.add_row(
            name, f"{row['ms']:.1f}", f"{row['images_per_s']:.4g}", f"{slowest / row['ms']:.2f}",
            f"{row['peak_mib']:.0f}", f"{row['useful_tflop_s']:.3g}", *fractions,
        )  # fmt: skip
    Console().print(table)
    about = facts() | {"threads": str(args.threads), "precision": precision.resolve("bf16", DEVICE).note}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    if args.json:
        args.json.write_text(json.dumps({"about": about, "size": size._asdict(), "rungs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
