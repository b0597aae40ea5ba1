"""``python -m engine.search RUN IMAGE``: the images of a run's data set, or of an embedding, that are most like a photograph."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.table import Table
from rich.text import Text
from torch import Tensor

from engine import build, files
from engine.console import console, counted, printable, say
from engine.data import Transform, contact_sheet, read_image, readable_photos
from engine.errors import ConfigError, command
from engine.evaluation import (
    SOURCE_HELP,
    Embedding,
    Source,
    add_best_option,
    description,
    embedding_file,
    features,
    most_similar,
    of_run,
    open_source,
    split_overrides,
)
from engine.files import write_atomically
from engine.training import add_device_option, option_device, precision
from ppssl.timm_trunk import image_input

_SIDE = 160
_SHOWN = 20
"""Photographs of which the answers are printed and drawn; ``--csv`` has all."""


class Match(NamedTuple):
    """One answer."""

    cosine: float
    split: str
    """train or test; nothing where there is one list alone."""
    path: Path
    name: str
    """Posix path below ``root``."""
    label: str
    """The name of its class; nothing where there are none."""
    root: Path
    cut: int = 0
    """Rows at the bottom of its picture that are no part of it."""

    def read(self) -> Image.Image:
        """Raises ``OSError`` or ``ValueError`` where the file cannot be read."""
        image = read_image(self.path).image
        return image.crop((0, 0, image.width, image.height - self.cut)) if self.cut else image


def search(
    folder: Path, image: Path, top: int, device: torch.device, root: str | None = None, *, best: bool = False
) -> list[Match]:
    """The ``top`` images of the run's training and test lists with the largest cosine to ``image``, nearest first.
    The lists' features are kept in ``folder``, so that only the first search takes long; nothing else is written.

    root: where the data set lies now, if it has moved. best: by the weights of the run's best evaluation, not the last.

    Raises ``FileNotFoundError`` when ``folder`` is no run folder or a file is missing, ``ValueError`` for an image that cannot be
    read, ``BrokenFile`` for one of the data set that no longer opens.
    """
    source = open_source(folder, device, overrides=[] if root is None else [f"data.root={root}"], best=best)
    return search_data(source, query_features(source, [image], device), top, device)[0]


def search_data(source: Source, query: Tensor, top: int, device: torch.device) -> list[list[Match]]:
    """As ``search``, for every row of ``query`` [Q, D]."""
    found = build.data(source.run.config, cache_dir=files.cache_folder(), training=False)
    matches: list[list[Match]] = [[] for _ in query]
    for split, images in (("train", found.train), ("test", found.test)):
        if images is None or not len(images):
            continue
        kept = f"best-{split}" if source.model == "best" else split
        labelled = found.labelled if split == "train" else images
        names = {} if labelled.labels is None else dict(zip(labelled.names, labelled.labels.tolist(), strict=True))
        near = most_similar(query, of_run(source.run, images, kept, source.folder, device), top)
        for answers, index, cosine in zip(matches, near.index.tolist(), near.cosine.tolist(), strict=True):
            labels = [images.classes[names[images.names[i]]] if images.names[i] in names else "" for i in index]
            answers += [
                Match(c, split, images.path(i), images.names[i], label, images.root, images.cut)
                for i, c, label in zip(index, cosine, labels, strict=True)
            ]
    return [sorted(answers, key=lambda m: -m.cosine)[:top] for answers in matches]


def search_embedding(stored: Embedding, query: Tensor, top: int, root: Path | None = None) -> list[list[Match]]:
    """For every row of ``query`` [Q, D] the ``top`` photos of an embedding with the largest cosine, nearest first. Exact, with
    products in float32. root: where the photos lie now, if they have moved."""
    near = most_similar(query, torch.from_numpy(stored.feature), top)
    folder = Path(stored.about.get("root", ".")) if root is None else root

    def match(i: int, cosine: float) -> Match:
        split, label = ("" if column is None else column[i] for column in (stored.split, stored.label))
        return Match(cosine, split, folder / stored.path[i], stored.path[i], label, folder)

    return [[match(i, c) for i, c in zip(*row, strict=True)] for row in zip(near.index.tolist(), near.cosine.tolist(), strict=True)]


def check_same(source: Source, stored: Embedding, path: Path, device: torch.device) -> None:
    """Raises ``ValueError`` naming what differs where the embedding was not made by the network of ``source``."""
    about = stored.about
    if about.get("weights_sha256") != features.content_hash(source.run.network.state_dict()):
        made = ", ".join(f"{name} {about[name]}" for name in ("arch", "epoch", "step") if name in about)
        raise ValueError(
            f"--in {path} was made by other weights ({printable(made)}): cosines would mean nothing; give the run or weights "
            f"that made it, or embed the photos again: python -m engine.embed"
        )
    now = description(source, Path("."), device, "", half=False)
    for key in ("feature", "mean", "std", "image_size", "resize", "interpolation"):
        if about.get(key) != now[key]:
            remedy = f"; add data.image_size={about.get('image_size')}" if key in ("image_size", "resize") else ""
            raise ValueError(f"--in {path} was made with {key} {about.get(key)}, the photo would be seen with {now[key]}{remedy}")


def query_features(source: Source, images: Sequence[Path], device: torch.device) -> Tensor:
    """[Q, D] float32 features on the CPU of photographs, as those of a list are taken. Raises ``FileNotFoundError`` for one that is
    not there, ``ValueError`` for one that cannot be read."""
    cfg, network = source.run.config, source.run.network
    transform = Transform(cfg.data.image_size, image_input(cfg.encoder.arch, cfg.encoder.weights))
    if network.mask is not None and network.mask.minmax == "batch":
        say(
            "the mask of this variant is scaled over a batch: alone, the image's feature differs a little from what it is in a list"
        )
    rows = []
    with torch.inference_mode(), precision.resolve(cfg.amp, device).autocast():  # as the list's features are taken
        for image in images:
            try:
                picture = transform(image)
            except (OSError, ValueError) as error:
                if not image.is_file():
                    raise FileNotFoundError(f"there is no image {image}") from error
                raise ValueError(f"{image} cannot be read as an image ({error})") from error
            rows.append(network(picture[None].to(device, memory_format=torch.channels_last)).float().cpu())
    return torch.cat(rows)


def photographs(given: Sequence[Path]) -> list[Path]:
    """The files of ``given``, folders with all photos below them. One of a folder that cannot be read is left out, which is said.
    Raises ``ValueError`` for a folder without photos."""
    found: list[Path] = []
    for path in given:
        if not path.is_dir():
            found.append(path)
            continue
        inside, bad = readable_photos(path)
        if not inside:
            raise ValueError(f"{printable(str(path))} holds no photo that can be read")
        if bad:
            name, reason = bad[0]
            say(f"{counted(len(bad), 'file')} of {printable(str(path))} left out, first {printable(name)}: {printable(reason)}")
        found += inside
    return found


def write_sheet(images: Sequence[Path], answers: Sequence[Sequence[Match]], out: Path) -> None:
    """The photographs and their matches as one PNG, the answers behind each. A match that cannot be read leaves its place gray."""
    tiles = []
    columns = min(6, len(answers[0]) + 1) if len(images) == 1 else len(answers[0]) + 1
    for image, matches in zip(images, answers, strict=True):
        tiles.append(contact_sheet.Tile(np.asarray(read_image(image)[0]), f"searched for\n{image.name}", frame=contact_sheet.INK))
        for number, match in enumerate(matches, 1):
            caption = f"{number}. {match.cosine:.3f}\n{match.label or match.path.name}"
            tiles.append(contact_sheet.Tile(_picture(match), caption))
    contact_sheet.write(contact_sheet.draw(tiles, columns=columns, side=_SIDE), out)


def _picture(match: Match) -> np.ndarray:
    try:
        return np.asarray(match.read())
    except (OSError, ValueError):
        return np.full((_SIDE, _SIDE, 3), 200, np.uint8)


def write_csv(images: Sequence[Path], answers: Sequence[Sequence[Match]], out: Path) -> None:
    """A row for every answer: query, rank, cosine, split, label, path."""

    def write(temporary: str) -> None:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["query", "rank", "cosine", "split", "label", "path"])
            for image, matches in zip(images, answers, strict=True):
                query = embedding_file.text_of(str(image))
                for rank, m in enumerate(matches, 1):
                    writer.writerow([query, rank, f"{m.cosine:.6f}", m.split, m.label, embedding_file.text_of(m.name)])

    write_atomically(out, write)


def show(image: Path, matches: Sequence[Match]) -> None:
    """The answers as a table."""
    say(f"most like {printable(str(image))}, below {printable(str(matches[0].root))}:")
    table = Table()
    for name in ("", "cosine", "list", "class", "file"):
        table.add_column(name, overflow="fold", justify="right" if name in ("", "cosine") else "left")
    for number, match in enumerate(matches, 1):
        told = (Text(printable(text)) for text in (match.label, match.name))
        table.add_row(str(number), f"{match.cosine:.4f}", match.split, *told)
    console.print(table)


@command(ConfigError, RuntimeError)
def main(argv: Sequence[str] | None = None) -> int:
    """Prints files and scores and writes the contact sheet; returns the exit code: 0 done, 1 failure, 2 usage, 130 interrupted."""
    parser = argparse.ArgumentParser(
        "python -m engine.search",
        description="the images of a run's data set, or of an embedding, that are most like a photograph",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="RUN|WEIGHTS", help=SOURCE_HELP)
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="photographs to search with, or folders of them")
    parser.add_argument("--in", dest="stored", type=Path, metavar="FILE",
                        help="search in the .parquet or .npz file of engine.embed (default: in the data of the run)")  # fmt: skip
    parser.add_argument("--cfg", metavar="FILE|RECIPE", help="architecture of a weights file, or other data for a run")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="answers (default: 10)")
    parser.add_argument("--out", type=Path, metavar="PNG", help="contact sheet (default: RUN/search.png)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write all answers as CSV")
    parser.add_argument("--root", metavar="DIR", help="the data set's folder, if it has moved")
    add_best_option(parser)
    add_device_option(parser)
    argv, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    args, more = parser.parse_known_args(argv)
    overrides += more
    if wrong := [text for text in overrides if "=" not in text]:
        parser.error(f"unexpected argument {wrong[0]!r}; overrides are given as key=value")
    if args.top < 1:
        parser.error(f"--top: got {args.top}, must be at least 1")
    out = args.out or (Path(args.source) / "search.png" if Path(args.source).is_dir() else Path("search.png"))
    device = option_device(args.device)
    if args.root is not None and args.stored is None:
        overrides.append(f"data.root={args.root}")
    source = open_source(args.source, device, cfg=args.cfg, overrides=overrides, best=args.best)
    images = photographs(args.images)
    if args.stored is None:
        answers = search_data(source, query_features(source, images, device), args.top, device)
    else:
        stored = embedding_file.read(args.stored)
        check_same(source, stored, args.stored, device)
        query = query_features(source, images, device)
        answers = search_embedding(stored, query, args.top, None if args.root is None else Path(args.root))
    for image, matches in zip(images[:_SHOWN], answers, strict=False):
        show(image, matches)
    if len(images) > _SHOWN:
        rest = "" if args.csv else "; --csv FILE writes all answers"
        say(f"printed and drawn are the first {_SHOWN} of {len(images):,} photographs{rest}")
    if args.csv:
        write_csv(images, answers, args.csv)
        say(f"answers: {args.csv}")
    if gone := [m for matches in answers[:_SHOWN] for m in matches if not m.path.is_file()]:
        say(f"{counted(len(gone), 'answer')} cannot be drawn: {printable(str(gone[0].path))} is not there; --root DIR names it")
    write_sheet(images[:_SHOWN], answers[:_SHOWN], out)
    say(f"contact sheet: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
