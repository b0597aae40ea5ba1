"""What a config builds: values that depend on the machine or on files are decided and written down."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine import build
from engine.config import BatchNormConfig, Config, EncoderConfig, MethodConfig, from_yaml
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
    assert "bn.groups: does nothing in resnet18_w8_s16" in told
    with pytest.raises(ConfigError, match="encoder.freeze: 'stage5' is no part of resnet18_w8_s16; use stem, layer1, .*, bn"):
        network("stage5")
    every = ("stem", "layer1", "layer2", "layer3", "layer4")
    with pytest.raises(ConfigError, match="encoder.freeze: with .* nothing of resnet18_w8_s16 is trained, and moco keeps"):
        network(*every)
    assert network(*every, name="lcr").trunk.constant == every[1:]  # its mask is kept
