"""``python -m engine.embed RUN|WEIGHTS FOLDER|LIST --out e.parquet``: the unit feature of every photo, as one file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from engine.console import console, counted, printable, say
from engine.data import list_photos, photo_settings
from engine.errors import ConfigError, command
from engine.evaluation import SOURCE_HELP, add_best_option, embed_photos, open_source, split_overrides
from engine.training import World, add_device_option, distributed


def embed(
    source: str | Path,
    photos: Path | None,
    out: Path,
    device: torch.device | None = None,
    *,
    cfg: str | None = None,
    overrides: Sequence[str] = (),
    half: bool = False,
    force: bool = False,
    best: bool = False,
    world: World = distributed.ALONE,
) -> None:
    """Embeds the folder or the list (CSV, Parquet) ``photos``, or without one the data of the config, into ``out``, and says what
    was done.

    source, cfg, overrides, best: as of ``engine.evaluation.open_source``; the others as of ``embed_photos``.
    """
    device = world.device if device is None else device
    if device.index is not None and device != world.device:
        torch.cuda.set_device(device)  # which kernels go to
    given = []
    if photos is not None:
        given = [f"data.{key}={_text(value)}" for key, value in photo_settings(photos).items()]
        roots = [Path(text.partition("=")[2]) for text in overrides if text.lstrip("-").startswith("data.root=")]
        if roots and photos.is_dir() and not roots[-1].resolve().is_relative_to(photos.resolve()):
            raise ConfigError(f"data.root={roots[-1]}: {printable(str(photos))} is to be embedded; name one of them")
    opened = open_source(source, device, cfg=cfg, overrides=[*given, *overrides], best=best)
    listed = list_photos(opened.run.config.data, opened.run.config.seed, whole=photos is not None and photos.is_dir())
    for note in listed.notes:
        say(note)
    found = ", ".join(f"{count:,} of {split}" for split, count in listed.splits)
    kinds = "without labels" if listed.labels is None else f"in {counted(len({*listed.labels} - {''}), 'class', 'classes')}"
    say(f"{counted(len(listed), 'photo')} {kinds} below {printable(str(listed.root))}" + f" ({found})" * (len(listed.splits) > 1))
    done = embed_photos(opened, listed, out, device, half=half, force=force, world=world)
    rate = f", {done.made / done.seconds:,.1f} photos/s" if done.made else ""
    say(f"written: {out}, {counted(done.photos, 'photo')} ({out.stat().st_size / 1e6:,.1f} MB) in {done.seconds:,.1f} s{rate}")
    if done.bad is not None:
        say(f"{counted(done.left_out, 'file')} left out; the reasons are in {done.bad}")


def _text(value: object) -> str:
    """A setting as it is typed."""
    return "null" if value is None else "[]" if value == () else str(value).lower() if isinstance(value, bool) else str(value)


def _count(least: int, text: str) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least {least}")
    return int(text)


@command(ConfigError, RuntimeError)
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0 done (files may be left out), 1 failure, 2 usage, 130 interrupted."""
    parser = argparse.ArgumentParser(
        "python -m engine.embed",
        description="the unit feature of every photo as one file, a row each: path, label, feature; key=value overrides the config",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="RUN|WEIGHTS", help=SOURCE_HELP)
    parser.add_argument("photos", type=Path, nargs="?", metavar="FOLDER|LIST",
                        help="folder of photos, or a list, CSV or Parquet (default: the data of the run or recipe)")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="e.parquet, e.npz or e.csv")
    parser.add_argument("--cfg", metavar="FILE|RECIPE", help="architecture of a weights file, or data for a run")
    parser.add_argument("--half", action="store_true", help="store float16")
    parser.add_argument("--amp", nargs="?", const="bf16", choices=("bf16", "fp16", "off"),
                        help="mixed precision; alone it means bf16 (default: the run's)")  # fmt: skip
    parser.add_argument("--batch-size", type=lambda text: _count(1, text), metavar="N", help="default: eval.batch_size")
    parser.add_argument(
        "--workers", type=lambda text: _count(0, text), metavar="N", help="threads that decode (default: the cores)"
    )
    add_best_option(parser)
    add_device_option(parser)
    parser.add_argument("--force", action="store_true", help="replace --out, and parts of another embedding")
    argv, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    args, more = parser.parse_known_args(argv)
    overrides += more
    if wrong := [text for text in overrides if "=" not in text]:
        parser.error(f"unexpected argument {wrong[0]!r}; overrides are given as key=value")
    amp = None if args.amp is None else "null" if args.amp == "off" else args.amp
    for key, value in (("eval.batch_size", args.batch_size), ("data.workers", args.workers), ("amp", amp)):
        overrides += [] if value is None else [f"{key}={value}"]
    world = distributed.join(device=args.device, key="--device")
    try:
        embed(
            args.source, args.photos, args.out, cfg=args.cfg, overrides=overrides, half=args.half, force=args.force,
            best=args.best, world=world,
        )  # fmt: skip
    except Exception:
        console.quiet = False  # an error is shown by the process that has it, which may not be the one that talks
        raise
    world.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
