"""The project as a library: a run's features in three lines, and the trainer with a method that it has never seen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_runs import SIZE, exported_run
from PIL import Image

import engine
from engine import Trainer, run_folder
from engine.config import Config, DataConfig, OptimConfig, RunConfig
from engine.data.catalog import load as load_catalog
from engine.data.loaders.clean_batches import clean_batches
from engine.data.loaders.interface import IMAGENET_MEAN, IMAGENET_STD
from engine.data.views import clean_resize
from engine.errors import BrokenFile, ConfigError
from engine.evaluation import retrieval
from engine.pretrained import export
from engine.training import World, checkpoint
from ppssl import Batch, Method, MoCo, Output
from ppssl.encoder import BaseTrunk, FeatureNet, Trunk, projection_head


class Spread(Method):
    """Two views agree, different images part: all of a method in fifteen lines (Wang and Isola 2020, with a shared network)."""

    def __init__(self, trunk: Trunk):
        super().__init__()
        self.kept = FeatureNet(trunk)
        self.head = projection_head("mlp2", trunk.channels, 16)

    @property
    def network(self) -> FeatureNet:
        return self.kept

    def forward(self, batch: Batch) -> Output:
        q, k = (torch.nn.functional.normalize(self.head(self.kept(x)), dim=1) for x in (batch.x_q, batch.x_k))
        align = (q - k).square().sum(1).mean()
        apart = torch.pdist(q).square().mul(-2).exp().mean().log()
        return Output(align + apart, {"align": align.detach(), "apart": apart.detach()}, k.detach(), {})


class Noise:
    """Any object with these three is a loader."""

    steps_per_epoch = 8

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        for step in range(start, stop):
            x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(step % 8))
            yield Batch(x, x.flip(3), torch.arange(8))

    def close(self) -> None:
        pass


def test_the_trainer_runs_anybody_s_method(tmp_path: Path) -> None:
    torch.manual_seed(0)
    method = Spread(Trunk("resnet18_w8_s16"))
    trainer = Trainer(
        method, Noise(), epochs=3, optim=OptimConfig(lr=0.1), run=RunConfig(log_every=8), device="cpu", out=tmp_path / "mine"
    )
    summary = trainer.fit()
    assert summary.steps == 24
    losses = [r["loss"] for r in run_folder.read_metrics(tmp_path / "mine") if r["kind"] == "train"]
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert (tmp_path / "mine" / "weights.safetensors").is_file()

    again = Trainer(
        Spread(Trunk("resnet18_w8_s16")), Noise(), epochs=4, optim=OptimConfig(lr=0.1), device="cpu", out=tmp_path / "mine"
    )
    again.resume(checkpoint.list_checkpoints(tmp_path / "mine" / "checkpoints")[-1])
    assert again.fit().steps == 8


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported_run(tmp_path_factory.mktemp("runs") / "run", arch="resnet18_w8_s16", variant="guided")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    for i, (height, width) in enumerate(((90, 120), (200, 80))):
        Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def test_features_in_three_lines(run: Path, photos: Path) -> None:
    network = engine.load(run)
    images = torch.stack([network.transform(path) for path in sorted(photos.glob("*.png"))])
    features = network.features(images)

    assert features.shape == (2, 64) and features.dtype == torch.float32 and not features.requires_grad
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(features, network(images).detach())


def test_the_transform_is_what_evaluation_sees(run: Path, photos: Path) -> None:
    network = engine.load(run)
    cfg = replace(Config(), data=DataConfig(name="folder", root=str(photos), image_size=SIZE, workers=0))
    images = load_catalog("folder", photos, workers=1, progress=False).train
    ((evaluated, _),) = clean_batches(images, resize=clean_resize(SIZE), crop=SIZE, workers=cfg.data.workers)
    for i, expected in enumerate(evaluated):
        assert torch.equal(network.transform(images.path(i)), expected)
        with Image.open(images.path(i)) as image:
            assert torch.equal(network.transform(image), expected)


def test_the_transform_turns_and_converts(run: Path) -> None:
    transform = engine.load(run).transform
    gray = Image.fromarray(np.arange(96 * 80, dtype=np.uint32).astype(np.uint8).reshape(96, 80), "L")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    turned = gray.copy()
    turned.info["exif"] = exif.tobytes()
    assert torch.equal(transform(turned), transform(gray.transpose(Image.Transpose.ROTATE_270)))
    white = transform(Image.new("RGB", (100, 100), "white"))
    expected = (1 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    torch.testing.assert_close(white, expected[:, None, None].expand(3, SIZE, SIZE))


def test_files_become_rows_in_batches(run: Path, photos: Path) -> None:
    network = engine.load(run)
    paths = sorted(photos.glob("*.png")) * 3
    rows = network.embed(paths, batch_size=4)
    assert rows.shape == (6, 64) and rows.dtype == torch.float32 and not rows.requires_grad
    alone = torch.cat([network.features(network.transform(path)[None]) for path in paths])
    torch.testing.assert_close(rows, alone, atol=1e-5, rtol=0)
    with Image.open(paths[0]) as image:
        torch.testing.assert_close(network.embed([image, str(paths[1])], threads=1), alone[:2], atol=1e-5, rtol=0)
    assert network.embed(path for path in ()).shape == (0, 64)


def test_what_cannot_be_embedded_is_named(run: Path, photos: Path, tmp_path: Path) -> None:
    network, good = engine.load(run), photos / "0.png"
    (tmp_path / "broken.jpg").write_bytes(good.read_bytes()[:2000])
    for bad in (tmp_path / "broken.jpg", tmp_path / "missing.jpg", tmp_path, 7):
        with pytest.raises(ValueError, match=f"embed: {bad} cannot be read as an image"):
            network.embed([good, bad])
    for one in (good, str(good), 7):
        with pytest.raises(ValueError, match=r"got one \(.*give \[image\]"):
            network.embed(one)
    with pytest.raises(ValueError, match="batch_size: got 0"):
        network.embed([good], batch_size=0)
    with pytest.raises(ValueError, match="no transform; engine.load"):
        FeatureNet(Trunk("resnet18_w8_s16")).eval().embed([good])
    with pytest.raises(ValueError, match=r"eval\(\)"):
        network.train().embed([good])


def test_class_names_are_kept_where_the_photos_are_not(tmp_path: Path, run: Path) -> None:
    assert engine.load(run).class_names == ()
    for name in ("blue tit", "größe\n"):
        (tmp_path / "set/train" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (40, 40)).save(tmp_path / "set/train" / name / f"{i}.png")
    images = load_catalog("folder", tmp_path / "set", workers=1, progress=False).train
    train(tmp_path / "run", images=images)
    (tmp_path / "set").rename(tmp_path / "gone")
    assert engine.load(tmp_path / "run").class_names == ("blue tit", "größe\n")
    for damage, told in (("[1]", "is not a list of names"), ("[", "is damaged")):
        (tmp_path / "run/classes.json").write_text(damage)
        with pytest.raises(ValueError, match=rf"classes\.json {told}.*remove it"):
            engine.load(tmp_path / "run")


class Patches(BaseTrunk):
    """A trunk of one's own: two convolutions."""

    arch, channels, stride, sources = "patches", 16, 8, ("stem", "patches")

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 4, stride=4)
        self.mix = torch.nn.Sequential(torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 16, 2, stride=2))

    def maps(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        stem = self.stem(images)
        return {"stem": stem, "patches": self.mix(stem)}


def test_a_trunk_of_one_s_own_trains_evaluates_exports_and_loads(tmp_path: Path, photos: Path) -> None:
    torch.manual_seed(0)
    network = FeatureNet(Patches())
    method = MoCo(network, projection_head("mlp2", 16, 8), dim=8, queue_size=16)
    out = tmp_path / "mine"
    Trainer(method, Noise(), epochs=2, optim=OptimConfig(lr=0.1), device="cpu", out=out).fit()
    with pytest.raises(ValueError, match=r"encoder\.arch: 'patches' is not known.*network=FeatureNet"):
        engine.load(out)
    loaded = engine.load(out, network=FeatureNet(Patches()))
    assert not torch.equal(loaded.trunk.stem.weight, FeatureNet(Patches()).trunk.stem.weight)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded.features(x), method.network.eval().features(x))
    rows = loaded.embed([photos / f"{i % 2}.png" for i in range(4)])
    assert retrieval(rows, [0, 1, 0, 1]).rank1 == 1  # equal photos
    file = export(out, "torch-export", network=FeatureNet(Patches()))
    assert file.name == "patches_torch_export.pt2"
    torch.testing.assert_close(torch.export.load(file).module()(x), loaded.features(x), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="patches is not one of timm's networks; use --to onnx or torch-export"):
        export(out, "timm", network=FeatureNet(Patches()))


