"""One training step of a method: momentum update, forward, gradients, optimiser, enqueue. It owns what changes the weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine.precision import Precision
from ppssl.method import Batch, Method, Output


class Step:
    """Callable that trains ``method`` on one batch.

    optimizer: over the method's trainable parameters; lr: step -> learning rate; decay: of the momentum update;
    total_steps: the whole run's, for warm-ups. ``step`` is the number of steps done.

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
    ):
        self.method, self.optimizer, self.lr, self.decay = method, optimizer, lr, decay
        self.precision, self.total_steps = precision, total_steps
        self.scaler = precision.scaler()
        self.step = 0
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.online, self.target = method.ema_pairs()
        device = precision.device
        method.progress = torch.zeros((), device=device)
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self.bad_terms: dict[str, Tensor] = {}

    def __call__(self, batch: Batch) -> Output:
        """Trains on ``batch``; returns the method's output, its ``stats`` with ``grad_norm`` added, all on the device."""
        method = self.method
        self.set_schedule()
        if self.target:
            with torch.no_grad():
                torch._foreach_lerp_(self.target, self.online, 1.0 - self.decay)  # the key network first moves (MoCo)
        batch = self.prepare(batch)
        if self.precision.scales:
            method.loss_scale = self.scaler.scale(torch.ones((), device=self.precision.device))
        with self.precision.autocast():
            output = method(batch)
        # not backward(): it would compute the gradient of the images a second time
        gradients = torch.autograd.grad(self.scaler.scale(output.total), self.parameters, allow_unused=True)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.scaler.step(self.optimizer)
        self.scaler.update()
        method.enqueue(output.keys)
        output = output._replace(stats=output.stats | {"grad_norm": self.watch(output, gradients)})
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return output

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
        self.method.progress.fill_(self.step / self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(self.step)

    @torch.no_grad()
    def watch(self, output: Output, gradients: tuple[Tensor | None, ...]) -> Tensor:
        """The gradient's norm; the first step whose loss or gradient is not finite is kept, with its terms."""
        norms = torch._foreach_norm([g for g in gradients if g is not None])
        norm = torch.linalg.vector_norm(torch.stack([n.float() for n in norms]))
        finite = torch.isfinite(output.total)
        if self.precision.scales:
            norm = norm / self.method.loss_scale  # an overflow is the scaler's business: it skips that step
        else:
            finite = finite & torch.isfinite(norm)
        newly = ~finite & (self.first_bad < 0)
        self.first_bad = torch.where(newly, self.step, self.first_bad)
        terms = output.terms | {"total": output.total.detach(), "grad_norm": norm}
        before = self.bad_terms or terms
        self.bad_terms = {name: torch.where(newly, value, before[name]) for name, value in terms.items()}
        return norm

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
        self.scaler.load_state_dict(state["scaler"])
