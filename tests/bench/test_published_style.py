"""The baseline of bench/bench_step.py computes the published method: the fixtures' numbers, and PPSSL's losses."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_published_parity import CASES, RELATIVE, rebuild
from test_published_parity import build as fixture_method
from torch import nn

from bench import published_style
from engine.training import optim, precision
from engine.training.step import Step
from ppssl import PPSSL, Batch
from ppssl.encoder import FeatureNet, MaskBranch, Trunk, projection_head
from ppssl.settings import variant

TERMS = ("contrast", "iadm", "ais")


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_its_losses_are_the_published_ones(path: Path) -> None:
    case = rebuild(path)
    expected = case["expected"]
    model = published_style.PublishedStyle(fixture_method(case)).train()
    optimizer = published_style.default_sgd(model, lr=0.0)
    read = published_style.train_step(model, optimizer, case["x_q"], case["x_k"])
    for name in (*TERMS, "total"):
        assert read[name] == pytest.approx(expected[f"loss_{name}"], rel=RELATIVE)
    assert read["contrast_top1"] == pytest.approx(expected["contrast_top1"])
    modules = {"encoder_q.conv": model.trunk_q.conv, "conv16": model.feature_conv, "text_fc": model.to_text}
    for name, module in modules.items():
        assert float(module.weight.grad.norm()) == pytest.approx(expected["grad_norm"][f"{name}.weight"], rel=RELATIVE)
    assert model.queue[:, : expected["B"]].T.numpy() == pytest.approx(case["expected"]["queue_rows_written"], abs=1e-6)


class PooledTeacher(nn.Module):
    """A stand-in image encoder: a fixed map of the image's cell means."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("map", torch.randn(3 * 16, 24))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.normalize(F.adaptive_avg_pool2d(images.detach(), 4).flatten(1) @ self.map, dim=1)


def test_several_steps_follow_the_engines() -> None:
    torch.manual_seed(0)
    trunk = Trunk("resnet18_w8_s16")
    network = FeatureNet(trunk, MaskBranch(trunk.channels, 32, minmax="batch"))
    method = PPSSL(
        network, projection_head("mlp2", trunk.channels, 16), torch.randn(8, 24),
        settings=variant("ppssl", "published"), embed=PooledTeacher(), dim=16, queue_size=64,
    ).train()  # fmt: skip
    baseline = published_style.PublishedStyle(method).train()
    optimizer = published_style.default_sgd(baseline)

    trained = method.trained_parameters()
    step = Step(
        method, optim.sgd(trained, lr=0.03, momentum=0.9, weight_decay=1e-4), lr=lambda _: 0.03, decay=0.999,
        precision=precision.resolve(None, torch.device("cpu")), total_steps=5,
    )  # fmt: skip
    for number in range(5):
        x_q, x_k = torch.randn(2, 8, 3, 64, 64, generator=torch.Generator().manual_seed(number))
        theirs = published_style.train_step(baseline, optimizer, x_q, x_k)
        ours = step(Batch(x_q, x_k, torch.arange(8)))
        # rounding grows through the updates: parity itself is the first step
        tolerance = RELATIVE if number == 0 else 1e-3
        for name in TERMS:
            assert float(ours.terms[name]) == pytest.approx(theirs[name], rel=tolerance), f"step {number}: {name}"
        for name in ("contrast_top1", "contrast_top5"):
            assert float(ours.stats[name]) == pytest.approx(theirs[name]), f"step {number}: {name}"
    assert torch.allclose(baseline.queue.T, method.queue.rows, atol=1e-4)
    assert int(baseline.pointer) == int(method.queue.pointer) == 40
    assert torch.allclose(baseline.bn.running_mean, method.mask.bn.running_mean, rtol=1e-3, atol=1e-5)
