"""The paper's tables and figures as commands: every cell is a run, shown beside the published number.

    python -m bench.paper --table 1 --data-root /data                 # /data/cub, /data/cars, ... as the recipes expect them
    python -m bench.paper --table 4 --seeds 5 amp=bf16                # any override of engine.train goes to every run
    python -m bench.paper --figure 5 --dry-run                        # one step of every cell, nothing kept

bench/paper/paper.yaml says what the exhibits consist of. A cell is a run folder below --out, named by what differs from the recipe:
exhibits share their runs, a stopped command continues where it was, a finished run is neither trained nor evaluated again. The last
epoch is reported. A cell without its dataset or method is left empty, with the reason.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.paper import figures
from bench.paper.cells import carry_out
from bench.paper.exhibits import Plan, cells, exhibits, obstacle
from bench.paper.tables import keep, show
from engine.console import say


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0 every cell that could be run is done, 1 one failed, 2 usage, 75 and 130
    stopped by a signal and resumable."""
    known = exhibits()
    parser = argparse.ArgumentParser("python -m bench.paper", description="the paper's tables and figures, cell by cell")
    which = parser.add_mutually_exclusive_group(required=True)
    for kind in ("table", "figure"):
        which.add_argument(f"--{kind}", choices=[key.split()[1] for key in known if key.startswith(kind)])
    parser.add_argument("--data-root", type=Path, default=Path("data"), metavar="DIR", help="holds cub, cars, aircraft, ...")
    parser.add_argument("--out", type=Path, default=Path("runs/paper"), metavar="DIR", help="run folders (default: runs/paper)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N - 1 (default: 3)")
    parser.add_argument("--dry-run", action="store_true", help="one step of every cell, nothing kept")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run, as in engine.train")
    args = parser.parse_intermixed_args(argv)
    if args.seeds < 1:
        parser.error(f"--seeds {args.seeds}: at least 1")
    exhibit = known[f"table {args.table}" if args.table else f"figure {args.figure}"]
    plan = Plan(args.data_root, args.out, args.seeds, tuple(args.overrides))
    found, code = carry_out(exhibit, plan, dry_run=args.dry_run)
    show(exhibit, found, plan)
    if not args.dry_run:
        say(f"written: {keep(exhibit, found, plan)}")
        if exhibit.picture and code == 0:
            figures.draw(exhibit, [cell for cell in cells(exhibit, plan) if obstacle(cell) is None], found, plan.out)
    return code


if __name__ == "__main__":
    sys.exit(main())
