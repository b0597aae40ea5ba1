"""Every kernel of the table of launch configurations can be swept: its op declares what to try and what to run."""

from __future__ import annotations

import inspect

import pytest
import torch

import kernels
from bench.gpu import sweep
from kernels import configs, registry

TABLE = configs.table()["sm_90"]


@pytest.mark.parametrize("key", TABLE)
def test_a_tabulated_kernel_declares_its_candidates_and_its_workload(key: str) -> None:
    operand, widths = next(iter(TABLE[key].items()))
    width, batches = next(iter(widths.items()))
    batch, entry = next(iter(batches.items()))
    first, *others = sweep.candidates(key, entry)
    assert first == entry and entry not in others and len(others) > 10
    # on the meta device: shapes and names, no memory
    function, arguments = registry.table_module(key).workload(key, operand, int(width), int(batch), "meta")
    inspect.signature(getattr(kernels, function)).bind(**arguments, impl="triton")


def test_a_workload_gives_results_and_gradients_and_forward_only_ones_where_nothing_requires_any() -> None:
    loss, dq = sweep.workload("infonce", "ieee", 32, 16, device="cpu", impl="auto")()
    assert loss.shape == () and dq.shape == (16, 32) and torch.isfinite(dq).all()
    (cam,) = sweep.workload("gradcam image", "any", 1, 0, device="cpu", impl="auto")()
    assert cam.shape == (128, 7, 7)


def test_the_entries_of_the_step_come_first() -> None:
    entries = [
        (kernel, o, w, b)
        for kernel, ops in TABLE.items()
        for o, widths in ops.items()
        for w, batches in widths.items()
        for b in batches
    ]
    used = [entry for entry in entries if sweep.is_used(*entry)]
    assert ("infonce", "bfloat16", "256", "128") in used and ("maxout project", "bfloat16", "2048", "0") in used
    assert 10 <= len(used) < len(entries) / 2 and {kernel for kernel, *_ in used} == set(TABLE)
