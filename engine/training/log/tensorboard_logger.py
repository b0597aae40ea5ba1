"""``tensorboard/``: curves, pictures and the configuration of a run as TensorBoard events."""

from __future__ import annotations

import io
import itertools
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.config import to_yaml
from engine.run_folder import RunFolder

_METRICS = ("eval/rank1", "eval/mAP", "eval/knn_top1", "train/loss")
"""Columns of TensorBoard's table of hyperparameters."""
_numbers = itertools.count()


class TensorBoard:
    """Events of one process, in a file of their own.

    Written where they arise and not by a thread, as ``SummaryWriter`` does: a disk that is full is an ``OSError`` of the caller,
    who can say what was saved, and neither a traceback of a thread nor a run that goes on without its log.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], resumed: int | None):
        self.folder, self.settings, self.resumed = RunFolder(out).tensorboard, settings, resumed
        self.path: Path | None = None
        self.tags: set[str] = set()

    def write(self, record: Mapping[str, Any], names: Sequence[str]) -> None:
        from torch.utils.tensorboard import summary  # slow to import; a dry run does not need it

        values = [summary.scalar(f"{record['kind']}/{name}", record[name]) for name in names]
        self._append(*[self._event(record["step"], summary=value) for value in values])

    def picture(self, name: str, pixels: npt.NDArray[np.uint8], step: int) -> None:
        from torch.utils.tensorboard import summary

        self._append(self._event(step, summary=summary.image(name, pixels, dataformats="HWC")))

    def close(self) -> None:
        """Nothing is held back."""

    def finish(self) -> None:
        self.path = None

    def _append(self, *events: Any) -> None:
        """Writes ``events`` with one call, so that a kill leaves whole ones."""
        if self.path is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            place = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
            self.path = self.folder / f"events.out.tfevents.{place}"
            events = (*self._opening(), *events)
        from tensorboard.summary.writer.record_writer import RecordWriter

        text = io.BytesIO()
        writer = RecordWriter(text)
        for event in events:
            writer.write(event.SerializeToString())
        try:
            with self.path.open("ab") as file:
                file.write(text.getvalue())
        except OSError as error:
            error.filename = error.filename or str(self.path)  # a full disk does not say which file it was
            raise

    def _opening(self) -> list[Any]:
        """What a file of events begins with: its version, for a resumed run from which step on earlier files do not count, and the
        configuration as text and as hyperparameters."""
        from tensorboard.compat.proto import event_pb2
        from torch.utils.tensorboard import summary

        found = [event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2")]
        if self.resumed is not None:
            log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            found.append(event_pb2.Event(wall_time=time.time(), step=self.resumed + 1, session_log=log))
        step = self.resumed or 0
        text = "".join(f"    {line}\n" for line in to_yaml(self.settings).splitlines())  # as a block of code
        found.append(self._event(step, summary=summary.text("config", text)))
        chosen = {key: value if isinstance(value, (bool, int, float)) else _word(value) for key, value in self.settings.items()}
        return found + [self._event(step, summary=part) for part in summary.hparams(chosen, dict.fromkeys(_METRICS))]

    @staticmethod
    def _event(step: int, **content: Any) -> Any:
        from tensorboard.compat.proto import event_pb2

        return event_pb2.Event(wall_time=time.time(), step=step, **content)


def _word(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (tuple, list)) else "null" if value is None else str(value)
