"""What a config builds: values that depend on the machine or on files are decided and written down."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine import build
from engine.config import from_yaml

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
