"""The schedule, the groups of parameters, each optimizer against torch's and timm's, and the choice of apex's fused SGD."""

import copy
import math
import sys
import types
from collections.abc import Callable

import pytest
import timm.optim
import torch
from small_methods import build_by_name
from torch import Tensor, nn

from engine.config import OptimConfig
from engine.training import optim
from ppssl.encoder import Trunk
from ppssl.timm_trunk import build_trunk


def test_cosine_falls_from_the_peak_to_almost_nothing_by_step() -> None:
    rates = [optim.learning_rate(s, 100, peak=0.03, schedule="cosine") for s in range(100)]
    assert rates[0] == 0.03 and rates[50] == pytest.approx(0.015) and rates == sorted(rates, reverse=True)
    assert rates[99] == pytest.approx(0.015 * (1 + math.cos(math.pi * 0.99)))
    assert optim.learning_rate(70, 100, peak=0.03, schedule="constant") == 0.03


def test_a_warm_up_rises_to_the_peak_and_the_cosine_takes_the_rest() -> None:
    rates = [optim.learning_rate(s, 100, peak=0.4, schedule="cosine", warmup=20) for s in range(100)]
    assert rates[:20] == pytest.approx([0.4 * (s + 1) / 20 for s in range(20)])
    assert rates[20] == 0.4 and rates[60] == pytest.approx(0.2) and rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[99] == pytest.approx(0.4 * 0.5 * (1 + math.cos(math.pi * 79 / 80)))
    constant = [optim.learning_rate(s, 100, peak=0.4, schedule="constant", warmup=4) for s in range(100)]
    assert constant[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4]) and set(constant[4:]) == {0.4}


RATE, DECAY = 0.125, 0.0625
SHAPES = ((4, 3, 2, 2), (5,), (2, 6), (3,))
THEIRS = {  # what an independent library computes, given two groups
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.5, foreach=False),
    "adamw": lambda groups: torch.optim.AdamW(groups, betas=(0.5, 0.75), eps=1e-3, foreach=False),
    "lars": lambda groups: timm.optim.Lars(groups, momentum=0.5, foreach=False),
}
OURS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=RATE, momentum=0.5, fused=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=RATE, betas=(0.5, 0.75), eps=1e-3, fused=True),
    "lars": lambda groups: optim.LARS(groups, lr=RATE, momentum=0.5),
}


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in SHAPES]
    with torch.no_grad():
        made[2].zero_()  # a zero norm, as of the last batch-norm of a block
    return made


def gradients(step: int) -> list[Tensor | None]:
    """Of step 1, one that is not finite."""
    generator = torch.Generator().manual_seed(step + 1)
    found = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES[:3]]
    found[0][0, 0, 0, 0] = float("nan") if step == 1 else 1.0
    return [*found, None]  # the last parameter is not used


def groups_of(params: list[nn.Parameter]) -> list[dict]:
    """The weights, and the biases at half the rate without decay."""
    return [
        {"params": [p for p in params if p.ndim > 1], "lr_scale": 1.0, "decays": True, "weight_decay": DECAY},
        {"params": [p for p in params if p.ndim == 1], "lr_scale": 0.5, "decays": False, "weight_decay": 0.0},
    ]


def reference(name: str) -> tuple[list[Tensor], torch.optim.Optimizer, list[nn.Parameter]]:
    params = parameters()
    groups = groups_of(params)
    theirs = THEIRS[name]([{"params": g["params"], "weight_decay": g["weight_decay"], "lr": RATE * g["lr_scale"]} for g in groups])
    for step in (0, 2, 3):  # never sees the bad one
        for p, g in zip(params, gradients(step), strict=True):
            p.grad = g
        theirs.step()
    return [p.detach() for p in params], theirs, params


def compare(name: str, update: optim.Update, params: list[nn.Parameter]) -> None:
    wanted, theirs, their_params = reference(name)
    state = update.optimizer.state_dict()["state"]
    order = [i for g in groups_of(params) for p in g["params"] for i in range(len(params)) if params[i] is p]
    for number, i in enumerate(order):
        torch.testing.assert_close(params[i].detach(), wanted[i], rtol=1e-12, atol=1e-14)
        for key, tensor in theirs.state[their_params[i]].items():
            torch.testing.assert_close(state[number][key].double(), tensor.double(), rtol=1e-12, atol=1e-14, msg=f"{key} of {i}")


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
@pytest.mark.parametrize("name", THEIRS)
def test_the_update_of_a_graph_is_that_of_the_library(name: str, backend: str | None) -> None:
    """Four steps of which the second is bad, in float64: weights and state are those of three steps of torch or timm."""
    torch._dynamo.reset()
    params = parameters()
    update = optim.Update(OURS[name](groups_of(params)))
    call: Callable = update if backend is None else torch.compile(update, backend=backend, fullgraph=True, dynamic=False)
    rate = torch.tensor(RATE)
    order = [i for g in groups_of(params) for p in g["params"] for i in range(len(params)) if params[i] is p]
    for step in range(4):
        before = copy.deepcopy(([p.detach() for p in params], update.states))
        call([gradients(step)[i] for i in order], rate, torch.tensor(step == 1))
        same = all(map(torch.equal, before[0], params)) and all(
            torch.equal(a, b) for key, tensors in update.states.items() for a, b in zip(tensors, before[1][key], strict=True)
        )
        assert same == (step == 1)
    compare(name, update, params)


