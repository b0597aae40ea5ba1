"""The forms ``published`` of PP-SSL and LCR against numbers that the published code produced: every ``published_*.json`` and
``lcr_published_*.json`` in PPSSL_FIXTURES (default: the copies beside this file). ``recipe.py`` there rebuilds weights and inputs
and says what each quantity is."""

import functools
import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ppssl.encoder
import ppssl.lcr
import ppssl.moco
import ppssl.ppssl
from engine.training import optim, precision
from engine.training.step import Step
from ppssl.encoder import BaseTrunk, FeatureNet, MaskBranch
from ppssl.lcr import LCR
from ppssl.method import Batch
from ppssl.ppssl import PPSSL
from ppssl.settings import variant

FIXTURES = Path(os.environ.get("PPSSL_FIXTURES") or Path(__file__).parent / "fixtures")
CASES = sorted(FIXTURES.glob("published_*.json"))
LCR_CASES = sorted(FIXTURES.glob("lcr_published_*.json"))
RELATIVE = 1e-5
"""max |a - b| <= 1e-5 * max |b| per quantity, the tolerance of float32 on any execution path."""


def rebuild(path: Path) -> dict:
    spec = importlib.util.spec_from_file_location("recipe", FIXTURES / "recipe.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return recipe.published_case(path)


class PatchTrunk(BaseTrunk):
    """The fixtures' stand-in trunk: one 32x32 convolution and ReLU."""

    channels, stride = 2048, 32

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2048, 32, stride=32)

    def maps(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"layer4": F.relu(self.conv(images))}


# our parameter -> the fixtures' name
NAMES = {
    "encoder_q.trunk.conv.weight": "encoder_q.conv.weight",
    "encoder_q.trunk.conv.bias": "encoder_q.conv.bias",
    "encoder_q.head.0.weight": "encoder_q.fc.0.weight",
    "encoder_q.head.0.bias": "encoder_q.fc.0.bias",
    "encoder_q.head.2.weight": "encoder_q.fc.2.weight",
    "encoder_q.head.2.bias": "encoder_q.fc.2.bias",
    "mask.conv.weight": "conv16.weight",
    "mask.bn.weight": "bn16.weight",
    "mask.bn.bias": "bn16.bias",
    "image_mask.conv.weight": "conv32.weight",
    "to_text.weight": "text_fc.weight",
    "to_text.bias": "text_fc.bias",
}


def build(case: dict) -> PPSSL:
    expected, teacher = case["expected"], case["teacher"]

    def embed(images: torch.Tensor) -> torch.Tensor:
        return F.normalize(F.avg_pool2d(images.detach(), 32).flatten(1) @ teacher["w"], dim=1)

    dim = expected["D"]
    method = PPSSL(
        FeatureNet(PatchTrunk(), MaskBranch(2048, 32, minmax="batch")),
        nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, dim)),
        teacher["text"],
        settings=variant("ppssl", "published"),
        embed=embed,
        teacher_logit_scale=teacher["logit_scale"],
        dim=dim,
        queue_size=expected["K"],
        temperature=expected["T"],
    )
    return filled(method, case)


def build_lcr(case: dict) -> LCR:
    dim = case["expected"]["D"]
    return filled(
        LCR(
            FeatureNet(PatchTrunk(), MaskBranch(2048, 32, minmax="batch")),
            nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, dim)),
            settings=variant("lcr", "published"),
            dim=dim,
            queue_size=case["expected"]["K"],
            temperature=case["expected"]["T"],
        ),
        case,
    )


def filled(method: nn.Module, case: dict) -> nn.Module:
    """``method`` with the case's weights and queue."""
    own = method.state_dict()
    for ours, theirs in NAMES.items():
        if ours not in own:  # LCR has no image branch and no text
            continue
        own[ours].copy_(case["weights"][theirs])
        key = theirs.replace("encoder_q", "encoder_k")
        if key != theirs:
            own[ours.replace("encoder_q", "encoder_k")].copy_(case["weights"][key])
    method.queue.rows.copy_(case["queue"])
    return method


def close(name: str, actual, expected, relative: float = RELATIVE) -> None:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, expected {expected.shape}"
    error, size = np.abs(actual - expected).max(), np.abs(expected).max()
    assert error <= relative * size, f"{name}: off by {error / size:.2e} of its size"


