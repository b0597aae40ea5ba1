"""Optimizers by name, their update as operations that a graph can hold, and the learning rate as a pure function of the step."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.config import OptimConfig
from ppssl.method import Method

EMA_FORMULAS = {"cosine": "1 - (1 - ema.decay) * (1 + cos(pi * step / total_steps)) / 2", "constant": "ema.decay"}
"""``ema_decay`` by ``ema.schedule``, in words for the log."""

TRUST = 0.001
"""LARS: the trust coefficient (You, Gitman and Ginsburg 2017, arXiv 1708.03888), timm's default too."""
_TRUST_EPS = 1e-8
_HIGH_FOR_ADAMW = 5e-3


def learning_rate(step: int, total_steps: int, *, peak: float, schedule: str, warmup: int = 0) -> float:
    """Learning rate of 0-based ``step``. Over the first ``warmup`` steps it rises linearly, peak * (step + 1) / warmup (Goyal et
    al. 2017, arXiv 1706.02677). Over the rest, ``cosine``: peak * (1 + cos(pi * t)) / 2, t the part of the rest that is done
    (MoCo v2 by step; SimCLR and BYOL with a warm-up); ``constant``: peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    return peak * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (total_steps - warmup)))


def warmup_steps(epochs: float, steps_per_epoch: int, total_steps: int) -> int:
    """``optim.warmup`` in steps; the last step of a run is never part of it."""
    return min(round(epochs * steps_per_epoch), total_steps - 1)


def formula(step: int, *, schedule: str, warmup: int = 0) -> str:
    """``learning_rate`` of 0-based ``step`` in words for the log."""
    if step < warmup:
        return f"lr * (step + 1) / {warmup}"
    if schedule == "constant":
        return "lr"
    done = f"(step - {warmup}) / (total_steps - {warmup})" if warmup else "step / total_steps"
    return f"lr * (1 + cos(pi * {done})) / 2"


def build(method: Method, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer ``optim.name`` over ``method.trained_parameters()``.

    One group of parameters, or one for each rate and kind of weight decay: ``lr_scale``, the factor of ``optim.layer_decay`` on the
    learning rate, and ``decays``, false of biases and norms where ``optim.decay_norms`` is. Raises ``ValueError`` naming the key
    that cannot be had.
    """
    groups = parameter_groups(method, layer_decay=config.layer_decay, decay_norms=config.decay_norms)
    for group in groups:
        group["weight_decay"] = config.weight_decay if group["decays"] else 0.0
    if config.name == "adamw":
        beta1, beta2 = config.betas
        return torch.optim.AdamW(groups, lr=config.lr, betas=(beta1, beta2), eps=config.eps, fused=True)
    if config.name == "lars":
        return LARS(groups, lr=config.lr, momentum=config.momentum)
    return sgd(groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, backend=config.backend)


def describe_optimizer(optimizer: torch.optim.Optimizer, config: OptimConfig) -> list[str]:
    """What ``build`` made, for the log: a line on the optimizer, and one on each key that does nothing or is likely meant for
    another optimizer."""
    rates = sorted({group["lr_scale"] * config.lr for group in optimizer.param_groups})
    text = f"{config.name}, lr {rates[0]:.3g}" + (f" to {rates[-1]:.3g} by layer" if len(rates) > 1 else "")
    text += f", {config.schedule}" + (f" after a warm-up of {config.warmup:g} epochs" if config.warmup else "")
    text += f", weight decay {config.weight_decay:g}" + ("" if config.decay_norms else " without biases and norms")
    lines = [text + (f", gradients clipped at {config.clip:g}" if config.clip else "")]
    if not (config.decay_norms or config.weight_decay or config.name == "lars"):
        lines.append("optim.decay_norms: does nothing with optim.weight_decay=0")
    if config.layer_decay != 1 and rates in ([], [config.lr]):
        lines.append("optim.layer_decay: does nothing here: no layer of the trunk but the last is trained (encoder.freeze)")
    if config.name == "adamw" and config.lr > _HIGH_FOR_ADAMW:
        lines.append(f"optim.lr: {config.lr:g} is far above what adamw is used with (1e-5 to 1e-3); sgd's does not carry over")
    return lines


