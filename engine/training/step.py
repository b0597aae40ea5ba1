"""One training step of a method: momentum update, forward, gradients, optimizer, enqueue. It owns what changes the weights, and is
the only file that knows ``torch.compile``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine import compiler_cache
from engine.training import inductor, optim
from engine.training.distributed import average_all
from engine.training.graph import CapturedStep
from engine.training.guard import Guard
from engine.training.precision import Precision
from ppssl.encoder import BaseTrunk
from ppssl.method import Batch, Method, Output, StepContext
from ppssl.ops import world_size
from ppssl.span import span

MODES = ("off", "encoder", "step")


class Execution(NamedTuple):
    """How the step is run: ``compile`` one of MODES, ``graph`` whether it is captured as a CUDA graph, ``note`` what was chosen
    and why."""

    compile: str
    graph: bool
    note: str


def choose(compile: str, cuda_graph: str, precision: Precision, processes: int = 1) -> Execution:
    """What ``run.compile`` and ``run.cuda_graph`` become in one of ``processes``. Raises ``ValueError`` for an explicit choice that
    cannot be had."""
    on_gpu = precision.device.type == "cuda"
    if compile not in ("auto", *MODES):
        raise ValueError(f"run.compile: {compile!r} is not known; use auto, {', '.join(MODES)}")
    if compile == "step" and precision.scales:
        raise ValueError("run.compile: step does not scale fp16 losses; use amp=bf16, or run.compile=encoder")
    if cuda_graph == "on" and (not on_gpu or precision.scales or compile == "encoder"):
        raise ValueError("run.cuda_graph: on needs a GPU, no fp16 loss scaling, and run.compile=off or step")
    if cuda_graph == "on" and processes > 1:
        raise ValueError("run.cuda_graph: on captures the step of one process; leave it off under torchrun")
    why = "as asked"
    if compile == "auto":
        if not on_gpu:
            compile, why = "off", "compiling makes the step of a CPU slower"
        elif precision.scales:
            compile, why = "encoder", "fp16 losses are scaled outside the graph"
        else:
            compile, why = "step", "on a GPU"
    # auto leaves graphs off: what they gain over the compiled step has not been measured
    return Execution(compile, cuda_graph == "on", f"compile {compile} ({why}), CUDA graph {'on' if cuda_graph == 'on' else 'off'}")


def uncompiled() -> AbstractContextManager:
    """Within it, what was compiled runs eagerly: for passes of another shape, whose compiling would take longer than they do."""
    return torch.compiler.set_stance("force_eager")


class Step:
    """Callable that trains ``method`` on one batch.

    optimizer: of ``optim.build`` over the method's trainable parameters; lr: step -> learning rate; decay: of the momentum
    update, and decay_schedule how it changes (``optim.ema_decay``); clip: the longest gradient, of all parameters together, None
    for any (``grad_norm`` is that before clipping);
    total_steps: the whole run's, for warm-ups. ``steps_done`` counts the steps.
    compile: ``off`` runs eagerly; ``encoder`` compiles the method's encoders; ``step`` compiles everything from the momentum
    update to the enqueue into one graph without a break, in which the compiler drops every pass that nobody needs. backend:
    of torch.compile. graph: capture the step as a CUDA graph.

    Nothing here waits for the device. A step with a non-finite loss or gradient changes nothing and is counted there (``guard``);
    whoever synchronizes next asks for a streak of ``max_bad_steps``.
    """

    def __init__(
        self,
        method: Method,
        optimizer: torch.optim.Optimizer,
        *,
        lr: Callable[[int], float],
        decay: float,
        precision: Precision,
        total_steps: int,
        compile: str = "off",
        backend: Any = "inductor",
        graph: bool = False,
        max_bad_steps: int = 10,
        decay_schedule: str = "constant",
        clip: float | None = None,
    ):
        choose(compile, "on" if graph else "off", precision, world_size(method.group))  # refuses what cannot be had
        self.method, self.optimizer, self.lr, self.decay = method, optimizer, lr, decay
        self.precision, self.total_steps, self.clip = precision, total_steps, clip
        self.scaler = precision.scaler()
        self.steps_done = 0
        self.update = optim.Update(optimizer)
        self.parameters = self.update.parameters
        self.online, self.target = method.ema_pairs()
        device = precision.device
        self.takes_context = "context" in inspect.signature(method.forward).parameters
        self.context = StepContext(torch.zeros((), device=device), share=1 / world_size(method.group))
        self.rate = torch.zeros((), device=device)
        self.decay_schedule, self.ema_weight = decay_schedule, torch.zeros((), device=device)
        self.guard = Guard(method, device, patience=max_bad_steps)
        for module in method.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.num_batches_tracked = None  # one more kernel per layer, and unused with a fixed momentum
        if compile != "off":
            compiler_cache.prepare()
        self.compile = compile
        self.run = self._eager
        if compile == "step" or graph:
            self.run = self._compiled(backend) if compile == "step" else self._whole
        elif compile == "encoder":
            self._compile_encoders(backend)
        if graph:
            self.run = CapturedStep(self.run)

    def __call__(self, batch: Batch) -> Output:
        """Trains on ``batch``; returns the method's output, all detached on the device, its ``stats`` with ``grad_norm`` and
        ``skipped`` (1.0 where the step was bad and changed nothing) added."""
        self.set_schedule()
        output = self.run(self.prepare(batch))
        self.guard.count(self.steps_done, output, batch.index)
        self.steps_done += 1
        return output._replace(stats=output.stats | {"skipped": self.guard.bad.float()})

    def _eager(self, batch: Batch) -> Output:
        kept = self.guard.keep()
        output, gradients = self.gradients(batch)
        self.check_finite(output, kept)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        if self.precision.scales:
            # the scaler finds by itself which gradients are not finite: this tells it of a bad loss
            (first, *_) = (p.grad for p in self.parameters if p.grad is not None)
            first.masked_fill_(self.guard.bad, float("nan"))
        else:
            optim.skip_where(self.optimizer, self.guard.bad)
        with span("optim_ema"):
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.enqueue(output, batch)
        return output

    def enqueue(self, output: Output, batch: Batch) -> None:
        """Puts the keys into the queue, where the method has one."""
        if output.keys is not None:
            self.method.enqueue(output.keys, batch.index, self.guard.bad)

    def gradients(self, batch: Batch) -> tuple[Output, Sequence[Tensor | None]]:
        """Moves the key network, runs the method and differentiates by the parameters alone (gradients are scaled in fp16)."""
        if self.target:
            with span("optim_ema"), torch.no_grad():
                # the key network first moves (MoCo); a step that was skipped has moved it for this one
                weight = torch.where(self.guard.bad, 0.0, self.ema_weight).to(self.target[0].dtype)
                optim.move_towards(self.target, self.online, weight)
        with self.precision.autocast():
            output = self.method(batch, context=self.context) if self.takes_context else self.method(batch)
        scaled = output.total * self.context.loss_scale if self.precision.scales else output.total
        # not backward(): it would compute the gradient of the images a second time
        with span("backward"):
            gradients = torch.autograd.grad(scaled, self.parameters, allow_unused=True)
        gradients = [g if g is None else in_layout(g, p) for g, p in zip(gradients, self.parameters, strict=True)]
        if self.method.group:
            output, gradients = self.averaged(output, gradients)
        norm = optim.gradient_norm([g for g in gradients if g is not None])
        if self.precision.scales:
            norm = norm / self.context.loss_scale
        if self.clip is not None:
            gradients = optim.clipped(gradients, norm, self.clip)
        output = output._replace(total=output.total.detach(), stats=output.stats | {"grad_norm": norm})
        return output, gradients

    def check_finite(self, output: Output, kept: Tensor | None) -> None:
        """Decides on the device whether this step counts; takes back what the forward pass did to the statistics if not."""
        self.guard.check_finite(output.total, output.stats["grad_norm"], self.context.loss_scale)
        self.guard.restore(kept)

    def averaged(self, output: Output, gradients: Sequence[Tensor | None]) -> tuple[Output, list[Tensor | None]]:
        """The output and the gradients averaged over the processes, in one collective with the statistics, so that
        everything that a checkpoint, a log line or a check for finite numbers reads is the same in each."""
        scalars = [{"total": output.total.detach()}, output.terms, output.stats]
        values = [v for part in scalars for v in part.values()]
        used = [g for g in gradients if g is not None]
        with span("average"), torch.no_grad():
            means = iter(average_all([*values, *self.guard.statistics, *used], self.method.group))
            total, terms, stats = ({name: next(means) for name in part} for part in scalars)
            for statistic in self.guard.statistics:
                statistic.copy_(next(means))
            gradients = [None if g is None else next(means) for g in gradients]
        return output._replace(total=total["total"], terms=terms, stats=stats), gradients

    def _whole(self, batch: Batch) -> Output:
        """Everything from the momentum update to the enqueue, with the learning rate read from the device."""
        kept = self.guard.keep()
        output, gradients = self.gradients(batch)
        self.check_finite(output, kept)
        with torch.no_grad():
            self.update(gradients, self.rate, self.guard.bad)
            self.enqueue(output, batch)
        return output

    def _compiled(self, backend: Any) -> Callable[[Batch], Output]:
        """``_whole`` as one graph. ``trace_autograd_ops`` lets Dynamo follow ``autograd.grad``, so that both backward passes and
        the update are part of it; it takes and gives plain tuples, which is what Dynamo can hand back."""
        how = _how(backend, **(inductor.COMBINED if self.precision.device.type == "cuda" else {}))
        compiled = torch.compile(lambda *fields: tuple(self._whole(Batch(*fields))), fullgraph=True, **how)

        def run(batch: Batch) -> Output:
            with torch._dynamo.config.patch(trace_autograd_ops=True):
                return Output(*compiled(*batch))

        return run

    def _compile_encoders(self, backend: Any) -> None:
        """Compiles the trunks in place, so that the names in the state dict stay. The CAM keeps the graph alive for the loss's
        pass, so a compiled backward may not donate its buffers to its own results."""
        functorch = torch._functorch.config

        def compiled(maps: Callable) -> Callable:
            inner = torch.compile(maps, **_how(backend))

            def run(images: Tensor) -> dict[str, Tensor]:
                with functorch.patch(donated_buffer=False):
                    return inner(images)

            return run

        for module in self.method.modules():
            if isinstance(module, BaseTrunk):
                if between := [name for name in module.watched if name in module.sources[:-1]]:
                    # autograd sees one function of the image with several results, none of them a function of another
                    raise ValueError(f"run.compile: encoder has no gradient by {between[0]} (iadm.sources); use step or off")
                module.maps = compiled(module.maps)

    def prepare(self, batch: Batch) -> Batch:
        """Leaves where the method differentiates by an image, and float32 images everywhere when nothing casts them.

        A leaf is float32: fp16 would lose the digits of a gradient of size 1e-5. Under bf16 on a GPU it is bf16, whose range is
        that of float32: the first convolution computes in bf16 either way, so that the gradient is the same number in half
        the bytes."""
        changed = {}
        bf16 = self.precision.dtype == torch.bfloat16 and self.precision.device.type == "cuda"
        for name in ("x_q", "x_k", "x_clean"):
            images = getattr(batch, name)
            if images is None:
                continue
            if name in self.method.needs_image_grad:
                changed[name] = (images.detach().bfloat16() if bf16 else images.detach().float()).requires_grad_()
            elif self.precision.dtype is None:
                changed[name] = images.float()
        return batch._replace(**changed)

    def schedules(self) -> dict[str, float]:
        """What the next step has of what changes over the run: the learning rate and, with a momentum network, its decay."""
        found = {"learning rate": self.lr(self.steps_done)}
        if self.target:
            found["ema.decay"] = optim.ema_decay(self.steps_done, self.total_steps, base=self.decay, schedule=self.decay_schedule)
        return found

    def set_schedule(self) -> None:
        """Puts this step's learning rate, momentum decay, share of the run that is done and loss scale where they are read."""
        rate = self.lr(self.steps_done)
        self.context.progress.fill_(self.steps_done / self.total_steps)
        self.rate.fill_(rate)
        self.update.set_rate(rate)
        decay = optim.ema_decay(self.steps_done, self.total_steps, base=self.decay, schedule=self.decay_schedule)
        self.ema_weight.fill_(1.0 - decay)
        if self.precision.scales:
            self.context = self.context._replace(loss_scale=self.scaler.scale(torch.ones((), device=self.precision.device)))

    def state_dict(self) -> dict:
        return {
            "step": self.steps_done,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "guard": self.guard.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.steps_done = state["step"]
        self.update.load(state["optimizer"])
        if state["scaler"]:  # empty where nothing was scaled: amp may be another one from here on
            self.scaler.load_state_dict(state["scaler"])
        self.guard.load_state_dict(state["guard"])


def in_layout(gradient: Tensor, parameter: Tensor) -> Tensor:
    """``gradient`` in the memory order of ``parameter``: ``backward`` sees to that, ``autograd.grad`` does not, and a fused
    optimizer pairs numbers by their place in memory."""
    sides = zip(gradient.stride(), parameter.stride(), parameter.shape, strict=True)
    alike = all(ours == theirs for ours, theirs, length in sides if length > 1)
    return gradient if alike else torch.empty_like(parameter, dtype=gradient.dtype).copy_(gradient)


def _how(backend: Any, **options: Any) -> dict[str, Any]:
    """Arguments of ``torch.compile``; ``options`` of Inductor."""
    if backend != "inductor":
        return {"dynamic": False, "backend": backend}
    return {"dynamic": False, "backend": backend, "options": compiler_cache.OPTIONS | inductor.options() | options}
