"""Names for the parts of a step, as profilers show them."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.profiler import record_function


def span(name: str) -> AbstractContextManager:
    """Marks what runs inside it as ``name`` for torch.profiler and, where there is a GPU, for Nsight (an NVTX range).

    The names in use: data, key_fwd, query_fwd, infonce, cam, losses, backward, optim_ema, enqueue. Inside
    ``torch.compile`` it is nothing: a graph has no parts. Under a CUDA graph it marks the capture, not the replays.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    return _NvtxSpan(name) if _has_gpu() else record_function(name)


@functools.cache
def _has_gpu() -> bool:
    return torch.cuda.is_available()


class _NvtxSpan(record_function):
    def __enter__(self) -> _NvtxSpan:
        torch.cuda.nvtx.range_push(self.name)
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        torch.cuda.nvtx.range_pop()
