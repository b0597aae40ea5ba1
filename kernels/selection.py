"""Which implementation runs: ``impl="auto"`` depends on the tensors; an explicit choice either runs or raises."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


HAS_TRITON = importlib.util.find_spec("triton") is not None
"""Whether triton is installed, found out without importing it. A constant, so that tracing can read it."""


def interpreting() -> bool:
    """Whether Triton runs in its interpreter, on CPU tensors (``TRITON_INTERPRET=1`` set before triton is imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def can_run(device: torch.device) -> bool:
    """Whether ``impl="triton"`` runs on ``device``."""
    return HAS_TRITON and (device.type == "cuda" or interpreting())


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def choose(op: str, impl: str, tensor: Tensor, *, fast: str, unsupported: str | None = None) -> str:
    """The implementation that runs for ``impl``.

    Args:
        op: name of the public function, for messages.
        impl: the choice of the caller: auto, triton, reference or ``fast``.
        tensor: its device and dtype decide.
        fast: name of the op's PyTorch path, which runs on every device.
        unsupported: why the Triton kernel cannot take this input, or None.

    Raises:
        ValueError: unknown ``impl``, or ``impl="triton"`` for an input or device that it cannot take.
        ImportError: ``impl="triton"`` without triton.
    """
    if impl in ("reference", fast):
        return impl
    if tensor.dtype == torch.float64:
        unsupported = f"float64 is not supported (got {tensor.dtype})"
    if impl == "triton":
        if unsupported:
            raise ValueError(f"{op}: impl='triton': {unsupported}; use impl='{fast}' or 'auto'")
        if not HAS_TRITON:
            raise ImportError(f"{op}: impl='triton' needs the triton package; install it or use impl='auto'")
        if tensor.device.type != "cuda" and not interpreting():
            raise ValueError(
                f"{op}: impl='triton' needs CUDA tensors, got {tensor.device}; use impl='{fast}', or set "
                "TRITON_INTERPRET=1 before triton is imported to run the interpreter"
            )
        return impl
    if impl != "auto":
        raise ValueError(f"{op}: impl must be 'auto', 'triton', '{fast}' or 'reference', got {impl!r}")
    if tensor.device.type != "cuda" or unsupported:
        return fast
    if not HAS_TRITON:
        _say_once(f"{op}: triton is not installed, CUDA tensors take the '{fast}' path")
        return fast
    return "triton"


def check_floating(op: str, **tensors: Tensor) -> None:
    """Checks that every argument is a floating tensor, and that all are on one device.

    Raises:
        TypeError: not a tensor, or not float16/bfloat16/float32/float64.
        ValueError: two devices.
    """
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{op}: {name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(f"{op}: {name} is on {tensor.device} but {first_name} on {first.device}; move one of them")


def refuse_double_backward(op: str) -> None:
    """Raises under ``create_graph=True``, where the gradient of a backward formula would silently lack terms."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op}: no second derivative; use impl='reference' for create_graph=True")


def check_projection(
    op: str,
    x: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
    minmax: str | None,
) -> None:
    """Checks the arguments that ``maxout`` and ``maxout_image`` have in common, and raises what they document."""
    check_floating(op, x=x, weight=weight, gamma=gamma, beta=beta)
    if x.dim() != 4 or 0 in x.shape:
        raise ValueError(f"{op}: the input must be a non-empty [B, C, H, W], got {list(x.shape)}")
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"{op}: weight must be [M, {x.shape[1]}], got {list(weight.shape)}; take [:, :, 0, 0] of a convolution's")
    width = weight.shape[0]
    vectors = {"gamma": gamma, "beta": beta}
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError(f"{op}: training=False needs running_mean and running_var")
        vectors |= {"running_mean": running_mean, "running_var": running_var}
        check_floating(op, x=x, **vectors)
    for name, vector in vectors.items():
        if vector.shape != (width,):
            raise ValueError(f"{op}: {name} must be [{width}], got {list(vector.shape)}")
    if minmax not in (None, "image", "batch"):
        raise ValueError(f"{op}: minmax must be None, 'image' or 'batch', got {minmax!r}")
    if not eps >= 0:
        raise ValueError(f"{op}: eps must not be negative, got {eps}")


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which the max-out ops accumulate, and which they return."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
