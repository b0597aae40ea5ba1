"""PP-SSL: the variant ``guided`` against a plain re-computation, and what each switch changes."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ppssl.encoder import BaseTrunk, FeatureNet, MaskBranch
from ppssl.method import Batch, StepContext
from ppssl.ppssl import PPSSL, spatial_kl
from ppssl.settings import PPSSLSettings, method_settings, replace_keys, variant

CHANNELS, DIM, QUEUE, BATCH, SIDE, CELL = 24, 8, 20, 6, 32, 8
GUIDED, PUBLISHED = variant("ppssl", "guided"), variant("ppssl", "published")


def having(settings: PPSSLSettings, **switches) -> PPSSLSettings:
    """``settings`` with switches by the last part of their key; those of the text guidance and the teacher by ``ais_`` and
    ``teacher_``."""
    keys = {
        name: f"iadm.{name}"
        for name in ("weight", "sources", "image", "sign", "temperature", "cam_temperature", "softmax", "cam_scale", "cam_loss")
    }
    keys |= {name: f"iadm.{name}" for name in ("pool", "mask", "image_bn", "reduction")}
    keys |= {name: f"method.{name}" for name in ("minmax", "contrast_mask", "mask_reach")} | {"teacher_view": "teacher.view"}
    keys |= {f"ais_{name}": f"ais.{name}" for name in ("weight", "temperature", "scale", "warmup", "target")}
    return replace_keys(settings, {keys[name]: value for name, value in switches.items()})


UNMASKED = having(GUIDED, contrast_mask=False)
"""The contrast of MoCo itself, which a test can write down in a line."""


class SmallTrunk(BaseTrunk):
    """Two convolutions, [B, 3, 32, 32] -> layer1 [B, 8, 8, 8], layer4 [B, 24, 4, 4]."""

    channels, stride = CHANNELS, CELL

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 4, stride=4)
        self.second = nn.Conv2d(8, CHANNELS, 2, stride=2)

    def maps(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        low = F.relu(self.first(images))
        return {"layer1": low, "layer4": F.relu(self.second(low))}


def build(settings: PPSSLSettings = GUIDED, **options) -> PPSSL:
    """PP-SSL with switches by name (``having``) and options of the constructor."""
    switches = {name: options.pop(name) for name in list(options) if name.startswith("ais_") or name in ("sources", "image")}
    settings = having(settings, **switches)
    torch.manual_seed(1)
    text = torch.randn(8, 5)
    head = nn.Sequential(nn.Linear(CHANNELS, CHANNELS), nn.ReLU(), nn.Linear(CHANNELS, DIM))
    network = FeatureNet(SmallTrunk(), MaskBranch(CHANNELS, 32, minmax=settings.method.minmax))
    options = {"embed": lambda x: F.normalize(x.detach().mean((2, 3)) @ torch.ones(3, 5) + 0.1, dim=1), "teacher_dim": 5} | options
    return PPSSL(network, head, text, settings=settings, dim=DIM, queue_size=QUEUE, temperature=0.2, **options).train()


def batch() -> Batch:
    generator = torch.Generator().manual_seed(2)
    images = [torch.randn(BATCH, 3, SIDE, SIDE, generator=generator) for _ in range(3)]
    teacher = F.normalize(torch.randn(BATCH, 5, generator=generator), dim=1)
    return Batch(images[0].requires_grad_(), images[1], torch.arange(BATCH), images[2].requires_grad_(), teacher)


def plain_guided(method: PPSSL, given: Batch) -> dict[str, torch.Tensor]:
    """The table of the variant ``guided``, written out in float64 without the project's ops."""
    m = copy.deepcopy(method).double()
    x_q, x_k = given.x_q.detach().double().requires_grad_(), given.x_k.double()

    def feature_of(trunk: nn.Module, images: torch.Tensor) -> torch.Tensor:
        return F.relu(trunk.second(F.relu(trunk.first(images))))

    def mask_of(branch: nn.Module, feature: torch.Tensor) -> torch.Tensor:
        u = F.conv2d(feature, branch.conv.weight)
        mean, var = u.mean((0, 2, 3), keepdim=True), u.var((0, 2, 3), unbiased=False, keepdim=True)
        gamma, beta = (t.view(1, -1, 1, 1) for t in (branch.bn.weight, branch.bn.bias))
        phi = F.relu((u - mean) / (var + 1e-5).sqrt() * gamma + beta).max(1).values
        low = phi.flatten(1).min(1).values.view(-1, 1, 1)
        return (phi - low) / (1e-7 + (phi - low).flatten(1).max(1).values.view(-1, 1, 1))

    feature = feature_of(m.encoder_q.trunk, x_q)
    mask = mask_of(m.mask, feature)
    pooled = (mask[:, None] * feature).mean((2, 3))
    q = F.normalize(m.encoder_q.head((mask.detach()[:, None] * feature).mean((2, 3))), dim=1)
    with torch.no_grad():
        key_feature = feature_of(m.encoder_k.trunk, x_k)
        k = F.normalize(m.encoder_k.head((mask_of(m.mask_k, key_feature)[:, None] * key_feature).mean((2, 3))), dim=1)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ m.queue.rows.T], 1) / 0.2
    contrast_each = F.cross_entropy(logits, torch.zeros(BATCH, dtype=torch.long), reduction="none")

    (gradient,) = torch.autograd.grad(contrast_each.sum(), x_q, retain_graph=True)
    cam = F.avg_pool2d(F.relu(-(x_q.detach() * gradient).sum(1, keepdim=True)), CELL)[:, 0]
    cam = cam / cam.flatten(1).max(1).values.view(-1, 1, 1)
    target = F.softmax(cam.flatten(1) / 0.4, 1)
    iadm = (target * (target.log() - F.log_softmax(mask.flatten(1) / 0.4, 1))).sum(1).mean()

    text = m.text_features
    student = F.normalize(m.to_text(F.normalize(pooled, dim=1)), dim=1)
    p_t = F.softmax(100 * given.teacher.double() @ text.T, 1)
    ais = (p_t * (F.log_softmax(100 * given.teacher.double() @ text.T, 1) - F.log_softmax(100 * student @ text.T, 1))).sum() / (
        8 * BATCH
    )
    total = contrast_each.mean() + 1.28 * iadm + 1.2 * ais
    names = [n for n, p in m.named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad(total, [dict(m.named_parameters())[n] for n in names])
    return {"total": total, "contrast": contrast_each.mean(), "iadm": iadm, "ais": ais, "keys": k} | dict(
        zip(names, gradients, strict=True)
    )


def gradients(method: PPSSL, total: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {n: p for n, p in method.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    return dict(zip(named, found, strict=True))


def near(actual: torch.Tensor, expected: torch.Tensor, relative: float = 2e-5) -> bool:
    actual, expected = actual.detach().double(), expected.detach().double()
    return bool((actual - expected).abs().max() <= relative * expected.abs().max())


def test_guided_equals_its_plain_recomputation() -> None:
    method, given = build(), batch()
    expected = plain_guided(method, given)
    output = method(given)
    assert near(output.total, expected["total"]) and near(output.keys, expected["keys"])
    for name in ("contrast", "iadm", "ais"):
        assert near(output.terms[name], expected[name]), name
    for name, gradient in gradients(method, output.total).items():
        assert near(gradient, expected[name], 1e-4), name


def iadm_gradients(form: PPSSLSettings) -> dict[str, torch.Tensor]:
    method = build(form, ais_weight=0.0)
    output = method(batch())
    bare = build(having(form, weight=0.0), ais_weight=0.0)
    without = gradients(bare, bare(batch()).total)
    return {n: g - without[n] for n, g in gradients(method, output.total).items() if without.get(n) is not None}


def test_published_guidance_sends_nothing_into_the_encoder_and_guided_does() -> None:
    published = iadm_gradients(PUBLISHED)
    assert all(float(g.abs().max()) < 1e-7 for n, g in published.items() if n.startswith("encoder_q."))
    guided = iadm_gradients(GUIDED)
    assert float(guided["encoder_q.trunk.second.weight"].abs().max()) > 1e-4


def test_published_feature_depends_on_its_batch_mates_and_guided_does_not() -> None:
    images = batch().x_q.detach()
    with torch.no_grad():
        for form, depends in ((PUBLISHED, True), (GUIDED, False)):
            network = build(form).network.eval()
            network.mask.bn.bias.fill_(1.0)  # no cell is at the ReLU's zero, where every batch has the same minimum
            together, alone = network(images), torch.cat([network(one[None]) for one in images])
            assert (float((together - alone).abs().max()) > 1e-4) == depends


def test_published_target_is_uniform_to_three_digits_for_gradients_of_the_usual_size() -> None:
    cam = torch.rand(4, 7, 7, generator=torch.Generator().manual_seed(0)) * 1e-4
    assert float((F.softmax(cam, -1) - 1 / 7).abs().max()) < 1e-4
    mask = torch.rand(4, 7, 7, generator=torch.Generator().manual_seed(1))
    constant = spatial_kl(torch.zeros(4, 7, 7), mask, PUBLISHED.iadm)
    assert float((spatial_kl(cam, mask, PUBLISHED.iadm) - constant).abs() / constant) < 1e-3


def test_plus_marks_what_hurts_agreement_and_minus_what_supports_it() -> None:
    """G is the gradient of the loss: more of what relu(+x * G) marks raises the loss, more of what relu(-x * G) marks lowers it."""
    for sign, direction in (("plus", 1), ("minus", -1)):
        method, given = build(having(UNMASKED, sign=sign)), batch()

        def losses(images: torch.Tensor, method=method, given=given) -> torch.Tensor:
            q = method.encoder_q.project(method.encoder_q.trunk(images).mean((2, 3)))
            return method.contrast(q, method.keys(given.x_k), given.index)[0]

        at = losses(given.x_q)
        cam = method.cam(at, {"image": given.x_q}, (SIDE, SIDE))  # one cell a pixel
        assert float(cam.amax()) > 0
        with torch.no_grad():
            change = losses(given.x_q * (1 + 1e-3 * cam[:, None])) - at
        assert (change * direction > 0).all()


def test_a_shared_batch_norm_ends_as_a_mixture_so_that_no_mask_is_evaluated_as_it_was_trained() -> None:
    """Two updates a step, feature map then image, momentum 0.1: the buffers end at 9/19 of the one and 10/19 of the other."""
    method, given = build(having(PUBLISHED, weight=1.0), ais_weight=0.0), batch()
    with torch.no_grad():
        feature = F.conv2d(method.encoder_q.trunk(given.x_q), method.mask.conv.weight).mean((0, 2, 3))
        pixels = F.conv2d(given.x_q, method.image_mask.conv.weight).mean((0, 2, 3))
    own = build(having(PUBLISHED, image_bn="separate"), ais_weight=0.0)
    for _ in range(100):
        method(given), own(given)
    assert torch.allclose(method.mask.bn.running_mean, 9 / 19 * feature + 10 / 19 * pixels, atol=1e-5)

    def gap(m: PPSSL) -> float:
        """Between the mask in training and in evaluation, on the very images trained on."""
        with torch.no_grad():
            maps = m.encoder_q.trunk(given.x_q)
            return float((m.train().mask(maps).mask - m.eval().mask(maps).mask).abs().max())

    assert gap(method) > 10 * gap(own)


def test_zero_cam_is_a_uniform_target() -> None:
    mask = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(3), requires_grad=True)
    loss = spatial_kl(torch.zeros(3, 4, 4), mask, GUIDED.iadm)
    expected = -(F.log_softmax(mask.flatten(1) / 0.4, 1).mean(1) + torch.log(torch.tensor(16.0))).mean()
    assert torch.allclose(loss, expected, atol=1e-6) and torch.isfinite(torch.autograd.grad(loss, mask)[0]).all()


# every switch of the variant, alone: the value to turn it to from ``guided``, and the terms that it must and must not move
SWITCHES = [
    ("minmax", "batch", {"contrast", "iadm", "ais"}),
    ("weight", 2.0, set()),
    ("contrast_mask", False, {"contrast", "iadm"}),
    ("sign", "plus", {"iadm"}),
    ("temperature", 1.0, {"iadm"}),
    ("cam_temperature", 0.2, {"iadm"}),
    ("softmax", "rows", {"iadm"}),
    ("cam_scale", "none", {"iadm"}),
    ("pool", "max", {"iadm"}),
    ("mask", "image", {"iadm"}),
    ("reduction", "sum", {"iadm"}),
    ("teacher_view", "query", {"ais"}),
    ("ais_target", "image", {"ais"}),
    ("ais_target", "relations", {"ais"}),
]


@pytest.mark.parametrize(("switch", "value", "moves"), SWITCHES, ids=[s[0] for s in SWITCHES])
def test_each_switch_moves_its_own_term_only(switch: str, value: object, moves: set[str]) -> None:
    before = build()(batch())
    after = build(having(GUIDED, **{switch: value}))(batch())
    moved = {name for name in before.terms if not torch.equal(before.terms[name], after.terms[name])}
    assert moved == moves
    assert (before.total - after.total).abs() > 1e-6


def test_cam_of_the_batch_mean_is_the_per_sample_one_over_the_batch_size() -> None:
    raw = having(UNMASKED, cam_scale="none")
    cams = []
    for loss in ("sum", "mean"):
        method, given = build(having(raw, cam_loss=loss)), batch()
        maps = {"image": given.x_q, **method.encoder_q.trunk.maps(given.x_q)}
        q = method.encoder_q.project(maps["layer4"].mean((2, 3)))
        losses, _ = method.contrast(q, method.keys(given.x_k), given.index)
        cams.append(method.cam(losses, maps, (4, 4)))
    assert torch.allclose(cams[0], BATCH * cams[1], rtol=1e-5, atol=1e-9)


def test_shared_image_batch_norm_moves_one_buffer_twice_and_an_own_one_is_apart() -> None:
    shared, own = build(PUBLISHED), build(having(PUBLISHED, image_bn="separate"))
    for method in (shared, own):
        method(batch())
    assert shared.image_mask.own_bn is None and not torch.equal(shared.mask.bn.running_mean, own.mask.bn.running_mean)
    assert float(own.image_mask.own_bn.running_mean.abs().max()) > 0
    assert not any("own_bn" in name for name in shared.state_dict())


def test_sources_and_original_image() -> None:
    layers = build(sources=("image", "layer1"))(batch())
    image = build()(batch())
    assert not torch.equal(layers.terms["iadm"], image.terms["iadm"])
    orig = build(image="clean")
    assert orig.needs_clean and orig.needs_image_grad == ("x_clean",)
    assert not torch.equal(orig(batch()).terms["iadm"], image.terms["iadm"])
    assert build(sources=("layer1",)).needs_image_grad == ()
    with pytest.raises(ValueError, match="layer9"):
        build(sources=("layer9",))


@pytest.mark.parametrize("sources", [("layer4",), ("image", "layer1", "layer4")], ids="+".join)
def test_several_sources_are_the_mean_of_their_own_cams(sources: tuple[str, ...]) -> None:
    def cam(*names: str) -> torch.Tensor:
        method, given = build(UNMASKED, sources=names), batch()
        maps = {"image": given.x_q, **method.encoder_q.trunk.maps(given.x_q)}
        q = method.encoder_q.project(maps["layer4"].mean((2, 3)))
        losses, _ = method.contrast(q, method.keys(given.x_k), given.index)
        return method.cam(losses, maps, (4, 4))

    each = torch.stack([cam(name) for name in sources])
    assert torch.allclose(cam(*sources), each.mean(0), atol=1e-6)
    highest = each.amax((2, 3))  # 1 in every source, so that all count alike; or 0, where nothing supports the agreement
    assert ((highest - highest.round()).abs() < 1e-5).all() and float(highest.mean()) > 0.8


@pytest.mark.parametrize("count", [2, 5, 8])
def test_number_of_descriptions(count: int) -> None:
    torch.manual_seed(4)
    text = F.normalize(torch.randn(8, 5), dim=1)[:count]
    method, given = build(), batch()
    method.text_features = text
    pooled = torch.rand(BATCH, CHANNELS)
    student = F.normalize(method.to_text(F.normalize(pooled, dim=1)), dim=1)
    p_t = F.softmax(100 * given.teacher @ text.T, 1)
    plain = [(p * (p.log() - F.log_softmax(z, 0))).nan_to_num().mean() for p, z in zip(p_t, 100 * student @ text.T, strict=True)]
    assert torch.allclose(method.ais(pooled, given), torch.stack(plain).mean(), rtol=1e-4)


def test_temperature_and_scale_of_the_text_guidance() -> None:
    """tau divides both sides' logits, ais.scale multiplies the student's alone."""
    given, pooled = batch(), torch.rand(BATCH, CHANNELS, generator=torch.Generator().manual_seed(5))
    cooler, scaled = build(ais_temperature=4.0), build(ais_scale=25.0, teacher_logit_scale=25.0)
    assert torch.allclose(cooler.ais(pooled, given), scaled.ais(pooled, given), rtol=1e-4)
    assert not torch.allclose(build(ais_scale=25.0).ais(pooled, given), scaled.ais(pooled, given), rtol=1e-2)


def test_the_teacher_looks_at_the_view_or_not_at_all() -> None:
    seen = []

    def embed(images: torch.Tensor) -> torch.Tensor:
        seen.append(images)
        return torch.ones(BATCH, 5)

    given = batch()
    assert build(embed=embed).needs_teacher_embeddings and not build(PUBLISHED, embed=embed).needs_teacher_embeddings
    build(embed=embed)(given)
    assert seen == []  # the clean image's embedding came with the batch
    build(PUBLISHED, embed=embed)(given)
    assert len(seen) == 1 and seen[0] is given.x_q


@pytest.mark.parametrize("target", ["image", "relations"])
def test_what_is_learned_of_the_teacher_s_images(target: str) -> None:
    """Written out in float64, from the images to the gradient of the trunk."""
    settings = having(GUIDED, weight=0.0, ais_target=target, ais_temperature=0.1)
    method, given = build(settings), batch()
    other = copy.deepcopy(method).double()
    feature = other.encoder_q.trunk(given.x_q.detach().double())
    pooled = F.normalize((other.mask(feature).mask[:, None] * feature).mean((2, 3)), dim=1)
    teacher = given.teacher.double()
    if target == "image":
        projected = F.normalize(other.to_image(pooled), dim=1)
        expected = torch.stack([1 - torch.dot(p, t) for p, t in zip(projected, teacher, strict=True)]).mean()
    else:
        apart = ~torch.eye(BATCH, dtype=torch.bool)
        z_s, z_t = ((x @ x.T)[apart].view(BATCH, BATCH - 1) / 0.1 for x in (pooled, teacher))
        expected = (z_t.softmax(1) * (z_t.log_softmax(1) - z_s.log_softmax(1))).sum(1).mean()
        assert method.to_image is None
    assert method.to_text is None and method.text_features is None and method.needs_teacher_embeddings
    output = method(given)
    assert near(output.terms["ais"], expected)
    mine, theirs = (
        gradients(method, method.ais(method.masked(method.encoder_q.trunk(given.x_q)).pooled, given)),
        gradients(other, expected),
    )
    for name in ("encoder_q.trunk.second.weight", "mask.conv.weight", *(["to_image.weight"] if target == "image" else [])):
        assert near(mine[name], theirs[name], 1e-4), name
    view = build(having(settings, teacher_view="query"))
    assert not view.needs_teacher_embeddings and not torch.equal(view(given).terms["ais"], output.terms["ais"])


def test_each_target_says_what_it_needs_of_the_teacher() -> None:
    head, network = nn.Linear(CHANNELS, DIM), FeatureNet(SmallTrunk(), MaskBranch(CHANNELS, 32, minmax="image"))
    with pytest.raises(ValueError, match=r"ais\.target: text needs"):
        PPSSL(network, head, None, settings=GUIDED, dim=DIM)
    with pytest.raises(ValueError, match=r"ais\.target: image needs"):
        PPSSL(network, head, None, settings=having(GUIDED, ais_target="image"), dim=DIM)


@pytest.mark.parametrize("settings", [PUBLISHED, GUIDED], ids=["published", "guided"])
def test_the_guidance_of_a_symmetric_contrast_is_that_of_the_first_view(settings: PPSSLSettings) -> None:
    given = batch()
    one, two = build(settings)(given), build(settings, symmetric=True)(given)
    swapped = given._replace(x_q=given.x_k.clone().requires_grad_(), x_k=given.x_q.detach())
    back = build(settings)(swapped)
    assert all(torch.equal(one.terms[name], two.terms[name]) for name in ("iadm", "ais"))
    assert torch.allclose(two.terms["contrast"], (one.terms["contrast"] + back.terms["contrast"]) / 2, rtol=1e-6)
    assert torch.equal(two.keys, torch.cat([one.keys, back.keys]))


def test_masked_keys_with_gradient_come_from_the_query_network_and_its_mask() -> None:
    method, given = build(having(GUIDED, weight=0.0), ais_weight=0.0, negatives="batch", keys_with_gradient=True), batch()
    assert method.mask_k is None and method.ema_pairs() == ([], [])
    twin = copy.deepcopy(method)
    rows = []
    for images in (given.x_q, given.x_k):
        feature = twin.encoder_q.trunk(images)
        rows.append(twin.encoder_q.project((twin.mask(feature).mask.detach()[:, None] * feature).mean((2, 3))))
    expected = F.cross_entropy(rows[0] @ rows[1].T / 0.2, torch.arange(BATCH))
    output = method(given)
    assert near(output.total, expected)
    found, wanted = gradients(method, output.total), gradients(twin, expected)
    assert found["mask.conv.weight"] is None  # A is a constant to the contrast, on both sides
    assert all(near(found[n], g, 1e-4) for n, g in wanted.items() if g is not None)
    assert torch.allclose(method.mask.bn.running_mean, twin.mask.bn.running_mean, atol=1e-6)


def test_maxout_width_and_head_are_the_configs() -> None:
    from engine.config import Config, EncoderConfig, IadmConfig, MethodConfig, QueueConfig
    from ppssl.encoder import Trunk

    cfg = Config(
        method=MethodConfig(maxout_width=5), encoder=EncoderConfig(head="mlp3_bn", dim=7), iadm=IadmConfig(mask="image"),
        queue=QueueConfig(size=30, dtype="float32"),
    )  # fmt: skip
    cfg = dataclasses.replace(cfg, ais=dataclasses.replace(cfg.ais, weight=0.0))
    settings = method_settings(cfg)
    method = PPSSL.from_settings(settings, PPSSL.build_network(settings, Trunk("resnet18_w8")))
    assert method.mask.conv.out_channels == 5 and method.image_mask.conv.out_channels == 5
    assert isinstance(method.encoder_q.head[-1], nn.BatchNorm1d) and method.queue.rows.shape == (30, 7)


def test_contrast_mask_contrasts_masked_features_on_both_sides() -> None:
    """Written out: A of either network pools its own features, and is a constant to the contrast."""
    method, given = build(having(GUIDED, weight=0.0), ais_weight=0.0), batch()
    with torch.no_grad():
        method.mask_k.conv.weight.mul_(torch.rand_like(method.mask_k.conv.weight))  # as if they had moved apart
    other = copy.deepcopy(method)
    feature, key_feature = other.encoder_q.trunk(given.x_q), other.encoder_k.trunk(given.x_k)
    mask, key_mask = other.mask(feature).mask.detach(), other.mask_k(key_feature).mask
    q = other.encoder_q.project((mask[:, None] * feature).mean((2, 3)))
    k = other.encoder_k.project((key_mask[:, None] * key_feature).mean((2, 3))).detach()
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ other.queue.rows.T], 1) / 0.2
    expected = F.cross_entropy(logits, torch.zeros(BATCH, dtype=torch.long))
    output = method(given)
    assert near(output.total, expected) and near(output.keys, k)
    found, wanted = gradients(method, output.total), gradients(other, expected)
    assert found["mask.conv.weight"] is None and found["mask.bn.weight"] is None
    assert all(near(found[n], g, 1e-4) for n, g in wanted.items() if g is not None)


