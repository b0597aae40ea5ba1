"""Errors that a person can put right (their messages name the remedy), and how a command ends on them: one line and an exit code.
A fault of ours stays a traceback. Needs no torch.

0 done, 1 failure, 2 usage or config, 130 interrupted. ``engine.train`` and ``bench.paper`` have one more, 75: saved on a signal.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from engine.console import say


class ConfigError(ValueError):
    """A recipe, an override or a value that cannot be used; the message names the key or file and the remedy."""


class BrokenFile(RuntimeError):
    """A file that was readable when the list was made and no longer is."""


class WorkerDied(RuntimeError):
    """A process that loads images and ended before its work was done."""


FAILURES: tuple[type[Exception], ...] = (
    ValueError,
    OSError,
    ImportError,
    NotImplementedError,
    FloatingPointError,
    BrokenFile,
    WorkerDied,
)
"""What data, files, settings and missing packages do; messages of these name the remedy."""

Main = Callable[[Sequence[str] | None], int]


def exit_code(error: Exception) -> int:
    """Of one of ``FAILURES``."""
    return 2 if isinstance(error, ConfigError) else 1


def command(*failures: type[Exception]) -> Callable[[Main], Main]:
    """Decorates ``main(argv) -> exit code``: says an error of ``FAILURES`` and returns its code, 130 on Ctrl-C.

    failures: what else ends this command with 1. ``RuntimeError`` where foreign files or exporters run; ``ConfigError`` where the
    config is a file of the run and not the person's line.
    """

    ends = (*failures, *FAILURES)

    def decorate(main: Main) -> Main:
        @functools.wraps(main)
        def run(argv: Sequence[str] | None = None) -> int:
            try:
                return main(argv)
            except KeyboardInterrupt:
                return 130
            except ends as error:
                say(f"error: {error}")
                return 1 if isinstance(error, failures) else exit_code(error)

        return run

    return decorate
