"""LCR: the variant ``guided`` against a plain re-computation, what each switch changes, and what ``published`` really does."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ppssl.encoder import FeatureNet, MaskBranch, Trunk, projection_head
from ppssl.lcr import LCR
from ppssl.method import METHODS, Batch
from ppssl.settings import LCRSettings, method_settings, replace_keys, variant

DIM, QUEUE, BATCH = 8, 20, 6
GUIDED, PUBLISHED = variant("lcr", "guided"), variant("lcr", "published")


def having(settings: LCRSettings, **switches) -> LCRSettings:
    """``settings`` with switches by the last part of their key."""
    section = {"minmax": "method", "detach": "lcr", "updates": "lcr"}
    return replace_keys(settings, {f"{section.get(name, 'iadm')}.{name}": value for name, value in switches.items()})


class SmallTrunk(Trunk):
    """Two convolutions, [B, 3, 32, 32] -> [B, 24, 4, 4]."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.channels, self.stride = 24, 8
        self.first, self.second = nn.Conv2d(3, 8, 4, stride=4), nn.Conv2d(8, 24, 2, stride=2)

    def maps(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"layer4": F.relu(self.second(F.relu(self.first(images))))}


def build(settings: LCRSettings = GUIDED, **contrast) -> LCR:
    torch.manual_seed(1)
    network = FeatureNet(SmallTrunk(), MaskBranch(24, 32, minmax=settings.method.minmax))
    return LCR(
        network, projection_head("mlp2", 24, DIM), settings=settings, dim=DIM, queue_size=QUEUE, temperature=0.2, **contrast
    ).train()


def batch() -> Batch:
    x = torch.randn(2, BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    return Batch(x[0], x[1], torch.arange(BATCH))


def gradients(method: LCR, total: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {n: p for n, p in method.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(total, list(named.values()), allow_unused=True), strict=True))


def plain_guided(method: LCR, given: Batch) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The variant ``guided`` written out in float64 without the project's ops: its terms and its gradients."""
    m = copy.deepcopy(method).double()
    feature = m.encoder_q.trunk(given.x_q.double())
    q = F.normalize(m.encoder_q.head(feature.mean((2, 3))), dim=1)
    with torch.no_grad():
        k = F.normalize(m.encoder_k.head(m.encoder_k.trunk(given.x_k.double()).mean((2, 3))), dim=1)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ m.queue.rows.T], 1) / 0.2
    each = F.cross_entropy(logits, torch.zeros(BATCH, dtype=torch.long), reduction="none")

    u = F.conv2d(feature, m.mask.conv.weight)
    mean, var = u.mean((0, 2, 3), keepdim=True), u.var((0, 2, 3), unbiased=False, keepdim=True)
    gamma, beta = (t.view(1, -1, 1, 1) for t in (m.mask.bn.weight, m.mask.bn.bias))
    phi = F.relu((u - mean) / (var + 1e-5).sqrt() * gamma + beta).max(1).values
    phi = phi - phi.amin((1, 2), keepdim=True)
    mask = phi / (1e-7 + phi.amax((1, 2), keepdim=True))

    (gradient,) = torch.autograd.grad(each.sum(), feature, retain_graph=True)
    cam = F.relu(-(feature * gradient).sum(1)).detach()
    cam = cam / cam.amax((1, 2), keepdim=True).clamp_min(1e-300)  # a cam that is zero everywhere stays so: a uniform target
    target = F.softmax(cam.flatten(1) / 0.4, 1)
    rationale = (target * (target.log() - F.log_softmax(mask.flatten(1) / 0.4, 1))).sum(1).mean()
    total = each.mean() + 1.28 * rationale
    terms = {"contrast": each.mean(), "rationale": rationale, "total": total}
    return terms, gradients(m, total)


def near(actual: torch.Tensor, expected: torch.Tensor, relative: float = 2e-5) -> bool:
    actual, expected = actual.detach().double(), expected.detach().double()
    return bool((actual - expected).abs().max() <= relative * expected.abs().max())


def test_guided_equals_its_plain_recomputation() -> None:
    method, given = build(), batch()
    terms, expected = plain_guided(method, given)
    output = method(given)
    assert near(output.total, terms.pop("total"))
    assert output.terms.keys() == terms.keys() and all(near(output.terms[n], t) for n, t in terms.items())
    for name, gradient in gradients(method, output.total).items():
        assert near(gradient, expected[name], 1e-4), name


