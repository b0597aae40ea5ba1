"""What a config builds: values that depend on the machine or on files are decided and written down."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine import build
from engine.config import from_yaml
from engine.errors import ConfigError

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


def test_what_computes_batch_norm_is_decided_and_reaches_the_trunk(monkeypatch: pytest.MonkeyPatch):
    text = "encoder: {arch: resnet18_w8, weights: none}\nmethod: {name: moco}\nbn: {impl: %s}"
    plain, fused = (build.resolve(from_yaml(text % impl), CPU) for impl in ("auto", "fused"))  # in Triton's interpreter
    assert (plain.bn.impl, fused.bn.impl) == ("torch", "fused")
    assert [build.initial_network(cfg).trunk.layer1[0].fused for cfg in (plain, fused)] == [False, True]
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