MODES = [("reference", "off"), ("auto", "off"), ("auto", "step")]
"""The ops' definitions, the paths that run, and those in the step that is one graph (slow to trace: one case a method)."""
STEPS = [(p, *mode) for p in [*CASES, *LCR_CASES] for mode in MODES if mode[1] == "off" or p.stem.endswith("_a")]


@pytest.mark.parametrize(("path", "impl", "compile"), STEPS, ids=lambda value: getattr(value, "stem", value))
def test_one_published_step(path: Path, impl: str, compile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = rebuild(path)
    expected = case["expected"]
    of, method = (ppssl.lcr, build_lcr(case)) if path in LCR_CASES else (ppssl.ppssl, build(case))
    for module, names in ((ppssl.moco, ["queue_infonce"]), (ppssl.encoder, ["maxout", "maxout_image"]), (of, ["gradcam"])):
        for name in names:
            monkeypatch.setattr(module, name, functools.partial(getattr(module, name), impl=impl))
    seen = {}
    spatial_kl = of.spatial_kl

    def watched(cam: torch.Tensor, mask: torch.Tensor, form) -> torch.Tensor:
        seen.update(cam=cam.detach(), mask=mask.detach())
        return spatial_kl(cam, mask, form)

    if compile == "off":
        monkeypatch.setattr(of, "spatial_kl", watched)

    names = dict(method.train().named_parameters())
    ours = [n for n in NAMES if n in names]
    optimizer = optim.sgd([names[n] for n in ours], lr=0.03, momentum=0.9, weight_decay=1e-4)
    step = Step(
        method, optimizer, lr=lambda _: 0.0, decay=0.999, precision=precision.resolve(None, torch.device("cpu")),
        total_steps=1, compile=compile, backend="aot_eager",
    )  # fmt: skip
    norms = {}
    if compile == "off":
        optimizer.register_step_pre_hook(lambda *_: norms.update({NAMES[n]: float(names[n].grad.norm()) for n in ours}))
    output = step(Batch(case["x_q"], case["x_k"], torch.arange(expected["B"])))
    if compile == "step":  # the first momentum is the gradient and its weight decay
        for name, buffer in zip(ours, step.update.states["momentum_buffer"], strict=True):
            norms[NAMES[name]] = float((buffer - 1e-4 * names[name].detach()).norm())
        torch._dynamo.reset()

    close("loss_contrast", output.terms["contrast"], expected["loss_contrast"])
    for term, loss in (("rationale", "loss_cam"), ("iadm", "loss_iadm"), ("ais", "loss_ais")):
        assert (term in output.terms) == (loss in expected)
        if loss in expected:
            close(loss, output.terms[term], expected[loss])
    close("loss_total", output.total.detach(), expected["loss_total"])
    if "contrast_top1" in expected:
        close("contrast_top1", output.stats["contrast_top1"], expected["contrast_top1"])
    assert norms.keys() == expected["grad_norm"].keys()
    for name, norm in expected["grad_norm"].items():
        close(f"gradient of {name}", norms[name], norm, RELATIVE if norm >= 1e-2 else 1e-4)
    if seen:
        close("cam", seen["cam"], expected["cam"])
        close("att", seen["mask"], expected["att"])
    close("bn_running_mean", method.mask.bn.running_mean, expected["bn_running_mean"])
    close("bn_running_var", method.mask.bn.running_var, expected["bn_running_var"])
    if "queue_rows_written" in expected:
        close("queue_rows_written", method.queue.rows[: expected["B"]], expected["queue_rows_written"])
    assert int(method.queue.pointer) == expected["B"] % expected["K"]

    with torch.no_grad():
        feature = method.network.eval()(case["x_eval"])
    close("feature_head", feature[:, :64], expected["feature_head"])
    close("feature_sum", feature.double().sum(1), expected["feature_sum"])


@pytest.mark.parametrize("path", [*CASES, *LCR_CASES], ids=lambda p: p.stem)
def test_the_published_targets_are_uniform(path: Path) -> None:
    """The cams that the published code made on the fixtures, as its softmax over rows of seven sees them."""
    cam = torch.from_numpy(np.load(path.with_suffix(".npz"))["cam"])
    target = F.softmax(cam, -1)
    assert cam.max() > 0 and float((target - 1 / 7).abs().max()) < 5e-4


def test_there_are_cases() -> None:
    assert CASES and LCR_CASES, f"no published_*.json or no lcr_published_*.json in {FIXTURES}"
