"""``python -m engine.report RUN [RUN …]``: the page about one run, or about several side by side."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.errors import ConfigError, command
from engine.report import render
from engine.training import add_device_option, option_device


@command(ConfigError)
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0 done, 1 failure, 2 usage, 130 interrupted."""
    parser = argparse.ArgumentParser("python -m engine.report", description="the page about one run, or about several side by side")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder; the images shown are the first one's")
    parser.add_argument("--out", type=Path, metavar="FILE", help="HTML file (default: report.html in the first run folder)")
    add_device_option(parser)
    args = parser.parse_args(argv)
    device = option_device(args.device)
    render.write(list(dict.fromkeys(args.runs)), args.out or args.runs[0] / "report.html", device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