# every switch of the variant, alone: the value to turn it to from ``guided``, and whether the rationale's value moves
SWITCHES = [
    ("minmax", "batch", True),
    ("weight", 2.0, False),
    ("sign", "plus", True),
    ("temperature", 1.0, True),
    ("softmax", "rows", True),
    ("cam_scale", "none", True),
    ("reduction", "sum", True),
    ("detach", False, False),
]


@pytest.mark.parametrize(("switch", "value", "moves"), SWITCHES, ids=[s[0] for s in SWITCHES])
def test_each_switch_moves_its_own_term_only(switch: str, value: object, moves: bool) -> None:
    methods = build(), build(having(GUIDED, **{switch: value}))
    before, after = (m(batch()) for m in methods)
    assert torch.equal(before.terms["contrast"], after.terms["contrast"]) and torch.equal(before.keys, after.keys)
    assert torch.equal(before.terms["rationale"], after.terms["rationale"]) != moves
    name = "encoder_q.trunk.second.weight"
    a, b = (gradients(m, o.total)[name] for m, o in zip(methods, (before, after), strict=True))
    assert float((a - b).abs().max()) > 1e-4 * float(a.abs().max())


def test_the_cam_of_the_batch_mean_is_the_per_sample_one_over_the_batch_size() -> None:
    cams = []
    for loss in ("sum", "mean"):
        method, given = build(having(GUIDED, cam_scale="none", cam_loss=loss)), batch()
        feature = method.encoder_q.trunk(given.x_q)
        q = method.encoder_q.project(feature.mean((2, 3)))
        losses, _ = method.contrast(q, method.keys(given.x_k), given.index)
        cams.append(method.cam(losses, feature))
    assert torch.allclose(cams[0], BATCH * cams[1], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("settings", [PUBLISHED, GUIDED], ids=["published", "guided"])
def test_keys_are_shuffled_among_the_parts_of_the_batch_as_moco_s_are(settings: LCRSettings) -> None:
    torch.manual_seed(1)
    trunk = Trunk("resnet18_w8_s16")
    network = FeatureNet(trunk, MaskBranch(trunk.channels, 32, minmax=settings.method.minmax, groups=2))
    head = projection_head("mlp2", trunk.channels, DIM)
    method = LCR(network, head, settings=settings, dim=DIM, queue_size=QUEUE, bn_groups=2).train()
    given = batch()
    keys = method(given).keys
    assert torch.equal(keys, method.keys(given.x_k))
    assert not torch.allclose(keys, method.embed_key(given.x_k), atol=1e-4)  # in the parts of their queries


@pytest.mark.parametrize("settings", [PUBLISHED, GUIDED], ids=["published", "guided"])
def test_the_rationale_of_a_symmetric_contrast_is_that_of_the_first_view(settings: LCRSettings) -> None:
    given = batch()
    one, two = build(settings)(given), build(settings, symmetric=True)(given)
    back = build(settings)(given._replace(x_q=given.x_k, x_k=given.x_q))
    assert torch.equal(one.terms["rationale"], two.terms["rationale"])
    assert torch.allclose(two.terms["contrast"], (one.terms["contrast"] + back.terms["contrast"]) / 2, rtol=1e-6)
    assert torch.equal(two.keys, torch.cat([one.keys, back.keys]))
    assert torch.equal(two.stats["contrast_top1"], one.stats["contrast_top1"])


@pytest.mark.parametrize(
    "settings", [PUBLISHED, GUIDED, having(PUBLISHED, weight=0.0)], ids=["published", "guided", "no rationale"]
)
def test_keys_with_gradient_and_the_negatives_of_the_batch(settings: LCRSettings) -> None:
    """The contrast written out; the query network makes both sides, and its mask's batch-norm moves as often as without."""
    method, given = build(settings, negatives="batch", keys_with_gradient=True), batch()
    twin = copy.deepcopy(method)
    output = method(given)
    q, k = (twin.encoder_q.project(twin.encoder_q.trunk(x).mean((2, 3))) for x in (given.x_q, given.x_k))
    expected = F.cross_entropy(q @ k.T / 0.2, torch.arange(BATCH))
    assert torch.allclose(output.terms["contrast"], expected, rtol=1e-5) and output.keys is None and method.ema_pairs() == ([], [])
    if not settings.iadm.weight:
        wanted = gradients(twin, expected)
        for name, gradient in gradients(method, output.total).items():
            assert (gradient is None) == (wanted[name] is None)
            assert gradient is None or torch.allclose(gradient, wanted[name], rtol=1e-4, atol=1e-6), name


def test_published_batch_norm_moves_three_times_once_for_the_keys_map() -> None:
    method, given = build(PUBLISHED), batch()
    start = method.mask.bn.running_mean.clone()
    with torch.no_grad():
        means = [
            F.conv2d(encoder.trunk(x), method.mask.conv.weight).mean((0, 2, 3))
            for encoder, x in ((method.encoder_q, given.x_q), (method.encoder_k, given.x_k))
        ]
    expected = start
    for mean in (means[0], means[1], means[0]):
        expected = 0.9 * expected + 0.1 * mean
    method(given)
    assert torch.allclose(method.mask.bn.running_mean, expected, atol=1e-6)
    guided = build()
    guided(given)
    assert torch.allclose(guided.mask.bn.running_mean, 0.9 * start + 0.1 * means[0], atol=1e-6)


def rationale_gradients(form: LCRSettings) -> dict[str, torch.Tensor]:
    method = build(form)
    output = method(batch())
    bare = build(having(form, weight=0.0))
    plain = bare(batch())
    assert set(plain.terms) == {"contrast"} and torch.equal(plain.total, plain.terms["contrast"])
    without = gradients(bare, plain.total)
    return {n: g - without[n] for n, g in gradients(method, output.total).items() if n.startswith("encoder_q.trunk")}


def test_both_forms_send_the_rationale_into_the_trunk() -> None:
    for form in (PUBLISHED, GUIDED):
        assert float(rationale_gradients(form)["encoder_q.trunk.second.weight"].abs().max()) > 1e-6


def test_published_target_is_uniform_so_that_any_cam_gives_the_same_loss() -> None:
    method = build(PUBLISHED)
    true = method(batch()).terms["rationale"]
    method = build(PUBLISHED)
    method.cam = lambda losses, feature, context: torch.zeros(feature.shape[0], *feature.shape[2:])
    assert float((method(batch()).terms["rationale"] - true).abs() / true) < 0.01
    guided, nothing = build(), build()
    nothing.cam = method.cam
    assert float((guided(batch()).terms["rationale"] / nothing(batch()).terms["rationale"] - 1).abs()) > 0.1


def test_published_feature_depends_on_its_batch_mates_and_guided_does_not() -> None:
    images = batch().x_q
    with torch.no_grad():
        for form, depends in ((PUBLISHED, True), (GUIDED, False)):
            network = build(form).network.eval()
            network.mask.bn.bias.fill_(1.0)  # no cell is at the ReLU's zero, where every batch has the same minimum
            together, alone = network(images), torch.cat([network(one[None]) for one in images])
            assert (float((together - alone).abs().max()) > 1e-4) == depends


def test_config_switches_override_the_variant() -> None:
    from engine.config import Config, IadmConfig, LcrConfig, MethodConfig, from_yaml

    assert method_settings(Config(method=MethodConfig(name="lcr"))) == PUBLISHED
    cfg = Config(
        method=MethodConfig(name="lcr", variant="guided", minmax="batch"), iadm=IadmConfig(sign="plus"), lcr=LcrConfig(detach=False)
    )
    assert method_settings(cfg) == having(GUIDED, minmax="batch", sign="plus", detach=False)
    cfg = from_yaml("method: {name: lcr}\nlcr: {updates: one}\niadm: {weight: 3}")
    assert method_settings(cfg) == having(PUBLISHED, updates="one", weight=3.0)
    network = METHODS["lcr"].build_network(method_settings(cfg), SmallTrunk())
    assert network.mask.minmax == "batch" and network.mask.conv.out_channels == 32


def test_a_network_without_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="mask branch"):
        LCR(FeatureNet(SmallTrunk()), projection_head("mlp2", 24, DIM), dim=DIM)
