"""``python -m engine.evaluate RUN``: how well the features of a run retrieve images of the same class."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from engine import build
from engine.checkpoint import write_atomically
from engine.config import Config
from engine.data.catalog import BrokenFile, ImageList
from engine.log import console, say
from engine.protocols.features import extract
from engine.protocols.retrieval import retrieval

PROTOCOL = "retrieval: leave-one-out inside the test split, cosine"


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
