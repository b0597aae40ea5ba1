"""A run with a timm trunk: training, resume, evaluation, search and export as for a ResNet."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from made_runs import CLASSES, exported_run, reported_run
from safetensors.torch import load_file

import engine
from engine import build, evaluate, export, report, search
from engine.config import BatchNormConfig, Config, DataConfig, EncoderConfig, MethodConfig, from_run
from engine.data import build_loader, catalog
from engine.evaluation.features import key
from engine.train import main
from engine.training import checkpoint
from ppssl.timm_trunk import IMAGENET, image_input

LITE = "timm/tf_efficientnet_lite0"
CPU = torch.device("cpu")


def words(photos: Path, arch: str, *more: str) -> list[str]:
    return [
        "--cfg", "folder", f"data.root={photos}", f"encoder.arch={arch}", "encoder.weights=none", "encoder.dim=8", "epochs=2",
        "batch_size=4", "queue.size=8", "data.image_size=32", "data.workers=1", "data.loader=torch", "method.name=moco",
        "run.save_every_steps=2", *more,
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPSSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def newest(out: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(checkpoint.list_checkpoints(out / "checkpoints")[-1])["method"]


def test_interrupted_and_resumed_equals_uninterrupted_to_the_bit(photos: Path, ctrl_c_at_first_save: Callable) -> None:
    given = words(photos, "timm/tf_efficientnet_lite0", "encoder.freeze=stem,stage1,stage2,stage3,bn")
    assert main([*given, "--out", "whole"]) == 0
    ctrl_c_at_first_save()
    assert main([*given, "--out", "parts"]) == 130
    assert main([*given, "--out", "parts"]) == 0
    whole, parts = newest(Path("whole")), newest(Path("parts"))
    assert whole.keys() == parts.keys() and [n for n in whole if not torch.equal(whole[n], parts[n])] == []
    config = from_run(Path("whole/config.yaml"))
    assert config.encoder.arch == LITE and config.encoder.freeze == ("stem", "stage1", "stage2", "stage3", "bn")
    assert Path("whole/report.html").is_file()
    start = build.initial_network(config).trunk.state_dict()
    kept = {n: tensor for n, tensor in start.items() if not n.endswith("num_batches_tracked")}
    fixed = {n for n, tensor in kept.items() if torch.equal(tensor, whole[f"encoder_q.trunk.{n}"])}
    assert {n for n in kept if n.startswith(("conv_stem", "blocks.0", "blocks.1", "blocks.2")) or "running" in n} <= fixed
    assert "blocks.6.0.conv_pw.weight" not in fixed
    assert engine.load("whole").class_names == engine.load("parts").class_names == CLASSES


def test_evaluation_search_and_the_library_see_the_same_feature(photos: Path, tmp_path: Path) -> None:
    folder = reported_run(tmp_path / "run", photos, maps=False, encoder=EncoderConfig(arch=f"{LITE}_s8", weights="none", dim=8))
    records = evaluate.evaluate(folder, CPU, protocols=["retrieval"])
    assert records[0]["protocol"] == "retrieval" and 0 <= records[0]["rank1"] <= 1
    wanted = photos / "test/002.Blue_Tit/2.png"
    found = search.search(folder, wanted, 3, CPU)
    assert found[0].path == wanted and found[0].cosine == pytest.approx(1, abs=1e-4)
    network = engine.load(folder)
    assert network.transform.input == image_input(LITE) != IMAGENET
    features = load_file(folder / "features/test.safetensors")["features"]
    images = build.data(from_run(folder / "config.yaml"), cache_dir=None, training=False).test
    row = network.features(network.transform(wanted)[None])[0]
    torch.testing.assert_close(row, features[images.names.index("test/002.Blue_Tit/2.png")], atol=1e-4, rtol=1e-3)
    report.write([folder], tmp_path / "report.html", CPU, quick=True)


def test_kept_features_of_a_resnet_keep_their_key_and_another_input_has_another(photos: Path, tmp_path: Path) -> None:
    images = catalog.load("folder", photos, workers=0, cache_dir=None, progress=False).test
    network = torch.nn.Linear(2, 2)
    keys = [
        key(network, images, Config(encoder=EncoderConfig(arch="timm/vit_base_patch16_224", weights=weights)), CPU)
        for weights in ("timm", "timm:mae")
    ]
    assert keys[0] != keys[1]


@pytest.mark.parametrize("loader", ["torch", "resident", "dali", "dali colour"])
def test_every_loader_normalizes_as_the_model_was_trained(loader: str, photos: Path) -> None:
    if loader.startswith("dali"):
        pytest.importorskip("engine.data.loaders.dali_loader", exc_type=ImportError)
    data = {"resident": "host"} if loader == "resident" else {"resident": "off", "loader": loader.split()[0]}
    aug = "dali" if loader == "dali colour" else "parity"
    images = catalog.load("folder", photos, workers=0, cache_dir=None, progress=False).train
    batches = []
    for arch in ("resnet50", LITE):
        cfg = Config(
            batch_size=4,
            encoder=EncoderConfig(arch=arch),
            data=DataConfig(name="folder", image_size=32, workers=0, aug=aug, **data),
        )
        made = build_loader(images, cfg, "cpu", with_clean=True)
        batches.append(next(iter(made.batches(0, 1))))
        made.close()
    pixels = []
    for batch, how in zip(batches, (IMAGENET, image_input(LITE)), strict=True):
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (how.mean, how.std))
        pixels.append([(x * std + mean) * 255 for x in (batch.x_q, batch.x_k, batch.x_clean)])
    for one, other in zip(*(found[:2] for found in pixels), strict=True):
        torch.testing.assert_close(one, other, atol=0.6 if aug == "dali" else 1e-3, rtol=0)
    clean = pixels[1][2]
    assert (clean - pixels[0][2]).abs().max() > 2  # bicubic, not bilinear
    from engine.data import Transform

    for x, i in zip(batches[1].x_clean, batches[1].index.tolist(), strict=True):
        wanted = Transform(32, image_input(LITE))(images.path(i))
        assert (x - wanted).abs().mean() < 0.05  # several decoders and resamplers


def test_timm_reads_the_export_and_computes_the_same(tmp_path: Path) -> None:
    folder = exported_run(tmp_path / "run", arch="timm/convnext_atto_s16", method="moco")
    path = export.export(folder, "timm")
    assert path == folder / "export/convnext_atto_s16_timm.safetensors"
    card = json.loads(path.with_name(path.name + ".json").read_text())
    scope = {"timm": timm}
    exec(card["use"].replace(f'"{path.name}"', repr(str(path))), scope)
    images = torch.randn(2, 3, 64, 64)
    network = engine.load(folder)
    with torch.no_grad():
        torch.testing.assert_close(scope["model"].eval().forward_features(images), network.trunk(images))
    how = image_input("timm/convnext_atto")
    assert card["preprocessing"]["interpolation"].startswith("bicubic") and card["preprocessing"]["mean"] == list(how.mean)
    assert card["preprocessing"]["resize_short_side"] == how.resize(64)


def test_onnx_gives_a_vit_s_masked_feature_at_another_size(tmp_path: Path) -> None:
    folder = exported_run(tmp_path / "run", arch="timm/vit_tiny_patch16_224", variant="guided")
    session = onnxruntime.InferenceSession(export.export(folder, "onnx"), providers=["CPUExecutionProvider"])
    images = torch.randn(3, 3, 64, 64)
    theirs = session.run(None, {"images": images.numpy()})[0]
    np.testing.assert_allclose(theirs, engine.load(folder).features(images).numpy(), atol=1e-4)


def test_the_formats_of_others_are_refused_by_name(tmp_path: Path) -> None:
    folder = exported_run(tmp_path / "run", arch="timm/convnext_atto", method="moco")
    with pytest.raises(
        ValueError, match="timm/convnext_atto is not one of torchvision's.* --to timm, huggingface, onnx or torch-export"
    ):
        export.export(folder, "torchvision")


def test_batch_norm_keys_say_that_they_do_nothing_in_a_layer_norm_trunk(photos: Path, capfd: pytest.CaptureFixture) -> None:
    for arch, silent in (("timm/convnext_atto", False), ("timm/resnet18", True)):
        assert main([*words(photos, arch, "bn.groups=2"), "--dry-run"]) == 0
        told = " ".join(capfd.readouterr().err.split())
        assert ("bn.groups: does nothing in timm/convnext_atto, which has no batch norm" in told) != silent


def test_the_fused_batch_norm_of_our_resnets_says_that_it_does_nothing_in_timm_s(capfd: pytest.CaptureFixture) -> None:
    fused = Config(bn=BatchNormConfig(impl="fused"), encoder=EncoderConfig(arch="timm/resnet18", weights="none"))
    build.initial_network(replace(fused, method=MethodConfig(name="moco")))
    assert "bn.impl: fused does nothing in timm/resnet18" in " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["encoder.arch=timm/vit_tiny_patch16_224", "data.image_size=40"], "cannot take images of 40 px"),
        (["encoder.arch=timm/resnet18", "data.image_size=80", "method.name=ldfs"], "must be a multiple of 32, the stride of"),
        (["encoder.arch=timm/resnet_18"], "timm/resnet18"),
        (["encoder.arch=timm/resnet18", "encoder.weights=IMAGENET1K_V1"], "timm:a1_in1k"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(more: list[str], told: str, photos: Path, capfd: pytest.CaptureFixture) -> None:
    assert main([*words(photos, "timm/resnet18"), *more, "--dry-run"]) in (1, 2)
    said = " ".join(capfd.readouterr().err.split())
    assert told in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("more", "key"),
    [
        (["encoder.weights=timm"], "encoder.weights"),
        (["method.name=ppssl", "ais.target=image", "teacher.model=timm/resnet18", "teacher.weights=timm"], "teacher.weights"),
    ],
)
def test_weights_that_cannot_be_downloaded_end_the_run_in_one_line(
    more: list[str], key: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert main([*words(photos, "timm/resnet18"), *more, "--dry-run"]) == 1
    told = " ".join(capfd.readouterr().err.split())
    assert f"error: {key}: timm: model.safetensors of" in told and "hf download timm/resnet18.a1_in1k" in told
