"""A training step captured as one CUDA graph: static input buffers, one replay a step, no launch cost on the host."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ppssl.method import Batch, Output


class CapturedStep:
    """Replays ``run(batch) -> Output`` as a CUDA graph.

    The first ``warm_up`` calls run as they are, on a side stream; the next one captures, all later ones copy the batch into the
    captured buffers and replay. Everything that ``run`` reads must keep its address (weights, momentum, queue, schedules) and
    nothing in it may wait for the device. The returned tensors are overwritten by the next call.

    Capture is ``thread_local``: a data loader's thread that calls CUDA meanwhile would break the default mode.
    """

    def __init__(self, run: Callable[[Batch], Output], warm_up: int = 3):
        self.run, self.remaining = run, warm_up
        self.side = torch.cuda.Stream()  # one for all: each stream that allocates keeps memory of its own
        self.graph: torch.cuda.CUDAGraph | None = None
        self.static: Batch | None = None
        self.output: Output | None = None

    def __call__(self, batch: Batch) -> Output:
        if self.static is None:
            self.static = Batch(*(_buffer(field) for field in batch))
        with torch.no_grad():
            for buffer, field in zip(self.static, batch, strict=True):
                if buffer is not None:
                    if buffer.shape != field.shape:
                        raise ValueError(f"a CUDA graph needs batches of one shape: {list(buffer.shape)}, then {list(field.shape)}")
                    buffer.copy_(field, non_blocking=True)
        if self.remaining:
            self.remaining -= 1
            return self._warm_up()
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.side, capture_error_mode="thread_local"):
                self.output = self.run(self.static)
            self.graph = graph
        self.graph.replay()
        return self.output

    def _warm_up(self) -> Output:
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            output = self.run(self.static)
        torch.cuda.current_stream().wait_stream(self.side)
        return output


def _buffer(field: torch.Tensor | None) -> torch.Tensor | None:
    """A buffer like ``field``, in its memory format, and a leaf where ``field`` is one that requires grad."""
    return None if field is None else torch.empty_like(field).requires_grad_(field.requires_grad)
