"""Every method at the same budget of images, on a synthetic dataset or on photographs, several seeds, one table.

    python -m bench.methods                              {untrained, moco, lcr, ldfs, ppssl, simclr, byol}, both variants, 5 seeds
    python -m bench.methods --study parts                at half the budget: parts, layers, weights, prompts, teacher
    python -m bench.methods --only "ppssl guided" --seeds 3 --budget 51200 --out /tmp/other optim.lr=0.03
    python -m bench.methods --setting cub-finetune --data DIR          from ImageNet weights on CUB; what is planned: PLAN.md
    python -m bench.methods --setting cub-finetune --data DIR --study choice --tune      seeds 0 to 2, on validation photos

Every cell starts from bench/methods/SETTING.yaml, which is pinned. The synthetic dataset is drawn with another seed
(--dataset-seed) than the one on which the demo's settings were chosen, and the runs have other seeds too. A cell is one process and
leaves one JSON file; as many run at a time as there are cores (--jobs). A cell with a file, or with a record in the table of --out,
is not run again: the same command continues after any interruption, and with more --seeds it adds to the committed table. A table
of another specification is never mixed with it. Seconds are CPU time. KEY=VALUE after the options changes every cell. The table, of
all cells that have records, is rewritten after each cell.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from bench.methods.settings import PHOTOS, ROOT, SETTINGS
from bench.methods.study import run_study
from engine.config import YamlLoader, keys, nearest
from engine.console import say
from engine.data.machine import cores
from engine.errors import command


class Renamed(argparse.Action):
    """An option that has another name now, ``const``: using it ends the command with code 2."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: str | None = None) -> None:
        parser.error(f"{option_string} is called {self.const} now")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench.methods", description=__doc__.splitlines()[0])
    parser.add_argument("--setting", choices=list(SETTINGS), default="synthetic")
    parser.add_argument("--study", default="main", help="; ".join(f"{s.name}: {', '.join(s.studies)}" for s in SETTINGS.values()))
    parser.add_argument("--data", type=Path, metavar="DIR", help=f"folder of the photographs; else {PHOTOS} names it")
    parser.add_argument("--tune", action="store_true", help="seeds from 0; evaluate on held-out training photos, as tuning must")
    parser.add_argument("--budget", type=int, metavar="IMAGES", help="a run sees (25,600 synthetic, where most studies take half)")
    parser.add_argument("--seeds", type=int, metavar="N", help="default: what the study has planned, or 5; 3 with --tune")
    default = 1 if torch.cuda.is_available() else cores()
    parser.add_argument("--jobs", type=int, default=default, metavar="N", help="cells that run at a time")
    parser.add_argument("--first-seed", type=int, metavar="SEED", help="default 10; 0 with --tune")
    parser.add_argument("--dataset-seed", type=int, default=1, metavar="SEED", help="of the synthetic dataset (the demo's is 0)")
    parser.add_argument("--world", action=Renamed, const="--dataset-seed", help=argparse.SUPPRESS)
    parser.add_argument("--only", action="append", metavar="CELL", help="train this cell (several times: these)")
    parser.add_argument("--amp", choices=["bf16", "fp16", "off"], default="bf16")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "methods", help="folder of the tables")
    parser.add_argument("--work", type=Path, default=Path("runs") / "methods", help="folder of the cells' records")
    parser.add_argument("--keep", action="store_true", help="keep every cell's run folder, and draw where they look")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="config keys for every cell")
    args = parser.parse_args(argv)
    setting = SETTINGS[args.setting]
    if args.study not in setting.studies:
        parser.error(f"--study {args.study!r} is not one of {args.setting}'s: {', '.join(setting.studies)}")
    study = setting.studies[args.study]
    if args.tune and setting.folder is None:
        parser.error("--tune is for photographs; another --dataset-seed is what tuning on the synthetic dataset takes")
    if args.data and setting.folder is None:
        parser.error("--data is for photographs: it goes with " + " or ".join(n for n, s in SETTINGS.items() if s.folder))
    args.budget = setting.budget if args.budget is None else args.budget
    args.seeds = (3 if args.tune else study.seeds or 5) if args.seeds is None else args.seeds
    args.first_seed = (0 if args.tune else setting.first_seed) if args.first_seed is None else args.first_seed
    if setting.folder is not None and args.tune != (args.first_seed < setting.first_seed):
        parser.error(
            f"--first-seed {args.first_seed}: seeds below {setting.first_seed} are for --tune, the others for reported cells"
        )
    if args.tune and args.first_seed + args.seeds > setting.first_seed:
        parser.error(f"--seeds {args.seeds}: --tune has the seeds below {setting.first_seed} only")
    for option in ("budget", "seeds", "jobs"):
        if getattr(args, option) < 1:
            parser.error(f"--{option} {getattr(args, option)} must be at least 1")
    names = [cell.name for cell in study.cells]
    for name in args.only or []:
        if name not in names:
            parser.error(f"--only {name!r} is not a cell of study {args.study}; its cells: {', '.join(names)}")
    overrides = {}
    for text in args.overrides:
        key, equals, value = text.partition("=")
        if not equals or key not in keys():
            parser.error(f"{text!r} is not KEY=VALUE with a config key; {nearest(key)}")
        if key in ("epochs", "seed", "amp"):
            remedy = {"epochs": "--budget", "seed": "--first-seed and --seeds", "amp": "--amp"}[key]
            parser.error(f"{text!r} would be replaced for every cell; use {remedy}")
        overrides[key] = yaml.load(value, Loader=YamlLoader)
    args.overrides = overrides
    return args


def command_of(argv: Sequence[str]) -> str:
    """The command line that makes the whole table: without this machine's folders and jobs, and without the choice of cells."""
    local = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--out", "--work", "--jobs", "--data"):
        local.add_argument(option)
    local.add_argument("--only", action="append")
    return shlex.join(["python", "-m", "bench.methods", *local.parse_known_args(argv)[1]])


@command(RuntimeError)
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0 done, 1 failure, 2 usage or config, 130 interrupted."""
    args = parse(argv)
    try:
        run_study(args.study, args, command_of(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        say("interrupted; the same command continues with the cells that are missing")
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
