"""Fixtures of several rooms."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from made_runs import CLASSES, draw

from engine.training import Trainer


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve labelled test images in three classes, and as many for training."""
    root = tmp_path_factory.mktemp("photos")
    for color, name in enumerate(CLASSES):
        for number in range(4):
            draw(root / "train" / name / f"{number}.png", color, number)
            draw(root / "test" / name / f"{number}.png", color, number + 4)
    return root


@pytest.fixture
def ctrl_c_at_first_save(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[int]]:
    """Once called, the next save of a trainer is followed by a SIGINT, that one alone; gives the list that gets its step."""

    def arm() -> list[int]:
        save, seen = Trainer.save, []

        def save_then_ctrl_c(self: Trainer) -> None:
            save(self)
            if not seen:
                seen.append(self.step.steps_done)
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(Trainer, "save", save_then_ctrl_c)
        return seen

    return arm
