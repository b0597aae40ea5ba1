"""``encoder.freeze`` in the step: what is frozen stays as it is, costs no backward pass, and the rest gets the gradients that it
would get from the same network."""

from __future__ import annotations

import collections
import copy

import pytest
import torch
import torch.nn.functional as F
from small_methods import DIM, QUEUE, batch, build_by_name, step_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ppssl import PPSSL
from ppssl.batch_norm import GroupedBatchNorm, group_batch_norm
from ppssl.encoder import FeatureNet, MaskBranch, Trunk, projection_head
from ppssl.method import Method
from ppssl.settings import variant

EARLY = ("stem", "layer1", "layer2")
ALL = ("stem", "layer1", "layer2", "layer3", "layer4")
ARCH = "resnet18_w8_s16"


def trunk(freeze: tuple[str, ...]) -> Trunk:
    """Random weights, away from the zeros that blocks begin with, and running statistics that are not those of a new network."""
    torch.manual_seed(0)
    made = Trunk(ARCH)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    made.freeze(freeze)
    return made


def build(name: str, freeze: tuple[str, ...]) -> Method:
    """A method by name; ``guided SOURCE`` is PP-SSL with its CAM there."""
    name, _, source = name.partition(" ")
    if name != "guided":
        return build_by_name(name, trunk(freeze), side=32)
    settings = variant("ppssl", "guided", {"iadm.sources": (source,)})
    made = trunk(freeze)
    network = FeatureNet(made, MaskBranch(made.channels, 32, minmax="image"))
    return PPSSL(
        network, projection_head("mlp2", made.channels, DIM), torch.randn(8, 5), settings=settings, dim=DIM, queue_size=QUEUE
    )


def part_of(name: str) -> str | None:
    """The part of a ResNet that a tensor of a method belongs to."""
    names = name.split("trunk.")
    top = names[1].split(".")[0] if len(names) == 2 else None
    return "stem" if top in ("conv1", "bn1") else top


CASES = [
    ("moco", EARLY), ("simclr", EARLY), ("byol", EARLY), ("lcr", EARLY), ("lcr", ALL), ("ldfs", EARLY), ("guided image", EARLY),
    ("guided layer1", EARLY), ("guided layer4", ALL), ("moco", ("layer2",)), ("moco", ("bn",)), ("guided image", ("stem", "bn")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "freeze"), CASES, ids=lambda value: value if isinstance(value, str) else "+".join(value))
def test_what_is_frozen_stays_to_the_bit_and_the_rest_is_trained(name: str, freeze: tuple[str, ...]) -> None:
    method = build(name, freeze)
    step = step_of(method)
    before = copy.deepcopy(method.state_dict())
    for seed in range(2):
        assert float(step(batch(side=32, seed=seed)).stats["skipped"]) == 0
    still = {n for n in before if part_of(n) in freeze}
    if "bn" in freeze:
        still |= {n for n in before if "trunk." in n and (".bn" in n or "downsample.1" in n)}
    moved = {n for n in before if not torch.equal(before[n], method.state_dict()[n])}
    assert still and not moved & still
    follows = [n for n in before if "trunk." in n and n not in still and not n.endswith("num_batches_tracked")]
    assert len([n for n in follows if n in moved]) >= 0.9 * len(follows)  # a batch-norm of a single map cell has no gradient
    assert moved


@pytest.mark.parametrize(("name", "freeze"), CASES[:8], ids=lambda value: value if isinstance(value, str) else "+".join(value))
def test_gradients_are_those_of_the_whole_network_with_these_norms_in_eval_mode(name: str, freeze: tuple[str, ...]) -> None:
    frozen, whole = build(name, freeze).train(), build(name, ()).train()
    for n, module in whole.named_modules():
        if part_of(f"{n}.") in freeze:
            module.eval()
    made = []
    for method in (frozen, whole):
        step = step_of(method)
        for n, module in method.named_modules():  # step_of puts the whole method into training mode
            if part_of(f"{n}.") in freeze:
                module.eval()
        torch.manual_seed(3)
        step.set_schedule()
        _, gradients = step.gradients(step.prepare(batch(side=32)))
        names = {id(p): n for n, p in method.named_parameters()}
        made.append({names[id(p)]: g for p, g in zip(step.parameters, gradients, strict=True)})
    assert made[0].keys() == {n for n in made[1] if part_of(n) not in freeze}
    for n, gradient in made[0].items():
        assert (gradient is None) == (made[1][n] is None)
        if gradient is not None:
            torch.testing.assert_close(gradient, made[1][n], msg=lambda text, n=n: f"{n}: {text}")


