"""The image's max-out mask by moments and winners: against the plain form in float64, values and gradients."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from error_budget import assert_within_budget, upstream

import kernels


class Case(NamedTuple):
    batch: int
    height: int
    width: int
    cell: int
    projections: int
    minmax: str | None
    training: bool
    channels_last: bool
    why: str


CASES = [
    Case(2, 16, 16, 8, 32, "batch", True, False, "published form"),
    Case(3, 8, 24, 8, 5, "image", True, True, "columns no power of two, channels_last"),
    Case(2, 8, 16, 4, 3, None, True, False, "no min-max"),
    Case(2, 8, 8, 8, 4, "image", False, False, "running statistics, one cell"),
    Case(1, 4, 12, 4, 1, "batch", False, True, "one image, one projection"),
]
PATHS = [("torch", torch.float32), ("torch", torch.bfloat16), ("triton", torch.float32), ("triton", torch.float16)]
if torch.cuda.is_available():
    PATHS.append(("triton", torch.bfloat16))
NAMES = ("mask", "mean", "var", "dweight", "dgamma", "dbeta")


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(case.why))

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    image = draw(case.batch, 3, case.height, case.width).to(dtype)
    if case.channels_last:
        image = image.to(memory_format=torch.channels_last)
    tensors = {
        "image": image,
        "weight": draw(case.projections, 3).to(dtype),
        "gamma": 1 + 0.3 * draw(case.projections),
        "beta": 0.5 + 0.1 * draw(case.projections),
        "running_mean": 0.1 * draw(case.projections),
        "running_var": 0.5 + torch.rand(case.projections, generator=generator),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def run(function, tensors, case, **options):
    leaves = [tensors[name].detach().requires_grad_() for name in ("weight", "gamma", "beta")]
    running = {name: tensors[name] for name in ("running_mean", "running_var")}
    out = function(tensors["image"], *leaves, **running, training=case.training, cell=case.cell, minmax=case.minmax, **options)
    return [*out, *torch.autograd.grad((out.mask * upstream(out.mask, 1).to(out.mask)).sum(), leaves)]


def double(tensors):
    return {name: tensor.double() for name, tensor in tensors.items()}


@pytest.mark.parametrize(("impl", "dtype"), PATHS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_matches_the_plain_form_in_float64(case, impl, dtype, kernel_device, poisoned_empty):
    tensors = inputs(case, dtype, kernel_device if impl == "triton" else torch.device("cpu"))
    truth = run(kernels.reference.maxout_image, double(tensors), case)
    eager = run(kernels.reference.maxout_image, tensors, case)
    ours = run(kernels.maxout_image, tensors, case, impl=impl)
    for name, mine, theirs, true in zip(NAMES, ours, eager, truth, strict=True):
        # The min-max takes most of the gradient to beta away: what is left keeps the rounding of the whole.
        units = 1024 if name.startswith("d") and case.minmax else 16
        assert_within_budget(name, mine, theirs, true, units=units)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_exact_in_float64(case):
    tensors = double(inputs(case, torch.float64, torch.device("cpu")))
    truth = run(kernels.reference.maxout_image, tensors, case)
    ours = run(kernels.maxout_image, tensors, case)
    for mine, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_any_strides(impl, kernel_device):
    tensors = inputs(CASES[1], torch.float32, kernel_device)
    expected = run(kernels.maxout_image, tensors, CASES[1], impl=impl)
    image = torch.nn.functional.pad(tensors["image"].transpose(2, 3).contiguous().transpose(2, 3), (1, 2, 3, 1))
    cropped = tensors | {"image": image[:, :, 3:-1, 1:-2]}
    for mine, theirs in zip(run(kernels.maxout_image, cropped, CASES[1], impl=impl), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_dead_relu_gives_zeros_and_no_gradient(impl, kernel_device):
    tensors = inputs(CASES[0], torch.float32, kernel_device)
    tensors["beta"] = torch.full_like(tensors["beta"], -100.0)
    ours = run(kernels.maxout_image, tensors, CASES[0], impl=impl)
    assert (ours[0] == 0).all()
    assert all((gradient == 0).all() for gradient in ours[3:])


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_pixels_of_one_color_are_one_winner(impl, kernel_device):
    """Saturated areas tie: any of their pixels is the winner, and the gradient is the same."""
    tensors = inputs(CASES[0], torch.float32, kernel_device)
    tensors["image"] = tensors["image"].clamp(-0.5, 0.5).sign() * 0.5
    truth = run(kernels.reference.maxout_image, double(tensors), CASES[0])
    ours = run(kernels.maxout_image, tensors, CASES[0], impl=impl)
    for name, mine, true in zip(NAMES, ours, truth, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_images_far_from_zero_keep_their_variance(impl, kernel_device):
    """Raw pixel values: the covariance is a small difference of large moments, hence float64."""
    case = CASES[0]._replace(minmax=None)
    tensors = inputs(case, torch.float32, kernel_device)
    tensors["image"] = 200 + 0.05 * tensors["image"]
    truth = kernels.reference.maxout_image(**double(tensors), training=True, cell=case.cell)
    ours = kernels.maxout_image(**tensors, training=True, cell=case.cell, impl=impl)
    torch.testing.assert_close(ours.var.double(), truth.var, rtol=1e-5, atol=0)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_nan_in_nan_out(impl, kernel_device):
    tensors = inputs(CASES[3]._replace(height=16), torch.float32, kernel_device)
    tensors["image"][1, 2, 3, 5] = float("nan")
    out = kernels.maxout_image(**tensors, training=False, cell=8, impl=impl)
    assert out.mask[1, 0, 0].isnan() and torch.isfinite(out.mask[0]).all()
    assert kernels.maxout_image(**tensors, cell=8, minmax="batch", impl=impl).mask.isnan().all()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_equal_bits_every_time(impl, kernel_device):
    tensors = inputs(CASES[1], torch.float32, kernel_device)
    first, second = (run(kernels.maxout_image, tensors, CASES[1], impl=impl) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_statistics_are_batch_norms():
    tensors = inputs(CASES[0], torch.float32, torch.device("cpu"))
    mean, var = tensors["running_mean"].clone(), tensors["running_var"].clone()
    u = torch.nn.functional.conv2d(tensors["image"], tensors["weight"][:, :, None, None])
    torch.nn.functional.batch_norm(u, mean, var, training=True, momentum=0.1)
    out = kernels.maxout_image(**tensors, cell=8)
    count = u.numel() / u.shape[1]
    torch.testing.assert_close(0.9 * tensors["running_mean"] + 0.1 * out.mean, mean)
    torch.testing.assert_close(0.9 * tensors["running_var"] + 0.1 * out.var * count / (count - 1), var)


def test_mean_pooling_is_the_reference():
    tensors = inputs(CASES[0], torch.float32, torch.device("cpu"))
    ours = kernels.maxout_image(**tensors, cell=8, minmax="image", pool="mean")
    theirs = kernels.reference.maxout_image(**tensors, cell=8, minmax="image", pool="mean")
    assert torch.equal(ours.mask, theirs.mask)
    with pytest.raises(ValueError, match="no pool='mean'"):
        kernels.maxout_image(**tensors, cell=8, pool="mean", impl="torch")


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_one_graph_under_compile_and_autocast(impl, kernel_device):
    tensors = inputs(CASES[0], torch.float32, kernel_device)
    image = tensors["image"].requires_grad_()  # a constant of the op, whatever it requires elsewhere

    def step(weight, gamma, beta):
        with torch.autocast(kernel_device.type, dtype=torch.bfloat16):
            out = kernels.maxout_image(image, 2 * weight, gamma, beta, cell=8, minmax="batch", impl=impl)
        return out.mask.square().sum(), out.var

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [tensors[name].detach().requires_grad_() for name in ("weight", "gamma", "beta")]
        total, var = function(*leaves)
        results.append((var, *torch.autograd.grad(total, leaves)))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)
        assert mine.dtype == torch.float32


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_opcheck(impl, kernel_device):
    tensors = inputs(CASES[1], torch.float32, kernel_device)
    leaves = [tensors[name].detach().requires_grad_() for name in ("weight", "gamma", "beta")]
    arguments = (tensors["image"], *leaves, None, None, True, 1e-5, 8, "image", "", impl)
    torch.library.opcheck(torch.ops.ppssl.maxout_image.default, arguments)


GOOD = {"image": torch.ones(2, 3, 8, 8), "weight": torch.ones(5, 3), "gamma": torch.ones(5), "beta": torch.ones(5),
        "cell": 4}  # fmt: skip
BAD = [
    ({"image": torch.ones(2, 4, 8, 8), "weight": torch.ones(5, 4)}, ValueError, r"\[2, 4, 8, 8\]"),
    ({"image": torch.ones(2, 3, 8, 8, dtype=torch.uint8)}, TypeError, "uint8"),
    ({"cell": 3}, ValueError, "got 3"),
    ({"cell": 0}, ValueError, "got 0"),
    ({"weight": torch.ones(5, 3, 1, 1)}, ValueError, r"\[5, 3, 1, 1\]"),
    ({"training": False}, ValueError, "running_mean"),
    ({"pool": "sum"}, ValueError, "sum"),
    ({"minmax": "none"}, ValueError, "none"),
    ({"image": torch.ones(2, 3, 9, 9), "cell": 3, "impl": "triton"}, ValueError, "power of two of at most 128, got 3"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        kernels.maxout_image(**(GOOD | change))
