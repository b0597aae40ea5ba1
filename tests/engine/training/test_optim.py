"""The schedule, and the choice between torch's and apex's fused SGD."""

import math
import sys
import types

import pytest
import torch
from torch import nn

from engine.training import optim


def test_cosine_falls_from_the_peak_to_almost_nothing_by_step() -> None:
    rates = [optim.learning_rate(s, 100, peak=0.03, schedule="cosine") for s in range(100)]
    assert rates[0] == 0.03 and rates[50] == pytest.approx(0.015) and rates == sorted(rates, reverse=True)
    assert rates[99] == pytest.approx(0.015 * (1 + math.cos(math.pi * 0.99)))
    assert optim.learning_rate(70, 100, peak=0.03, schedule="constant") == 0.03


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
