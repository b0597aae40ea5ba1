"""The interface of a method: the registry that imports on demand, a user's own settings, the context and an output without keys."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_methods import batch, build_moco, build_ppssl, step_of
from torch import Tensor

import ppssl
from engine import build
from engine.config import ConfigError, from_yaml
from ppssl import BYOL, METHODS, Batch, Method, MoCo, Output, StepContext, register
from ppssl.encoder import FeatureNet, Trunk, projection_head
from ppssl.guidance import contrast_gradients
from ppssl.method import NO_CONTEXT, spread
from ppssl.settings import SETTINGS, ContrastConfig, EncoderConfig, IadmConfig, Settings, SimCLRSettings, method_settings
from ppssl.simclr import SimCLR

ARCH = "resnet18_w8_s16"
CPU = torch.device("cpu")


@pytest.fixture
def registry() -> Iterator[None]:
    """Forgets what a test has registered."""
    settings, classes = dict(SETTINGS), dict(METHODS.classes)
    yield
    SETTINGS.clear(), METHODS.classes.clear()
    SETTINGS.update(settings), METHODS.classes.update(classes)


def test_a_method_s_module_is_imported_when_it_is_asked_for() -> None:
    code = (
        "import sys; from ppssl import METHODS; names = sorted(METHODS); assert len(METHODS) == len(names) == 6\n"
        "assert 'byol9' not in METHODS and not {f'ppssl.{name}' for name in names} & set(sys.modules)\n"
        "kind = METHODS['byol']; assert kind.__name__ == 'BYOL' and 'ppssl.moco' not in sys.modules\n"
        "import ppssl; assert ppssl.BYOL is kind"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_every_public_name_is_there() -> None:
    assert set(ppssl.__all__) <= set(dir(ppssl))
    assert all(getattr(ppssl, name) is not None for name in ppssl.__all__)
    assert METHODS["moco"] is MoCo and METHODS["byol"] is BYOL and dict(METHODS).keys() == SETTINGS.keys()
    with pytest.raises(AttributeError, match="absent"):
        ppssl.absent  # noqa: B018
    with pytest.raises(KeyError, match="absent"):
        METHODS["absent"]


@dataclass(frozen=True)
class SoftSettings(Settings):
    """Settings that a user wrote: two sections, and variants of their own."""

    variants = {"published": {"iadm.weight": 3.0}, "guided": {"iadm.weight": 5.0}}
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    iadm: IadmConfig = field(default_factory=IadmConfig)


def test_a_user_s_method_with_settings_of_its_own_is_configured(registry: None) -> None:
    @register("soft", settings=SoftSettings)
    class Soft(SimCLR):
        @classmethod
        def from_settings(cls, settings: SoftSettings, network: FeatureNet, teacher: object = None) -> "Soft":
            head = projection_head(settings.encoder.head, network.trunk.channels, settings.encoder.dim)
            made = cls(network, head, temperature=settings.contrast.temperature)
            made.settings = settings
            return made

    encoder = "encoder: {arch: resnet18_w8_s16, weights: none, dim: 6}"
    cfg = from_yaml(f"method: {{name: soft, variant: guided}}\n{encoder}\ncontrast: {{temperature: 0.4}}")
    cfg = build.resolve(cfg, CPU)
    made = build.method(cfg, None)
    assert type(made) is Soft and METHODS["soft"] is Soft and made.temperature == 0.4
    assert isinstance(made.settings, SoftSettings) and made.settings.iadm.weight == 5.0 and made.settings.encoder.dim == 6
    assert build.teacher(cfg, CPU) is None
    said = build.resolve(replace(cfg, iadm=replace(cfg.iadm, weight=0.25)), CPU)
    assert build.settings_of(said).iadm.weight == 0.25


def test_a_method_without_settings_takes_those_of_what_it_extends(registry: None) -> None:
    @register("mine")
    class Mine(SimCLR):
        pass

    @register("plain")
    class Plain(Method):
        pass

    assert issubclass(SETTINGS["mine"], SimCLRSettings) and SETTINGS["mine"].name == "mine" and SETTINGS["simclr"].name == "simclr"
    assert not issubclass(SETTINGS["plain"], SimCLRSettings)
    cfg = from_yaml("method: {name: mine}\ncontrast: {temperature: 0.7}")
    assert method_settings(cfg).contrast.temperature == 0.7


def test_what_cannot_be_registered_is_refused(registry: None) -> None:
    @dataclass(frozen=True)
    class Wrong(Settings):
        hyper: ContrastConfig = field(default_factory=ContrastConfig)

    with pytest.raises(ValueError, match=r"Wrong\.hyper.*contrast.*ppssl/settings/methods\.py"):
        register("wrong", settings=Wrong)
    with pytest.raises(ValueError, match=r"method\.name: 'moco'.*ppssl\.moco.*Other"):
        register("moco")(type("Other", (Method,), {}))
    with pytest.raises(ConfigError, match=r"method\.name.*wrong.*simclr"):
        build.resolve(from_yaml("method: {name: wrong}"), CPU)
    assert METHODS["moco"] is MoCo


class Recording(SimCLR):
    """Notes what it is given."""

    def forward(self, batch: Batch, context: StepContext = NO_CONTEXT) -> Output:
        self.seen = context
        return super().forward(batch)


class Alone(SimCLR):
    """Its second argument is its own."""

    def forward(self, batch: Batch, scale: float = 2.0) -> Output:
        output = super().forward(batch)
        return output._replace(total=scale * output.total)


def small(kind: type[SimCLR]) -> SimCLR:
    torch.manual_seed(0)
    trunk = Trunk(ARCH)
    return kind(FeatureNet(trunk), projection_head("mlp2", trunk.channels, 8))


def test_the_context_tells_of_the_step_and_may_be_left_out() -> None:
    assert StepContext() == (None, None, 1.0)
    method = small(Recording)
    method(batch())
    assert method.seen == StepContext()
    step = step_of(method)
    step(batch())
    step(batch())
    assert float(method.seen.progress) == pytest.approx(0.1) and method.seen.progress is step.context.progress
    assert method.seen.loss_scale is None and method.seen.share == 1.0
    own, plain = small(Alone), small(SimCLR)
    assert float(step_of(own)(batch()).total) == pytest.approx(2 * float(step_of(plain)(batch()).total))


@pytest.mark.parametrize("options", [{}, {"compile": "step", "backend": "eager"}])
def test_without_keys_nothing_is_enqueued(options: dict) -> None:
    class Keyless(SimCLR):
        def enqueue(self, keys: Tensor, index: Tensor, skip: Tensor | None = None) -> None:
            raise AssertionError("there are no keys")

    method = small(Keyless)
    before = [p.detach().clone() for p in method.parameters()]
    output = step_of(method, **options)(batch())
    assert output.keys is None and float(output.stats["skipped"]) == 0.0
    assert not all(torch.equal(a, b) for a, b in zip(before, method.parameters(), strict=True))


def test_a_sum_over_images_is_scaled_to_the_global_batch() -> None:
    """The engine averages the losses of N processes: with half of the images, a term that is a sum counts twice, and the gradient
    of a mean over images half."""
    given = batch()
    given.x_q.requires_grad_()
    values = {"iadm.cam_loss": "sum"}  # each image's own gradient, whatever the batch: the same CAM twice
    whole, half = (build_ppssl(ARCH, "published", values)(given, StepContext(share=share)) for share in (1.0, 0.5))
    assert float(half.terms["contrast"]) == float(whole.terms["contrast"])
    assert float(half.terms["iadm"]) == 2 * float(whole.terms["iadm"])

    x = torch.rand(4, 3, requires_grad=True)
    of_all, of_half = (contrast_gradients(x.square().sum(1), [x], of="mean", context=StepContext(share=s))[0] for s in (1.0, 0.5))
    assert torch.equal(of_all, x / 2) and torch.equal(of_half, x / 4)


def test_trained_parameters_are_all_but_the_targets() -> None:
    method = build_moco(ARCH)
    trained = method.trained_parameters()
    assert [id(p) for p in trained] == [id(p) for p in method.encoder_q.parameters()]
    next(method.encoder_q.parameters()).requires_grad_(False)
    assert len(method.trained_parameters()) == len(trained) - 1


def test_spread_is_one_for_all_directions_and_zero_for_one() -> None:
    rows = F.normalize(torch.randn(4000, 32), dim=1)
    assert float(spread(rows)["spread"]) == pytest.approx(1, abs=0.02)
    assert float(spread(rows[:1].expand(50, -1))["spread"]) < 1e-6 and spread(rows[:1]) == {}
    near = F.normalize(rows[:1] + 0.001 * F.normalize(torch.randn(4000, 32), dim=1), dim=1)
    assert float(spread(near)["spread"]) == pytest.approx(0.001, rel=0.05)
