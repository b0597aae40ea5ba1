"""What ``--amp`` means on this machine: the autocast type, the fp16 loss scaler, and the sentence for the log."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """``dtype`` is the autocast type, None for plain float32; ``scales`` whether fp16 loss scaling is needed; ``note`` says what
    was chosen and why."""

    device: torch.device
    dtype: torch.dtype | None
    scales: bool
    note: str

    def autocast(self) -> AbstractContextManager:
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """A scaler that does nothing unless fp16 is in use."""
        return torch.amp.GradScaler(self.device.type, enabled=self.scales)


def resolve(amp: str | None, device: torch.device) -> Precision:
    """The precision for ``amp`` (None, ``bf16``, ``fp16``) on ``device``.

    bf16 wherever the hardware has it; fp16 with loss scaling on a GPU without bf16 or on request; float32 on a CPU without native
    bf16, where emulated bf16 is slower than float32.
    """
    if amp is None:
        return Precision(device, None, False, "float32 (no --amp)")
    if amp not in ("bf16", "fp16"):
        raise ValueError(f"amp: {amp!r} is not known; use bf16 or fp16")
    if device.type == "cuda":
        if amp == "bf16" and torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision(device, torch.bfloat16, False, "bf16 autocast")
        why = "on request" if amp == "fp16" else "this GPU has no bf16"
        return Precision(device, torch.float16, True, f"fp16 autocast with loss scaling ({why})")
    if device.type == "mps":
        return Precision(device, None, False, "float32: amp is not used on mps")
    if not cpu_has_bf16():
        return Precision(device, None, False, "float32: this CPU has no native bf16, and emulated bf16 is slower")
    why = "" if amp == "bf16" else " (fp16 needs a GPU)"
    return Precision(device, torch.bfloat16, False, f"bf16 autocast on the CPU{why}")


def cpu_has_bf16() -> bool:
    """True when the CPU multiplies bf16 natively (AVX512-BF16 or AMX)."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in checks)
