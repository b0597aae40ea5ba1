"""One cell: its training and what is measured of the network. Runs in a process of its own."""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.methods import lightly_moco
from bench.methods.cells import Cell
from bench.methods.maps import look
from bench.methods.settings import ROOT
from engine import build
from engine.build import assemble
from engine.config import Config, to_yaml
from engine.data import teacher_cache
from engine.data.catalog import Catalog, ImageList
from engine.evaluation import attention_maps, linear
from engine.evaluation.features import extract
from engine.evaluation.retrieval import retrieval
from engine.evaluation.validation import hold_out
from engine.files import cache_folder, write_text
from ppssl.encoder import FeatureNet
from ppssl.method import Method
from ppssl.teacher import Teacher

PERCENTS = (100, 50, 20)
"""Of the training labels that the linear probes see."""
HELD_OUT = 0.2
"""With --tune, the part of the training photos of each class that is evaluated on instead of being trained on."""


def images_of(cfg: Config, tune: bool) -> Catalog:
    """The data set of ``cfg``; to ``tune``, its training photos without a validation part, the same for every seed, which stands
    in the place of the test photos."""
    images = build.data(cfg, cache_dir=cache_folder(), progress=False)
    if not tune:
        return images
    found = hold_out(images, replace(cfg, seed=0, eval=replace(cfg.eval, validation=HELD_OUT)))
    return found._replace(test=found.validation, validation=None)


def run_cell(cell: Cell, cfg: Config, spec: dict[str, Any], record: Path, folder: Path | None, threads: int) -> None:
    """Trains and measures one cell and writes its record; in a separate process, so that memory and CPU time are the cell's."""
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cfg = build.resolve(cfg, device)
    images = images_of(cfg, "validation" in spec)
    found: dict[str, Any] = {"cell": cell.name, "seed": cfg.seed if cell.has_seed else None, "specification": spec}
    cache = dict(device=device, cache_dir=cache_folder(), workers=cfg.data.workers)
    if cell.kind == "teacher":
        teacher = build.teacher(cfg, device)
        rows = [teacher_cache.embeddings(teacher, part, **cache).float() for part in (images.train, images.test)]
        found |= measure_features(*rows, images)
    elif not cell.trains:
        found |= measure(build.method(cfg, None).to(device), cfg, images, device)
        if not cell.has_seed:
            found = {key: value for key, value in found.items() if not key.startswith("cam_")}  # it is of a random head
    elif cell.kind == "lightly":
        before = cpu_seconds()
        trunk, steps = lightly_moco.train(cfg, images.train, device)
        found |= costs(cpu_seconds() - before, steps, cfg, device)
        found |= measure_network(FeatureNet(trunk), cfg, images, device)
    else:

        def embed(teacher: Teacher) -> Tensor:
            rows = teacher_cache.embeddings(teacher, images.train, **cache)
            return altered(rows, cell.teacher, cfg.seed, labels_of(images.train, device))

        teacher = build.teacher(cfg, device)
        trainer = assemble(cfg, images, device, teacher=teacher, out=folder, cache=cache_folder(), embed=embed)
        if folder is not None:
            trainer.begin(None)
            write_text(folder / "config.yaml", to_yaml(cfg))
            watch = attention_maps.Watch(folder, cfg, images, device)
            trainer.hooks.append(watch.after_epoch)
        before = cpu_seconds()
        try:
            summary = trainer.fit()
            trainer.loader.close()
            found |= costs(cpu_seconds() - before, summary.steps, cfg, device)
            if folder is not None:
                watch(trainer)
            found |= measure(trainer.method, cfg, images, device)
        except FloatingPointError as error:
            found["failed"] = str(error)
    write_text(record, json.dumps(found | provenance(), indent=1) + "\n")


