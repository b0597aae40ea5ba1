"""The max-out projection: both paths against float64, forward and every gradient, and the edges of the contract."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from error_budget import assert_within_budget, upstream

import kernels


class Case(NamedTuple):
    shape: tuple[int, int, int, int]
    width: int
    minmax: str | None
    training: bool
    channels_last: bool
    why: str


CASES = [
    Case((2, 32, 4, 4), 32, "batch", True, True, "published form, whole tiles"),
    Case((3, 40, 3, 7), 5, "image", True, False, "ragged everywhere, NCHW"),
    Case((2, 20, 2, 3), 16, None, True, True, "no min-max"),
    Case((2, 24, 3, 3), 8, "image", False, True, "running statistics"),
    Case((2, 24, 3, 3), 8, "batch", False, False, "running statistics over the batch"),
    Case((1, 33, 3, 5), 1, None, True, False, "one projection, one image"),
]
PATHS = [("torch", torch.float32), ("torch", torch.bfloat16), ("triton", torch.float32), ("triton", torch.float16)]
if torch.cuda.is_available():  # the interpreter truncates to bfloat16 where a GPU rounds
    PATHS.append(("triton", torch.bfloat16))
NAMES = ("mask", "pooled", "mean", "var", "dfeature", "dweight", "dgamma", "dbeta")


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(case.why))
    channels, width = case.shape[1], case.width

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    feature = torch.relu(draw(*case.shape)).to(dtype)
    if case.channels_last:
        feature = feature.to(memory_format=torch.channels_last)
    tensors = {
        "feature": feature,
        # in the feature's dtype, so that every path multiplies the same numbers
        "weight": (draw(width, channels) * channels**-0.5).to(dtype),
        "gamma": 1 + 0.3 * draw(width),
        "beta": 0.1 * draw(width),
        "running_mean": 0.1 * draw(width),
        "running_var": 0.5 + torch.rand(width, generator=generator),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def run(function, tensors, case, **options):
    leaves = [tensors[name].detach().requires_grad_() for name in ("feature", "weight", "gamma", "beta")]
    running = {name: tensors[name] for name in ("running_mean", "running_var")}
    out = function(*leaves, **running, training=case.training, minmax=case.minmax, **options)
    total = sum((part * upstream(part, seed).to(part)).sum() for seed, part in enumerate((out.mask, out.pooled)))
    return [*out, *torch.autograd.grad(total, leaves)]


def double(tensors):
    return {name: tensor.double() for name, tensor in tensors.items()}


@pytest.mark.parametrize(("impl", "dtype"), PATHS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_matches_float64(case, impl, dtype, kernel_device, poisoned_empty):
    tensors = inputs(case, dtype, kernel_device if impl == "triton" else torch.device("cpu"))
    truth = run(kernels.reference.maxout, double(tensors), case)
    eager = run(kernels.reference.maxout, tensors, case)
    ours = run(kernels.maxout, tensors, case, impl=impl)
    assert ours[4].stride() == tensors["feature"].stride()
    for name, mine, theirs, true in zip(NAMES, ours, eager, truth, strict=True):
        # 16 units: float32 sums of a few thousand terms; in eval mode the min-max gradient cancels to a small rest
        assert_within_budget(name, mine, theirs, true, units=16 if case.training or not case.minmax else 256)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("layout", ["transposed", "cropped"])
def test_any_strides(impl, layout, kernel_device):
    case = Case((2, 20, 3, 4), 5, "image", True, False, "strides")
    tensors = inputs(case, torch.float32, kernel_device)
    expected = run(kernels.maxout, tensors, case, impl=impl)
    feature = tensors["feature"]
    if layout == "transposed":
        feature = feature.transpose(2, 3).contiguous().transpose(2, 3)
    else:
        feature = torch.nn.functional.pad(feature, (1, 2, 3, 1))[:, :, 3:-1, 1:-2]
    assert not feature.is_contiguous()
    got = run(kernels.maxout, tensors | {"feature": feature}, case, impl=impl)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("output", ["mask", "pooled"])
def test_gradient_of_one_output_alone(impl, output, kernel_device):
    case = CASES[1]
    tensors = inputs(case, torch.float32, kernel_device)
    gradients = []
    for function, options in ((kernels.reference.maxout, {}), (kernels.maxout, {"impl": impl})):
        leaves = [tensors[name].detach().requires_grad_() for name in ("feature", "weight", "gamma", "beta")]
        part = getattr(function(*leaves, minmax="image", **options), output)
        gradients.append(torch.autograd.grad((part * upstream(part, 3).to(part)).sum(), leaves))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_all_equal_positions_share_the_range(impl, kernel_device):
    """One value everywhere: the range is empty, the mask zero, and no gradient blows up to NaN."""
    case = Case((2, 8, 2, 2), 4, "image", False, True, "flat")
    tensors = inputs(case, torch.float32, kernel_device)
    tensors["feature"] = torch.ones_like(tensors["feature"])
    tensors["beta"] = torch.ones_like(tensors["beta"])
    truth = run(kernels.reference.maxout, double(tensors), case)
    ours = run(kernels.maxout, tensors, case, impl=impl)
    assert (ours[0] == 0).all() and (ours[1] == 0).all()
    for name, mine, true in zip(NAMES[4:], ours[4:], truth[4:], strict=True):
        # gradients of order 1e7 (one over the empty range) that cancel
        torch.testing.assert_close(mine.double(), true, rtol=1e-3, atol=16.0, msg=name)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_nan_in_nan_out(impl, kernel_device):
    tensors = inputs(CASES[3], torch.float32, kernel_device)
    tensors["feature"][1, 2, 0, 0] = float("nan")
    out = kernels.maxout(**tensors, training=False, impl=impl)
    assert out.mask[1, 0, 0].isnan() and out.pooled[1].isnan().any()
    assert torch.isfinite(out.mask[0]).all()
    weight = tensors["weight"].clone()
    weight[3, 1] = float("nan")  # one projection of many: the maximum must not skip it
    assert kernels.maxout(**(tensors | {"weight": weight}), training=False, impl=impl).mask.isnan().all()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_equal_bits_every_time(impl, kernel_device):
    tensors = inputs(CASES[0], torch.float32, kernel_device)
    first, second = (run(kernels.maxout, tensors, CASES[0], impl=impl) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_statistics_are_batch_norms_and_nothing_is_mutated(impl, kernel_device):
    tensors = inputs(CASES[0], torch.float32, kernel_device)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    with torch.no_grad():
        out = kernels.maxout(**tensors, impl=impl)
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)
    mean, var = before["running_mean"], before["running_var"]
    u = torch.nn.functional.conv2d(tensors["feature"], tensors["weight"][:, :, None, None])
    torch.nn.functional.batch_norm(u, mean, var, training=True, momentum=0.1)
    count = u.numel() / u.shape[1]
    torch.testing.assert_close(0.9 * tensors["running_mean"] + 0.1 * out.mean, mean)
    torch.testing.assert_close(0.9 * tensors["running_var"] + 0.1 * out.var * count / (count - 1), var)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_autocast_keeps_float32(impl, kernel_device):
    tensors = inputs(CASES[0], torch.float32, kernel_device)
    plain = kernels.maxout(**tensors, minmax="batch", impl=impl)
    with torch.autocast(kernel_device.type, dtype=torch.bfloat16):
        cast = kernels.maxout(**tensors, minmax="batch", impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_one_graph_under_compile(impl, kernel_device):
    tensors = inputs(CASES[0], torch.float32, kernel_device)
    running = {name: tensors.pop(name) for name in ("running_mean", "running_var")}

    def step(feature, weight, gamma, beta):
        out = kernels.maxout(2 * feature, weight, gamma, beta, **running, minmax="batch", impl=impl)
        return out.mask.square().sum() + out.pooled.sum(), out.mean

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors.values()]
        total, mean = function(*leaves)
        results.append((mean, *torch.autograd.grad(total, leaves)))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_opcheck(impl, kernel_device):
    tensors = inputs(CASES[2], torch.float32, kernel_device)
    leaves = [tensors[name].detach().requires_grad_() for name in ("feature", "weight", "gamma", "beta")]
    torch.library.opcheck(torch.ops.ppssl.maxout.default, (*leaves, None, None, True, 1e-5, "batch", "", impl))


def test_gradcheck_in_float64():
    tensors = double(inputs(CASES[1], torch.float64, torch.device("cpu")))
    leaves = [tensors[name].requires_grad_() for name in ("feature", "weight", "gamma", "beta")]

    def outputs(*leaves):
        out = kernels.maxout(*leaves, minmax="batch")
        return out.mask, out.pooled

    assert torch.autograd.gradcheck(outputs, leaves)


GOOD = {"feature": torch.ones(2, 3, 4, 4), "weight": torch.ones(5, 3), "gamma": torch.ones(5), "beta": torch.ones(5)}
BAD = [
    ({"feature": torch.ones(2, 3, 4)}, ValueError, r"\[2, 3, 4\]"),
    ({"feature": torch.ones(0, 3, 4, 4)}, ValueError, r"\[0, 3, 4, 4\]"),
    ({"feature": torch.ones(2, 3, 4, 4, dtype=torch.uint8)}, TypeError, "uint8"),
    ({"weight": torch.ones(5, 3, 1, 1)}, ValueError, r"\[5, 3, 1, 1\]"),
    ({"weight": torch.ones(5, 4)}, ValueError, r"\[5, 4\]"),
    ({"gamma": torch.ones(4)}, ValueError, r"gamma must be \[5\], got \[4\]"),
    ({"beta": torch.ones(5, device="meta")}, ValueError, "meta"),
    ({"training": False}, ValueError, "running_mean"),
    ({"minmax": "global"}, ValueError, "global"),
    ({"eps": -1.0}, ValueError, "-1.0"),
    ({"impl": "cudnn"}, ValueError, "cudnn"),
    (
        {"weight": torch.ones(65, 3), "gamma": torch.ones(65), "beta": torch.ones(65), "impl": "triton"},
        ValueError,
        "at most 64, got 65",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        kernels.maxout(**(GOOD | change))