def parameter_groups(method: Method, *, layer_decay: float = 1.0, decay_norms: bool = True) -> list[dict[str, Any]]:
    """The trained parameters in groups of one ``lr_scale`` and one ``decays``, each in the method's order.

    lr_scale: layer_decay ** (layers after it) for the trunk, by timm's ``group_matcher`` and its helper for layer-wise rates; 1
    for what is not the trunk. decays: with ``decay_norms`` every parameter; else those of two dimensions and more that the model
    does not except (timm's ``no_weight_decay``).
    """
    scales: dict[int, float] = {}
    excepted: set[int] = set()
    trunk = method.network.trunk if layer_decay != 1.0 or not decay_norms else None
    if trunk is not None and layer_decay != 1.0:
        from timm.optim import param_groups_layer_decay  # heavy

        layers = param_groups_layer_decay(trunk, layer_decay=layer_decay)
        scales = {id(p): layer["lr_scale"] for layer in layers for p in layer["params"]}
    if not decay_norms:
        patterns = trunk.no_weight_decay() if hasattr(trunk, "no_weight_decay") else ()
        excepted = {id(p) for p in method.parameters() if p.ndim <= 1}
        excepted |= {id(p) for name, p in trunk.named_parameters() if any(fnmatch(name, pattern) for pattern in patterns)}
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter in method.trained_parameters():
        groups.setdefault((scales.get(id(parameter), 1.0), id(parameter) not in excepted), []).append(parameter)
    return [{"params": params, "lr_scale": scale, "decays": decays} for (scale, decays), params in groups.items()]


def ema_decay(step: int, total_steps: int, *, base: float, schedule: str) -> float:
    """Decay of the momentum network at 0-based ``step``. ``cosine``: 1 - (1 - base) * (1 + cos(pi * step / total)) / 2, which rises
    from ``base`` to 1 (BYOL, Grill et al. 2020, section 3.2; MoCo v3); ``constant``: base."""
    if schedule == "constant":
        return base
    return 1.0 - (1.0 - base) * 0.5 * (1.0 + math.cos(math.pi * step / total_steps))


def sgd(
    parameters: Iterable[Any], *, lr: float, momentum: float, weight_decay: float, backend: str = "auto"
) -> torch.optim.Optimizer:
    """SGD over ``parameters``, or groups of them, in one fused kernel per step and group.

    backend: ``torch`` is torch's fused SGD; ``apex`` NVIDIA apex's FusedSGD, a ``ValueError`` when it is not importable;
    ``auto`` takes apex where it is importable and the parameters are on a GPU.
    """
    parameters = list(parameters)
    options = dict(lr=lr, momentum=momentum, weight_decay=weight_decay)
    first = parameters[0]["params"][0] if isinstance(parameters[0], dict) else parameters[0]
    on_gpu = first.is_cuda
    missing = apex_missing()
    if backend == "apex" and missing:
        raise ValueError(f"optim.backend: apex is not usable: {missing}; use optim.backend=torch, which needs nothing")
    if backend == "apex" or (backend == "auto" and on_gpu and not missing):
        return importlib.import_module("apex.optimizers").FusedSGD(parameters, **options)
    return torch.optim.SGD(parameters, **options, fused=True)


def skip_where(optimizer: torch.optim.Optimizer, bad: Tensor) -> None:
    """Makes the next step of ``optimizer`` (from ``build`` or ``sgd``) leave weights and state alone if the 0-d bool ``bad`` is
    true; it is read on the device."""
    if isinstance(optimizer, (torch.optim.SGD, torch.optim.AdamW, LARS)):
        optimizer.grad_scale, optimizer.found_inf = None, bad.float()  # what a fused optimizer asks before it writes
    else:
        optimizer._dummy_overflow_buf.copy_(bad)  # apex's kernels return at once where this is not 0


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step of each tensor is as long as TRUST times the tensor itself (You, Gitman and Ginsburg 2017).

        g <- trust * (g + weight_decay * p),  trust = TRUST * |p| / (|g| + weight_decay * |p|), 1 where either norm is 0
        b <- momentum * b + g,  p <- p - lr * b

    A group with ``decays`` false (biases and norms, as in SimCLR and BYOL) is plain SGD. It computes what ``timm.optim.Lars``
    does. That one is not used, since it cannot leave its momentum alone in a step that the device finds to be bad, and a loss
    scaler would wait for the device before it.
    """

    def __init__(self, parameters: Iterable[Any], *, lr: float, momentum: float = 0.9, weight_decay: float = 0.0):
        super().__init__(parameters, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, decays=True))
        self._step_supports_amp_scaling = True  # a GradScaler sets ``grad_scale`` and ``found_inf`` and does not wait for them

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update by the gradients; none where ``found_inf`` is not 0."""
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for group in self.param_groups:
            used = [p for p in group["params"] if p.grad is not None]
            if not used:
                continue
            for p in used:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            gradients = [p.grad for p in used]
            if scale is not None:
                gradients = torch._foreach_div(gradients, scale)
            bad = torch.zeros((), dtype=torch.bool, device=used[0].device) if found is None else found != 0
            lars_update(
                used, gradients, [self.state[p]["momentum_buffer"] for p in used], rate=torch.where(bad, 0.0, group["lr"]), bad=bad,
                momentum=group["momentum"], weight_decay=group["weight_decay"], adapts=group["decays"],
            )  # fmt: skip


