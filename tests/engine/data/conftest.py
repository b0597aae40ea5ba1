"""Fixtures of the image lists' tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from miniatures import picture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "my photos"
    names = ("train/a b/1.jpg", "train/a b/2.png", "train/größe/x.jpeg", "test/a b/3.jpg", "test/größe/y.JPG")
    for i, name in enumerate(names):
        picture(root / name, seed=i)
    return root
