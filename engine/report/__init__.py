"""One self-contained HTML page about one run or several."""

from engine.report.pictures import overlay
from engine.report.render import write
from engine.report.sections import MAP_NAMES

__all__ = ["MAP_NAMES", "overlay", "write"]
