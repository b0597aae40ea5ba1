"""BYOL: the loss, who receives gradient, the target network, and a run."""

import copy

import torch
import torch.nn.functional as F

from engine import Trainer
from engine.config import OptimConfig, from_yaml
from ppssl.byol import BYOL
from ppssl.encoder import Trunk
from ppssl.method import METHODS, Batch
from ppssl.settings import method_settings

BATCH = 8


def build() -> BYOL:
    torch.manual_seed(0)
    cfg = from_yaml("method: {name: byol}\nencoder: {dim: 8, head: mlp3_bn}")
    kind = METHODS["byol"]
    settings = method_settings(cfg)
    return kind.from_settings(settings, kind.build_network(settings, Trunk("resnet18_w8_s16"))).train()


def batch(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(BATCH, 3, 32, 32, generator=generator)
    x_q, x_k = (image + 0.3 * torch.randn(image.shape, generator=generator) for _ in range(2))
    return Batch(x_q, x_k, torch.arange(BATCH))


def test_the_loss_is_the_squared_distance_of_unit_vectors_both_ways() -> None:
    method, given = build(), batch()
    for p in method.target.parameters():
        p.mul_(1.1)
    twin = copy.deepcopy(method)
    output = method(given)
    expected = 0.0
    for seen, other in ((given.x_q, given.x_k), (given.x_k, given.x_q)):
        prediction = twin.predictor(twin.online.head(twin.online.trunk(seen).mean((2, 3))))
        target = twin.target.head(twin.target.trunk(other).mean((2, 3))).detach()
        expected = expected + (F.normalize(prediction, dim=1) - F.normalize(target, dim=1)).square().sum(1).mean()
    assert torch.allclose(output.total, expected, rtol=1e-4)
    assert torch.allclose(output.stats["cosine"], 1 - expected / 4, rtol=1e-4)
    swapped = copy.deepcopy(twin)(given._replace(x_q=given.x_k, x_k=given.x_q))
    assert torch.allclose(output.total, swapped.total, rtol=1e-4)


def test_the_target_gets_no_gradient_and_follows_the_online_network() -> None:
    method = build()
    output = method(batch())
    online, target = method.ema_pairs()
    assert len(online) == len(target) == len(list(method.online.parameters()))
    assert not any(p.requires_grad for p in target) and output.keys is None
    trained = [p for p in method.parameters() if p.requires_grad]
    assert len(trained) == len(online) + len(list(method.predictor.parameters()))
    assert all(float(g.abs().max()) > 0 for g in torch.autograd.grad(output.total, list(method.predictor.parameters()))[:1])
    assert not any("queue" in name for name in method.state_dict())


class Images:
    steps_per_epoch = 10

    def batches(self, start_step: int, stop_step: int):
        for step in range(start_step, stop_step):
            yield batch(step % 4)


def test_it_learns_to_predict_and_does_not_collapse() -> None:
    method = build()
    start = copy.deepcopy(method.target.state_dict())
    with torch.no_grad():
        before = copy.deepcopy(method)(batch())
    Trainer(method, Images(), epochs=4, optim=OptimConfig(lr=0.05), ema_decay=0.9, amp="bf16").fit()
    with torch.no_grad():
        after = method.train()(batch())
    assert float(after.total) < 0.5 * float(before.total)
    assert float(after.stats["spread"]) > 0.1
    assert not torch.equal(start["trunk.conv1.weight"], method.target.state_dict()["trunk.conv1.weight"])
    assert not torch.equal(start["trunk.bn1.running_mean"], method.target.state_dict()["trunk.bn1.running_mean"])
