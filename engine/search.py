"""``python -m engine.search RUN IMAGE``: the images of a run's data set that are most like a photograph."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.table import Table
from rich.text import Text

from engine import build, files
from engine.console import console, printable, say
from engine.data import ImageList, Transform, contact_sheet, read_image
from engine.errors import ConfigError, command
from engine.evaluation import most_similar, of_run
from engine.pretrained import load_run, say_which
from engine.training import add_device_option, option_device, precision
from ppssl.timm_trunk import image_input

_SIDE = 160


class Match(NamedTuple):
    """One answer."""

    cosine: float
    split: str
    images: ImageList
    index: int
    """Position in ``images``."""

    @property
    def path(self) -> Path:
        return self.images.path(self.index)

    @property
    def label(self) -> str:
        """The name of its class; nothing where there are none."""
        return "" if self.images.labels is None else self.images.classes[self.images.labels[self.index]]


def search(
    folder: Path, image: Path, top: int, device: torch.device, root: str | None = None, *, best: bool = False
) -> list[Match]:
    """The ``top`` images of the run's training and test lists with the largest cosine to ``image``, nearest first.
    The lists' features are kept in ``folder``, so that only the first search takes long; nothing else is written.

    root: where the data set lies now, if it has moved. best: by the weights of the run's best evaluation, not the last.

    Raises ``FileNotFoundError`` when ``folder`` is no run folder or a file is missing, ``ValueError`` for an image that cannot be
    read, ``BrokenFile`` for one of the data set that no longer opens.
    """
    run = load_run(folder, device, best=best)
    say_which(folder, best)
    cfg, network = run.config, run.network
    if root is not None:
        cfg = replace(cfg, data=replace(cfg.data, root=root))
    try:
        picture = Transform(cfg.data.image_size, image_input(cfg.encoder.arch, cfg.encoder.weights))(image)
    except (OSError, ValueError) as error:
        if not image.is_file():
            raise FileNotFoundError(f"there is no image {image}") from error
        raise ValueError(f"{image} cannot be read as an image ({error})") from error
    if network.mask is not None and network.mask.minmax == "batch":
        say(
            "the mask of this variant is scaled over a batch: alone, the image's feature differs a little from what it is in a list"
        )
    with torch.no_grad(), precision.resolve(cfg.amp, device).autocast():  # as the list's features are taken
        query = network(picture[None].to(device, memory_format=torch.channels_last))
    found = build.data(cfg, cache_dir=files.cache_folder(), training=False)
    matches = []
    for split, images in (("train", found.train), ("test", found.test)):
        if images is None or not len(images):
            continue
        near = most_similar(query, of_run(run, images, f"best-{split}" if best else split, folder, device), top)
        matches += [Match(float(c), split, images, int(i)) for i, c in zip(near.index[0], near.cosine[0], strict=True)]
    return sorted(matches, key=lambda m: -m.cosine)[:top]


def write_sheet(image: Path, matches: Sequence[Match], out: Path) -> None:
    """The photograph and its matches as one PNG."""
    tiles = [contact_sheet.Tile(np.asarray(read_image(image)[0]), f"searched for\n{image.name}", frame=contact_sheet.INK)]
    for number, match in enumerate(matches, 1):
        caption = f"{number}. {match.cosine:.3f}\n{match.label or match.path.name}"
        tiles.append(contact_sheet.Tile(np.asarray(match.images.read(match.index)), caption))
    contact_sheet.write(contact_sheet.draw(tiles, columns=min(6, len(tiles)), side=_SIDE), out)


@command(ConfigError)
def main(argv: Sequence[str] | None = None) -> int:
    """Prints files and scores and writes the contact sheet; returns the exit code: 0 done, 1 failure, 2 usage, 130 interrupted."""
    parser = argparse.ArgumentParser(
        "python -m engine.search", description="the images of a run's data set that are most like a photograph"
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("image", type=Path, metavar="IMAGE", help="photograph to search with")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="answers (default: 10)")
    parser.add_argument("--out", type=Path, metavar="PNG", help="contact sheet (default: RUN/search.png)")
    parser.add_argument("--root", metavar="DIR", help="the data set's folder, if it has moved")
    parser.add_argument("--best", action="store_true", help="the weights of the best evaluation, not the last (eval.keep_best)")
    add_device_option(parser)
    args = parser.parse_args(argv)
    if args.top < 1:
        parser.error(f"--top: got {args.top}, must be at least 1")
    out = args.out or args.run / "search.png"
    device = option_device(args.device)
    matches = search(args.run, args.image, args.top, device, args.root, best=args.best)
    write_sheet(args.image, matches, out)
    say(f"most like {printable(str(args.image))}, below {printable(str(matches[0].images.root))}:")
    table = Table()
    for name in ("", "cosine", "list", "class", "file"):
        table.add_column(name, overflow="fold", justify="right" if name in ("", "cosine") else "left")
    for number, match in enumerate(matches, 1):
        told = (Text(printable(text)) for text in (match.label, match.images.names[match.index]))
        table.add_row(str(number), f"{match.cosine:.4f}", match.split, *told)
    console.print(table)
    say(f"contact sheet: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
