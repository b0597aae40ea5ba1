"""SGD in one fused pass, by torch or by NVIDIA's apex, and the learning-rate schedule as a pure function of the step."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

FORMULAS = {"cosine": "lr * (1 + cos(pi * step / total_steps)) / 2", "constant": "lr"}
"""``learning_rate`` by ``optim.schedule``, in words for the log."""
EMA_FORMULAS = {"cosine": "1 - (1 - ema.decay) * (1 + cos(pi * step / total_steps)) / 2", "constant": "ema.decay"}
"""``ema_decay`` by ``ema.schedule``."""


def learning_rate(step: int, total_steps: int, *, peak: float, schedule: str) -> float:
    """Learning rate of 0-based ``step``. ``cosine``: peak * (1 + cos(pi * step / total)) / 2 (MoCo v2, by step);
    ``constant``: peak."""
    if schedule == "constant":
        return peak
    return peak * 0.5 * (1.0 + math.cos(math.pi * step / total_steps))


def ema_decay(step: int, total_steps: int, *, base: float, schedule: str) -> float:
    """Decay of the momentum network at 0-based ``step``. ``cosine``: 1 - (1 - base) * (1 + cos(pi * step / total)) / 2, which rises
    from ``base`` to 1 (BYOL, Grill et al. 2020, section 3.2; MoCo v3); ``constant``: base."""
    if schedule == "constant":
        return base
    return 1.0 - (1.0 - base) * 0.5 * (1.0 + math.cos(math.pi * step / total_steps))


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


@torch.no_grad()
def move_towards(target: list[Tensor], online: list[Tensor], weight: Tensor) -> None:
    """``target + weight * (online - target)`` in place, for the momentum network; ``weight`` a 0-d tensor in [0, 1].

    On a GPU three launches: a foreach lerp with weights on the device is one launch for each tensor.
    """
    if not weight.is_cuda:
        torch._foreach_lerp_(target, online, [weight] * len(target))
        return
    difference = torch._foreach_sub(online, target)
    torch._foreach_mul_(difference, weight)
    torch._foreach_add_(target, difference)


@torch.library.custom_op("ppssl::gradient_norm", mutates_args=())
def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """The Euclidean norm of all ``gradients`` together, 0-d float32. An op of its own because a compiler that looks into it stacks
    the norms of hundreds of tensors one by one."""
    norms = []
    for dtype in dict.fromkeys(g.dtype for g in gradients):  # one launch for tensors of one type
        norms += torch._foreach_norm([g for g in gradients if g.dtype == dtype], dtype=torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms))


@gradient_norm.register_fake
def _(gradients: list[Tensor]) -> Tensor:
    return gradients[0].new_empty((), dtype=torch.float32)


def apex_missing() -> str | None:
    """Why NVIDIA's apex cannot be used, or None when it can. PyPI's ``apex`` is an unrelated project."""
    if importlib.util.find_spec("apex") is None:
        return "no module named apex (NVIDIA's is built from source, see README)"
    try:
        found = hasattr(importlib.import_module("apex.optimizers"), "FusedSGD")
    except ImportError as error:
        return f"the module apex that is installed is not NVIDIA's, or was built without its CUDA extensions ({error})"
    return None if found else "the module apex that is installed is not NVIDIA's: it has no optimizers.FusedSGD"
