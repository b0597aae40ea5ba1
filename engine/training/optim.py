"""SGD in one fused pass, by torch or by NVIDIA's apex, and the learning-rate schedule as a pure function of the step."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def learning_rate(step: int, total_steps: int, *, peak: float, schedule: str) -> float:
    """Learning rate of 0-based ``step``. ``cosine``: peak * (1 + cos(pi * step / total)) / 2 (MoCo v2, by step);
    ``constant``: peak."""
    if schedule == "constant":
        return peak
    return peak * 0.5 * (1.0 + math.cos(math.pi * step / total_steps))


def sgd(
    parameters: Iterable[nn.Parameter], *, lr: float, momentum: float, weight_decay: float, backend: str = "auto"
) -> torch.optim.Optimizer:
    """SGD over ``parameters`` in one fused kernel per step.

    backend: ``torch`` is torch's fused SGD; ``apex`` NVIDIA apex's FusedSGD, a ``ValueError`` when it is not importable;
    ``auto`` takes apex where it is importable and the parameters are on a GPU.
    """
    parameters = list(parameters)
    options = dict(lr=lr, momentum=momentum, weight_decay=weight_decay)
    on_gpu = parameters[0].is_cuda
    missing = apex_missing()
    if backend == "apex" and missing:
        raise ValueError(f"optim.backend: apex is not usable: {missing}; use optim.backend=torch, which needs nothing")
    if backend == "apex" or (backend == "auto" and on_gpu and not missing):
        return importlib.import_module("apex.optimizers").FusedSGD(parameters, **options)
    return torch.optim.SGD(parameters, **options, fused=True)


def skip_where(optimizer: torch.optim.Optimizer, bad: Tensor) -> None:
    """Makes the next step of ``optimizer`` (from ``sgd``) leave weights and momentum alone if the 0-d bool ``bad`` is true; it is
    read on the device."""
    if isinstance(optimizer, torch.optim.SGD):
        optimizer.grad_scale, optimizer.found_inf = None, bad.float()  # what fused SGD asks before it writes
    else:
        optimizer._dummy_overflow_buf.copy_(bad)  # apex's kernels return at once where this is not 0


def apex_missing() -> str | None:
    """Why NVIDIA's apex cannot be used, or None when it can. PyPI's ``apex`` is an unrelated project."""
    if importlib.util.find_spec("apex") is None:
        return "no module named apex (NVIDIA's is built from source, see README)"
    try:
        found = hasattr(importlib.import_module("apex.optimizers"), "FusedSGD")
    except ImportError as error:
        return f"the module apex that is installed is not NVIDIA's, or was built without its CUDA extensions ({error})"
    return None if found else "the module apex that is installed is not NVIDIA's: it has no optimizers.FusedSGD"
