"""Checkpoints: everything the loop mutates, as tensors and plain data under a checksum, never replaced by half a file, written
while training goes on; and a run's network."""

from __future__ import annotations

import copy
import errno
import hashlib
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from engine.console import say
from engine.files import write_atomically
from engine.pretrained import other_kind, save_weights
from engine.run_folder import RunFolder

FORMAT = 2
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk that is full."""
_NAME = re.compile(r"step_(\d{9})\.pt")
_SEAL = b"\nPPSSL SHA-256 "  # then the digest, at the end of a checkpoint; torch's reader looks past it
_DIGEST_SIZE = 32
_CHUNK = 1 << 22


def write(path: Path, state: dict[str, Any]) -> None:
    """Writes ``state`` (tensors and plain data only) to ``path``: torch's own format, then a SHA-256 of it, atomically.

    Raises ``OSError``, as when the disk is full; an older file of that name is untouched.
    """
    write_atomically(path, lambda temporary: _write(temporary, {"format": FORMAT, **state}))


def _write(temporary: str, state: dict[str, Any]) -> None:
    with open(temporary, "wb") as file:
        stream = _Hashed(file)
        try:
            torch.save(state, stream)
        except RuntimeError:
            if stream.error is not None:  # torch's writer buries it
                raise stream.error from None
            raise
        file.write(_SEAL + stream.digest.digest())


class _Hashed:
    """A file that hashes what is written to it."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self.digest.update(data)
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def save(folder: Path, state: dict[str, Any], *, keep: int, good: Path | None = None) -> Path:
    """Writes ``folder/step_<state["step"]>.pt`` and removes all but the newest ``keep`` up to it, and never ``good``. Raises
    ``OSError`` when the disk is full; the checkpoints before it are untouched."""
    path = folder / f"step_{state['step']:09d}.pt"
    write(path, state)
    for old in [p for p in list_checkpoints(folder) if p.name <= path.name][:-keep]:
        if old != good:
            old.unlink(missing_ok=True)
    return path