@pytest.mark.parametrize("scaled", [False, True], ids=["guard", "scaler"])
@pytest.mark.parametrize("name", THEIRS)
def test_the_optimizer_skips_on_the_device(name: str, scaled: bool) -> None:
    """The same by the optimizer's own step: told by the guard, or by a scaler that finds the gradient itself."""
    params = parameters()
    optimizer = OURS[name](groups_of(params))
    update = optim.Update(optimizer)
    update.set_rate(RATE)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100, backoff_factor=1.0 - 1e-9)
    for step in range(4):
        scale = float(scaler.scale(torch.ones(()))) if scaled else 1.0
        for p, g in zip(params, gradients(step), strict=True):
            p.grad = None if g is None else g * scale
        if scaled:
            scaler.step(optimizer)
            scaler.update(4.0)
        else:
            optim.skip_where(optimizer, torch.tensor(step == 1))
            optimizer.step()
    compare(name, update, params)


def test_adamw_keeps_its_digits_in_the_first_steps() -> None:
    """In float32, with the usual betas, the corrected averages are those of float64."""
    param = nn.Parameter(torch.full((3,), 0.5))
    update = optim.Update(torch.optim.AdamW([param], lr=1e-3, weight_decay=0.0, fused=True))
    exact = nn.Parameter(param.detach().double())
    theirs = torch.optim.AdamW([exact], lr=1e-3, weight_decay=0.0, foreach=False)
    for step in range(3):
        gradient = torch.tensor([1e-3, 1.0, -5.0]) * (step + 1)
        update([gradient], torch.tensor(1e-3), torch.tensor(False))
        exact.grad = gradient.double()
        theirs.step()
    torch.testing.assert_close((param - 0.5).double(), exact - 0.5, rtol=1e-4, atol=0)


@pytest.mark.parametrize("most", [0.5, 100.0])
def test_clipping_is_torchs(most: float) -> None:
    params = parameters()
    for p, g in zip(params, gradients(0), strict=True):
        p.grad = g
    given = gradients(0)
    norm = optim.gradient_norm([g for g in given if g is not None])
    found = optim.clipped(given, norm, most)
    torch.nn.utils.clip_grad_norm_(params, most)
    assert found[-1] is None and torch.allclose(found[0], gradients(0)[0]) == (most == 100)
    for p, g in zip(params[:3], found, strict=False):
        torch.testing.assert_close(g, p.grad, rtol=1e-6, atol=1e-12)
    overflow = optim.clipped([torch.ones(2)], torch.tensor(float("inf")), 1.0)
    assert torch.equal(overflow[0], torch.ones(2))  # left to whoever skips the step


