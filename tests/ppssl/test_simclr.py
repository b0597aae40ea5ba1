"""SimCLR: the loss over all views, its symmetry, and a run; and that a method is one file, whoever wrote it."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from engine import Trainer, load, run_folder
from engine.config import OptimConfig, from_yaml
from engine.synthetic import dataset
from engine.train import main
from ppssl.encoder import Trunk
from ppssl.method import METHODS, Batch, Output, register
from ppssl.settings import SETTINGS, method_settings
from ppssl.simclr import SimCLR, nt_xent

BATCH = 5


def build() -> SimCLR:
    torch.manual_seed(0)
    cfg = from_yaml("method: {name: simclr}\nencoder: {dim: 8, head: mlp3_bn}\ncontrast: {temperature: 0.3}")
    kind = METHODS["simclr"]
    settings = method_settings(cfg)
    return kind.from_settings(settings, kind.build_network(settings, Trunk("resnet18_w8_s16"))).train()


def batch(seed: int = 0, size: int = BATCH) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(size, 3, 32, 32, generator=generator)
    x_q, x_k = (image + 0.3 * torch.randn(image.shape, generator=generator) for _ in range(2))
    return Batch(x_q, x_k, torch.arange(size))


def plain(z: torch.Tensor, temperature: float) -> torch.Tensor:
    """NT-Xent as the paper writes it, one view after the other."""
    losses = []
    for i in range(len(z)):
        twin = (i + len(z) // 2) % len(z)
        others = [torch.dot(z[i], z[j]) / temperature for j in range(len(z)) if j != i]
        losses.append(torch.logsumexp(torch.stack(others), 0) - torch.dot(z[i], z[twin]) / temperature)
    return torch.stack(losses)


def test_the_loss_is_nt_xent_and_its_gradient() -> None:
    z = F.normalize(torch.randn(2 * BATCH, 8, dtype=torch.float64), dim=1).requires_grad_()
    losses, rank = nt_xent(z, 0.3)
    expected = plain(z, 0.3)
    assert torch.allclose(losses, expected, rtol=1e-10)
    weights = torch.arange(1.0, 2 * BATCH + 1, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((loss * weights).sum(), z)[0] for loss in (losses, expected))
    assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-12)
    similar = (z @ z.T).detach()
    for i in range(2 * BATCH):
        twin = (i + BATCH) % (2 * BATCH)
        assert int(rank[i]) == sum(bool(similar[i, j] > similar[i, twin]) for j in range(2 * BATCH) if j not in (i, twin))


def test_a_step_contrasts_both_views_of_the_batch_alike() -> None:
    method, given = build(), batch()
    output = method(given)
    z = method.encoder(torch.cat([given.x_q, given.x_k]))
    assert torch.allclose(output.total, plain(z, 0.3).mean(), rtol=1e-5)
    swapped = method(given._replace(x_q=given.x_k, x_k=given.x_q))
    assert torch.allclose(output.total, swapped.total, rtol=1e-5)
    assert output.keys is None  # there is no queue
    assert method.ema_pairs() == ([], [])


class Images:
    steps_per_epoch = 10

    def batches(self, start_step: int, stop_step: int):
        for _ in range(start_step, stop_step):
            yield batch(size=8)


def test_it_learns_which_views_belong_together() -> None:
    method = build()
    with torch.no_grad():
        before = method(batch(size=8))
    Trainer(method, Images(), epochs=3, optim=OptimConfig(lr=0.1), amp="bf16").fit()
    with torch.no_grad():
        after = method.train()(batch(size=8))
    assert float(after.total) < 0.7 * float(before.total) and float(after.stats["contrast_top1"]) > 0.9
    feature = method.network.eval()(batch().x_q)
    assert feature.shape == (BATCH, 64) and feature.norm(dim=1).detach().numpy() == pytest.approx(1.0, abs=1e-5)


def test_a_method_is_its_file_and_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that the project does not know trains, is logged, evaluated and loaded from a recipe, once registered."""
    monkeypatch.setenv("PPSSL_CACHE", str(tmp_path / "cache"))
    world = dataset.generate(tmp_path / "birds", train_per_species=1, test_per_species=2, workers=1, progress=False)

    @register("alignment")
    class Alignment(SimCLR):
        """The twin alone, without negatives."""

        def forward(self, batch: Batch) -> Output:
            z_q, z_k = self.encoder(torch.cat([batch.x_q, batch.x_k])).chunk(2)
            total = 2 - 2 * (z_q * z_k).sum(1).mean()
            return Output(total, {"alignment": total.detach()}, z_k.detach(), {})

    try:
        recipe = tmp_path / "mine.yaml"
        recipe.write_text(
            f"epochs: 2\nbatch_size: 20\nmethod: {{name: alignment}}\nqueue: {{size: 20}}\n"
            f"encoder: {{arch: resnet18_w8_s16, weights: none, dim: 8, head: mlp3_bn}}\n"
            f"data: {{name: birds, root: {world}, image_size: 40, workers: 1, loader: torch}}\nrun: {{log_every: 2}}\n"
        )
        assert main(["--cfg", str(recipe), "--out", str(tmp_path / "run")]) == 0
        records = run_folder.read_metrics(tmp_path / "run")
        assert [r["alignment"] for r in records if r["kind"] == "train"][-1] < 2
        assert len([r for r in records if r["kind"] == "eval"]) == 2
        assert load(tmp_path / "run")(torch.randn(2, 3, 40, 40)).shape == (2, 64)
    finally:
        METHODS.classes.pop("alignment"), SETTINGS.pop("alignment")
