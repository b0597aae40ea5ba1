"""Batch-norm with residual and ReLU: both paths against float64, and against torch's own modules."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from error_budget import assert_within_budget, upstream
from torch import Tensor

import kernels


class Case(NamedTuple):
    shape: tuple[int, int, int, int]
    groups: int
    residual: bool
    relu: bool
    why: str


CASES = [
    Case((4, 64, 7, 5), 1, False, True, "relu"),
    Case((4, 64, 7, 5), 2, True, True, "residual, two groups"),
    Case((2, 256, 3, 3), 1, True, True, "residual"),
    Case((2, 256, 3, 3), 2, False, True, "relu, two groups"),
    Case((3, 64, 5, 3), 1, False, False, "shortcut"),
    Case((4, 64, 5, 3), 2, True, False, "residual without relu"),
    Case((3, 20, 5, 3), 3, True, True, "ragged channels, three groups"),
    Case((2, 1, 1, 1), 1, True, True, "one channel, two values"),
]
PATHS = [(impl, dtype) for impl in ("torch", "triton") for dtype in (torch.float32, torch.bfloat16, torch.float16)]


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(len(case.why))

    def image(scale: float, shift: float) -> Tensor:
        values = scale * torch.randn(case.shape, generator=generator) + shift
        return values.to(device, dtype).to(memory_format=torch.channels_last)

    gamma, beta = (torch.randn(case.shape[1], generator=generator).to(device) for _ in range(2))
    found = dict(x=image(3.0, 2.0), gamma=gamma, beta=beta)
    return found | (dict(residual=image(1.0, 0.0)) if case.residual else {})


def run(function, tensors: dict[str, Tensor], case: Case, **options) -> dict[str, Tensor]:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    channels = torch.linspace(-1, 2, case.shape[1]).to(tensors["gamma"])
    running = dict(running_mean=channels, running_var=channels.exp(), momentum=0.3)
    out = function(**leaves, relu=case.relu, groups=case.groups, **running, **options)
    grads = torch.autograd.grad((out.y * upstream(out.y, 2).to(out.y)).sum(), list(leaves.values()))
    return out._asdict() | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


@pytest.mark.parametrize(("impl", "dtype"), PATHS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_matches_float64(case, impl, dtype, kernel_device, poisoned_empty):
    tensors = inputs(case, dtype, kernel_device if impl == "triton" else torch.device("cpu"))
    truth = run(kernels.reference.batch_norm, {name: t.double() for name, t in tensors.items()}, case)
    eager = run(kernels.reference.batch_norm, tensors, case)
    ours = run(kernels.batch_norm, tensors, case, impl=impl)
    for name, mine in ours.items():
        assert_within_budget(name, mine, eager[name], truth[name])
    for name in ("y", "dx"):
        assert ours[name].dtype == dtype and ours[name].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_is_torchs_batch_norm(impl, kernel_device):
    case = CASES[2]
    tensors = inputs(case, torch.float32, kernel_device)

    def eager(x, gamma, beta, residual, relu, groups, running_mean, running_var, momentum):
        running = running_mean.clone(), running_var.clone()
        y = F.batch_norm(x, *running, gamma, beta, training=True, momentum=momentum) + residual
        mean, var = x.mean((0, 2, 3))[None], x.var((0, 2, 3), correction=0)[None]
        return kernels.reference.BatchNorm(torch.relu(y), mean, var, *running)

    theirs = run(eager, tensors, case)
    for name, mine in run(kernels.batch_norm, tensors, case, impl=impl).items():
        torch.testing.assert_close(mine, theirs[name], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_statistics_far_from_zero_keep_their_digits(impl, kernel_device):
    """Sums of squares would lose all of them; the first rows are outliers, which a shift by the first value would suffer from."""
    x = torch.randn(4, 32, 7, 7, generator=torch.Generator().manual_seed(0))
    x[0, :, 0] *= 50
    x = (x + 1000).to(kernel_device).to(memory_format=torch.channels_last)
    _, mean, var, *_ = kernels.batch_norm(x, torch.ones(32, device=x.device), torch.zeros(32, device=x.device), impl=impl)
    truth = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(var[0].double(), truth[0], rtol=2e-5, atol=0)
    torch.testing.assert_close(mean[0].double(), truth[1], rtol=2e-7, atol=0)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_any_strides(impl, kernel_device):
    tensors = inputs(CASES[1], torch.float32, kernel_device)
    expected = run(kernels.batch_norm, tensors, CASES[1], impl=impl)
    other = tensors | {"x": tensors["x"].contiguous(), "residual": F.pad(tensors["residual"], (1, 2, 3, 1))[:, :, 3:-1, 1:-2]}
    for name, mine in run(kernels.batch_norm, other, CASES[1], impl=impl).items():
        torch.testing.assert_close(mine, expected[name])
    leaf = tensors["x"].detach().requires_grad_()  # the gradient of a pooled feature, which has a stride of 0
    kernels.batch_norm(leaf, tensors["gamma"], tensors["beta"], impl=impl).y.mean((2, 3)).square().sum().backward()
    truth = tensors["x"].detach().requires_grad_()
    kernels.reference.batch_norm(truth, tensors["gamma"], tensors["beta"]).y.mean((2, 3)).square().sum().backward()
    torch.testing.assert_close(leaf.grad, truth.grad)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: case.why)
def test_a_gradient_to_the_input_alone_and_then_to_everything(case, impl, kernel_device):
    """PP-SSL differentiates one forward pass twice: for the CAM, and for the loss."""
    tensors = inputs(case, torch.float32, kernel_device)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    y = kernels.batch_norm(**leaves, relu=case.relu, groups=case.groups, impl=impl).y
    first, second = (upstream(y, seed).to(y) for seed in (2, 3))
    (image,) = torch.autograd.grad((y * first).sum(), leaves["x"], retain_graph=True)
    both = torch.autograd.grad((y * (second + image.detach())).sum(), list(leaves.values()))
    assert torch.equal(image, run(kernels.batch_norm, tensors, case, impl=impl)["dx"])
    truth = {name: tensor.double().detach().requires_grad_() for name, tensor in tensors.items()}
    y = kernels.reference.batch_norm(**truth, relu=case.relu, groups=case.groups).y
    for mine, true in zip(both, torch.autograd.grad((y * (second + image)).sum(), list(truth.values())), strict=True):
        torch.testing.assert_close(mine.double(), true, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_only_what_is_asked_for_gets_a_gradient(impl, kernel_device):
    tensors = inputs(CASES[2], torch.float32, kernel_device)
    leaf = tensors["residual"].requires_grad_()
    out = kernels.batch_norm(**tensors, impl=impl)
    assert not out.mean.requires_grad and not out.var.requires_grad
    out.y.sum().backward()
    assert torch.equal(leaf.grad, (out.y > 0).to(leaf))
    with torch.no_grad():
        assert torch.equal(kernels.batch_norm(**tensors, impl=impl).y, out.y)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_residual_that_is_the_input(impl, kernel_device):
    tensors = inputs(CASES[0], torch.float32, kernel_device)

    def twice(x, *, op, **rest):
        return op(x, residual=x, **rest)

    ours = run(twice, tensors, CASES[0], op=kernels.batch_norm, impl=impl)
    truth = run(twice, tensors, CASES[0], op=kernels.reference.batch_norm)
    for name, mine in ours.items():
        torch.testing.assert_close(mine, truth[name])


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_nan_in_nan_out(impl, kernel_device):
    tensors = inputs(CASES[1], torch.float32, kernel_device)
    tensors["x"][0, 1, 0, 0] = float("nan")
    y = kernels.batch_norm(**tensors, groups=2, impl=impl).y
    assert y[:2, 1].isnan().all() and torch.isfinite(y[2:]).all() and torch.isfinite(y[:, 2:]).all()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_constant_channel_gives_its_shift(impl, kernel_device):
    x = torch.full((2, 16, 3, 3), 0.1, device=kernel_device).to(memory_format=torch.channels_last)
    out = kernels.batch_norm(x, torch.ones(16, device=x.device), torch.full((16,), 0.25, device=x.device), impl=impl)
    torch.testing.assert_close(out.y, torch.full_like(x, 0.25))
    assert (out.var >= 0).all() and (out.var < 1e-12).all()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_equal_bits_every_time_and_under_autocast(impl, kernel_device):
    tensors = inputs(CASES[1], torch.float32, kernel_device)
    first = run(kernels.batch_norm, tensors, CASES[1], impl=impl)
    with torch.autocast(kernel_device.type, dtype=torch.bfloat16):
        second = run(kernels.batch_norm, tensors, CASES[1], impl=impl)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_second_derivatives_are_refused(impl, kernel_device):
    tensors = inputs(CASES[0], torch.float32, kernel_device)
    y = kernels.batch_norm(**(tensors | {"x": tensors["x"].requires_grad_()}), impl=impl).y
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.sum(), tensors["x"], create_graph=True)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_one_graph_under_compile(impl, kernel_device):
    tensors = inputs(CASES[1], torch.float32, kernel_device)

    def step(x):
        return kernels.batch_norm(**(tensors | {"x": 2 * x}), groups=2, impl=impl).y.square().sum()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = tensors["x"].detach().requires_grad_()
        results.append(torch.autograd.grad(function(leaf), leaf)[0])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[5]], ids=lambda case: case.why)
def test_opcheck(case, impl, kernel_device):
    tensors = inputs(case, torch.float32, kernel_device)
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    running = (leaves[1].detach().clone(), leaves[2].detach().clone()) if case.groups == 1 else (None, None)
    arguments = (*leaves[:3], leaves[3] if case.residual else None, *running, 0.1, case.relu, 1e-5, case.groups, impl)
    torch.library.opcheck(torch.ops.ppssl.batch_norm.default, arguments)


@pytest.mark.parametrize(("impl", "dtype"), PATHS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_a_gradient_in_two_parts_is_their_sum(case, impl, dtype, kernel_device, poisoned_empty):
    """To the bit: a compiled step must not depend on whether the sum was taken into the op."""
    device = kernel_device if impl == "triton" else torch.device("cpu")
    if impl == "triton" and dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter truncates to bfloat16 where a GPU rounds")
    tensors = inputs(case, dtype, device)
    _, mean, var, bits, *_ = torch.ops.ppssl.batch_norm(
        *(tensors.get(name) for name in ("x", "gamma", "beta", "residual")), None, None, 0.1, case.relu, 1e-5, case.groups, impl
    )
    first, second = (upstream(tensors["x"], seed).to(device, dtype) for seed in (2, 3))
    common = (tensors["x"], tensors["gamma"], tensors["beta"], mean, var, bits, case.relu, 1e-5, impl)
    whole = torch.ops.ppssl.batch_norm_backward(first + second, *common)
    for ours, theirs in zip(torch.ops.ppssl.batch_norm_backward(first, *common, second), whole, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_running_statistics_are_returned_and_not_changed(impl, kernel_device):
    tensors = inputs(CASES[1], torch.float32, kernel_device)
    running = torch.zeros(64, device=kernel_device), torch.ones(64, dtype=torch.float64, device=kernel_device)
    out = kernels.batch_norm(**tensors, groups=2, running_mean=running[0], running_var=running[1], momentum=0.1, impl=impl)
    parts = tensors["x"].double().unflatten(0, (2, -1))
    truth = parts.mean((1, 3, 4)).mean(0), parts.var((1, 3, 4)).mean(0)
    torch.testing.assert_close(out.running_mean.double(), 0.1 * truth[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.running_var, 0.9 + 0.1 * truth[1], rtol=1e-5, atol=1e-6)
    assert not running[0].any() and (running[1] == 1).all() and not out.running_mean.requires_grad
    assert kernels.batch_norm(**tensors, groups=2, impl=impl).running_mean is None


GOOD = {"x": torch.ones(4, 3, 8, 8), "gamma": torch.ones(3), "beta": torch.ones(3)}
BAD = [
    ({"x": torch.ones(4, 3, 8)}, ValueError, r"\[4, 3, 8\]"),
    ({"x": torch.ones(4, 3, 8, 8, dtype=torch.int32)}, TypeError, "int32"),
    ({"gamma": torch.ones(4)}, ValueError, r"gamma must be \[3\], got \[4\]"),
    ({"beta": torch.ones(3, 1)}, ValueError, "beta"),
    ({"residual": torch.ones(4, 3, 8, 4)}, ValueError, r"\[4, 3, 8, 4\]"),
    ({"residual": torch.ones(4, 3, 8, 8).double()}, TypeError, "float64"),
    ({"groups": 3}, ValueError, "batch of 4, got 3"),
    ({"groups": 0}, ValueError, "got 0"),
    ({"x": torch.ones(4, 3, 1, 1), "groups": 4}, ValueError, "one value per channel"),
    ({"running_mean": torch.ones(3)}, ValueError, "go together"),
    ({"running_mean": torch.ones(3), "running_var": torch.ones(2)}, ValueError, r"running_var must be \[3\], got \[2\]"),
    ({"eps": -1.0}, ValueError, "eps"),
    ({"impl": "fast"}, ValueError, "fast"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        kernels.batch_norm(**(GOOD | change))
