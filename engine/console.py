"""What a person at the terminal reads: lines and progress bars, on stderr."""

from __future__ import annotations

import os
from collections.abc import Iterable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn, track
from rich.text import Text

console = Console(stderr=True, highlight=False)
if not console.is_terminal and "COLUMNS" not in os.environ:
    console.width = 132  # a file or a pipe has no width: rich's 80 columns break tables


def say(text: str) -> None:
    """One line for the person at the terminal. Whatever ``text`` quotes, it cannot drive the terminal: what is neither printable
    nor a line feed or a tab is escaped."""
    console.print("".join(c if c.isprintable() or c in "\n\t" else _escaped(c) for c in text), markup=False, soft_wrap=True)


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """``1 epoch``, ``1,200 epochs``; ``plural`` where that is not the noun with an s."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def printable(text: str) -> str:
    """``text`` on one line and harmless to a terminal: what comes from outside (names of files, classes, tensors) may hold line
    feeds, escape sequences and bytes that are no text. They are written as Python escapes them, and so is a backslash."""
    escaped = text.replace("\\", "\\\\")
    return "".join(c if c.isprintable() else _escaped(c) for c in escaped)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode()


def bar() -> Progress:
    """A progress bar for work outside the steps: on a terminal only, and gone when the work is done."""
    return Progress(console=console, transient=True, disable=not console.is_terminal)


class _Rate(ProgressColumn):
    """Steps of the task per second, of late."""

    def __init__(self, unit: str):
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.1f} {self.unit}/s")


def rate_bar(unit: str) -> Progress:
    """As ``bar``, with how many have been done, the rate in ``unit`` per second, and what is left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(unit), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def with_progress(items: Iterable, total: int, text: str, show: bool) -> Iterable:
    """``items`` with a progress bar, if ``show`` and where there is a terminal to show it on."""
    return track(items, text, total, console=console, transient=True, disable=not console.is_terminal) if show else items