def set_aside(folder: Path, step: int, suffix: str) -> list[Path]:
    """Renames the checkpoints of steps after ``step``, so that none of them is continued; returns what they were."""
    later = [path for path in list_checkpoints(folder) if path.name > f"step_{step:09d}.pt"]
    for path in later:
        path.replace(path.with_suffix(suffix))
    return later


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in ``folder``, oldest first."""
    return sorted(p for p in folder.glob("step_*.pt") if _NAME.fullmatch(p.name)) if folder.is_dir() else []


def newest(folder: Path, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint in ``folder`` that is whole, and its state; None without any. Damaged ones are named to ``warn`` and
    renamed to ``*.damaged``, so that they take no whole one's place among those that are kept.

    Raises ``ValueError`` when there are checkpoints and none can be read; none is renamed then.
    """
    damaged: list[Path] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            state = load(path)
        except ValueError as error:
            warn(f"warning: {error}")
            damaged.append(path)
            continue
        for bad in damaged:
            bad.rename(bad.with_suffix(".damaged"))
            warn(f"warning: going back from {bad.name} (now {bad.stem}.damaged) to {path.name}")
        return path, state
    if damaged:
        raise ValueError(f"resume: none of the {len(damaged)} checkpoints in {folder} can be read; --resume none starts afresh")
    return None


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU without running any code from it.

    Raises ``FileNotFoundError``, or ``ValueError`` naming the file when it is not one of ours or is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    _check_seal(path)
    if reason := other_kind(path):  # a seal can be forged: an archive that would fill the memory is not opened
        raise ValueError(f"resume: {path} is {reason}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several types for what it will not load
        raise ValueError(f"resume: {path} cannot be read as a checkpoint ({type(error).__name__}); give an older one") from error
    whole = isinstance(state, dict) and isinstance(state.get("step"), int) and isinstance(state.get("info", {}), dict)
    if not whole or state.get("format") != FORMAT:
        raise ValueError(f"resume: {path} is not a checkpoint of this trainer (format {FORMAT}); for weights use encoder.weights=")
    return state


def _check_seal(path: Path) -> None:
    """Raises ``ValueError`` unless the file ends with the SHA-256 of what is before it."""
    length = path.stat().st_size - len(_SEAL) - _DIGEST_SIZE
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for start in range(0, length, _CHUNK):
            digest.update(file.read(min(_CHUNK, length - start)))
        seal = file.read()
    if not seal.startswith(_SEAL):
        raise ValueError(
            f"resume: {path} is not a checkpoint of this trainer (format {FORMAT}), or was cut short; give an older one, or for "
            f"weights use encoder.weights="
        )
    if seal[len(_SEAL) :] != digest.digest():
        raise ValueError(f"resume: {path} is damaged: its content is not what its checksum says; give an older one")


class Saver:
    """Saves a run's checkpoints and weights in a thread while training goes on.

        with Saver(Path("runs/mine"), keep=2) as saver:
            saver.save(state, weights, metadata)      # waits for a copy of the tensors, not for the disk

    ``save`` copies every tensor to the host (pinned where it comes from a GPU) and returns; the thread waits for the copies and
    writes. One save is outstanding at most: the next one waits for it. The thread's error is raised by ``poll``, ``wait`` or the
    next ``save`` as an ``OSError`` that names the last good checkpoint. ``saved`` is the newest checkpoint, ``good`` the newest
    that nothing speaks against: it stays, however many follow it that are in doubt.

    out: run folder, None where there is none. writes: False in the processes that only ask for ``last_good``.
    """

    def __init__(self, out: Path | None, *, keep: int, writes: bool = True):
        self.out, self.keep, self.writes = out, keep, writes
        self.saved: Path | None = None
        self.good: Path | None = None
        self.good_step = -1
        self.doubt: str | None = None
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.buffers: dict[tuple, list[Tensor]] = {}

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif self.thread is not None:
            self.thread.join()  # what ends the run is more important than an error in here

    def save(
        self,
        state: dict[str, Any],
        weights: dict[str, Tensor] | None,
        metadata: dict[str, str] | None,
        *,
        doubt: str | None = None,
        best: dict[str, str] | None = None,
    ) -> None:
        """Begins to write ``checkpoints/step_<state["step"]>.pt``, then ``weights`` as ``weights.safetensors`` with ``metadata``
        and as ``best.safetensors`` with ``best``, each unless that is None; state and weights may be changed at once. doubt: what
        speaks against this state."""
        self.wait()
        if doubt and not self.doubt:
            say(f"step {state['step']}: {doubt}: the run may be diverging; {self.last_good()} stays the last good checkpoint")
        self.doubt = doubt
        about = {"doubt": doubt, "good": self.good and self.good.name, "good_step": self.good_step}
        copies, on_gpu = self._copy({"state": state | about, "weights": weights})
        copied = torch.cuda.current_stream().record_event() if on_gpu else None
        files = {RunFolder(self.out).weights: metadata, RunFolder(self.out).best: best} if weights is not None else {}
        thread = threading.Thread(target=self._write, args=(copies, files, copied), name="checkpoint")
        try:
            thread.start()
        except RuntimeError:  # a limit on threads: training waits for the disk then
            self._write(copies, files, copied)
        else:
            self.thread = thread

    def resume(self, path: Path, state: dict[str, Any]) -> None:
        """Goes on from the checkpoint at ``path`` with its ``state``."""
        self.saved, self.doubt = path, state.get("doubt")
        self.good, self.good_step = path, state["step"]
        if self.doubt:
            before = path.with_name(state["good"] or "none")
            self.good, self.good_step = before if before.is_file() else None, state["good_step"]

    def last_good(self) -> Path | str:
        """The newest checkpoint that nothing speaks against, for a message; ``none``. A process that does not write looks what is
        there."""
        if self.writes or self.out is None:
            return self.good or "none"
        return next(reversed(list_checkpoints(RunFolder(self.out).checkpoints)), "none")

    def set_aside(self) -> None:
        """Renames the checkpoints that are in doubt to ``*.suspect``: the run has turned out to be ruined, and the last good one is
        what is continued."""
        if self.writes and self.out is not None:
            for path in set_aside(RunFolder(self.out).checkpoints, self.good_step, ".suspect"):
                say(f"{path.name} was in doubt and was set aside (now {path.stem}.suspect)")

    def poll(self) -> None:
        """Raises the error of a save that has failed; does not wait."""
        if self.error is not None:
            self.wait()

    def wait(self) -> None:
        """Waits until the outstanding save is on the disk; raises its error."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def _write(self, copies: dict[str, Any], files: dict[Path, dict[str, str] | None], copied: torch.cuda.Event | None) -> None:
        state = copies["state"]
        try:
            if copied is not None:
                copied.synchronize()
            good = self.good if state["doubt"] else None
            self.saved = save(RunFolder(self.out).checkpoints, state, keep=self.keep, good=good)
            if state["doubt"] is None:
                self.good, self.good_step = self.saved, state["step"]
            for path, metadata in files.items():
                if metadata is not None:
                    save_weights(path, copies["weights"], metadata)
        except OSError as error:
            remedy = ""
            if error.errno in NO_ROOM:
                size = sum(t.nbytes for same in self.buffers.values() for t in same) / 2**20
                remedy = f"free some space (a checkpoint takes {size:.0f} MiB) or lower run.keep, "
            self.error = OSError(
                f"step {state['step']} could not be saved in {self.out} ({error}); last good checkpoint: {self.last_good()}; "
                f"{remedy}then run the same command: it continues there"
            )
        except BaseException as error:  # raised where the trainer looks
            self.error = error

    def _copy(self, tree: Any) -> tuple[Any, bool]:
        """``tree`` with its tensors copied to the host, each once, into the buffers of the save before; whether any is on a GPU."""
        free, self.buffers = self.buffers, {}
        copies: dict[tuple, Tensor] = {}

        def walk(node: Any) -> Any:
            if isinstance(node, dict):
                same = copy.copy(node)  # with what a module's state_dict remembers beside its items
                same.update((key, walk(value)) for key, value in node.items())
                return same
            if isinstance(node, (list, tuple)):
                return type(node)(map(walk, node))
            if not isinstance(node, Tensor):
                return node
            kind = (node.shape, node.stride(), node.dtype, node.device)
            place = (node.data_ptr(), *kind)
            if place not in copies:
                spare = free.get(kind)
                buffer = spare.pop() if spare else torch.empty_like(node, device="cpu", pin_memory=node.is_cuda)
                self.buffers.setdefault(kind, []).append(buffer)
                copies[place] = buffer.copy_(node.detach(), non_blocking=True)
            return copies[place]

        return walk(tree), any(key[-1].type == "cuda" for key in copies)


def rng_state(device: torch.device) -> dict[str, Any]:
    """The state of torch's generators, for ``load_rng_state``; those of the GPUs for a run that uses one (a run on the CPU leaves
    them alone, their memory too)."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if device.type == "cuda" else []}


def load_rng_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
