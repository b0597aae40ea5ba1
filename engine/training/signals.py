"""Signals: training finishes its step and saves, everything else stops at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from engine.console import console, say

_STOP = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]  # Windows has no SIGUSR1


class Stopped(Exception):
    """A signal asked to stop and everything is saved; ``code`` is the exit code: 130 for Ctrl-C, 75 ("saved, run me again") for
    SIGTERM and SIGUSR1."""

    def __init__(self, number: int, saved: Path | None):
        self.code = _exit_code(number)
        where = f"saved {saved}" if saved else "there was nothing to save"
        super().__init__(f"stopped by {signal.Signals(number).name}, {where}")


@contextmanager
def _handlers(handler: Callable[[int, Any], None], *numbers: int) -> Iterator[None]:
    """``handler`` in place of what the process does on these signals; nothing outside of the main thread, which cannot set any:
    whoever runs us there handles signals."""
    main = threading.current_thread() is threading.main_thread()
    previous = [(number, signal.signal(number, handler)) for number in numbers] if main else []
    try:
        yield
    finally:
        for number, before in previous:
            signal.signal(number, before)


def stop_at_once() -> AbstractContextManager[None]:
    """Within it SIGTERM and SIGUSR1 raise ``Stopped``: for all that is not training, where nothing is to be finished or saved."""

    def stop(number: int, _frame: object) -> None:
        raise Stopped(number, None)

    return _handlers(stop, *_STOP)


@contextmanager
def noted() -> Iterator[Noted]:
    """Within it SIGINT, SIGTERM and SIGUSR1 are noted."""
    asked = Noted()
    with _handlers(asked, signal.SIGINT, *_STOP):
        yield asked


class Noted:
    """Notes the first SIGINT, SIGTERM or SIGUSR1 in ``number``; a second one of SIGINT or SIGTERM ends the process at once, which
    spoils nothing: files are replaced whole."""

    number = 0

    def __call__(self, number: int, _frame: object) -> None:
        if self.number and number in (signal.SIGINT, signal.SIGTERM):
            console.show_cursor()
            os._exit(_exit_code(number))  # an exception would wait for the thread that saves, and for the loader
        self.number = number
        say(f"{signal.Signals(number).name}: finishing this step, then saving; once more stops at once")


def _exit_code(number: int) -> int:
    return 130 if number == signal.SIGINT else 75
