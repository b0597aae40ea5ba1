"""What becomes of a step whose numbers are not finite: the device itself skips and counts it, and a streak of them ends the run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppssl.encoder import BaseTrunk
from ppssl.method import Method, Output


class Streak(NamedTuple):
    """A streak of bad steps that is long enough to stop: the first of them, its batch and its terms."""

    step: int
    index: Tensor
    """[B] int64 positions in the training list."""
    terms: dict[str, float]


class Guard:
    """Decides on the device, without a host sync, whether a step counts.

    ``bad`` (0-d bool) says so of the step that was run last. A bad step leaves weights, momentum, queue and statistics (the
    method's 1-d buffers) as they were, and the momentum update that opened it stands for the next step's: later steps are those
    of a run that never saw this batch. After ``patience`` bad steps in a row every step is refused until the host reads
    ``streak``, so that the state a replay starts from is still there.

    Used in this order: ``keep`` before the forward pass, ``check_finite`` once loss and gradients are there, ``restore``, then
    whoever changes state asks ``bad``; ``count`` after the step. Everything is in place: a captured or compiled step may hold it.
    """

    def __init__(self, method: Method, device: torch.device, *, patience: int):
        self.patience = patience
        self.bad = torch.zeros((), dtype=torch.bool, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self.first = torch.full((), -1, dtype=torch.int64, device=device)
        self.index = torch.empty(0, dtype=torch.int64, device=device)
        self.names: list[str] = []
        self.values = torch.empty(0, device=device)
        trunks = [module for module in method.modules() if isinstance(module, BaseTrunk)]
        frozen = {id(b) for trunk in trunks for norm in trunk.frozen_norms() for b in norm.buffers(recurse=False)}
        self.statistics = [b for b in method.buffers() if b.is_floating_point() and b.dim() == 1 and id(b) not in frozen]
        self.sizes = [tensor.numel() for tensor in self.statistics]

    def keep(self) -> Tensor | None:
        """A copy of the statistics, batch-norm's and a method's own, in one tensor: a few launches instead of hundreds."""
        return torch.cat(self.statistics) if self.statistics else None

    @torch.no_grad()
    def check_finite(self, total: Tensor, grad_norm: Tensor, scale: Tensor | None = None) -> None:
        """Sets ``bad``. scale: of fp16 losses; a gradient that overflows is then the scaler's business, which skips that step and
        halves the scale, until there is nothing left to halve."""
        overflow = ~torch.isfinite(grad_norm)
        if scale is not None:
            overflow = overflow & (scale <= 1)
        self.bad.copy_(~torch.isfinite(total) | overflow | (self.in_a_row >= self.patience))

    @torch.no_grad()
    def restore(self, kept: Tensor | None) -> None:
        """Puts the statistics of ``keep`` back where the step is bad."""
        if kept is None:
            return
        if torch.compiler.is_compiling():
            # fused into the copies: a concatenation of what hundreds of kernels made is a kernel for each of them
            parts = zip(kept.split(self.sizes), self.statistics, strict=True)
            chosen = [torch.where(self.bad, before, after) for before, after in parts]
        else:
            chosen = list(torch.where(self.bad, kept, torch.cat(self.statistics)).split(self.sizes))
        torch._foreach_copy_(self.statistics, chosen)

    @torch.no_grad()
    def count(self, step: int, output: Output, index: Tensor) -> None:
        """Counts the step, and keeps number, batch and terms of the first of a streak."""
        terms = output.terms | {"total": output.total, "grad_norm": output.stats["grad_norm"]}
        values = torch.stack([value.float() for value in terms.values()])
        if not self.names:
            self.names, self.values = list(terms), torch.zeros_like(values)
        if self.index.shape != index.shape:
            self.index = torch.zeros_like(index)
        first = self.bad & (self.in_a_row == 0)
        self.first.copy_(torch.where(first, step, self.first))
        self.index.copy_(torch.where(first, index, self.index))
        self.values.copy_(torch.where(first, values, self.values))
        self.skipped.add_(self.bad)
        self.in_a_row.add_(1).mul_(self.bad)

    def streak(self) -> Streak | None:
        """Waits for the device; the streak that is to stop the run, or None."""
        if int(self.in_a_row) < self.patience:
            return None
        return Streak(int(self.first), self.index.cpu(), dict(zip(self.names, self.values.tolist(), strict=True)))

    def state_dict(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in _SAVED}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in _SAVED:
            getattr(self, name).copy_(state[name])


class Health:
    """Whether a state whose numbers are finite may be ruined all the same: a weight or a loss that is out of all proportion to what
    the run began with. It decides which checkpoints are good to go back to, not what a step does."""

    def __init__(self, parameters: Sequence[Tensor]):
        self.parameters = parameters
        self.weight = self.largest_weight()
        self.loss: Tensor | None = None
        self.last = torch.zeros(())

    @torch.no_grad()
    def largest_weight(self) -> float:
        """The largest absolute value of a weight; waits for the device."""
        return float(torch.stack(torch._foreach_norm(self.parameters, math.inf)).max())

    def see(self, loss: Tensor) -> None:
        """Notes the loss of a step, without waiting for it."""
        self.last = loss
        if self.loss is None:
            self.loss = loss.clone()

    def doubt(self) -> str | None:
        """What speaks against the state after the last step, or None; waits for the device."""
        begun = self.state_dict()
        for name, now in (("weight", self.largest_weight()), ("loss", float(self.last))):
            usual = abs(begun[name]) if math.isfinite(begun[name]) else 0.0
            if not abs(now) <= _OUT_OF_PROPORTION * max(1.0, usual):
                return f"the {'largest weight' if name == 'weight' else name} is {now:.3g}, and was {begun[name]:.3g} at first"
        return None

    def state_dict(self) -> dict[str, float]:
        return {"weight": self.weight, "loss": 0.0 if self.loss is None else float(self.loss)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Of a checkpoint of an earlier version, which has none, the weights that it holds count as what the run began with."""
        self.weight = state.get("weight", self.largest_weight())
        self.loss = torch.tensor(state["loss"]) if "loss" in state else None


_OUT_OF_PROPORTION = 1000.0
_SAVED = ("bad", "skipped")  # a streak that a checkpoint cuts through begins anew
