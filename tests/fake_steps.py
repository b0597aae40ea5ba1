"""Steps on fake CUDA tensors, in a process of their own: ``python tests/fake_steps.py MODE [METHOD[@ARCH][+KEY=VALUE] ...]`` prints
one JSON line for each case. MODE: of the step, off, encoder or step, compiled without generating code; ``graph``: what
test_graph.py does on a GPU, up to the first number that it reads; ``forms``: the kernels of the full-size step against those that
are compiled ahead of time."""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from bench.gpu import fake_cuda  # noqa: E402

METHODS = ("moco", "ppssl published", "ppssl guided", "lcr published", "lcr guided", "ldfs", "simclr", "byol")
PRECISIONS = ("bf16", "fp16", None)
ARCH, SIDE, IMAGES = "resnet10_w16_s16", 64, 8


def config(name: str, amp: str | None):
    """The config of ``METHOD[ VARIANT][@ARCH][+key=value ...]``."""
    from engine.config import Config, EncoderConfig, MethodConfig, QueueConfig
    from ppssl.settings import replace_keys

    name, *switches = name.split("+")
    name, _, arch = name.partition("@")
    method, _, variant = name.partition(" ")
    queue = {"bf16": "bfloat16", "fp16": "float16", None: "float32"}[amp]
    cfg = Config(
        method=MethodConfig(name=method, variant=variant or "published"),
        encoder=EncoderConfig(arch=arch or ARCH, dim=128), queue=QueueConfig(size=512, dtype=queue),
    )  # fmt: skip
    values = dict(switch.split("=") for switch in switches)
    known = {"true": True, "false": False, "0.5": 0.5, "stem,layer1": ("stem", "layer1"), "bn": ("bn",)}
    return replace_keys(cfg, {key: known.get(value, value) for key, value in values.items()})


