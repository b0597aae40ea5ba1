"""Fixtures of several rooms."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_runs import CLASSES, draw


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve labelled test images in three classes, and as many for training."""
    root = tmp_path_factory.mktemp("photos")
    for colour, name in enumerate(CLASSES):
        for number in range(4):
            draw(root / "train" / name / f"{number}.png", colour, number)
            draw(root / "test" / name / f"{number}.png", colour, number + 4)
    return root
