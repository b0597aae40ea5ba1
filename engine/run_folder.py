"""A run folder: where everything of a run lies, the records in it, and the lock that gives it one writer. Needs no torch."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.console import printable, say
from engine.files import write_text

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@dataclass(frozen=True)
class RunFolder:
    """The layout of the run folder ``path``; nothing is created by asking."""

    path: Path

    @property
    def config(self) -> Path:
        """The configuration with every value decided."""
        return self.path / "config.yaml"

    @property
    def weights(self) -> Path:
        """The inference network at the newest checkpoint."""
        return self.path / "weights.safetensors"

    @property
    def best(self) -> Path:
        """The inference network with the best validation measure, where ``eval.keep_best`` names one."""
        return self.path / "best.safetensors"

    @property
    def checkpoints(self) -> Path:
        """Folder of ``step_*.pt``: everything that training continues from."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One JSON record per line: start, train, eval, summary."""
        return self.path / "metrics.jsonl"

    @property
    def metrics_csv(self) -> Path:
        """The numbers of ``metrics`` as a flat table, where ``run.loggers`` names csv."""
        return self.path / "metrics.csv"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard events."""
        return self.path / "tensorboard"

    @property
    def wandb(self) -> Path:
        """Id, project and name of the run at Weights & Biases, where ``run.loggers`` names wandb."""
        return self.path / "wandb.json"

    @property
    def evaluation(self) -> Path:
        """Every measure with its protocol, as a JSON list."""
        return self.path / "evaluation.json"

    @property
    def classes(self) -> Path:
        """The names of the data set's classes by label, as a JSON list."""
        return self.path / "classes.json"

    @property
    def maps(self) -> Path:
        """Folder of attention maps over the epochs."""
        return self.path / "maps"

    @property
    def report(self) -> Path:
        """The HTML page."""
        return self.path / "report.html"

    @property
    def replay(self) -> Path:
        """Folder of bundles for ``python -m engine.replay``."""
        return self.path / "replay"

    @property
    def profile(self) -> Path:
        """Folder of the profiler's trace and table."""
        return self.path / "profile"

    @property
    def bad_files(self) -> Path:
        """Files that left the image lists, with the reason."""
        return self.path / "bad_files.txt"

    def is_empty(self) -> bool:
        """True where nothing lies there but the lock."""
        return not self.path.is_dir() or all(entry.name == _LOCK for entry in self.path.iterdir())

    def move_aside(self) -> None:
        """Renames a folder that is not empty to the first free ``NAME.<number>``. A lock that is held moves to the new folder."""
        if self.is_empty():
            return
        number = next(n for n in range(1, 10**6) if not self.path.with_name(f"{self.path.name}.{n}").exists())
        moved = self.path.with_name(f"{self.path.name}.{number}")
        self.path.rename(moved)
        (moved / _LOCK).unlink(missing_ok=True)
        if held := _held.get(_key(self.path)):
            held.acquire(self.path)
        say(f"{self.path} held an earlier run; it is now {moved}")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Within it, this process is the only one that writes into the folder, which is created.

        The lock is the operating system's (a POSIX record lock): it ends with this process however that ends, is not inherited by
        child processes, and holds on file systems that several machines share. Where there is none (Windows, some file systems)
        this is said and nothing is locked. Entering again in the same thread is free.

        Raises ``RunFolderInUse`` naming the process that holds it.
        """
        key = _key(self.path)
        if (held := _held.get(key)) is not None:
            if held.thread != threading.get_ident():
                raise RunFolderInUse(f"{self.path}: another thread of this process trains here; give another run folder")
            yield
            return
        held = _held[key] = _Lock()
        try:
            held.acquire(self.path)
            yield
        finally:
            held.release()
            del _held[key]


class RunFolderInUse(OSError):
    """Another process writes into the run folder."""


_LOCK = ".lock"


class _Lock:
    """A POSIX record lock on ``.lock``, in which stands who holds it."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.file: int | None = None
        self.path, self.made = Path(), False

    def acquire(self, folder: Path) -> None:
        """Takes the lock of ``folder``, which is created, and lets go of the one before. Raises ``RunFolderInUse``."""
        self.release()
        self.path, self.made = folder / _LOCK, not folder.is_dir()
        if fcntl is None:
            folder.mkdir(parents=True, exist_ok=True)
            say(f"{folder}: this system gives no POSIX locks; start only one process that trains here")
            return
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)  # a link's target is somebody's
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                holder = printable(os.read(file, 1000).decode(errors="replace").strip()) or "unknown"
                os.close(file)
                raise RunFolderInUse(
                    f"{folder}: another process ({holder}) trains here; wait for it, end it, or give another run folder (--out DIR)"
                ) from None
            except OSError as error:
                os.close(file)
                say(f"{folder}: this file system gives no locks ({error}); start only one process that trains here")
                return
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(file), self.path.stat()):
                    break
            os.close(file)  # the folder was renamed or removed between opening and locking
        self.file = file
        os.ftruncate(file, 0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        os.write(file, f"pid {os.getpid()} on {socket.gethostname()}, since {since}".encode())

    def release(self) -> None:
        """Lets go, and removes a folder that it made and nothing was written into."""
        if self.file is None:
            return
        if self.made and RunFolder(self.path.parent).is_empty():
            with contextlib.suppress(OSError):
                self.path.unlink()
                self.path.parent.rmdir()
        else:
            os.ftruncate(self.file, 0)
        os.close(self.file)
        self.file = None


_held: dict[tuple[int, str], _Lock] = {}


def _key(path: Path) -> tuple[int, str]:
    """The folder in this process: a forked child holds nothing."""
    return os.getpid(), str(path.absolute())


def append_metrics(out: Path, record: dict[str, Any]) -> None:
    """Appends one JSON line to ``out``/metrics.jsonl."""
    path = RunFolder(out).metrics
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say which file it was
        raise


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The records of ``out``/metrics.jsonl; a line cut off by a kill, or otherwise damaged, is left out."""
    path = RunFolder(out).metrics
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step", 0), int):
            records.append(record)
    return records


def rewind_metrics(out: Path, step: int) -> None:
    """Drops the records after ``step``, so that a resumed run's log reads as one run."""
    records = [r for r in read_metrics(out) if r.get("step", 0) <= step]
    text = "".join(json.dumps(r) + "\n" for r in records)
    write_text(RunFolder(out).metrics, text)


def append_data(out: Path, step: int, root: str, lists: dict[str, str]) -> None:
    """Records at ``step`` which images the run has, where it has not yet: the folder as seen from the run folder, and the identity
    of each list by its split."""
    found = {"root": os.path.relpath(root, out.resolve()), "lists": lists}
    if read_data(out) != found:
        append_metrics(out, {"kind": "data", "step": step} | found)


def read_data(out: Path) -> dict[str, Any] | None:
    """What ``append_data`` recorded last; None for a run of an earlier version."""
    records = [r for r in read_metrics(out) if r.get("kind") == "data" and isinstance(r.get("lists"), dict)]
    return {name: records[-1].get(name) for name in ("root", "lists")} if records else None


def write_classes(out: Path, names: Sequence[str]) -> None:
    """Keeps the class names of the run's data, by label, where they are known without it; nothing for data without classes."""
    if names:
        write_text(RunFolder(out).classes, json.dumps(list(names), indent=0) + "\n")


def read_classes(out: Path) -> tuple[str, ...]:
    """What ``write_classes`` kept; empty for data without classes and for a run of an earlier version. Raises ``ValueError`` naming
    a file that is damaged."""
    path = RunFolder(out).classes
    if not path.is_file():
        return ()
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it: only the names of the classes are lost") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} is not a list of names; remove it: only the names of the classes are lost")
    return tuple(names)


def find_root(out: Path, root: str | None) -> str | None:
    """The folder of the run's data set: ``root`` as its config says or, where that is gone, the folder that lies as that one lay
    seen from the run. ``root`` where neither is there."""
    if root is None or Path(root).is_dir():
        return root
    run = out.resolve()
    lay = (read_data(out) or {}).get("root")
    places = [run / lay] if isinstance(lay, str) else []
    if not Path(root).is_absolute():  # as an earlier version wrote it: as typed, in a folder above the run as a rule
        places += [parent / root for parent in run.parents]
    for place in places:
        if place.is_dir():
            say(f"data.root={root} is not there; {os.path.normpath(place)} is taken, which lies as it did seen from the run")
            return os.path.normpath(place)
    return root


def commit() -> str | None:
    """The commit of this source tree, with ``-dirty`` where files differ from it; None where it is no git clone."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # an installed package inside somebody else's repository
        return None
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=root, capture_output=True, text=True, timeout=10, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
