"""The best weights of a run by a validation measure, and when a run ends early because they no longer get better."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from engine.console import counted, say
from engine.pretrained import best_of, load_weights, save_weights
from engine.run_folder import RunFolder


class Mark(NamedTuple):
    """An evaluation."""

    step: int
    epoch: int
    value: float


class Best:
    """The best evaluation so far by ``measure`` (larger is better), and how many followed it without being better.

    patience: that many evaluations without improvement end the run; None never does. Everything here is a function of what
    ``see`` was told and is part of a checkpoint, so that a resumed run ends where an uninterrupted one does. ``measure`` None keeps
    nothing.
    """

    def __init__(self, measure: str | None = None, patience: int | None = None):
        self.measure, self.patience = measure, patience
        self.mark: Mark | None = None
        self.since = 0
        self.images = ""

    @property
    def ended(self) -> bool:
        """Whether the run ends here."""
        return self.measure is not None and self.patience is not None and self.since >= self.patience

    def see(self, step: int, epoch: int, value: float, images: str = "") -> bool:
        """Takes an evaluation; True where it is the best so far. A value that is not finite is not.

        images: identity of the evaluated list. Values of another one are not compared: the best
        is looked for anew, which is said.
        """
        if self.mark is not None and images and self.images and images != self.images:
            say(f"the validation images are not those of before: {self.told()} is of others, the best is looked for from here on")
            self.mark, self.since = None, 0
        self.images = images
        if self.mark is None and value == value or self.mark is not None and value > self.mark.value:
            self.mark, self.since = Mark(step, epoch, value), 0
            return True
        self.since += 1
        return False

    def told(self) -> str:
        """The best evaluation in words."""
        if self.mark is None:
            return "none yet"
        return f"{self.measure} {100 * self.mark.value:.1f} % at epoch {self.mark.epoch}"

    def told_end(self) -> str:
        """Why the run ends here, and how it would go on."""
        waited = counted(self.since, "evaluation")
        return (
            f"no better {self.measure} in {waited} (eval.patience={self.patience}), the best was {self.told()}; a larger "
            f"eval.patience, or null, continues the run"
        )

    def metadata(self, step: int) -> dict[str, str] | None:
        """Of ``best.safetensors``, where the state after ``step`` is the best; None where it is not."""
        if self.mark is None or self.mark.step != step or self.measure is None:
            return None
        return {"measure": self.measure, **{name: str(value) for name, value in self.mark._asdict().items()}}

    def state_dict(self) -> dict[str, Any]:
        return {
            "measure": self.measure,
            "mark": None if self.mark is None else list(self.mark),
            "since": self.since,
            "images": self.images,
        }

    def load_state_dict(self, state: dict[str, Any], *, finished: bool = False) -> None:
        """Goes on from ``state``. By another measure the best is looked for anew, which is said; of a run that is ``finished`` it
        stays as it is."""
        if self.measure is None or not state:
            return
        if finished and state["measure"] != self.measure:
            self.measure = None
        elif state["measure"] not in (None, self.measure):
            say(f"eval.keep_best: {self.measure} from here on, {state['measure']} until now: the best is looked for from here on")
        elif state["mark"] is not None:
            self.mark, self.since, self.images = Mark(*state["mark"]), state["since"], state.get("images", "")

    def settle(self, out: Path, step: int, source: Path, weights: Callable[[], dict[str, Tensor]]) -> None:
        """Brings ``out``/best.safetensors to what is known after ``step``, of a run that continues the checkpoint ``source``.

        A run that died between its checkpoint and that file, or that goes on from an earlier checkpoint or in another folder, has
        another file or none. weights: of the inference network now.
        """
        path = RunFolder(out).best
        if self.measure is None:
            return
        if self.mark is not None and _step_of(path) == self.mark.step:
            return
        if path.is_file():
            aside = path.with_suffix(".later")
            path.replace(aside)
            say(f"{path} is of another step than the best until step {step} and was set aside (now {aside.name})")
        if self.mark is None:
            return
        about = self.metadata(self.mark.step)
        elsewhere = RunFolder(source.parent.parent).best
        assert about is not None
        if self.mark.step == step:
            save_weights(path, weights(), about)
        elif _step_of(elsewhere) == self.mark.step:
            save_weights(path, load_weights(elsewhere), about)
        else:
            say(f"the weights of the best evaluation ({self.told()}) are not there any more: the best is looked for from here on")
            self.mark = None


def _step_of(path: Path) -> int | None:
    """The step of a best.safetensors; None where there is none."""
    about = best_of(path.parent)
    return None if about is None else int(about.get("step", -1))
