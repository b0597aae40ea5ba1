"""The teacher: open_clip by name, tag or file, what is refused before any download, and the cache of clean-image embeddings."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from engine.data import catalog, teacher_cache
from engine.synthetic import dataset
from ppssl.teacher import Teacher, load_descriptions
from ppssl.timm_trunk import build_trunk

MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
DESCRIPTIONS = ["an animal with feathers and wings", "a four-wheeled road vehicle", "a plant with petals"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A tiny image-text model of random weights: its open_clip config and its safetensors file."""
    folder = tmp_path_factory.mktemp("teacher")
    config = folder / "tiny-test.json"
    config.write_text(json.dumps(MODEL))
    open_clip.add_model_config(config)
    torch.manual_seed(0)
    save_file(open_clip.create_model("tiny-test").state_dict(), folder / "tiny.safetensors")
    return str(config), str(folder / "tiny.safetensors")


def test_a_local_file_goes_through_open_clip(files: tuple[str, str]) -> None:
    teacher = Teacher.from_open_clip(*files, DESCRIPTIONS)
    clip = open_clip.create_model("tiny-test", pretrained=files[1]).eval()
    tokens = open_clip.get_tokenizer("tiny-test")(DESCRIPTIONS)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(teacher.text_features, F.normalize(clip.encode_text(tokens), dim=1), atol=1e-6)
        assert torch.allclose(teacher.embed(images), F.normalize(clip.encode_image(images), dim=1), atol=1e-6)
    assert (
        teacher.logit_scale == pytest.approx(float(clip.logit_scale.detach().exp()))
        and teacher.dim == 16
        and teacher.image_size == 32
    )
    assert teacher.mean == open_clip.OPENAI_DATASET_MEAN
    assert teacher.embed(torch.randn(2, 3, 96, 96)).shape == (2, 16)  # resized to the model's size
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.train().visual.training


def test_without_descriptions_it_is_an_image_encoder_of_any_size(files: tuple[str, str]) -> None:
    whole, images_only = (Teacher.from_open_clip(*files, text) for text in (DESCRIPTIONS, None))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(whole.embed(images), images_only.embed(images))
    assert images_only.text_features is None and images_only.dim == whole.dim == 16
    larger = Teacher.from_open_clip(*files, None, 48)
    assert larger.image_size == 48 and larger.embed(torch.randn(2, 3, 48, 48)).shape == (2, 16)
    with pytest.raises(ValueError, match=r"width of the image embedding"):
        Teacher(torch.nn.Identity(), None, image_size=8, mean=(0.5,) * 3, std=(0.5,) * 3)


def test_the_cache_tells_models_of_timm_apart_that_have_the_same_tensors(tmp_path: Path) -> None:
    dataset.draw(0, 0).save(tmp_path / "0.png")
    images = catalog.load("folder", tmp_path, workers=1, progress=False).train
    keys = set()
    for arch in ("timm/test_resnet", "timm/test_resnet_s8"):
        torch.manual_seed(0)
        keys.add(teacher_cache.cache_key(Teacher.from_trunk(build_trunk(arch), "timm", 64), images))
    assert len(keys) == 2


def test_quick_gelu_mismatch_is_an_error_before_any_download() -> None:
    with pytest.raises(ValueError, match=r"quick_gelu=False.*teacher\.model=ViT-B-32-quickgelu"):
        Teacher.from_open_clip("ViT-B-32", "openai", DESCRIPTIONS)


def test_the_recipes_teacher_names_an_existing_model_and_tag() -> None:
    assert "openai" in open_clip.list_pretrained_tags_by_model("ViT-B-32-quickgelu")
    assert open_clip.get_pretrained_cfg("ViT-B-32-quickgelu", "openai")["quick_gelu"] is True
    assert open_clip.get_model_config("ViT-B-32-quickgelu")["quick_gelu"] is True


