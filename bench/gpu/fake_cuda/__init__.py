"""Fake CUDA: the real training step on fake tensors of device ``cuda``, on a machine without a GPU.

A fake tensor (``torch._subclasses.FakeTensorMode``) has shape, strides, type and device but no memory. With a driver that has one
device and launches nothing (``driver.c``, built with ``cc`` when it is first needed), torch runs everything up to the first kernel:
device checks, strides, autograd, Dynamo, AOT autograd and Inductor's code generation. A read of a value on the host raises
``DataDependentOutputException``: a host sync cannot hide.

    from bench.gpu import fake_cuda
    fake_cuda.restart()                  # once, first: the driver is loaded when a process begins
    with fake_cuda.gpu() as device:
        step(batch)                      # tensors on ``device``
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from engine.files import cache_folder, write_atomically

_SOURCE = Path(__file__).with_name("driver.c")


def missing() -> str | None:
    """Why the driver cannot be built here, or None."""
    if sys.platform != "linux":
        return f"the stub driver is preloaded as Linux does it, not on {sys.platform}"
    return None if shutil.which("cc") else "no C compiler (cc) to build the stub driver"


def library() -> Path:
    """The built driver, in the cache folder. Raises ``RuntimeError`` where ``missing`` says why, or the compiler fails."""
    if why := missing():
        raise RuntimeError(f"fake CUDA: {why}")
    key = hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:16]
    path = cache_folder() / "fake_cuda" / key / "libcuda.so.1"
    if not path.is_file():

        def build(temporary: str) -> None:
            command = ["cc", "-shared", "-fPIC", "-O1", str(_SOURCE), "-o", temporary]
            found = subprocess.run(command, capture_output=True, text=True)
            if found.returncode:
                raise RuntimeError(f"fake CUDA: {' '.join(command)} failed: {found.stderr.strip()}")

        write_atomically(path, build)
    return path


def environment() -> dict[str, str]:
    """The environment of a process that is to see the stub driver: before torch's own runtime, and by its name."""
    path = library()
    others = [entry for entry in os.environ.get("LD_LIBRARY_PATH", "").split(":") if entry]
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}  # kernels are launched, if only so far
    return {**kept, "LD_PRELOAD": str(path), "LD_LIBRARY_PATH": ":".join([str(path.parent), *others])}


def restart() -> None:
    """Starts this very command again with the stub driver, unless it already runs with it."""
    if str(library()) != os.environ.get("LD_PRELOAD"):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment())


H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_block=1024, max_threads_per_multi_processor=2048,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20, gcnArchName="",
)  # fmt: skip
"""What torch, Inductor and Triton ask of a device."""


@contextlib.contextmanager
def gpu(properties: types.SimpleNamespace = H100) -> Iterator[Any]:
    """Within it torch believes in one CUDA device, of which every tensor is fake; yields the device.

    Raises ``RuntimeError`` in a process that was not started with the stub driver (``restart`` or ``environment``).
    """
    import torch
    import torch._dynamo.device_interface
    import torch._inductor.config as inductor
    import torch._subclasses.fake_tensor as fake_tensor
    import triton.runtime
    from torch._functorch import config as functorch
    from torch._inductor.fx_passes import fuse_attention

    if "fake_cuda" not in os.environ.get("LD_PRELOAD", ""):
        raise RuntimeError("fake CUDA: this process has no stub driver; call fake_cuda.restart() first")
    interface = torch._dynamo.device_interface.CudaInterface
    capability = (properties.major, properties.minor)
    rng_state = torch.zeros(16, dtype=torch.uint8)
    cuda = {
        "is_available": True, "current_device": 0, "device_count": 1, "get_device_capability": capability,
        "get_device_properties": properties, "get_device_name": properties.name, "is_initialized": True, "_lazy_init": None,
        "synchronize": None, "is_bf16_supported": True, "mem_get_info": (properties.total_memory * 7 // 8, properties.total_memory),
        "get_rng_state": rng_state, "get_rng_state_all": [rng_state], "set_rng_state": None, "set_rng_state_all": None,
        "manual_seed": None, "manual_seed_all": None, "memory_allocated": 0, "max_memory_allocated": 0,
        "reset_peak_memory_stats": None,
    }  # fmt: skip
    asked = {
        "is_available": True, "get_device_properties": properties, "current_device": 0,
        "get_compute_capability": 10 * properties.major + properties.minor,
        "is_bf16_supported": True, "synchronize": None, "get_raw_stream": 0, "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
    }  # fmt: skip
    worker = {"get_device_properties": properties, "current_device": 0}
    with contextlib.ExitStack() as stack:
        put = stack.enter_context
        for name, value in cuda.items():
            put(patch.object(torch.cuda, name, _constant(value)))
        put(patch.object(torch.cuda.random, "get_rng_state", _constant(rng_state)))
        for holder, answers in ((interface, asked), (interface.Worker, worker)):
            for name, value in answers.items():
                put(patch.object(holder, name, staticmethod(_constant(value))))
        put(patch.object(fake_tensor, "init_gpu_context", _constant(None)))  # it would allocate
        put(patch.object(torch, "_fused_sgd_", _fused_update))
        put(patch.object(torch, "_fused_adamw_", _fused_adamw))
        put(patch.object(triton.runtime.driver, "_active", _TritonDriver(properties)))
        put(patch.object(fuse_attention, "_sfdp_init", _constant(None)))  # its patterns are traced on real tensors
        put(inductor.patch(joint_graph_constant_folding=False, compile_threads=1, fx_graph_cache=False))
        put(functorch.patch(enable_autograd_cache=False))
        put(patch.object(torch.nn.Module, "_apply", _apply))
        put(patch.dict(_MODE, mode=fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)))
        put(_MODE["mode"])
        yield torch.device("cuda", 0)


