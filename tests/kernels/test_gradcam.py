"""GradCAM weighting: both paths against float64, on images and feature maps, in both memory orders."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from error_budget import assert_within_budget, upstream

import kernels


class Case(NamedTuple):
    shape: tuple[int, int, int, int]
    size: tuple[int, int]
    weighting: str
    pool: str
    sign: int
    channels_last: bool
    why: str


CASES = [
    Case((2, 3, 16, 24), (2, 3), "elementwise", "max", 1, False, "image, published form"),
    Case((2, 3, 16, 16), (2, 2), "elementwise", "mean", -1, True, "image, channels_last"),
    Case((1, 3, 6, 8), (2, 2), "channel", "max", 1, False, "image, channel weights"),
    Case((2, 20, 5, 3), (5, 3), "elementwise", "max", 1, True, "feature map as it is"),
    Case((2, 40, 4, 4), (2, 2), "elementwise", "mean", 1, False, "feature map pooled, ragged channels"),
    Case((2, 16, 4, 4), (4, 4), "channel", "mean", -1, True, "feature map, channel weights"),
    Case((1, 1, 1, 1), (1, 1), "channel", "max", 1, False, "one of everything"),
]
PATHS = [("torch", torch.float32), ("torch", torch.bfloat16), ("triton", torch.float32), ("triton", torch.float16)]
if torch.cuda.is_available():
    PATHS.append(("triton", torch.bfloat16))


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(case.why))
    pair = (torch.randn(case.shape, generator=generator).to(device, dtype) for _ in range(2))
    if case.channels_last:
        pair = (tensor.to(memory_format=torch.channels_last) for tensor in pair)
    return tuple(pair)


def run(function, act, grad, case, **options):
    act = act.detach().requires_grad_()
    cam = function(act, grad, size=case.size, weighting=case.weighting, pool=case.pool, sign=case.sign, **options)
    return cam, torch.autograd.grad((cam * upstream(cam, 2).to(cam)).sum(), act)[0]


@pytest.mark.parametrize(("impl", "dtype"), PATHS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_matches_float64(case, impl, dtype, kernel_device, poisoned_empty):
    act, grad = inputs(case, dtype, kernel_device if impl == "triton" else torch.device("cpu"))
    truth = run(kernels.reference.gradcam, act.double(), grad.double(), case)
    eager = run(kernels.reference.gradcam, act, grad, case)
    ours = run(kernels.gradcam, act, grad, case, impl=impl)
    assert ours[1].stride() == act.stride()
    for name, mine, theirs, true in zip(("cam", "dact"), ours, eager, truth, strict=True):
        assert_within_budget(name, mine, theirs, true)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[5]], ids=lambda case: case.why)
def test_any_strides(case, impl, kernel_device):
    act, grad = inputs(case, torch.float32, kernel_device)
    expected = run(kernels.gradcam, act, grad, case, impl=impl)
    act = act.transpose(2, 3).contiguous().transpose(2, 3)
    grad = torch.nn.functional.pad(grad, (1, 2, 3, 1))[:, :, 3:-1, 1:-2]
    for mine, theirs in zip(run(kernels.gradcam, act, grad, case, impl=impl), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("size", [(7, 7), (3, 4), (1, 1)])
def test_any_size_on_the_torch_path(size):
    act, grad = inputs(CASES[4]._replace(shape=(2, 6, 7, 7)), torch.float64, torch.device("cpu"))
    case = CASES[4]._replace(size=size)
    for pool in ("max", "mean"):
        ours = run(kernels.gradcam, act, grad, case._replace(pool=pool))
        truth = run(kernels.reference.gradcam, act, grad, case._replace(pool=pool))
        for mine, true in zip(ours, truth, strict=True):
            torch.testing.assert_close(mine, true)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_opposite_signs_split_the_sum(impl, kernel_device):
    act, grad = inputs(CASES[3], torch.float32, kernel_device)
    plus, minus = (kernels.gradcam(act, grad, size=(5, 3), sign=sign, impl=impl) for sign in (1, -1))
    torch.testing.assert_close(plus - minus, (act * grad).sum(1))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=lambda case: case.why)
def test_nan_in_nan_out(case, impl, kernel_device):
    act, grad = inputs(case, torch.float32, kernel_device)
    act[0, 1, 0, 0] = float("nan")
    cam = kernels.gradcam(act, grad, size=case.size, impl=impl)
    assert cam[0, 0, 0].isnan() and torch.isfinite(cam[1]).all()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_equal_bits_every_time_and_under_autocast(impl, kernel_device):
    act, grad = inputs(CASES[4], torch.float32, kernel_device)
    first = run(kernels.gradcam, act, grad, CASES[4], impl=impl)
    with torch.autocast(kernel_device.type, dtype=torch.bfloat16):
        second = run(kernels.gradcam, act, grad, CASES[4], impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_grad_is_a_constant_and_no_grad_works(impl, kernel_device):
    act, grad = inputs(CASES[0], torch.float32, kernel_device)
    cam = kernels.gradcam(act, grad.requires_grad_(), size=(2, 3), impl=impl)
    assert not cam.requires_grad
    with torch.no_grad():
        assert torch.equal(kernels.gradcam(act.requires_grad_(), grad, size=(2, 3), impl=impl), cam)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_one_graph_under_compile(impl, kernel_device):
    act, grad = inputs(CASES[3], torch.float32, kernel_device)

    def step(act):
        return kernels.gradcam(2 * act, grad, size=(5, 3), impl=impl).square().sum()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = act.detach().requires_grad_()
        results.append(torch.autograd.grad(function(leaf), leaf)[0])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_opcheck(impl, kernel_device):
    act, grad = inputs(CASES[5], torch.float32, kernel_device)
    arguments = (act.requires_grad_(), grad, 4, 4, "channel", "mean", -1, impl)
    torch.library.opcheck(torch.ops.ppssl.gradcam.default, arguments)


GOOD = {"act": torch.ones(2, 3, 8, 8), "grad": torch.ones(2, 3, 8, 8), "size": (2, 2)}
BAD = [
    ({"grad": torch.ones(2, 3, 8, 4)}, ValueError, r"\[2, 3, 8, 4\]"),
    ({"act": torch.ones(3, 8, 8), "grad": torch.ones(3, 8, 8)}, ValueError, r"\[3, 8, 8\]"),
    ({"act": torch.ones(2, 3, 8, 8, dtype=torch.int32)}, TypeError, "int32"),
    ({"size": (9, 2)}, ValueError, r"\(9, 2\)"),
    ({"size": (0, 2)}, ValueError, r"\(0, 2\)"),
    ({"weighting": "pixel"}, ValueError, "pixel"),
    ({"pool": "sum"}, ValueError, "sum"),
    ({"sign": 0}, ValueError, "got 0"),
    ({"impl": "fast"}, ValueError, "fast"),
    ({"size": (3, 2), "impl": "triton"}, ValueError, "multiple of size"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        kernels.gradcam(**(GOOD | change))
