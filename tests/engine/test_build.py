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