def test_one_group_by_default_and_the_config_s_optimizer() -> None:
    method = build_by_name("moco", Trunk("resnet18_w8_s16"), 32)
    for name, kind in (("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW), ("lars", optim.LARS)):
        made = optim.build(method, OptimConfig(name=name, lr=0.25, weight_decay=0.125))
        (group,) = made.param_groups
        assert type(made) is kind and group["lr"] == 0.25 and group["weight_decay"] == 0.125
        assert [id(p) for p in group["params"]] == [id(p) for p in method.trained_parameters()]
    made = optim.build(method, OptimConfig(name="adamw", betas=(0.5, 0.75), eps=1e-3))
    assert made.param_groups[0]["betas"] == (0.5, 0.75) and made.param_groups[0]["eps"] == 1e-3


@pytest.mark.parametrize("arch", ["resnet18_w8_s16", "timm/vit_tiny_patch16_224", "timm/resnet18"])
def test_layers_have_timm_s_rates_and_biases_no_decay(arch: str) -> None:
    trunk = build_trunk(arch)
    trunk.freeze(("stem",))
    method = build_by_name("moco", trunk, 32)
    made = optim.build(method, OptimConfig(name="adamw", weight_decay=0.25, layer_decay=0.5, decay_norms=False))
    place = {id(p): g for g in made.param_groups for p in g["params"]}
    trained = method.trained_parameters()
    assert sorted(place) == sorted(map(id, trained))
    names = {id(p): n for n, p in method.named_parameters()}
    # timm's own ResNet of the same names says what the layers of ours are
    known = trunk if arch.startswith("timm/") else timm.create_model("resnet18", num_classes=0)
    skipped = known.no_weight_decay() if hasattr(known, "no_weight_decay") else ()
    theirs = timm.optim.param_groups_layer_decay(known, weight_decay=0.25, no_weight_decay_list=skipped, layer_decay=0.5)
    wanted = {n: g for g in theirs for n, p in known.named_parameters() if any(p is q for q in g["params"])}
    scales = set()
    for p in trained:
        name = names[id(p)]
        group = place[id(p)]
        if ".trunk." in name:
            expected = wanted[name.split("trunk.")[1]]
            assert (group["lr_scale"], group["weight_decay"]) == (expected["lr_scale"], expected["weight_decay"]), name
            scales.add(group["lr_scale"])
        else:
            assert group["lr_scale"] == 1 and group["weight_decay"] == (0.25 if p.ndim > 1 else 0.0)
    assert len(scales) > 5
    optim.Update(made).set_rate(0.5)
    assert all(g["lr"] == 0.5 * g["lr_scale"] for g in made.param_groups)


def test_groups_do_not_depend_on_a_weight_decay_that_a_resumed_run_may_change() -> None:
    method = build_by_name("simclr", Trunk("resnet18_w8_s16"), 32)
    sizes = [
        [len(g["params"]) for g in optim.build(method, OptimConfig(weight_decay=decay, decay_norms=False)).param_groups]
        for decay in (0.0, 0.1)
    ]
    assert sizes[0] == sizes[1] and len(sizes[0]) == 2


def test_the_decay_of_the_momentum_network_rises_to_one_by_step() -> None:
    decays = [optim.ema_decay(s, 100, base=0.99, schedule="cosine") for s in range(101)]
    assert decays[0] == 0.99 and decays[50] == pytest.approx(0.995) and decays == sorted(decays) and decays[100] == 1.0
    assert decays[30] == pytest.approx(1 - 0.01 * (math.cos(math.pi * 0.3) + 1) / 2)  # BYOL, section 3.2
    assert optim.ema_decay(70, 100, base=0.99, schedule="constant") == 0.99


def test_sgd_is_torchs_sgd() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(4, 3), nn.Linear(4, 3)
    theirs.load_state_dict(ours.state_dict())
    optimizers = (
        optim.sgd(ours.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01),
        torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01, foreach=False),
    )
    x = torch.randn(5, 4)
    for _ in range(3):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    assert torch.allclose(ours.weight, theirs.weight, rtol=1e-6) and torch.allclose(ours.bias, theirs.bias, rtol=1e-6)


def install(monkeypatch: pytest.MonkeyPatch, **attributes) -> None:
    """Puts a module ``apex`` with an ``optimizers`` that has ``attributes`` where the import system finds it."""
    package, optimizers = types.ModuleType("apex"), types.ModuleType("apex.optimizers")
    package.__path__, package.__spec__ = [], types.SimpleNamespace(name="apex")
    for name, value in attributes.items():
        setattr(optimizers, name, value)
    monkeypatch.setitem(sys.modules, "apex", package)
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)


def test_apex_is_used_when_asked_for_and_refused_with_the_reason_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    options = dict(lr=0.1, momentum=0.9, weight_decay=0.0)
    parameters = list(nn.Linear(2, 2).parameters())
    with pytest.raises(ValueError, match=r"optim\.backend: apex.*built from source"):
        optim.sgd(parameters, **options, backend="apex")
    install(monkeypatch)  # PyPI's unrelated package
    with pytest.raises(ValueError, match="not NVIDIA's"):
        optim.sgd(parameters, **options, backend="apex")
    assert isinstance(optim.sgd(parameters, **options), torch.optim.SGD)
    stand_in = type("FusedSGD", (torch.optim.SGD,), {})
    install(monkeypatch, FusedSGD=stand_in)
    chosen = optim.sgd(parameters, **options, backend="apex")
    assert type(chosen) is stand_in and chosen.defaults["momentum"] == 0.9
    assert type(optim.sgd(parameters, **options)) is torch.optim.SGD  # auto: apex has GPU kernels only


def test_the_log_tells_the_optimizer_and_what_does_not_fit_it() -> None:
    method = build_by_name("moco", Trunk("resnet18_w8_s16"), 32)

    def told(**options) -> list[str]:
        config = OptimConfig(**options)
        return optim.describe_optimizer(optim.build(method, config), config)

    assert told() == ["sgd, lr 0.03, cosine, weight decay 0.0001"]
    assert told(name="lars", lr=1.0, warmup=0.5, clip=2.0, decay_norms=False) == [
        "lars, lr 1, cosine after a warm-up of 0.5 epochs, weight decay 0.0001 without biases and norms, gradients clipped at 2"
    ]
    line, remark = told(name="adamw", layer_decay=0.5)
    assert line.startswith("adamw, lr 0.000117 to 0.03 by layer") and remark.startswith("optim.lr: 0.03 is far above")
    assert len(told(layer_decay=0.5)) == 1
    method.encoder_q.trunk.freeze(("stem", "layer1", "layer2", "layer3", "layer4"))
    assert told(layer_decay=0.5)[1].startswith("optim.layer_decay: does nothing here: no layer of the trunk but the last")
    assert told(decay_norms=False, weight_decay=0.0)[1] == "optim.decay_norms: does nothing with optim.weight_decay=0"