def build(name: str, amp: str | None):
    import small_methods  # noqa: F401  names resnet10
    import torch

    from ppssl import METHODS, Teacher
    from ppssl.encoder import Trunk
    from ppssl.settings import method_settings
    from ppssl.timm_trunk import build_trunk

    cfg = config(name, amp)
    settings = method_settings(cfg, SIDE)
    teacher = None
    if settings.uses_teacher:
        visual = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 32))
        teacher = Teacher(visual, torch.randn(8, 32), logit_scale=100.0, image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
        fake_cuda.fake(teacher)
    kind, trunk = METHODS[cfg.method.name], build_trunk(cfg.encoder.arch)
    if isinstance(trunk, Trunk):
        trunk.fuse_batch_norm()  # bn.impl=auto on CUDA
    trunk.freeze(cfg.encoder.freeze)
    return kind.from_settings(settings, kind.build_network(settings, trunk), teacher)


def run(name: str, amp: str | None, mode: str, device) -> None:
    """One step, as the engine makes it."""
    import torch

    from engine.training import optim, precision
    from engine.training.step import Step
    from ppssl.method import Batch

    torch._dynamo.reset()
    method = fake_cuda.built(build)(name, amp).to(device, memory_format=torch.channels_last).train()
    options = config(name, amp).optim
    optimizer = optim.build(method, options)
    step = Step(
        method, optimizer, lr=lambda s: 1e-3, decay=0.99, precision=precision.resolve(amp, device), total_steps=10,
        compile=mode, backend="aot_eager", clip=options.clip,
    )  # fmt: skip
    x = [torch.empty(IMAGES, 3, SIDE, SIDE, dtype=torch.float16, device=device) for _ in range(3)]
    views = [image.contiguous(memory_format=torch.channels_last) for image in x]
    index = torch.arange(IMAGES, device=device)
    clean = views[2] if method.needs_clean else None
    teacher = torch.empty(IMAGES, 32, dtype=torch.float16, device=device) if method.needs_teacher_embeddings else None
    output = step(Batch(views[0], views[1], index, clean, teacher))
    for what, tensor in {"total": output.total, **output.terms, **output.stats}.items():
        assert tensor.device == device and tensor.shape == (), (what, tensor)


def graph_tests(name: str) -> None:
    """The eager side of a loss curve; ``fp16`` the test of an overflow."""
    from unittest.mock import patch

    import test_graph

    with patch.object(test_graph, "STEPS", 2):
        if name == "fp16":
            with patch.object(test_graph, "build_ppssl", fake_cuda.built(test_graph.build_ppssl)):
                test_graph.test_fp16_skips_an_overflow_and_goes_on()
        else:
            test_graph.curve(fake_cuda.built(test_graph.BUILD[name])())


def launched(name: str, variant: str, dim: int) -> list[tuple[str, dict, int]]:
    """(kernel, arguments by name, warps) of every launch of our Triton kernels in one step at the size of the benchmark."""
    from unittest.mock import patch

    from torch.utils._python_dispatch import TorchDispatchMode

    found = []

    def launch(self, *given, grid, warmup, **options):
        own = {key: value for key, value in options.items() if key in self.arg_names}
        found.append((self.fn.__name__, dict(zip(self.arg_names, given, strict=False)) | own, options.get("num_warps", 4)))

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "ppssl":
                fake_cuda.run_op(func, args, kwargs, launch)
            return func(*args, **(kwargs or {}))

    with fake_cuda.benchmark() as bench_step:
        settings = bench_step.variant
        with patch.object(bench_step, "variant", lambda method, _, values: settings(method, variant, values)):
            rung = bench_step.RUNGS[name]._replace(compile="off")
            step = bench_step.build_step(bench_step.size_of("full")._replace(dim=dim), rung)
    with Watch():
        step()
    return found


def differences(kernel: str, values: dict, warps: int) -> list[str]:
    """How the launch differs from the closest variant that is compiled ahead of time; [] where one is equal."""
    import torch

    from kernels import registry

    short = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64",
             torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64"}  # fmt: skip
    closest = [f"{kernel} is not compiled ahead of time"]
    for number, variant in enumerate(v for v in registry.variants("sm_90") if v.kernel.fn.__name__ == kernel):
        wrong = [] if warps == variant.warps else [f"warps {warps}, {variant.name} has {variant.warps}"]
        for name, value in values.items():
            given = short[value.dtype] if isinstance(value, torch.Tensor) else value
            known = variant.types.get(name) if isinstance(value, torch.Tensor) else variant.constants.get(name)
            if known is not None and known != given and getattr(known, "value", known) != given:
                wrong.append(f"{name} {given}, {variant.name} has {known}")
        if number == 0 or len(wrong) < len(closest):
            closest = wrong
    return closest


def forms() -> dict[str, list[str]]:
    steps = (("compiled", "published"), ("compiled", "guided"), *((f"{name} compiled", "") for name in ("moco", "lcr", "ldfs")))
    found = {}
    for name, variant in steps:
        for dim in (128, 256) if variant == "guided" else (128,):  # what depends on it, infonce, is in all of them
            wrong = [line for launch in launched(name, variant, dim) for line in differences(*launch)]
            found[f"{name} {variant} D{dim}"] = sorted(set(wrong))
    return found


def main(mode: str, names: list[str]) -> None:
    from torch._subclasses.fake_tensor import DataDependentOutputException

    with fake_cuda.gpu() as device:
        if mode == "forms":
            for case, wrong in forms().items():
                print(json.dumps({"case": case, "error": "; ".join(wrong) or None}), flush=True)
            return
        if mode == "graph":
            sys.path.insert(0, str(Path(__file__).with_name("engine") / "training"))
        for name in names or METHODS:
            for amp in PRECISIONS if mode != "graph" else ("",):
                if mode == "step" and amp != "bf16" or mode == "encoder" and amp is None:
                    continue  # fp16 losses are scaled outside of a step's graph; float32 is what the CPU's tests compile
                error = None
                try:
                    graph_tests(name) if mode == "graph" else run(name, amp, mode, device)
                except DataDependentOutputException:
                    error = None if mode == "graph" else "a value is read on the host: " + traceback.format_exc(limit=-6)
                except Exception:
                    error = traceback.format_exc(limit=-6)
                print(json.dumps({"case": f"{name} {amp} {mode}", "error": error}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