def test_the_key_s_mask_follows_and_is_only_there_where_keys_are_masked() -> None:
    plain, masked = build(UNMASKED), build()
    assert plain.mask_k is None and not any(name.startswith("mask_k") for name in plain.state_dict())
    online, target = masked.ema_pairs()
    moved = {id(p) for p in target}
    assert all(id(p) in moved and not p.requires_grad for p in masked.mask_k.parameters())
    assert [id(p) for p in online[-3:]] == [id(p) for p in masked.mask.parameters()]
    assert len(online) == len(plain.ema_pairs()[0]) + 3
    before = masked.mask_k.bn.running_mean.clone()
    masked(batch())
    assert not torch.equal(masked.mask_k.bn.running_mean, before)  # the key's statistics are its own
    assert not torch.equal(masked.mask_k.bn.running_mean, masked.mask.bn.running_mean)


def test_a_mask_that_reaches_its_branch_only_leaves_the_trunk_to_the_contrast() -> None:
    branch = having(GUIDED, mask_reach="branch")
    method, bare = build(branch, ais_weight=0.0), build(having(GUIDED, weight=0.0), ais_weight=0.0)
    output = method(batch())
    guided, contrast = gradients(method, output.total), gradients(bare, bare(batch()).total)
    assert torch.equal(output.terms["iadm"], build()(batch()).terms["iadm"])  # the values are the same
    assert all(near(guided[n], g, 1e-6) for n, g in contrast.items() if n.startswith("encoder_q."))
    assert float(guided["mask.conv.weight"].abs().max()) > 1e-4
    # the text guidance still teaches the trunk, through the feature that is pooled
    text = build(having(branch, weight=0.0))
    taught = gradients(text, text(batch()).total)
    assert not near(taught["encoder_q.trunk.second.weight"], contrast["encoder_q.trunk.second.weight"], 1e-2)


