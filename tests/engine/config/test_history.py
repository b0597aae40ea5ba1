"""Runs made at commit 637275a still load and continue, with the values that their nulls had then."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import engine
from engine.config import flatten, from_run, from_yaml
from engine.config.history import NULLS
from engine.errors import ConfigError
from engine.synthetic import dataset
from engine.train import main
from ppssl import settings

OLD = Path(__file__).parents[2] / "fixtures" / "run_637275a"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The old run as it was after its first of two steps, beside its data set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PPSSL_CACHE", str(tmp_path / "cache"))
    dataset.generate(tmp_path / "birds", train_per_species=1, test_per_species=1, workers=1, progress=False)
    shutil.copytree(OLD, tmp_path / "run")
    return tmp_path / "run"


def test_its_network_loads() -> None:
    network = engine.load(OLD)
    assert network.mask.minmax == "image"  # what a null meant in guided
    assert network.features(torch.randn(2, 3, 32, 32)).shape == (2, network.trunk.channels)


def test_it_continues_to_the_weights_that_it_ended_with(folder: Path) -> None:
    expected = load_file(folder / "weights.safetensors")
    assert main(["--cfg", str(folder / "config.yaml"), "--out", str(folder)]) == 0
    found = load_file(folder / "weights.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    written = (folder / "config.yaml").read_text()
    assert "variant: guided" in written and "form" not in written and "image_bn: separate" in written


def test_a_null_means_what_it_meant() -> None:
    config = from_run(OLD / "config.yaml")
    values = flatten(config)
    assert {key: values[key] for key in NULLS["ppssl", "guided"]} == NULLS["ppssl", "guided"]
    assert values["queue.exclude_same_image"] is False and values["method.variant"] == "guided"
    text = (OLD / "config.yaml").read_text()
    assert from_run(text) == config
    explicit = from_run(text.replace("sign: null", "sign: plus"))
    assert explicit.iadm.sign == "plus"


def test_the_table_of_nulls_does_not_follow_the_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ppssl", "lcr"):
        variants = settings.SETTINGS[name].variants
        assert {variant: NULLS[name, variant].keys() for variant in variants} == {v: keys.keys() for v, keys in variants.items()}
        monkeypatch.setattr(settings.SETTINGS[name], "variants", {variant: {} for variant in variants})
    assert from_run(OLD / "config.yaml").iadm.temperature == 0.4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("method: {form: guided}", ["method.form", "method.variant"]),
        ("queue: {mask_own: true}", ["queue.mask_own", "queue.exclude_same_image"]),
        ("iadm: {image: orig}", ["iadm.image", "'orig'", "clean"]),
        ("iadm: {image_bn: own}", ["iadm.image_bn", "'own'", "separate"]),
    ],
)
def test_a_recipe_with_a_former_name_is_told_the_new_one(text: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        from_yaml(text)
    key, value = text.replace(" ", "").replace("{", ".").rstrip("}").replace(":.", ".").split(":")
    with pytest.raises(SystemExit) as stopped:
        main(["--cfg", "demo", f"{key}={value}"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    for word in words:
        assert word in str(refused.value) and word.strip("'") in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("method: {form: [guided]}", ["method.variant", "['guided']", "published or guided"]),
        ("method: {form: guided, name: {a: 1}}", ["method.name", "text"]),
        ("method: {form: guided, variant: published}", ["method.variant", "twice", "method.form"]),
        ("queue: {exclude_same_image: true, mask_own: true}", ["queue.exclude_same_image", "twice", "queue.mask_own"]),
    ],
)
def test_a_damaged_config_of_a_run_is_one_clear_error(text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        from_run(text)
    for word in ["the config of the run", *words]:
        assert word in str(refused.value)
