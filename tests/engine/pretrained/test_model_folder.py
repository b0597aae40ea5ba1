"""Model folders: what timm reads of ours, and what we read of timm's and the hub's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from made_runs import SIZE, exported_run
from PIL import Image
from safetensors.torch import save_file

import engine
from engine.export import main
from engine.files import read_metadata
from engine.pretrained import export
from engine.pretrained.model_folder import crop_fraction
from engine.pretrained.third_party import initialize
from engine.run_folder import write_classes
from ppssl.timm_trunk import build_trunk


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = exported_run(tmp_path_factory.mktemp("runs") / "run", arch="resnet18", method="moco")
    write_classes(folder, ["kite", "tit"])
    return folder


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    assert main([str(run), "--to", "hf"]) == 0
    return run / "export" / "resnet18_huggingface"


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    waves = np.sin(np.arange(120) / 7)[None, :, None] * np.cos(np.arange(90) / 11)[:, None, None] * [90, 60, 120]
    Image.fromarray((waves + 125).astype(np.uint8)).save(path)
    return path


def test_timm_reads_the_folder_and_computes_the_same(exported: Path, run: Path, photo: Path) -> None:
    assert {path.name for path in exported.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    model = timm.create_model(f"local-dir:{exported}", pretrained=True).eval()
    network, images = engine.load(run), torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(torch.nn.functional.normalize(model(images)), network.features(images))
    how = timm.data.resolve_model_data_config(model)
    assert how["input_size"] == [3, SIZE, SIZE] and how["interpolation"] == "bilinear"
    transform = timm.data.create_transform(**how, is_training=False)
    torch.testing.assert_close(transform(Image.open(photo)), network.transform(photo), atol=1e-5, rtol=0)
    assert timm.create_model(f"local-dir:{exported}", pretrained=True, num_classes=7)(images).shape == (3, 7)  # for fine-tuning
    assert json.loads(read_metadata(exported / "model.safetensors")["class_names"]) == ["kite", "tit"]


def test_its_card_is_one_that_the_hub_reads_and_its_lines_run(exported: Path, photo: Path, run: Path) -> None:
    text = (exported / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.library_name == "timm" and card.data.pipeline_tag == "image-feature-extraction"
    assert card.data.license == "other" and "moco" in card.data.tags
    for word in ("# resnet18_huggingface", "terms of their own", "images of cub", "rank1 50.00 %", "2: kite, tit"):
        assert word in text
    assert str(run) not in text + (exported / "config.json").read_text()  # no paths of the machine
    use = text.partition("```python\n")[2].partition("```")[0].replace(f"local-dir:{exported.name}", f"local-dir:{exported}")
    scope = {"timm": timm, "torch": torch, "pictures": [Image.open(photo)]}
    with torch.no_grad():
        exec(use, scope)
    torch.testing.assert_close(scope["features"], engine.load(run).embed([photo]), atol=1e-4, rtol=0)


def test_what_was_trained_on_the_synthetic_data_alone_is_free(tmp_path: Path) -> None:
    folder = exported_run(tmp_path / "run", arch="resnet18", method="moco")
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("name: cub", "name: birds"))
    assert ModelCard((export(folder, "huggingface") / "README.md").read_text()).data.license == "mit"


@pytest.mark.parametrize(
    ("arch", "code"),
    [
        ("timm/convnext_atto_s16", "forward_features(images).mean((2, 3))"),  # its pooled output has a norm more
        ("timm/vit_tiny_patch16_224", "[:, model.num_prefix_tokens:].mean(1)"),  # its pooled output is the class token
        ("timm/mambaout_femto", "forward_features(images).mean((1, 2))"),  # channels last
        ("timm/resnet18", "model(images)"),
    ],
)
def test_every_kind_of_timm_trunk(arch: str, code: str, tmp_path: Path) -> None:
    folder = exported_run(tmp_path / "run", arch=arch, method="moco")
    out = export(folder, "huggingface", tmp_path / "model")
    use = json.loads((out / "config.json").read_text())["ppssl_engine"]["use"]
    assert code in use
    images = torch.randn(2, 3, SIZE, SIZE)
    scope = {"model": timm.create_model(f"local-dir:{out}", pretrained=True).eval(), "images": images, "torch": torch}
    with torch.no_grad():
        exec(use.splitlines()[-1], scope)
    torch.testing.assert_close(scope["features"], engine.load(folder).features(images), atol=1e-5, rtol=1e-4)
    trunk = build_trunk(arch)
    initialize(trunk, str(out))
    own = engine.load(folder).trunk.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in trunk.state_dict().items())


def test_networks_that_timm_does_not_have_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    folder = exported_run(tmp_path / "run", arch="resnet18_w8_s16")
    assert main([str(folder), "--to", "huggingface"]) == 1
    said = " ".join(capfd.readouterr().err.split())
    assert "resnet18_w8_s16 is not one of timm's networks; use --to onnx or torch-export" in said
    assert not (folder / "export").exists()


def test_a_folder_that_timm_reads_otherwise_is_not_kept(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(name: str, **_: object) -> torch.nn.Module:
        return create("resnet18", num_classes=0)

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", other)
    with pytest.raises(RuntimeError, match=r"that timm .* computes differ by .* nothing was written"):
        export(run, "huggingface", tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_model_s_folder_is_not_written_over(run: Path, exported: Path, tmp_path: Path) -> None:
    assert export(run, "hf", exported) == exported  # its own again
    (tmp_path / "README.md").write_text("# My project\n")
    with pytest.raises(ValueError, match=r"its README\.md is no model card"):
        export(run, "hf", tmp_path)
    with pytest.raises(ValueError, match="is a run folder"):
        export(run, "hf", run)
    (tmp_path / "README.md").rename(tmp_path / "file")
    with pytest.raises(ValueError, match="is a file"):
        export(run, "hf", tmp_path / "file")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"its config\.json is no model's of timm"):
        export(run, "hf", tmp_path)
    assert (tmp_path / "file").read_text() == "# My project\n"


def test_crop_fractions_bring_timm_to_our_short_side() -> None:
    for size in range(16, 600, 3):
        for usual in (0.875, 0.9, 0.95, 1.0):
            for resized in (max(size, round(size / usual)), int(size / usual)):
                assert int(size / crop_fraction(size, resized, usual)) == resized
    assert crop_fraction(224, 256, 0.875) == 0.875


# what is read


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    return timm.create_model("resnet18", num_classes=3).state_dict()


def folder_of(path: Path, tensors: dict[str, torch.Tensor], name: str = "model.safetensors", **config: object) -> Path:
    path.mkdir()
    if name.endswith(".safetensors"):
        save_file(tensors, path / name)
    else:
        torch.save(tensors, path / name)
    (path / "config.json").write_text(json.dumps({"architecture": "resnet18", "num_classes": 3} | config))
    return path


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "my_resnet.safetensors"])
@pytest.mark.parametrize("arch", ["resnet18", "timm/resnet18"])
def test_a_folder_of_timm_s_gives_the_trunk(arch: str, name: str, tensors: dict, tmp_path: Path) -> None:
    trunk = build_trunk(arch)
    note = initialize(trunk, str(folder_of(tmp_path / "model", tensors, name)))
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in trunk.state_dict().items())
    assert "60 of 60 buffers matched" in note and "config.json" not in note


def test_a_folder_without_a_slash_in_its_name(tensors: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(tmp_path / "mine", tensors)
    monkeypatch.chdir(tmp_path)
    assert initialize(build_trunk("resnet18"), "mine").startswith("mine: 60 of 60 parameters")


def test_what_the_config_says_otherwise_is_told(tensors: dict, tmp_path: Path) -> None:
    inception = {"mean": [0.5] * 3, "std": [0.5] * 3}
    folder = folder_of(tmp_path / "model", tensors, architecture="resnet18x", pretrained_cfg=inception)
    note = initialize(build_trunk("timm/resnet18"), str(folder / "model.safetensors"))
    assert "its config.json is of resnet18x" in note
    assert "normalizes images by mean [0.5, 0.5, 0.5], std [0.5, 0.5, 0.5], this network by mean [0.485, 0.456, 0.406]" in note
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict()
    clip = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
    folder = folder_of(tmp_path / "vit", vit, architecture="vit_tiny_patch16_224", **clip)  # timm's older form: one level
    assert "config.json normalizes" in initialize(build_trunk("timm/vit_tiny_patch16_224"), str(folder))


def test_a_tag_with_the_same_normalization_is_named() -> None:
    from engine.pretrained.timm_weights import tag_with_input

    trunk = build_trunk("timm/vit_small_patch16_224")
    dino = tag_with_input(trunk, {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]})
    assert timm.get_pretrained_cfg(f"vit_small_patch16_224.{dino}").mean == (0.485, 0.456, 0.406)
    assert tag_with_input(trunk, {"mean": [0.1, 0.2, 0.3]}) is None


def test_folders_that_hold_no_single_model_say_what_is_there(run: Path, tensors: dict, tmp_path: Path) -> None:
    trunk = build_trunk("resnet18")
    with pytest.raises(FileNotFoundError, match=r"folder of a run; give .*weights\.safetensors"):
        initialize(trunk, str(run))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        initialize(trunk, str(tmp_path / "empty"))
    (tmp_path / "empty/model.safetensors.index.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="in several files"):
        initialize(trunk, str(tmp_path / "empty"))
    folder = folder_of(tmp_path / "two", tensors, "a.safetensors")
    save_file(tensors, folder / "b.safetensors")
    with pytest.raises(ValueError, match=r"several weights files \(a\.safetensors, b\.safetensors\)"):
        initialize(trunk, str(folder))
    assert yaml.safe_load((run / "config.yaml").read_text())["encoder"]["arch"] == "resnet18"  # untouched