class Convolutions(TorchDispatchMode):
    """Counts the passes of convolutions: forward, or which gradients a backward computes (data, weight)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: collections.Counter = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            self.found["forward"] += 1
        elif func is torch.ops.aten.convolution_backward.default:
            self.found[tuple(args[-1][:2])] += 1
        return func(*args, **(kwargs or {}))


DATA, BOTH, WEIGHT = (True, False), (True, True), (False, True)
# a ResNet-18 has 20 convolutions, 10 of them up to layer2; two of layer3 see the frozen map, which needs no gradient
PASSES = [
    ("moco", EARLY, {"forward": 40, BOTH: 8, WEIGHT: 2}),
    ("guided image", EARLY, {"forward": 40, DATA: 20, BOTH: 8, WEIGHT: 2}),
    ("guided layer1", EARLY, {"forward": 40, DATA: 15, BOTH: 8, WEIGHT: 2}),
    ("guided layer4", ALL, {"forward": 40}),
    ("lcr", ALL, {"forward": 40}),
]


@pytest.mark.parametrize(("name", "freeze", "expected"), PASSES, ids=[p[0] + "+".join(p[1]) for p in PASSES])
def test_no_backward_pass_is_made_for_what_is_frozen(name: str, freeze: tuple[str, ...], expected: dict) -> None:
    step = step_of(build(name, freeze))
    with Convolutions() as trace:
        step(batch(2, side=32))
    # of the mask branch's 1x1 projection, ours is an op of its own
    assert trace.found == expected


@pytest.mark.parametrize(
    ("name", "freeze", "mode"),
    [
        ("guided image", EARLY, "encoder"),
        ("lcr", ALL, "encoder"),
        ("guided image", EARLY, "step"),
        ("guided layer1", EARLY, "step"),
    ],
)
def test_every_mode_computes_the_eager_step(name: str, freeze: tuple[str, ...], mode: str) -> None:
    torch._dynamo.reset()
    states = []
    for how in ({}, {"compile": mode, "backend": "aot_eager"}):
        method = build(name, freeze)
        step = step_of(method, **how)
        step(batch(side=32))
        states.append(method.state_dict())
    for n, tensor in states[0].items():
        if part_of(n) in freeze:
            assert torch.equal(tensor, states[1][n]), n
        elif tensor.is_floating_point():
            torch.testing.assert_close(states[1][n], tensor, rtol=1e-3, atol=1e-4, msg=lambda text, n=n: f"{n}: {text}")
    torch._dynamo.reset()


def test_a_compiled_encoder_says_that_it_has_no_gradient_by_a_map_inside() -> None:
    with pytest.raises(ValueError, match="run.compile: encoder has no gradient by layer1.*use step or off"):
        step_of(build("guided layer1", ()), compile="encoder", backend="eager")


def test_frozen_norms_stay_frozen_in_the_fused_batch_norm_and_in_parts_of_a_batch(kernel_device: torch.device) -> None:
    made = trunk(("stem", "layer1"))
    made.fuse_batch_norm()
    grouped = group_batch_norm(copy.deepcopy(made), 2).train()
    assert (
        isinstance(grouped.layer1[0].bn1, GroupedBatchNorm)
        and not grouped.layer1[0].bn1.training
        and grouped.layer2[0].bn1.training
    )
    images = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
    reference = trunk(()).eval()
    for one in (made.train(), grouped):
        one = one.to(kernel_device, memory_format=torch.channels_last)
        found = one.maps(images.to(kernel_device))["layer1"].cpu()
        torch.testing.assert_close(found, reference.maps(images)["layer1"], rtol=1e-4, atol=1e-4)
        assert torch.equal(one.bn1.running_mean.cpu(), reference.bn1.running_mean)


def test_the_guard_and_the_average_over_processes_leave_frozen_statistics_alone() -> None:
    method = build("moco", EARLY)
    step = step_of(method)
    frozen = {id(b) for n, b in method.named_buffers() if part_of(n) in EARLY}
    watched = {id(b) for b in step.guard.statistics}
    assert frozen and not watched & frozen
    assert {id(b) for n, b in method.named_buffers() if part_of(n) in ("layer3", "layer4") and b.dim() == 1} <= watched


@pytest.mark.parametrize(("name", "freeze"), [("lcr", ALL), ("guided layer4", ALL), ("moco", EARLY)])
def test_attention_is_shown_of_a_frozen_trunk_too(name: str, freeze: tuple[str, ...]) -> None:
    method = build(name, freeze).eval()
    maps = method.attention(F.normalize(torch.randn(2, 3, 32, 32)))
    assert "cam" in maps and all(torch.isfinite(m).all() and not m.requires_grad for m in maps.values())
