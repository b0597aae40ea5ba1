"""Weights & Biases: the numbers, pictures and configuration of a run, sent there or kept for ``wandb sync``."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.console import say
from engine.errors import ConfigError
from engine.files import write_text
from engine.run_folder import RunFolder

PROJECT = "ppssl"
"""Where WANDB_PROJECT names none."""


def check() -> None:
    """Raises ``ConfigError`` where the package is missing."""
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "run.loggers: wandb is named and the package is not installed: pip install wandb, or leave it out of run.loggers"
        )


class WandB:
    """The run at Weights & Biases whose id, project and name stand in ``wandb.json`` of the run folder: a resumed run continues it.

    The environment variables of wandb apply (WANDB_MODE=offline, WANDB_PROJECT, WANDB_ENTITY, WANDB_API_KEY, …); the name is the
    run folder's. Curves are drawn over ``step``. After a resumption from an earlier step both values of a step are there: what was
    sent is not taken back. A new process of a run that was offline adds a folder for ``wandb sync --append``.
    Raises ``ConfigError`` where the run cannot be started.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], resumed: int | None):
        import wandb  # slow to import, and optional

        about = _identity(out)
        try:
            self.run = wandb.init(
                **about,
                dir=out,
                config={key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()},
                resume="allow",
                reinit="create_new",  # another trainer of this process has a run of its own
                save_code=False,
                settings=wandb.Settings(silent=True, console="off"),  # the terminal stays ours
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"run.loggers: wandb could not be started ({reason}); run 'wandb login', or set WANDB_MODE=offline and send "
                f"the run later by 'wandb sync', or leave wandb out of run.loggers"
            ) from error
        self.lost = False
        self.run.define_metric("*", step_metric="step")
        write_text(RunFolder(out).wandb, json.dumps(about, indent=1) + "\n")
        place = Path(self.run.dir).parent  # without a network there is no address yet
        say(f"wandb: {f'offline; wandb sync --append {place} sends the run' if self.run.offline else self.run.url}")

    def write(self, record: Mapping[str, Any], names: Sequence[str]) -> None:
        values = {f"{record['kind']}/{name}": record[name] for name in names}
        epoch = {"epoch": record["epoch"]} if "epoch" in record else {}
        self._log(values | epoch | {"step": record["step"]})

    def picture(self, name: str, pixels: npt.NDArray[np.uint8], step: int) -> None:
        import wandb

        self._log({name: wandb.Image(pixels), "step": step})

    def _log(self, values: dict[str, Any]) -> None:
        """Training does not end where wandb's own process has: metrics.jsonl has the numbers."""
        import wandb

        if self.lost:
            return
        try:
            self.run.log(values)
        except (wandb.Error, ConnectionError) as error:
            self.lost = True
            say(f"warning: wandb: {type(error).__name__}: {error}; nothing more is sent of this run, metrics.jsonl goes on")

    def close(self) -> None:
        """It stays open until ``finish``, or wandb's own end of the process."""

    def finish(self) -> None:
        if not self.lost:
            self.run.finish()


def _identity(out: Path) -> dict[str, Any]:
    """id, project, entity and name of the run in ``out``: those that it had, or new ones."""
    path = RunFolder(out).wandb
    if path.is_file():
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            return {name: kept[name] for name in ("id", "project", "entity", "name")}
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} cannot be read ({error!r}); remove it to begin another run there") from error
    project = os.environ.get("WANDB_PROJECT") or PROJECT
    return {"id": secrets.token_hex(4), "project": project, "entity": os.environ.get("WANDB_ENTITY"), "name": out.resolve().name}
