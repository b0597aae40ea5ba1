"""``python -m engine.evaluate RUN``: how well the features of a run retrieve images of the same class."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from engine import build, precision
from engine.checkpoint import write_atomically
from engine.config import Config
from engine.data import clean_batches
from engine.data.catalog import BrokenFile, ImageList
from engine.data.views import clean_resize
from engine.log import console, say

PROTOCOL = "retrieval: leave-one-out inside the test split, cosine"
# Rows are taken in blocks of about this much scratch; smaller ones make the matrix product re-pack its right side more.
_BLOCK_BYTES = 128 * 2**20
# Scratch per entry of a block: the similarity and a temporary of its size, or the similarity and the 64-bit key.
_ENTRY_BYTES = 12


class Retrieval(NamedTuple):
    """Fractions in [0, 1] over the queries."""

    rank1: float
    """Queries whose nearest other image is of their class."""
    rank5: float
    """Queries with an image of their class among the five nearest."""
    mAP: float
    """Mean over queries of the average precision of the full ranking."""
    queries: int
    excluded: int
    """Images that are alone in their class: no query, but they stay in everybody's ranking."""


@torch.no_grad()
def retrieval(features: Tensor, labels: Tensor | Sequence[int]) -> Retrieval:
    """Leave-one-out retrieval: every image asks for the others of its class, by cosine similarity.

    features: [N, D] floating point, any device, rows of any length; labels: [N] integers.
    Similarities are float32. Ties (equal to the last bit) are won by the image that comes first, so that the result is
    a function of the values and their order alone. Works in blocks of rows, so that beside one float32 copy of
    ``features`` the extra memory hardly grows with N (25,000 x 2048: 0.5 GiB with the copy; more only where one class
    holds most of the images).

    Raises:
        ValueError: wrong shapes, a non-finite feature, or no class with two images.
    """
    labels = torch.as_tensor(labels, device=features.device)
    if features.ndim != 2 or not features.is_floating_point():
        raise ValueError(f"features: expected floating point [N, D], got {features.dtype} {list(features.shape)}")
    if labels.shape != features.shape[:1] or labels.is_floating_point():
        raise ValueError(f"labels: expected integers [{len(features)}], got {labels.dtype} {list(labels.shape)}")
    unit = F.normalize(features.float(), dim=1)
    if not torch.isfinite(unit).all():
        raise ValueError("features: not finite; the network that made them has diverged")
    _, group, sizes = torch.unique(labels, return_inverse=True, return_counts=True)
    queries = torch.nonzero(sizes[group] > 1).flatten()
    if not len(queries):
        raise ValueError(f"labels: no class has two images (of {len(labels)}), so that there is nothing to retrieve")
    members = torch.argsort(group, stable=True)  # images by class; a class is one stretch of it
    starts = sizes.cumsum(0) - sizes

    found_1 = found_5 = torch.zeros((), dtype=torch.int64, device=unit.device)
    precision_sum = torch.zeros((), dtype=torch.float64, device=unit.device)
    rows = max(1, _BLOCK_BYTES // (_ENTRY_BYTES * len(unit)))
    with _full_precision(unit.device.type):
        for query in queries.split(rows):
            keys = _ranking_keys(unit[query].neg_() @ unit.T)
            # The query's class, as columns: padded to the largest class of the block, itself taken out.
            slot = torch.arange(int(sizes[group[query]].max()), device=unit.device)
            same = members[(starts[group[query]][:, None] + slot).clamp(max=len(unit) - 1)]
            absent = (slot >= sizes[group[query]][:, None]) | (same == query[:, None])
            wanted = keys.gather(1, same).masked_fill_(absent, _LAST)
            keys.scatter_(1, query[:, None], _LAST)

            # Position of every wanted image among all others, from 1, nearest first; absent ones are sorted behind.
            rank = (torch.searchsorted(_sort_rows(keys), wanted) + 1).masked_fill_(absent, _LAST).sort(dim=1).values
            found_1 = found_1 + (rank[:, 0] <= 1).sum()
            found_5 = found_5 + (rank[:, 0] <= 5).sum()
            hits = (slot + 1).double() / rank  # the i-th found one: precision i / rank
            relevant = (sizes[group[query]] - 1)[:, None]
            precision_sum += (hits.masked_fill_(slot >= relevant, 0) / relevant).sum()
    n = len(queries)
    return Retrieval(int(found_1) / n, int(found_5) / n, float(precision_sum) / n, n, len(labels) - n)


_LAST = torch.iinfo(torch.int64).max


def _ranking_keys(distance: Tensor) -> Tensor:
    """[b, N] float32, negated similarities (spent as scratch) -> int64 keys that rise with distance, then with column.
    IEEE floats compare like their bits once the magnitude bits of negative ones are flipped; the column fills the low
    half. In place where it can be: fresh memory costs more here than the arithmetic."""
    bits = distance.add_(0.0).view(torch.int32)  # -0.0 + 0.0 = 0.0
    bits ^= (bits >> 31).bitwise_and_(0x7FFFFFFF)
    keys = bits.long()
    keys <<= 32
    keys += torch.arange(keys.shape[1], device=keys.device)
    return keys


def _sort_rows(keys: Tensor) -> Tensor:
    """Sorts each row, in place where it can: numpy's vectorised sort is several times faster than torch's on a CPU."""
    if keys.device.type != "cpu":
        return keys.sort(dim=1).values
    keys.numpy().sort(axis=1)
    return keys


@contextmanager
def _full_precision(device_type: str) -> Iterator[None]:
    """Matrix products in float32 proper, whatever autocast or TF32 setting is in force outside."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.no_grad()
def extract(network: nn.Module, images: ImageList, cfg: Config, device: torch.device) -> Tensor:
    """[N, C] float32 features on ``device``: short side 256/224 of ``data.image_size``, centre crop, under the run's
    ``amp``, modules in eval mode meanwhile. In file order at ``eval.batch_size``: in form ``published`` the mask is
    scaled over the batch, so that both are part of the result.

    Raises ``BrokenFile`` naming a file that no longer opens.
    """
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    rows: list[Tensor] = []
    try:
        with precision.resolve(cfg.amp, device).autocast():
            for x, _ in clean_batches(
                images,
                resize=clean_resize(cfg.data.image_size),
                crop=cfg.data.image_size,
                batch_size=cfg.eval.batch_size,
                workers=cfg.data.workers,
                device=device,
            ):
                rows.append(network(x).float())
    finally:
        for module, training in modes:
            module.training = training
    return torch.cat(rows)


def evaluate(network: nn.Module, images: ImageList, cfg: Config, device: torch.device) -> dict[str, Any]:
    """Judges ``network`` (images -> features, as ``Method.network``) on a labelled list, as plain data for a log or a
    file: the fields of ``Retrieval``, what was measured, and ``seconds``.

    Raises ``ValueError`` for a list without labels or without two images of any class.
    """
    if images.labels is None:
        raise ValueError(f"data.root: {images.root} has no labels, so that retrieval cannot be judged")
    started = time.perf_counter()
    features = extract(network, images, cfg, device)
    result = retrieval(features, torch.from_numpy(images.labels).to(device))
    masked = getattr(network, "mask", None) is not None
    return result._asdict() | {
        "protocol": PROTOCOL,
        "feature": f"{'l2(gap(A * F))' if masked else 'l2(gap(F))'}, {features.shape[1]}-d",
        "images": len(images),
        "classes": len(images.classes),
        "image_size": cfg.data.image_size,
        "batch_size": cfg.eval.batch_size,
        "seconds": time.perf_counter() - started,
    }


def evaluate_run(folder: Path, device: torch.device) -> dict[str, Any]:
    """``evaluate`` of a run folder's weights on the test split of its data set.

    Raises ``FileNotFoundError`` when ``folder`` is not a run folder, ``ValueError`` without a labelled test split.
    """
    run = build.load_run(folder, device)
    images = build.data(run.config, cache_dir=build.cache_folder()).test
    if images is None or images.labels is None:
        raise ValueError(
            f"{folder}: data.name={run.config.data.name} at {run.config.data.root} has no labelled test split; "
            f"retrieval needs one (for folders: ROOT/test/<class>/*.jpg)"
        )
    where = {"run": str(folder), "data": run.config.data.name, "split": "test", "step": run.step, "epoch": run.epoch}
    return where | evaluate(run.network, images, run.config, device)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a run's numbers and writes them as JSON; returns the exit code: 0 done, 1 failure, 2 usage."""
    parser = argparse.ArgumentParser("python -m engine.evaluate", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file (default: RUN/retrieval.json)")
    args = parser.parse_args(argv)
    out = args.out or args.run / "retrieval.json"
    try:
        result = evaluate_run(args.run, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        text = json.dumps(result, indent=2) + "\n"
        write_atomically(out, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))
    except (ValueError, OSError, NotImplementedError, BrokenFile) as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    table = Table(title=result["protocol"], title_justify="left", show_header=False)
    for name in ("rank1", "rank5", "mAP"):
        table.add_row(name, f"{100 * result[name]:.2f} %")
    table.add_row("feature", result["feature"])
    size = f"{result['images']} images, {result['classes']} classes"
    table.add_row("split", f"{result['split']} of {result['data']}: {size}")
    table.add_row("queries", f"{result['queries']} ({result['excluded']} alone in their class)")
    table.add_row("epoch", f"{result['epoch']} (step {result['step']})")
    table.add_row("input", f"{result['image_size']} px, batches of {result['batch_size']} in file order")
    console.print(table)
    say(f"written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