def test_what_cannot_be_loaded_is_refused_with_the_remedy(
    files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pickle = tmp_path / "ViT-B-32.pt"
    pickle.write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"ViT-B-32\.pt.*safetensors\.torch\.save_file"):
        Teacher.from_open_clip("ViT-B-32-quickgelu", str(pickle), DESCRIPTIONS)
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors"):
        Teacher.from_open_clip("ViT-B-32-quickgelu", "absent.safetensors", DESCRIPTIONS)
    with pytest.raises(ValueError, match=r"teacher\.model.*ViT-B-33"):
        Teacher.from_open_clip("ViT-B-33", "openai", DESCRIPTIONS)
    with pytest.raises(ValueError, match=r"teacher\.weights.*'opnai'.*openai"):
        Teacher.from_open_clip("ViT-B-32-quickgelu", "opnai", DESCRIPTIONS)
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors does not fit"):
        Teacher.from_open_clip(files[0], str(tmp_path / "other.safetensors"), DESCRIPTIONS)

    def offline(*_args, **_kwargs):
        logging.getLogger("huggingface_hub").warning("retrying")
        raise OSError("no network")

    monkeypatch.setattr(open_clip, "create_model", offline)
    with pytest.raises(ConnectionError, match=r"openai.*no network.*open_clip_model\.safetensors.*teacher\.weights=PATH"):
        Teacher.from_open_clip("ViT-B-32-quickgelu", "openai", DESCRIPTIONS)
    assert "retrying" not in caplog.text, "the attempts of a download are not logged, the error says how it ended"


def test_descriptions_put_the_relevant_one_first(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("descriptions: [{text: a dog}, {text: a bird, relevant: true}, {text: a car}]")
    assert load_descriptions(str(own), 2) == ["a bird", "a dog"]
    assert load_descriptions(str(own)) == ["a bird", "a dog", "a car"]
    with pytest.raises(ValueError, match=r"ais\.count: 4 .* has 3; ais\.count=null takes them all"):
        load_descriptions(str(own), 4)
    own.write_text("descriptions: [{text: a dog}]")
    with pytest.raises(ValueError, match=r"ais\.prompts: .* has 1 descriptions; at least 2"):
        load_descriptions(str(own))
    own.write_text("- a bird")
    with pytest.raises(ValueError, match=r"ais\.prompts.*own\.yaml"):
        load_descriptions(str(own), 1)
    with pytest.raises(FileNotFoundError, match="birds"):
        load_descriptions("birdz", 8)
    assert "feathers" in load_descriptions("birds", 8)[0]
    assert load_descriptions("birds") == load_descriptions("birds", 8)


def test_embeddings_are_computed_once_and_anew_when_anything_changes(
    files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "flat"
    root.mkdir()
    for i in range(5):
        dataset.draw(i, i).save(root / f"{i}.png")
    images = catalog.load("folder", root, workers=1, progress=False).train
    teacher = Teacher.from_open_clip(*files, DESCRIPTIONS)
    calls = []
    embed = Teacher.embed
    monkeypatch.setattr(Teacher, "embed", lambda self, x: calls.append(len(x)) or embed(self, x))
    options = dict(device=torch.device("cpu"), cache_dir=tmp_path / "cache", workers=0, batch_size=2)

    rows = teacher_cache.embeddings(teacher, images, **options)
    assert rows.shape == (5, 16) and rows.dtype == torch.float16 and calls == [2, 2, 1]
    one = Image.open(images.path(3)).resize((32, 32), Image.Resampling.BICUBIC)
    x = (np.asarray(one, np.float32) / 255 - np.array(teacher.mean, np.float32)) / np.array(teacher.std, np.float32)
    expected = embed(teacher, torch.from_numpy(x).permute(2, 0, 1)[None])
    assert torch.allclose(rows[3].float(), expected[0], atol=2e-3)

    calls.clear()
    assert torch.equal(teacher_cache.embeddings(teacher, images, **options), rows) and calls == []
    some = teacher_cache.embeddings_of(teacher, images, np.array([4, 1]), device=options["device"])
    assert torch.allclose(some.float(), rows[[4, 1]].float(), atol=2e-3)
    keys = {teacher_cache.cache_key(teacher, images), teacher_cache.cache_key(teacher, replace(images, fingerprint="other"))}
    with torch.no_grad():
        next(teacher.visual.parameters()).add_(1)
    keys.add(teacher_cache.cache_key(teacher, images))
    assert len(keys) == 3