def test_a_trunk_that_is_none_is_refused() -> None:
    with pytest.raises(TypeError, match=r"must extend ppssl\.encoder\.BaseTrunk, got Conv2d"):
        FeatureNet(torch.nn.Conv2d(3, 8, 1))


def test_features_of_something_else_are_refused(run: Path, photos: Path) -> None:
    network = engine.load(run)
    for wrong in ([Image.new("RGB", (9, 9))], torch.zeros(3, SIZE, SIZE), torch.zeros(1, SIZE, SIZE, 3)):
        with pytest.raises(ValueError, match=r"network\.transform"):
            network.features(wrong)
    with pytest.raises(ValueError, match="eval"):
        network.train().features(torch.zeros(1, 3, SIZE, SIZE))
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        engine.load(photos)
    (photos / "text.png").write_text("no image")
    with pytest.raises(ValueError, match="not an image"):
        network.transform(photos / "text.png")


def moco() -> MoCo:
    torch.manual_seed(0)
    trunk = Trunk("resnet18_w8_s16")
    return MoCo(FeatureNet(trunk), projection_head("mlp2", trunk.channels, 8), dim=8, queue_size=16)


def train(out: Path, epochs: int = 1, **options: object) -> Trainer:
    trainer = Trainer(moco(), Noise(), epochs=epochs, optim=OptimConfig(lr=0.1), device="cpu", out=out, **options)
    trainer.fit()
    return trainer


