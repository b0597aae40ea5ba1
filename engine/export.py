"""``python -m engine.export RUN --to FORMAT``: a run's network in the files that other programs read, with a model card."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.console import say
from engine.errors import ConfigError, command
from engine.pretrained import FORMATS, export, say_which


@command(ConfigError, RuntimeError)
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0 done, 1 failure, 2 usage, 130 interrupted."""
    parser = argparse.ArgumentParser("python -m engine.export", description="a run's network in the files other programs read")
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--to", required=True, choices=FORMATS, help="format")
    parser.add_argument("--out", type=Path, metavar="DIR/FILE", help="where to (default: RUN/export)")
    parser.add_argument("--minmax", choices=("batch", "image"), help="range over which the mask is scaled (default: the run's own)")
    parser.add_argument("--best", action="store_true", help="the weights of the best evaluation, not the last (eval.keep_best)")
    args = parser.parse_args(argv)
    say_which(args.run, args.best)
    path = export(args.run, args.to, args.out, minmax=args.minmax, best=args.best)
    say(f"written: {path} ({path.stat().st_size / 1e6:.1f} MB), {path.name}.json, {path.name}.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