class Group(NamedTuple):
    """What a graph holds of one group of parameters."""

    first: int
    last: int
    """Its parameters are those of the optimizer from ``first`` up to ``last``."""
    scale: float
    """``lr_scale``."""
    options: dict[str, Any]
    """Constants of the update."""


class Update:
    """The update of an optimizer (from ``build`` or ``sgd``) with learning rate and ``bad`` read on the device, and the state that
    it shares with the optimizer: zeros at first, so that a first step that is skipped leaves it defined. It is what
    ``torch.optim`` begins with too: the first update of a zero momentum is the gradient itself.

    parameters: all of the optimizer in its order. states: by torch's names, a tensor for each parameter.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self.parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        self.adam = isinstance(optimizer, torch.optim.AdamW)
        names = ("exp_avg", "exp_avg_sq") if self.adam else ("momentum_buffer",)
        self.states = {name: [torch.zeros_like(p) for p in self.parameters] for name in names}
        if self.adam:
            self.states["step"] = [torch.zeros((), device=p.device) for p in self.parameters]
        # constants are kept apart: a graph that read the optimizer's groups would be bound to their learning rate too
        self.groups, first = [], 0
        for group in optimizer.param_groups:
            last = first + len(group["params"])
            wanted = ("betas", "eps", "weight_decay") if self.adam else ("momentum", "weight_decay")
            options = {name: group[name] for name in wanted}
            if isinstance(optimizer, LARS):
                options["adapts"] = group["decays"]
            self.groups.append(Group(first, last, group.get("lr_scale", 1.0), options))
            first = last
        self.share()

    def share(self) -> None:
        """Puts the state where the optimizer keeps it."""
        for i, parameter in enumerate(self.parameters):
            self.optimizer.state[parameter] = {name: tensors[i] for name, tensors in self.states.items()}

    def set_rate(self, rate: float) -> None:
        """Gives the optimizer its learning rate."""
        for group, known in zip(self.optimizer.param_groups, self.groups, strict=True):
            group["lr"] = rate * known.scale

    def load(self, state: dict[str, Any]) -> None:
        """Takes the state of ``optimizer.state_dict()`` into the tensors that a graph holds; what the groups are told stays."""
        told = [{name: value for name, value in group.items() if name != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state)
        for i, parameter in enumerate(self.parameters):
            for name, tensors in self.states.items():
                tensors[i].copy_(self.optimizer.state[parameter][name])
        for group, kept in zip(self.optimizer.param_groups, told, strict=True):
            group.update(kept)
        self.share()

    @torch.no_grad()
    def __call__(self, gradients: Sequence[Tensor | None], rate: Tensor, bad: Tensor) -> None:
        """What ``optimizer.step()`` does, with the 0-d ``rate``; nothing where the 0-d bool ``bad`` is true. gradients: one for
        each parameter, None where it has none."""
        rate = torch.where(bad, 0.0, rate)
        update = adamw_update if self.adam else lars_update if isinstance(self.optimizer, LARS) else sgd_update
        for group in self.groups:
            used = [i for i in range(group.first, group.last) if gradients[i] is not None]
            if used:
                states = [[tensors[i] for i in used] for tensors in self.states.values()]
                scaled = rate if group.scale == 1.0 else rate * group.scale
                parameters, found = [self.parameters[i] for i in used], [gradients[i] for i in used]
                update(parameters, found, *states, rate=scaled, bad=bad, **group.options)


def sgd_update(
    parameters: list[Tensor], gradients: list[Tensor], buffers: list[Tensor], *, rate: Tensor, bad: Tensor, momentum: float,
    weight_decay: float,
) -> None:  # fmt: skip
    """``torch.optim.SGD``, in place: b <- momentum * b + g + weight_decay * p, p <- p - rate * b. rate: 0-d, 0 where ``bad``."""
    _move(parameters, torch._foreach_add(gradients, parameters, alpha=weight_decay), buffers, rate, bad, momentum)


def lars_update(
    parameters: list[Tensor], gradients: list[Tensor], buffers: list[Tensor], *, rate: Tensor, bad: Tensor, momentum: float,
    weight_decay: float, adapts: bool,
) -> None:  # fmt: skip
    """``LARS``, in place; rate: 0-d, 0 where ``bad``. adapts: false is plain SGD."""
    found = torch._foreach_add(gradients, parameters, alpha=weight_decay)
    if adapts:
        length, slope = norms(parameters), norms(gradients)
        trust = TRUST * length / (slope + length * weight_decay + _TRUST_EPS)
        trust = torch.where((length > 0) & (slope > 0), trust, 1.0)
        found = torch._foreach_mul(found, list(trust.to(found[0].dtype).unbind()))
    _move(parameters, found, buffers, rate, bad, momentum)


def _move(parameters: list[Tensor], found: list[Tensor], buffers: list[Tensor], rate: Tensor, bad: Tensor, momentum: float) -> None:
    # a bad step multiplies the buffers by one, adds zeros to them and goes nowhere
    found = [torch.where(bad, torch.zeros_like(g), g) for g in found]
    torch._foreach_mul_(buffers, torch.where(bad, 1.0, momentum))
    torch._foreach_add_(buffers, found)
    torch._foreach_sub_(parameters, torch._foreach_mul(buffers, rate))


def adamw_update(
    parameters: list[Tensor], gradients: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], steps: list[Tensor], *,
    rate: Tensor, bad: Tensor, betas: Sequence[float], eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """``torch.optim.AdamW`` (Loshchilov and Hutter 2019, arXiv 1711.05101), in place. rate: 0-d, 0 where ``bad``. steps: 0-d each,
    all alike."""
    beta1, beta2 = betas
    number = (steps[0] + 1).double()  # of this step, whether or not it counts; in float32, 1 - beta2 would lose four digits
    correction1, correction2 = 1 - torch.pow(beta1, number), 1 - torch.pow(beta2, number)
    torch._foreach_add_(steps, [1.0 - bad.float()] * len(steps))  # a single tensor would be read on the host
    torch._foreach_mul_(parameters, 1 - rate * weight_decay)
    found = [torch.where(bad, torch.zeros_like(g), g) for g in gradients]
    torch._foreach_mul_(exp_avgs, torch.where(bad, 1.0, beta1))
    torch._foreach_add_(exp_avgs, found, alpha=1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, torch.where(bad, 1.0, beta2))
    torch._foreach_addcmul_(exp_avg_sqs, found, found, 1 - beta2)
    below = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(below, correction2.sqrt())
    torch._foreach_add_(below, eps)
    change = torch._foreach_div(exp_avgs, below)
    torch._foreach_mul_(change, rate / correction1)
    torch._foreach_sub_(parameters, change)


def clipped(gradients: Sequence[Tensor | None], norm: Tensor, most: float) -> list[Tensor | None]:
    """The gradients times min(1, most / norm), as ``torch.nn.utils.clip_grad_norm_`` does. norm: 0-d, of all of them together; one
    that is not finite is left to whoever skips such a step."""
    factor = torch.where(torch.isfinite(norm), (most / (norm + 1e-6)).clamp(max=1.0), 1.0)
    used = iter(torch._foreach_mul([g for g in gradients if g is not None], factor))
    return [None if g is None else next(used) for g in gradients]


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
        wide = torch.promote_types(dtype, torch.float32)  # a norm in a narrower type than its numbers is refused
        norms += torch._foreach_norm([g for g in gradients if g.dtype == dtype], dtype=wide)
    return torch.linalg.vector_norm(torch.stack([norm.float() for norm in norms]))


@gradient_norm.register_fake
def _(gradients: list[Tensor]) -> Tensor:
    return gradients[0].new_empty((), dtype=torch.float32)


@torch.library.custom_op("ppssl::norms", mutates_args=())
def norms(tensors: list[Tensor]) -> Tensor:
    """[N] float32 (float64 of such tensors): the Euclidean norm of each of N tensors. An op of its own as ``gradient_norm`` is."""
    return torch.stack([n.to(torch.promote_types(n.dtype, torch.float32)) for n in torch._foreach_norm(tensors)])


@norms.register_fake
def _(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty(len(tensors), dtype=torch.promote_types(tensors[0].dtype, torch.float32))


def apex_missing() -> str | None:
    """Why NVIDIA's apex cannot be used, or None when it can. PyPI's ``apex`` is an unrelated project."""
    if importlib.util.find_spec("apex") is None:
        return "no module named apex (NVIDIA's is built from source, see README)"
    try:
        found = hasattr(importlib.import_module("apex.optimizers"), "FusedSGD")
    except ImportError as error:
        return f"the module apex that is installed is not NVIDIA's, or was built without its CUDA extensions ({error})"
    return None if found else "the module apex that is installed is not NVIDIA's: it has no optimizers.FusedSGD"
