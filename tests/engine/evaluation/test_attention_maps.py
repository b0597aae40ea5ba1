"""Attention maps kept while training: what they are, that taking them changes nothing, and that they are read back."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from small_methods import build_moco, build_ppssl, step_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.config import Config, DataConfig, EvalConfig
from engine.data import catalog
from engine.evaluation import attention_maps
from engine.files import read_metadata
from engine.training.log import Records
from ppssl.encoder import FeatureNet, Trunk, projection_head
from ppssl.lcr import LCR
from ppssl.method import Batch, Method
from ppssl.settings import replace_keys, variant
from ppssl.simclr import SimCLR

ARCH = "resnet18_w8_s16"
CPU = torch.device("cpu")


def images(count: int = 3) -> torch.Tensor:
    x = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    return x.contiguous(memory_format=torch.channels_last)


def build(kind: str) -> Method:
    if kind == "moco":
        return build_moco(ARCH)
    if kind == "lcr":
        torch.manual_seed(0)
        trunk = Trunk(ARCH)
        settings = variant("lcr", "guided")
        network = LCR.build_network(settings, trunk)
        return LCR(network, projection_head("mlp2", trunk.channels, 16), settings=settings, dim=16, queue_size=64)
    return build_ppssl(ARCH, kind)


@pytest.mark.parametrize("kind", ["moco", "lcr", "guided", "published"])
def test_taking_maps_leaves_the_method_as_it_was(kind: str) -> None:
    method = build(kind).train()
    method.encoder_q.trunk.layer2.eval()  # a mode somebody chose
    before, modes = copy.deepcopy(method.state_dict()), [m.training for m in method.modules()]
    random = torch.get_rng_state()
    maps = attention_maps.attention(method, images())
    assert set(maps) == {"feature", "cam"} | (set() if kind == "moco" else {"mask"})
    for values in maps.values():
        assert values.shape == (3, 2, 2) and values.dtype == torch.float32 and not values.requires_grad
        assert torch.isfinite(values).all() and values.min() >= 0 and values.max() > 0
    assert torch.equal(random, torch.get_rng_state()) and modes == [m.training for m in method.modules()]
    assert [n for n, t in method.state_dict().items() if not torch.equal(t, before[n])] == []
    assert all(p.grad is None for p in method.parameters())
    again = attention_maps.attention(method, images())
    assert all(torch.equal(maps[name], again[name]) for name in maps)


def test_moco_s_map_is_what_supports_agreement_with_the_mirror_image() -> None:
    method, x = build("moco").eval(), images()
    maps = attention_maps.attention(method, x)
    leaf = x.clone().requires_grad_()
    q, k = method.encoder_q(leaf), method.encoder_k(x.flip(3))
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ method.queue.rows.T], 1) / method.temperature
    loss = torch.nn.functional.cross_entropy(logits, torch.zeros(3, dtype=torch.long), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, leaf)
    plain = torch.relu(-(x * gradient).sum(1)).unfold(1, 16, 16).unfold(2, 16, 16).mean((3, 4))
    torch.testing.assert_close(maps["cam"], plain, rtol=1e-4, atol=1e-7)


def test_pp_ssl_s_mask_is_the_one_that_pools_the_feature() -> None:
    method, x = build("guided").eval(), images()
    with torch.no_grad():
        expected = method.mask(method.encoder_q.trunk(x)).mask
    torch.testing.assert_close(attention_maps.attention(method, x)["mask"], expected)
    method.settings = replace_keys(method.settings, {"iadm.weight": 0.0})  # without guidance there is still something to look at
    assert attention_maps.attention(method, x)["cam"].max() > 0


def test_every_method_with_a_network_shows_its_feature_map() -> None:
    torch.manual_seed(0)
    trunk = Trunk(ARCH)
    method, x = SimCLR(FeatureNet(trunk), projection_head("mlp2", trunk.channels, 16)).train(), images()
    maps = attention_maps.attention(method, x)
    with torch.no_grad():
        expected = trunk.eval()(x).mean(1)
    assert set(maps) == {"feature"} and torch.equal(maps["feature"], expected)
    assert attention_maps.has_maps(method) and not attention_maps.has_maps(Method())


@pytest.mark.parametrize("mode", ["encoder", "step"])
def test_nothing_is_compiled_for_maps(mode: str) -> None:
    torch._dynamo.reset()
    seen: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        seen.append(len(inputs))
        return graph.forward

    method = build("guided")
    x = images(4)
    step = step_of(method, compile=mode, backend=backend)
    step(Batch(x, x.flip(3), torch.arange(4), teacher=torch.randn(4, 5)))
    compiled = len(seen)
    maps = attention_maps.attention(method, images(3))
    assert compiled and len(seen) == compiled
    plain = build("guided")
    plain.load_state_dict(method.state_dict(), strict=False)  # a step drops batch-norm's counters
    expected = attention_maps.attention(plain, images(3))
    assert all(torch.allclose(maps[name], expected[name], atol=1e-5) for name in maps)
    step(Batch(x, x.flip(3), torch.arange(4), teacher=torch.randn(4, 5)))  # and the compiled step is still the compiled one
    assert len(seen) == compiled
    torch._dynamo.reset()


def test_maps_are_kept_at_every_look_and_read_back(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    for n in range(20):
        Image.fromarray(np.full((30 + n, 50, 3), 10 * n, np.uint8)).save(root / f"{n:02}.png")
    cfg = Config(data=DataConfig(name="folder", root=str(root), image_size=32))
    found = catalog.load("folder", root, progress=False)
    keep = attention_maps.Watch(tmp_path / "run", cfg, found, CPU)
    (tmp_path / "run").mkdir()
    records = Records(tmp_path / "run")
    trainer = SimpleNamespace(method=build("guided").train(), step=SimpleNamespace(steps_done=0), epoch=0, records=records)
    assert attention_maps.read(tmp_path / "run") is None
    for step in (0, 10, 30, 20):  # the run was resumed from before step 30
        trainer.step.steps_done, trainer.epoch = step, step // 10
        keep(trainer)
    kept = attention_maps.read(tmp_path / "run")
    assert [(look.step, look.epoch) for look in kept.looks] == [(0, 0), (10, 1), (20, 2)]
    assert kept.split == "train" and len(kept.names) == attention_maps.COUNT == len(set(kept.names))
    assert kept.names[0] == "01.png" and kept.names[-1] == "18.png"
    assert kept.pictures.shape == (attention_maps.COUNT, attention_maps.SIDE, attention_maps.SIDE, 3)
    assert kept.pictures[0].min() == kept.pictures[0].max() == 10
    assert {n: m.shape for n, m in kept.looks[0].maps.items()} == dict.fromkeys(("mask", "cam", "feature"), (8, 2, 2))
    assert sum(p.stat().st_size for p in (tmp_path / "run" / "maps").iterdir()) < 700_000
    names = read_metadata(tmp_path / "run/maps/images.safetensors")["names"]
    assert json.loads(names) == list(kept.names)
    shown = EventAccumulator(str(tmp_path / "run/tensorboard"), {"images": 0}).Reload().Images("attention")
    assert [event.step for event in shown] == [0, 10, 30, 20] and len({event.encoded_image_string for event in shown}) == 1


def test_a_run_is_looked_at_five_times_or_at_every_evaluation(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "photos/a.png")
    found = catalog.load("folder", tmp_path / "photos", progress=False)
    looked: list[int] = []
    for every, epochs, wanted in ((0, 100, [25, 50, 75]), (0, 1, []), (0, 3, [1, 2]), (3, 8, [2, 3, 4, 6])):
        watch = attention_maps.Watch(None, Config(eval=EvalConfig(every=every)), found, CPU)
        watch.__class__ = type("Counted", (attention_maps.Watch,), {"__call__": lambda self, t: looked.append(t.epoch)})
        for epoch in range(1, epochs + 1):
            watch.after_epoch(SimpleNamespace(epoch=epoch, epochs=epochs, ended=epoch == epochs))
        assert looked == wanted
        looked.clear()


def test_a_process_that_keeps_nothing_still_looks(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (40, 40), (9, 90, 9)).save(tmp_path / "photos/a.png")
    found = catalog.load("folder", tmp_path / "photos", progress=False)
    method, calls = build("moco"), []
    method.keys = lambda x: calls.append(len(x)) or type(method).keys(method, x)
    watch = attention_maps.Watch(None, Config(data=DataConfig(name="folder", image_size=32)), found, CPU)
    watch(SimpleNamespace(method=method, step=SimpleNamespace(steps_done=0), epoch=0))
    assert calls == [1] and [p.name for p in tmp_path.iterdir()] == ["photos"]


def test_a_method_without_attention_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "photos/a.png")
    found = catalog.load("folder", tmp_path / "photos", progress=False)
    keep = attention_maps.Watch(tmp_path / "run", Config(data=DataConfig(name="folder", image_size=32)), found, CPU)
    keep(SimpleNamespace(method=Method()))
    assert not (tmp_path / "run").exists()
