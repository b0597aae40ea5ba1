"""LDFS: which dimensions are altered, what the decoder draws, which statistics move, and the loss against a plain one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine import Trainer
from engine.config import OptimConfig
from ppssl.batch_norm import group_batch_norm
from ppssl.encoder import FeatureNet, Trunk, projection_head
from ppssl.ldfs import LDFS, Decoder
from ppssl.method import METHODS, Batch, StepContext
from ppssl.settings import method_settings

BATCH, SIDE = 6, 32


def build(**options) -> LDFS:
    torch.manual_seed(0)
    trunk = Trunk("resnet18_w8_s16")
    head = projection_head("mlp3_bn", trunk.channels, 6)
    return LDFS(FeatureNet(trunk), head, side=SIDE, dim=6, queue_size=12, **options).train()


def batch(seed: int = 0) -> Batch:
    x = torch.randn(2, BATCH, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    return Batch(x[0], x[1], torch.arange(BATCH))


def test_the_loss_is_the_sum_of_its_three_terms_computed_plainly() -> None:
    method, given = build(noise=0.0), batch()
    twin = copy.deepcopy(method)
    output = method(given)

    def info_nce(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ twin.queue.rows.T], 1) / twin.temperature
        return F.cross_entropy(logits, torch.zeros(BATCH, dtype=torch.long))

    def embed(encoder: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(encoder.head(encoder.trunk(x).mean((2, 3))), dim=1)

    y = twin.encoder_q.trunk(given.x_q).mean((2, 3))
    drawn = twin.decoder(y)
    with torch.no_grad():
        k, k_drawn = embed(twin.encoder_k, given.x_k), embed(twin.encoder_k, drawn)
    expected = {
        "contrast": info_nce(F.normalize(twin.encoder_q.head(y), dim=1), k),
        "reconstruction": (drawn - given.x_q).square().mean(),
        "pair": info_nce(embed(twin.encoder_q, drawn.detach()), k_drawn),  # without noise both draw the same image
    }
    for name, value in expected.items():
        assert torch.allclose(output.terms[name], value, rtol=1e-4), name
    total = expected["contrast"] + 0.05 * expected["reconstruction"] + 0.5 * expected["pair"]
    assert torch.allclose(output.total, total, rtol=1e-4) and torch.allclose(output.keys, k, atol=1e-5)


def test_variance_and_importance_are_running_means_of_their_definitions() -> None:
    method, given = build(), batch()
    feature = method.encoder_q.trunk(given.x_q)
    y = feature.mean((2, 3))
    losses, _ = method.contrast(method.encoder_q.project(y), method.keys(given.x_k), given.index)
    (gradient,) = torch.autograd.grad(losses.sum(), feature, retain_graph=True)
    method.observe(y, losses)
    cells = feature.shape[2] * feature.shape[3]
    by_map = (gradient.mean((2, 3)) * y).abs().mean(0) * cells  # GradCAM on the map: the same but for the number of cells
    assert torch.allclose(method.importance, 0.1 * by_map, rtol=1e-4, atol=1e-9)
    assert torch.allclose(method.variance, 0.1 * y.var(0), rtol=1e-4, atol=1e-9)
    before = method.variance.clone()
    method.observe(y, losses)
    assert torch.allclose(method.variance, 0.9 * before + 0.1 * y.var(0), rtol=1e-4, atol=1e-9)


def test_noise_falls_on_the_dimensions_of_low_variance_or_low_importance_alone_and_is_scaled_by_them() -> None:
    method = build(share=0.25, noise=2.0)
    channels = len(method.variance)
    method.variance.copy_(torch.arange(1.0, channels + 1).square())
    method.importance.copy_(torch.arange(channels, 0, -1.0))
    count = round(0.25 * channels)
    expected = torch.zeros(channels, dtype=torch.bool)
    expected[:count] = expected[-count:] = True  # the least varying, and the least important
    assert torch.equal(method.not_discriminative(), expected)
    torch.manual_seed(3)
    y = torch.zeros(4000, channels)
    altered = method.perturb(y)
    assert torch.equal(altered[:, ~expected], y[:, ~expected])
    deviation = altered[:, expected].std(0) / method.variance.sqrt()[expected]
    assert torch.allclose(deviation, torch.full_like(deviation, 2.0), rtol=0.1)
    method.share = 0.0
    assert not method.not_discriminative().any()


@pytest.mark.parametrize("groups", [1, 2])
def test_only_real_images_move_the_running_statistics(groups: int) -> None:
    method, given = build(), batch()
    for encoder in (method.encoder_q, method.encoder_k):
        group_batch_norm(encoder, groups)
    twin = copy.deepcopy(method)
    method(given)
    twin.encoder_q(given.x_q), twin.encoder_k(given.x_k)
    for ours, alone in ((method.encoder_q, twin.encoder_q), (method.encoder_k, twin.encoder_k)):
        for (name, a), b in zip(ours.named_buffers(), alone.buffers(), strict=True):
            assert "running" not in name or torch.allclose(a, b, atol=1e-6), name
    assert all(m.momentum == 0.1 for m in method.modules() if isinstance(m, nn.BatchNorm2d))  # and will move again


def test_who_learns_from_which_term() -> None:
    def moved(method: LDFS) -> set[str]:
        output = method(batch())
        named = {n: p for n, p in method.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(output.total, list(named.values()), allow_unused=True)
        return {n.split(".")[0] for n, g in zip(named, found, strict=True) if g is not None and float(g.abs().max()) > 0}

    assert moved(build(reconstruction=0.0)) == {"encoder_q"}  # drawn images are data: L_Cp does not teach the decoder
    assert moved(build(pair=0.0)) == {"encoder_q", "decoder"}


def test_pair_counts_from_the_end_of_the_warm_up() -> None:
    totals = []
    for progress in (0.0, 0.19, 0.2, 1.0):
        method = build(warmup=0.2, noise=0.0)
        output = method(batch(), StepContext(torch.tensor(progress)))
        rest = output.total.detach() - output.terms["contrast"] - 0.05 * output.terms["reconstruction"]
        totals.append(float(rest / output.terms["pair"]))
    assert totals == pytest.approx([0.0, 0.0, 0.5, 0.5], abs=1e-4)


@pytest.mark.parametrize(("side", "stride"), [(224, 32), (64, 16), (32, 8)])
def test_the_decoder_draws_images_of_the_trunks_input_size(side: int, stride: int) -> None:
    assert Decoder(40, side, stride)(torch.randn(2, 40)).shape == (2, 3, side, side)


def test_a_size_that_the_map_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.image_size: 40"):
        Decoder(40, 40, 16)


class Images:
    """The same few images again and again."""

    steps_per_epoch = 10

    def batches(self, start_step: int, stop_step: int):
        for _ in range(start_step, stop_step):
            yield batch()


def test_it_trains_and_its_decoder_learns_to_draw() -> None:
    from engine.config import from_yaml

    torch.manual_seed(0)
    cfg = from_yaml("method: {name: ldfs}\nencoder: {dim: 6}\nqueue: {size: 128, dtype: float32}\ndata: {image_size: 32}")
    kind, trunk = METHODS["ldfs"], Trunk("resnet18_w8_s16")
    settings = method_settings(cfg, cfg.data.image_size)
    method = kind.from_settings(settings, kind.build_network(settings, trunk))
    assert (method.pair, method.share, method.warmup, method.noise) == (0.5, 0.2, 0.2, 1.0)
    method.reconstruction = 1.0
    first = float(copy.deepcopy(method)(batch()).terms["reconstruction"])
    Trainer(method, Images(), epochs=3, optim=OptimConfig(lr=0.05), ema_decay=0.9, amp="bf16").fit()
    assert float(method(batch()).terms["reconstruction"]) < 0.9 * first
    assert torch.isfinite(method.network.eval()(batch().x_q)).all() and "decoder" not in str(method.network.weights().keys())
