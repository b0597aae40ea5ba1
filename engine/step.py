"""One training step of a method: momentum update, forward, gradients, optimiser, enqueue. It owns what changes the weights, and is
the only file that knows ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.graph import CapturedStep
from engine.precision import Precision
from ppssl.encoder import Trunk
from ppssl.method import Batch, Method, Output
from ppssl.span import span

MODES = ("off", "encoder", "step")


class Execution(NamedTuple):
    """How the step is run: ``compile`` one of MODES, ``graph`` whether it is captured as a CUDA graph, ``note`` what was chosen
    and why."""

    compile: str
    graph: bool
    note: str


def choose(compile: str, cuda_graph: str, precision: Precision) -> Execution:
    """What ``run.compile`` and ``run.cuda_graph`` become. Raises ``ValueError`` for an explicit choice that cannot be had."""
    on_gpu = precision.device.type == "cuda"
    if compile not in ("auto", *MODES):
        raise ValueError(f"run.compile: {compile!r} is not known; use auto, {', '.join(MODES)}")
    if compile == "step" and precision.scales:
        raise ValueError("run.compile: step does not scale fp16 losses; use amp=bf16, or run.compile=encoder")
    if cuda_graph == "on" and (not on_gpu or precision.scales or compile == "encoder"):
        raise ValueError("run.cuda_graph: on needs a GPU, no fp16 loss scaling, and run.compile=off or step")
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


class Step:
    """Callable that trains ``method`` on one batch.

    optimizer: SGD over the method's trainable parameters; lr: step -> learning rate; decay: of the momentum update;
    total_steps: the whole run's, for warm-ups. ``step`` is the number of steps done.
    compile: ``off`` runs eagerly; ``encoder`` compiles the method's encoders; ``step`` compiles everything from the momentum
    update to the enqueue into one graph without a break, in which the compiler drops every pass that nobody needs. backend:
    of torch.compile. graph: capture the step as a CUDA graph.

    Nothing here waits for the device. A non-finite loss or gradient is remembered on the device (``first_bad``, ``bad_terms``) and
    read by whoever synchronises next.
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
    ):
        choose(compile, "on" if graph else "off", precision)  # refuses what cannot be had
        self.method, self.optimizer, self.lr, self.decay = method, optimizer, lr, decay
        self.precision, self.total_steps = precision, total_steps
        self.scaler = precision.scaler()
        self.step = 0
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.online, self.target = method.ema_pairs()
        device = precision.device
        method.progress = torch.zeros((), device=device)
        self.rate = torch.zeros((), device=device)
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self.bad_terms: dict[str, Tensor] = {}
        for module in method.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.num_batches_tracked = None  # one more kernel a layer, and unused with a fixed momentum
        self.compile = compile
        self.buffers: list[Tensor] = []
        self.run = self._eager
        if compile == "step" or graph:
            self.buffers = [torch.zeros_like(p) for p in self.parameters]
            self._keep_buffers()
            self.run = self._compiled(backend) if compile == "step" else self._whole
        elif compile == "encoder":
            self._compile_encoders(backend)
        if graph:
            self.run = CapturedStep(self.run)

    def __call__(self, batch: Batch) -> Output:
        """Trains on ``batch``; returns the method's output, its ``stats`` with ``grad_norm`` added, all detached on the device."""
        self.set_schedule()
        if self.precision.scales:
            self.method.loss_scale = self.scaler.scale(torch.ones((), device=self.precision.device))
        output = self.run(self.prepare(batch))
        self.watch(output)
        self.step += 1
        return output

    def _eager(self, batch: Batch) -> Output:
        output, gradients = self.gradients(batch)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        with span("optim_ema"):
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.enqueue(output.keys, batch.index)
        return output

    def gradients(self, batch: Batch) -> tuple[Output, Sequence[Tensor | None]]:
        """Moves the key network, runs the method and differentiates by the parameters alone (gradients are scaled in fp16)."""
        if self.target:
            with span("optim_ema"), torch.no_grad():
                torch._foreach_lerp_(self.target, self.online, 1.0 - self.decay)  # the key network first moves (MoCo)
        with self.precision.autocast():
            output = self.method(batch)
        scaled = output.total * self.method.loss_scale if self.precision.scales else output.total
        # not backward(): it would compute the gradient of the images a second time
        with span("backward"):
            gradients = torch.autograd.grad(scaled, self.parameters, allow_unused=True)
        norms = torch._foreach_norm([g for g in gradients if g is not None])
        norm = torch.linalg.vector_norm(torch.stack([n.float() for n in norms]))
        if self.precision.scales:
            norm = norm / self.method.loss_scale
        output = output._replace(total=output.total.detach(), stats=output.stats | {"grad_norm": norm})
        return output, gradients

    def _keep_buffers(self) -> None:
        """Puts the momentum buffers of the compiled update where the optimiser saves them. They begin as zeros: the first update
        of a zero buffer is the gradient itself, as in ``torch.optim.SGD``."""
        for parameter, buffer in zip(self.parameters, self.buffers, strict=True):
            self.optimizer.state[parameter]["momentum_buffer"] = buffer

    def _whole(self, batch: Batch) -> Output:
        """Everything from the momentum update to the enqueue, with the learning rate read from the device."""
        output, gradients = self.gradients(batch)
        (group,) = self.optimizer.param_groups
        with torch.no_grad():
            used = [(p, g, b) for p, g, b in zip(self.parameters, gradients, self.buffers, strict=True) if g is not None]
            parameters, found, buffers = map(list, zip(*used, strict=True))
            found = torch._foreach_add(found, parameters, alpha=group["weight_decay"])
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, found)
            torch._foreach_sub_(parameters, torch._foreach_mul(buffers, self.rate))
            self.method.enqueue(output.keys, batch.index)
        return output

    def _compiled(self, backend: Any) -> Callable[[Batch], Output]:
        """``_whole`` as one graph. ``trace_autograd_ops`` lets Dynamo follow ``autograd.grad``, so that both backward passes and
        the update are part of it; it takes and gives plain tuples, which is what Dynamo can hand back."""
        compiled = torch.compile(lambda *fields: tuple(self._whole(Batch(*fields))), fullgraph=True, dynamic=False, backend=backend)

        def run(batch: Batch) -> Output:
            with torch._dynamo.config.patch(trace_autograd_ops=True):
                return Output(*compiled(*batch))

        return run

    def _compile_encoders(self, backend: Any) -> None:
        """Compiles the trunks in place, so that the names in the state dict stay. The CAM keeps the graph alive for the loss's
        pass, so a compiled backward may not donate its buffers to its own results."""
        functorch = torch._functorch.config

        def compiled(maps: Callable) -> Callable:
            inner = torch.compile(maps, dynamic=False, backend=backend)

            def run(images: Tensor) -> dict[str, Tensor]:
                with functorch.patch(donated_buffer=False):
                    return inner(images)

            return run

        for module in self.method.modules():
            if isinstance(module, Trunk):
                module.maps = compiled(module.maps)

    def prepare(self, batch: Batch) -> Batch:
        """Float32 leaves where the method differentiates by an image (a 16-bit gradient of size 1e-5 would lose its digits), and
        float32 images everywhere when nothing casts them."""
        changed = {}
        for name in ("x_q", "x_k", "x_o"):
            images = getattr(batch, name)
            if images is None:
                continue
            if name in self.method.needs_image_grad:
                changed[name] = images.detach().float().requires_grad_()
            elif self.precision.dtype is None:
                changed[name] = images.float()
        return batch._replace(**changed)

    def set_schedule(self) -> None:
        """Puts this step's learning rate and the share of the run that is done where they are read."""
        rate = self.lr(self.step)
        self.method.progress.fill_(self.step / self.total_steps)
        self.rate.fill_(rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    @torch.no_grad()
    def watch(self, output: Output) -> None:
        """Keeps the first step whose loss or gradient is not finite, with its terms."""
        finite = torch.isfinite(output.total)
        if not self.precision.scales:  # a gradient that overflows fp16 is the scaler's business: it skips that step
            finite = finite & torch.isfinite(output.stats["grad_norm"])
        terms = output.terms | {"total": output.total, "grad_norm": output.stats["grad_norm"]}
        if not self.bad_terms:
            self.bad_terms = {name: torch.zeros_like(value) for name, value in terms.items()}
        newly = ~finite & (self.first_bad < 0)
        self.first_bad.copy_(torch.where(newly, self.step, self.first_bad))
        for name, value in terms.items():
            self.bad_terms[name].copy_(torch.where(newly, value, self.bad_terms[name]))

    def raise_if_bad(self) -> None:
        """Waits for the device; raises ``FloatingPointError`` naming the first bad step and its terms."""
        step = int(self.first_bad)
        if step >= 0:
            terms = ", ".join(f"{name} {float(value):.6g}" for name, value in self.bad_terms.items())
            raise FloatingPointError(f"step {step}: the loss or its gradient is not finite ({terms})")

    def state_dict(self) -> dict:
        return {"step": self.step, "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.step = state["step"]
        self.optimizer.load_state_dict(state["optimizer"])
        if self.buffers:  # the compiled graph holds these very tensors
            for parameter, buffer in zip(self.parameters, self.buffers, strict=True):
                saved = self.optimizer.state[parameter].get("momentum_buffer")
                buffer.zero_() if saved is None else buffer.copy_(saved)
            self._keep_buffers()
        self.scaler.load_state_dict(state["scaler"])
