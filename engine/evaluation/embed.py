"""The features of any photos as one file: made in parts that outlast a kill, by one process or several, and joined at the end."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine import __version__
from engine.console import console, counted, printable, rate_bar, say
from engine.data import Normalize, PhotoList, Watch, ahead, decoded_batches, input_view, keep_freed_memory
from engine.errors import ConfigError
from engine.evaluation import embedding_file
from engine.evaluation.embedding_file import Rows
from engine.evaluation.evaluator import feature_name
from engine.evaluation.features import content_hash
from engine.evaluation.source import Source
from engine.files import locked, read_metadata, remove_temporary_files, write_text
from engine.pretrained import Run, weights_file
from engine.run_folder import commit
from engine.training import ALONE, World, precision
from ppssl.timm_trunk import image_input

PHOTOS = 2048
"""Of a part, at most (in whole batches)."""
SECONDS = 20.0
"""That a part takes before it is kept."""
_TOLD = 60.0
"""Seconds between lines of progress where there is no terminal."""
_NAMES = {"weights": "the weights", "photos": "the list of photos", "options": "the options"}


class Summary(NamedTuple):
    """What was embedded."""

    photos: int
    """Rows of the file."""
    bad: Path | None
    """The list of what was left out; None where all was used."""
    left_out: int
    made: int
    """Photos that this process embedded now; the others were kept from before or are those of other processes."""
    seconds: float


class Embedded(NamedTuple):
    """One batch."""

    index: range
    """Its positions in the list."""
    positions: list[int]
    """Those of them that could be read."""
    features: Tensor | None
    """[n, D] float32 unit rows on the device, None where none could be read."""
    bad: list[tuple[int, str]]
    """(position, reason) of the others."""


def identity(run: Run, photos: PhotoList, device: torch.device, *, half: bool) -> dict[str, Any]:
    """What a part depends on: sha256 of the weights and of the list of photos, and everything that makes a feature of an image."""
    cfg = run.config
    return {
        "weights": content_hash(run.network.state_dict()),
        "photos": photos.identity,
        "options": {
            "arch": cfg.encoder.arch, "feature": feature_name(run.network), "method": asdict(cfg.method),
            "image_size": cfg.data.image_size, "input": image_input(cfg.encoder.arch, cfg.encoder.weights)._asdict(),
            "batch_size": cfg.eval.batch_size, "precision": [device.type, str(precision.resolve(cfg.amp, device).dtype)],
            "dtype": "float16" if half else "float32",
        },
    }  # fmt: skip


def description(source: Source, root: Path, device: torch.device, weights: str, *, half: bool) -> dict[str, Any]:
    """What stands in the file beside its rows; ``dim`` and ``photos`` are added when they are known."""
    cfg = source.run.config
    how = image_input(cfg.encoder.arch, cfg.encoder.weights)
    about = {
        "weights_sha256": weights,
        "arch": cfg.encoder.arch,
        "feature": feature_name(source.run.network),
        "dtype": "float16" if half else "float32",
        "mean": list(how.mean),
        "std": list(how.std),
        "image_size": cfg.data.image_size,
        "resize": how.resize(cfg.data.image_size),
        "interpolation": how.interpolation,
        "batch_size": cfg.eval.batch_size,
        "precision": precision.resolve(cfg.amp, device).note,
        "root": embedding_file.text_of(str(root.resolve())),
        "engine": engine_version(),
        "torch": torch.__version__,
    }
    return about | ({"epoch": source.run.epoch, "step": source.run.step} if source.model in ("run", "best") else {})


def engine_version() -> str:
    """The version, and the commit of a clone."""
    here = commit()
    return f"{__version__}, commit {here}" if here else __version__


def embedded(run: Run, photos: PhotoList, batches: Sequence[range], device: torch.device) -> Iterator[Embedded]:
    """The features of the photos at ``batches``, in order: decoded, stacked and (on a GPU) put into page-locked memory while the
    network computes. The result of a batch is given once the next one has been started, so that nothing waits for the device."""
    cfg, how = run.config, image_input(run.config.encoder.arch, run.config.encoder.weights)
    normalize = Normalize(how.mean, how.std, device, torch.float32)
    keep_freed_memory(device)
    waiting: Embedded | None = None
    with Watch() as watch:

        def decode(i: int) -> np.ndarray | str:
            try:
                return np.asarray(input_view(photos.read(i, watch), how, cfg.data.image_size))
            except OSError as error:
                return f"cannot be read ({error.strerror or error or type(error).__name__})"
            except (ValueError, MemoryError) as error:
                return str(error) or type(error).__name__

        def stacked() -> Iterator[tuple[range, list[int], Tensor | None, list[tuple[int, str]]]]:
            for index, found in decoded_batches(decode, batches, cfg.data.workers):
                good = [i for i, pixels in zip(index, found, strict=True) if not isinstance(pixels, str)]
                bad = [(i, reason) for i, reason in zip(index, found, strict=True) if isinstance(reason, str)]
                arrays = [pixels for pixels in found if not isinstance(pixels, str)]
                pixels = torch.from_numpy(np.stack(arrays)) if arrays else None
                yield index, good, pixels.pin_memory() if pixels is not None and device.type == "cuda" else pixels, bad

        with contextlib.closing(ahead(stacked(), 1)) as items:
            for index, good, pixels, bad in items:
                with torch.inference_mode(), precision.resolve(cfg.amp, device).autocast():
                    features = None if pixels is None else run.network(normalize(pixels)).float()
                if waiting is not None:
                    yield waiting
                waiting = Embedded(index, good, features, bad)
    if waiting is not None:
        yield waiting


def embed_photos(
    source: Source,
    photos: PhotoList,
    out: Path,
    device: torch.device,
    *,
    half: bool = False,
    force: bool = False,
    world: World = ALONE,
) -> Summary:
    """Writes the unit feature of every photo that can be read to ``out`` (.parquet, .npz or .csv; ``embedding_file.read`` reads the
    first two), and what cannot be read to OUT.bad_files.txt, a line ``name<TAB>reason`` each.

    Finished parts lie in OUT.parts until all are there: the same call continues them. half: stores float16. force: replaces ``out``
    and parts of another embedding. The processes of ``world`` embed a shard each, and the first joins them.
    Raises ``ConfigError`` where ``out`` exists or OUT.parts is of another embedding, ``ValueError`` where no photo can be read or a
    feature is not finite, ``ImportError`` where pyarrow is needed and missing.
    """
    started = time.perf_counter()
    embedding_file.check_name(out)
    if world.first and out.exists() and not force:
        raise ConfigError(f"--out {printable(str(out))} exists; give another name, or --force to replace it")
    wanted = identity(source.run, photos, device, half=half)
    parts = _Parts(out.with_name(f"{out.name}.parts"), wanted, photos, half)
    mask = source.run.network.mask
    if mask is not None and mask.minmax == "batch":
        say("the mask of this variant is scaled over a batch: features depend a little on --batch-size and the order of photos")
    with _writing(out, parts), contextlib.ExitStack() as held:
        if world.first:
            held.enter_context(parts.opened(force))
        done, theirs = world.broadcast_object((parts.done(), parts.key) if world.first else None)
        if theirs != parts.key:
            raise ValueError(f"process {world.rank} sees other photos or weights than the first; all need the same files")
        todo = [b for b in photos.batches(source.run.config.eval.batch_size) if not any(b.start in d for d in done)]
        if done:
            say(f"{sum(map(len, done)):,} of {counted(len(photos), 'photo')} are in {printable(str(parts.folder))} and are kept")
        each = -(-len(todo) // world.size)
        with parts:
            made = _embed(source.run, photos, todo[world.rank * each : (world.rank + 1) * each], device, parts)
        world.barrier()
        summary = Summary(0, None, 0, made, 0.0)
        if world.first:
            summary = _join(out, parts, description(source, photos.root, device, wanted["weights"], half=half))
    if world.first:  # once its lock is let go: a network file system keeps files that are open
        shutil.rmtree(parts.folder)
    world.barrier()
    return summary._replace(made=made, seconds=time.perf_counter() - started)


@contextlib.contextmanager
def _writing(out: Path, parts: _Parts) -> Iterator[None]:
    """A disk that takes nothing, as an error that says what is kept; photos that cannot be read are none."""
    try:
        yield
    except OSError as error:
        kept = f"; finished parts are kept in {printable(str(parts.folder))}" if any(parts.folder.glob("part_*")) else ""
        raise OSError(
            f"--out {printable(str(out))} cannot be written ({error.strerror or error}){kept}; make room and run the same "
            f"command again, or name a place that can be written to"
        ) from error


def _embed(run: Run, photos: PhotoList, batches: Sequence[range], device: torch.device, parts: _Parts) -> int:
    total, done, started = sum(map(len, batches)), 0, time.perf_counter()
    told = started
    with rate_bar("photos") as progress:
        task = progress.add_task("embedding", total=total)
        try:
            for batch in embedded(run, photos, batches, device):
                parts.add(batch)
                done += len(batch.index)
                progress.advance(task, len(batch.index))
                now = time.perf_counter()
                if not console.is_terminal and now - told > _TOLD:
                    told, rate = now, done / (now - started)
                    say(f"{done:,} of {counted(total, 'photo')}, {rate:,.1f} photos/s, {(total - done) / rate / 60:,.0f} min left")
        except torch.OutOfMemoryError as error:
            raise ValueError(f"--batch-size {run.config.eval.batch_size}: the device has too little memory; use fewer") from error
        except KeyboardInterrupt:
            parts.flush()
            say("interrupted: what is finished is kept, and the same command continues")
            raise
        parts.flush()
    return done


class _Parts:
    """The folder beside the output in which finished parts lie, and the part that is being made."""

    def __init__(self, folder: Path, wanted: dict[str, Any], photos: PhotoList, half: bool):
        self.folder, self.photos, self.half = folder, photos, half
        self.wanted = json.loads(json.dumps(wanted))  # as it is read back
        self.key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()
        self._batches: list[Embedded] = []
        self._since = time.perf_counter()
        self._writer, self._written = ThreadPoolExecutor(1, thread_name_prefix="parts"), Future[None]()
        self._written.set_result(None)

    def __enter__(self) -> _Parts:
        return self

    def __exit__(self, *_: object) -> None:
        """Waits for the last part. Raises what writing it raised."""
        self._writer.shutdown()
        self._written.result()

    @contextlib.contextmanager
    def opened(self, force: bool) -> Iterator[None]:
        """Makes the folder this process's own. Raises ``ConfigError`` where it holds parts of another embedding."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with locked(self.folder / ".lock", None):
                self._claim(force)
                yield
        except BlockingIOError as error:
            raise ValueError(
                f"{printable(str(self.folder))}: another process embeds here; wait for it or give another --out"
            ) from error

    def _claim(self, force: bool) -> None:
        remove_temporary_files(self.folder)
        record, files = self.folder / "identity.json", sorted(self.folder.glob("part_*.safetensors"))
        try:
            found = json.loads(record.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {}
        if files and found != self.wanted:
            differs = [text for name, text in _NAMES.items() if not isinstance(found, dict) or found.get(name) != self.wanted[name]]
            if not force:
                raise ConfigError(
                    f"{printable(str(self.folder))} holds parts of another embedding: {' and '.join(differs)} differ; finish it "
                    f"with the command that began it, give another --out, or --force to begin anew"
                )
            for file in files:
                file.unlink()
        write_text(record, json.dumps(self.wanted, indent=1) + "\n")

    def done(self) -> list[range]:
        """Positions of the parts that are there and whole; one that is damaged is removed, which is said."""
        found = []
        for path in sorted(self.folder.glob("part_*.safetensors")):
            try:
                _, about = self.load(path)
                found.append(range(int(about["start"]), int(about["stop"])))
            except (ValueError, KeyError) as error:
                say(f"{printable(str(error))}; it is made again")
                path.unlink()
        return found

    def load(self, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata of one part. Raises ``ValueError`` where it is damaged or of another embedding."""
        tensors, about = weights_file.load_weights(path), read_metadata(path)
        if about.get("key") != self.key or about.get("content") != content_hash(tensors):
            raise ValueError(f"{path} is damaged or of another embedding")
        return tensors, about

    def add(self, batch: Embedded) -> None:
        """Adds a batch; keeps the part where it is full or old enough, or the batch does not follow it."""
        if self._batches and self._batches[-1].index.stop != batch.index.start:
            self.flush()
        self._batches.append(batch)
        if sum(len(b.index) for b in self._batches) >= PHOTOS or time.perf_counter() - self._since > SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes the part that is being made, while the next one is computed. Raises ``ValueError`` naming a photo whose feature is
        not finite, ``OSError`` where the part before could not be written."""
        batches, self._batches, self._since = self._batches, [], time.perf_counter()
        if not batches:
            return
        positions = [i for b in batches for i in b.positions]
        rows = [b.features for b in batches if b.features is not None]
        features = torch.cat(rows).cpu() if rows else torch.zeros(0, 0)
        finite = torch.isfinite(features).all(1)
        if not finite.all():
            name = self.photos.names[positions[int((~finite).nonzero()[0])]]
            raise ValueError(
                f"{printable(name)}: its feature is not finite; embed without --amp, or give weights that have not diverged"
            )
        tensors = {"features": features.half() if self.half else features, "positions": torch.tensor(positions, dtype=torch.int64)}
        start, stop = batches[0].index.start, batches[-1].index.stop
        about = {"key": self.key, "start": str(start), "stop": str(stop)}
        about["bad"] = json.dumps([entry for b in batches for entry in b.bad])
        self._written.result()
        self._written = self._writer.submit(self._write, self.folder / f"part_{start:010d}.safetensors", tensors, about)

    @staticmethod
    def _write(path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
        weights_file.save_weights(path, tensors, about | {"content": content_hash(tensors)})


def _join(out: Path, parts: _Parts, about: dict[str, Any]) -> Summary:
    """Writes the file and the list of what was left out."""
    photos, files = parts.photos, sorted(parts.folder.glob("part_*.safetensors"))
    bad, rows, reached, dim = [(b.name, b.reason) for b in photos.bad], 0, 0, 0
    for path in files:
        tensors, found = parts.load(path)
        if int(found["start"]) != reached:
            break
        reached, rows, dim = int(found["stop"]), rows + len(tensors["positions"]), max(dim, tensors["features"].shape[1])
        bad += [(photos.names[i], reason) for i, reason in json.loads(found["bad"])]
    if reached != len(photos):
        raise ValueError(
            f"{printable(str(parts.folder))}: the part that begins with photo {reached:,} is gone; run the same command again"
        )
    if not rows:
        name, reason = bad[0]
        raise ValueError(f"none of {counted(len(photos), 'photo')} could be read; {printable(name)}: {printable(reason)}")
    listed, splits = out.with_name(f"{out.name}.bad_files.txt"), photos.split_of() if len(photos.splits) > 1 else None

    def all_rows() -> Iterator[Rows]:
        for path in files:
            tensors, _ = parts.load(path)
            if not len(tensors["positions"]):
                continue
            at = tensors["positions"].tolist()
            texts = {"path": [embedding_file.text_of(photos.names[i]) for i in at]}
            if photos.labels is not None:
                texts["label"] = [photos.labels[i] for i in at]
            if splits is not None:
                texts["split"] = [splits[i] for i in at]
            yield Rows(texts, tensors["features"].numpy())

    if bad:
        write_text(listed, "".join(f"{printable(name)}\t{printable(reason)}\n" for name, reason in bad))
    else:
        listed.unlink(missing_ok=True)
    embedding_file.write(out, all_rows, about | {"dim": dim, "photos": rows})
    return Summary(rows, listed if bad else None, len(bad), 0, 0.0)