def fake(module: Any) -> Any:
    """``module`` with every parameter and buffer fake, on the device, in its layout. Networks are built for real and then made
    fake: their builders copy, draw and read values."""
    import torch

    with _MODE["mode"]:  # a builder that calls another is out of it when it gets here
        return _apply(module, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda"))


@contextlib.contextmanager
def benchmark() -> Iterator[Any]:
    """``bench.bench_step`` with networks that are made fake. Within ``gpu``: it looks for a GPU when it is imported."""
    from bench import bench_step

    with (
        patch.object(bench_step, "build_method", built(bench_step.build_method)),
        patch.object(bench_step, "build_teacher", built(bench_step.build_teacher)),
    ):
        yield bench_step


def run_op(func: Any, args: tuple, kwargs: dict[str, Any] | None, launch: Callable[..., None]) -> None:
    """Runs the implementation of ``func``, a custom op of this project, on fake tensors. Instead of a launch of one of its Triton
    kernels, ``launch(kernel, *arguments, grid=..., warmup=..., **options)`` is called."""
    from torch._library.custom_ops import OPDEFS
    from triton.runtime.jit import JITFunction

    with patch.object(JITFunction, "run", launch):
        OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))


_MODE: dict[str, Any] = {}
"""The fake mode within ``gpu``."""


def _apply(module: Any, fn: Callable[[Any], Any], recurse: bool = True) -> Any:
    """``nn.Module._apply``, what ``to`` and ``cuda`` call, without giving a tensor new data: a fake one has none."""
    import torch

    for part in module.modules() if recurse else (module,):
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(fn(parameter.detach()), requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = fn(buffer)
    return module


def built(build: Callable[..., Any]) -> Callable[..., Any]:
    """``build``, a builder of networks, run on real tensors; what it gives is made fake."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    def run(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            module = build(*args, **kwargs)
        return fake(module)

    return run


def _constant(value: Any) -> Any:
    return lambda *args, **kwargs: value


def _fused_update(parameters: list, gradients: list, *states: list, **options: Any) -> None:
    """What torch's fused optimizers demand and a fake tensor's kernel does not check: one device, one type and one layout for each
    parameter, its gradient and its state; scale and flag on the device."""
    for parameter, *others in zip(parameters, gradients, *states, strict=True):
        for other in others:
            assert (other.device, other.dtype) == (parameter.device, parameter.dtype), (other, parameter)
            sides = zip(parameter.shape, parameter.stride(), other.stride(), strict=True)
            assert all(ours == theirs or n == 1 for n, ours, theirs in sides), (parameter.stride(), other.stride())
    for name in ("grad_scale", "found_inf"):
        assert options.get(name) is None or options[name].device == parameters[0].device, name


def _fused_adamw(
    parameters: list, gradients: list, averages: list, squares: list, maxima: list, steps: list, **options: Any
) -> None:
    _fused_update(parameters, gradients, averages, squares, **options)
    assert not maxima and all(step.device == parameters[0].device for step in steps)


class _TritonDriver:
    """What Inductor asks Triton's driver while it generates code."""

    def __init__(self, properties: types.SimpleNamespace):
        self.arch = 10 * properties.major + properties.minor

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def is_active(self) -> bool:
        return True