def test_a_run_built_in_code_can_be_loaded(tmp_path: Path) -> None:
    trainer = train(tmp_path / "moco")
    network = engine.load(tmp_path / "moco")
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(network.features(x), trainer.method.network.eval().features(x))
    assert network.transform.image_size == 32


def test_a_user_s_own_method_is_loaded_into_a_network_that_is_given(tmp_path: Path) -> None:
    torch.manual_seed(0)
    method = Spread(Trunk("resnet18_w8_s16"))
    Trainer(method, Noise(), epochs=1, device="cpu", out=tmp_path / "mine").fit()
    with pytest.raises(ValueError, match=r"Spread.*network="):
        engine.load(tmp_path / "mine")
    network = engine.load(tmp_path / "mine", network=FeatureNet(Trunk("resnet18_w8_s16")))
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(network.features(x), method.network.eval().features(x))


def test_a_second_trainer_continues_the_run_in_its_folder(tmp_path: Path) -> None:
    train(tmp_path / "run", epochs=2)
    again = Trainer(moco(), Noise(), epochs=2, optim=OptimConfig(lr=0.1), device="cpu", out=tmp_path / "run")
    assert again.fit().steps == 0
    records = run_folder.read_metrics(tmp_path / "run")
    assert [r["step"] for r in records if r["kind"] == "train"] == sorted({r["step"] for r in records if r["kind"] == "train"})


def test_a_second_trainer_with_other_settings_is_refused(tmp_path: Path) -> None:
    train(tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match=r"optim\.momentum.*0\.9.*0\.8"):
        Trainer(moco(), Noise(), epochs=1, optim=OptimConfig(lr=0.1, momentum=0.8), device="cpu", out=tmp_path / "run").fit()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_a_broken_image_in_a_process_that_does_not_write_names_the_checkpoint_all_the_same(tmp_path: Path) -> None:
    train(tmp_path / "run")

    class Broken(Noise):
        def batches(self, start: int, stop: int) -> Iterator[Batch]:
            yield from super().batches(0, 1)
            raise BrokenFile("x.jpg: unreadable now")

    other = Trainer(moco(), Broken(), epochs=1, device="cpu", out=tmp_path / "run", world=World(1, 2, device=torch.device("cpu")))
    with pytest.raises(BrokenFile, match=r"last good checkpoint: .*step_000000008\.pt"):
        other.fit()


def test_a_run_can_be_moved_aside(tmp_path: Path) -> None:
    train(tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    again = train(tmp_path / "run", resume="none")
    assert again.step.steps_done == 8 and (tmp_path / "run.1" / "metrics.jsonl").read_text() == before
    assert len([r for r in run_folder.read_metrics(tmp_path / "run") if r["kind"] == "train"]) == 1
