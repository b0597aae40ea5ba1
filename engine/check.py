"""``python -m engine.check --cfg X``: what a data set holds and what is wrong with it, with a contact sheet; with ``--views FILE``
the views that a training run makes of its first images, by every loader that runs here."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from engine import build
from engine.config import Config, parse
from engine.console import console, say
from engine.data import contact_sheet, inspection, views_sheet
from engine.errors import command
from engine.files import cache_folder, write_text
from engine.training import choose_device

_USAGE = "python -m engine.check --cfg FILE|RECIPE [--out SHEET.png | --views SHEET.png] [key.sub=value ...]"


@command()
def main(argv: Sequence[str] | None = None) -> int:
    """Prints the summary and writes the sheet; returns the exit code: 0 done (also with findings), 1 failure, 2 usage or
    config, 130 interrupted."""
    parser = argparse.ArgumentParser(
        usage=_USAGE, description="what a data set holds, what is wrong with it, and a contact sheet", allow_abbrev=False
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("sheet.png"),
        metavar="SHEET.png",
        help="contact sheet (%(default)s); SHEET.findings.txt lists what was found",
    )
    parser.add_argument(
        "--views", type=Path, metavar="SHEET.png", help="write the views that training makes of the first images instead"
    )
    own, rest = parser.parse_known_args(argv)
    cfg = parse(rest).config
    build.draw(cfg)
    if own.views is None:
        return check(cfg, own.out)
    return show_views(cfg, own.views)


def check(cfg: Config, out: Path) -> int:
    """Summary, findings and a contact sheet of the data set of ``cfg``; beside the sheet, in SHEET.findings.txt, every finding."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", UserWarning)
        catalog = build.data(cfg, cache_dir=cache_folder(), training=False)
    console.print(inspection.table(catalog))
    for warning in warned:
        say(f"warning: {warning.message}")
    found = inspection.findings(catalog, inspection.duplicates(catalog, workers=cfg.data.workers))
    for line in inspection.in_short(found):
        say(line)
    picture, full = inspection.class_sheet(catalog), out.with_suffix(".findings.txt")
    try:
        contact_sheet.write(picture, out)
        if found or full.exists():
            write_text(full, inspection.in_full(found))
    except OSError as error:
        raise OSError(f"--out {out} cannot be written: {error}") from error
    say(f"contact sheet: {out}" + (f"; findings in full: {full}" if found else ""))
    return 0


def show_views(cfg: Config, out: Path) -> int:
    """The views of the first training images, side by side as every loader makes them."""
    device = choose_device(cfg.run.device)
    images = build.data(cfg, cache_dir=cache_folder())
    contact_sheet.write(views_sheet.draw(images.train, cfg, device), out)
    say(f"contact sheet: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