def test_warmup_raises_the_weight_with_the_share_of_the_run_done() -> None:
    totals = []
    for progress in (0.0, 0.1, 0.2, 0.9):
        method = build(ais_warmup=0.2)
        output = method(batch(), StepContext(torch.tensor(progress)))
        rest = output.total.detach() - output.terms["contrast"] - 1.28 * output.terms["iadm"]
        totals.append(float(rest / output.terms["ais"]))
    assert totals == pytest.approx([0.0, 0.6, 1.2, 1.2], abs=1e-4)


def test_weights_of_zero_turn_a_term_and_its_needs_off() -> None:
    method = build(having(GUIDED, weight=0.0), ais_weight=0.0)
    assert method.needs_image_grad == () and not method.needs_teacher_embeddings
    output = method(batch())
    assert set(output.terms) == {"contrast"} and torch.equal(output.total, output.terms["contrast"])


def test_the_teacher_view_query_needs_an_image_encoder() -> None:
    with pytest.raises(ValueError, match=r"teacher\.view"):
        build(PUBLISHED, embed=None)


def test_config_switches_override_the_variant() -> None:
    from engine.config import Config, IadmConfig, MethodConfig

    cfg = Config(method=MethodConfig(variant="guided", minmax="batch"), iadm=IadmConfig(sign="plus"))
    assert method_settings(cfg) == having(GUIDED, minmax="batch", sign="plus")
    assert method_settings(Config()) == PUBLISHED
