"""Tests run on one thread. Without CUDA, Triton kernels run in its interpreter: chosen before triton is first imported."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start; small shapes gain nothing from a second
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # one, and OpenMP's waiting for it starves whatever else runs
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    # numpy's remark about how Triton's interpreter turns loop counters into integers
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim > 0:DeprecationWarning:triton")


@pytest.fixture(autouse=True)
def threads_are_given_back() -> Iterator[None]:
    """Benchmarks, and tests of several processes, set the number of threads of the whole process."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture(scope="session")
def kernel_device() -> torch.device:
    """Where ``impl="triton"`` runs: the GPU, or the CPU under the interpreter."""
    # cuDNN's default would round the float32 convolutions that results are compared with
    torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialized memory is NaN (a large number for integers), so that an element nobody wrote is seen."""

    def poison(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            return tensor.fill_(1 if tensor.dtype == torch.bool else min(1 << 20, torch.iinfo(tensor.dtype).max))

        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
