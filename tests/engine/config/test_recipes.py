"""The shipped recipes: all parse, hold the paper's settings, and open with what a reader needs first."""

from __future__ import annotations

import re

import pytest

from engine.config import Config, flatten, from_yaml, to_yaml
from engine.config.command_line import RECIPES, parse, recipe_names
from engine.train import main
from ppssl.timm_trunk import build_trunk

PAPER = ["cub", "cars", "aircraft", "nabirds", "flowers", "butterfly", "dogs"]


def test_the_shipped_set():
    assert recipe_names() == sorted([*PAPER, "folder", "finetune", "list", "demo"])


@pytest.mark.parametrize("name", recipe_names())
def test_print_config_round_trips(name: str, capsys: pytest.CaptureFixture[str]):
    assert main(["--cfg", f"{name}.yaml", "--print-config", "--amp"]) == 0
    printed = capsys.readouterr().out
    assert from_yaml(printed) == parse(["--cfg", name, "--amp"]).config


@pytest.mark.parametrize("name", PAPER)
def test_paper_recipes_differ_from_the_defaults_in_the_data_only(name: str):
    defaults = flatten(Config())
    values = flatten(from_yaml(RECIPES / f"{name}.yaml"))
    own = {key: value for key, value in values.items() if value != defaults[key]}
    assert set(own) <= {"data.name", "data.root", "ais.prompts"}
    assert values["data.name"] == name
    assert values["ais.prompts"] == {"cub": "birds", "nabirds": "birds"}.get(name, name)


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_open_with_command_claim_and_layout(name: str):
    head = "".join(line for line in (RECIPES / f"{name}.yaml").read_text().splitlines(True) if line.startswith("#"))
    assert head.startswith(f"# python -m engine.train --cfg {name}.yaml --amp")
    assert re.search(r"[Nn]ot measured by us|No published claim", head)
    assert "Expected below data.root" in head


@pytest.mark.parametrize("name", [n for n in recipe_names() if n != "demo"])
def test_a_dry_run_without_data_says_what_it_expects(name: str, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--cfg", name, "--dry-run"]) == 1
    message = capsys.readouterr().err
    assert "data.root" in message and f"data.name={'folder' if name == 'finetune' else name}" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", PAPER)
def test_an_empty_folder_is_told_what_to_unpack(name: str, tmp_path, capsys):
    assert main(["--cfg", name, "--dry-run", f"data.root={tmp_path}"]) == 1
    message = capsys.readouterr().err
    assert f"data.root={tmp_path} has no " in message and f"data.name={name}" in message
    assert f"-C {tmp_path}" in message or "unpack the archive" in message


def test_folder_with_other_settings_is_still_one_recipe():
    config = parse(["--cfg", "folder", "data.root=photos", "ais.weight=0", "batch_size=32"]).config
    assert from_yaml(to_yaml(config)) == config


def test_the_recipe_for_a_pretrained_trunk_freezes_its_first_stages_and_every_norm():
    config = parse(["--cfg", "finetune"]).config
    assert config.encoder.weights == "timm" and config.encoder.freeze == ("stem", "stage1", "stage2", "stage3", "bn")
    assert config.optim.lr < Config().optim.lr and config.eval.every == 1 and config.data.name == "folder"
    trunk = build_trunk(config.encoder.arch)
    trunk.freeze(config.encoder.freeze)
    assert trunk.constant == ("stage1", "stage2", "stage3")