def costs(seconds: float, steps: int, cfg: Config, device: torch.device) -> dict[str, float]:
    """What a training of so many CPU ``seconds`` has cost."""
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 1024 * _usage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "cpu_seconds_per_epoch": seconds / cfg.epochs, "cpu_seconds": seconds, "peak_memory_mib": peak / 2**20,
        "steps": steps, "images": steps * cfg.batch_size,
    }  # fmt: skip


def altered(rows: Tensor, how: str, seed: int, labels: Tensor) -> Tensor:
    """Teacher embeddings [N, E]: as they are (``true``), each image with another's (``shuffled``), their mean (``constant``), or
    that mean and a random direction for each of the ``labels`` [N] (``species``), which no teacher without labels could give."""
    if how == "true":
        return rows
    generator = torch.Generator().manual_seed(seed)
    if how == "shuffled":
        return rows[torch.randperm(len(rows), generator=generator).to(rows.device)]
    found = F.normalize(rows.float().mean(0, keepdim=True), dim=1).expand(len(rows), -1)
    if how == "species":
        directions = F.normalize(torch.randn(int(labels.max()) + 1, rows.shape[1], generator=generator), dim=1).to(rows.device)
        # 0.8: between species the logits then differ by a standard deviation of 1.4 (of the demo's teacher: 0.1)
        found = F.normalize(found + 0.8 * directions[labels], dim=1)
    return found.to(rows.dtype).contiguous()


def measure(method: Method, cfg: Config, images: Catalog, device: torch.device) -> dict[str, Any]:
    """``measure_network`` of the method's, and, where it is known where the bird is, where the network looks
    (``bench.methods.maps``). Raises ``FloatingPointError``."""
    found = measure_network(method.network, cfg, images, device)
    return found | look(method, cfg, images.test, labels_of(images.test, device), device, cache_folder())


def measure_network(network: FeatureNet, cfg: Config, images: Catalog, device: torch.device) -> dict[str, Any]:
    """Retrieval and linear probes of a network, and retrieval without its mask. Raises ``FloatingPointError``."""
    train, test = (extract(network, part, cfg, device) for part in (images.train, images.test))
    if not all(torch.isfinite(features).all() for features in (train, test)):
        raise FloatingPointError("the features are not finite: the network has diverged")
    labels = labels_of(images.test, device)
    found = measure_features(train, test, images)
    plain = test if network.mask is None else extract(FeatureNet(network.trunk), images.test, cfg, device)
    unmasked = retrieval(plain, labels)
    return found | {"plain_rank1": unmasked.rank1, "plain_mAP": unmasked.mAP}


def measure_features(train: Tensor, test: Tensor, images: Catalog) -> dict[str, float]:
    """rank1, rank5, mAP inside the test split; accuracy of linear probes on ``PERCENTS`` of the training labels; in [0, 1]."""
    of_train, of_test = (labels_of(part, test.device) for part in (images.train, images.test))
    ranked = retrieval(test, of_test)
    found = {"rank1": ranked.rank1, "rank5": ranked.rank5, "mAP": ranked.mAP}
    classes = int(of_train.max()) + 1
    for percent in PERCENTS:
        some = linear.fraction(of_train, percent, seed=0)
        if int(torch.bincount(of_train[some]).max()) < 2:
            continue  # nothing to hold out for the choice of the penalty
        found[f"linear_{percent}"] = linear.convex(train[some], of_train[some], classes).probe.accuracy(test, of_test)
    return found


def labels_of(images: ImageList, device: torch.device) -> Tensor:
    return torch.as_tensor(images.labels, dtype=torch.int64, device=device)


def _usage(who: int) -> resource.struct_rusage:
    return resource.getrusage(who)


def cpu_seconds() -> float:
    """CPU time of this process, its threads and the children it has waited for, in seconds."""
    return sum(u.ru_utime + u.ru_stime for u in map(_usage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def provenance() -> dict[str, str]:
    """Where and with what a cell was run."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "commit": commit or "unknown", "torch": torch.__version__, "device": device, "threads": str(torch.get_num_threads()),
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
