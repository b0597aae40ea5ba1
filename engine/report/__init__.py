"""One self-contained HTML page about one run or several."""

from engine.report.render import write

__all__ = ["write"]
