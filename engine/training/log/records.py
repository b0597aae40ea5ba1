"""The records of a run: ``metrics.jsonl``, and the same numbers in the loggers that ``run.loggers`` names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from engine.console import say
from engine.run_folder import RunFolder, append_metrics, read_metrics, rewind_metrics
from engine.training.log import csv_logger, symptoms, tensorboard_logger, wandb_logger


class Logger(Protocol):
    """Something that numbers go to beside metrics.jsonl. It is made when the first record is written, with the settings of the run
    and the step that a resumed run goes on from (None for a new run). Every method may raise ``OSError``."""

    def __init__(self, out: Path, settings: Mapping[str, Any], resumed: int | None): ...

    def write(self, record: Mapping[str, Any], names: Sequence[str]) -> None:
        """Takes a record of metrics.jsonl; ``names`` are those of its numbers that are curves."""

    def picture(self, name: str, pixels: npt.NDArray[np.uint8], step: int) -> None:
        """Takes an RGB picture [H, W, 3]."""

    def close(self) -> None:
        """Everything is on the disk; a later call opens it again."""

    def finish(self) -> None:
        """Nothing follows."""


LOGGERS = {
    "tensorboard": tensorboard_logger.TensorBoard,
    "csv": csv_logger.Csv,
    "wandb": wandb_logger.WandB,
}  # by their name in ``run.loggers``
PICTURES = {"tensorboard", "wandb"}


class Records:
    """``metrics.jsonl`` of the run folder ``out`` and the same numbers in ``loggers``; ``out`` None keeps nothing.

    It says each symptom of the run once, when it first shows (``symptoms``). settings: {dotted key: value} of the run, for the
    loggers and the symptoms; looked at when something is written, not before.
    Raises ``ConfigError`` for a logger whose package is missing.
    """

    def __init__(
        self,
        out: Path | None,
        settings: dict[str, Any] | None = None,
        *,
        loggers: Sequence[str] = ("tensorboard",),
        queue: int | None = None,
        steps_per_epoch: int = 0,
        total_steps: int = 0,
    ):
        if "wandb" in loggers:
            wandb_logger.check()
        self.out = out
        self.settings = {} if settings is None else settings
        self.names = tuple(loggers)
        self.queue = queue
        self.lengths = {"steps_per_epoch": steps_per_epoch, "total_steps": total_steps}
        self.watch: symptoms.Watch | None = symptoms.Watch()
        self.open: list[Logger] | None = None
        self.resumed: int | None = None

    @property
    def takes_pictures(self) -> bool:
        """Whether ``picture`` goes anywhere."""
        return self.out is not None and not PICTURES.isdisjoint(self.names)

    @property
    def told(self) -> int:
        """Symptoms that were said of this run, until it was resumed and since."""
        return len(self.watch.findings) if self.watch is not None else 0

    def rewind(self, step: int) -> None:
        """Drops what was recorded after ``step``, from which the run goes on. What was said until then is not said again."""
        self.resumed, self.watch = step, None
        if self.out is not None:
            rewind_metrics(self.out, step)
            table = RunFolder(self.out).metrics_csv
            if "csv" not in self.names and table.is_file():
                say(f"{table.name} stays as it was left: run.loggers has no csv any more; with csv it is made anew, whole")

    def write(self, record: dict[str, Any], names: Iterable[str] | None = None) -> None:
        """Appends ``record``; ``names`` of its numbers (None: all of them) are the curves ``kind/name`` of the loggers."""
        facts = symptoms.facts(self.settings | {"queue.size": self.queue}, **self.lengths)
        if self.watch is None:  # what was recorded before the run was resumed
            self.watch = symptoms.Watch()
            for earlier in read_metrics(self.out) if self.out is not None else ():
                self.watch.add(earlier, facts)
        if self.out is not None:
            append_metrics(self.out, record)
            shown = [n for n in (record if names is None else names) if n not in ("step", "epoch") and _is_number(record[n])]
            for logger in self._loggers():
                logger.write(record, shown)
        for finding in self.watch.add(record, facts):
            say(f"warning: step {finding.step}: {finding}")

    def picture(self, name: str, pixels: npt.NDArray[np.uint8], step: int) -> None:
        """Shows the RGB picture [H, W, 3] in the loggers that show any."""
        if self.takes_pictures:
            for logger in self._loggers():
                logger.picture(name, pixels, step)

    def _loggers(self) -> list[Logger]:
        if self.open is None:
            self.open = [LOGGERS[name](self.out, self.settings, self.resumed) for name in self.names]
        return self.open

    def close(self) -> None:
        """Everything is on the disk; a later ``write`` goes on."""
        for logger in self.open or ():
            logger.close()

    def finish(self) -> None:
        """The run ends here."""
        for logger in self.open or ():
            logger.finish()
        self.open = None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))
