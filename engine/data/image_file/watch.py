"""The check of a file under a watch: whatever it does to its decoder, the check goes on.

An ordinary photograph is decoded in the calling thread: its markers bound what that takes. Every other file goes to a process that
the thread keeps for the purpose, with a limit of processor time and memory; one that crashes, hangs or takes too much is replaced.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import NamedTuple

from PIL import AvifImagePlugin

from engine.data.image_file.levels import emptiness
from engine.data.image_file.read import MAX_MEMORY, Picture, decode, ordinary, read_bytes

SECONDS = 10
"""Of processor time that decoding one file may take."""
_READY = b"ready\n"
_WAIT = 120
"""Seconds after which a file system is taken to hang."""


class Verdict(NamedTuple):
    """What reading one file came to."""

    height: int = 0
    width: int = 0
    plain: bool = False
    note: str = ""
    """As in ``Picture``."""
    empty: str = ""
    """Why there is nothing to see in it: nearly black, or of one color."""
    reason: str | None = None
    """Why it cannot be used; None if it can."""
    lasting: bool = True
    """The content's own fault: another try would say the same."""


def _unwatched(path: Path | str) -> Verdict:
    try:
        return _judged(read_bytes(path))
    except (OSError, ValueError, MemoryError) as error:
        return _refused(error)


def _judged(data: bytes) -> Verdict:
    image, plain, note = decode(data)
    return Verdict(image.height, image.width, plain, note, emptiness(image))


def _refused(error: OSError | ValueError | MemoryError) -> Verdict:
    if isinstance(error, MemoryError):
        return Verdict(reason="cannot be read now (not enough memory)", lasting=False)
    if isinstance(error, OSError):
        return Verdict(reason=f"cannot be read now ({error.strerror or error or type(error).__name__})", lasting=False)
    return Verdict(reason=str(error) or type(error).__name__)


class Watch:
    """Judges files from any number of threads; processes are started when they are first needed and end with the context."""

    def __init__(self) -> None:
        self._idle: SimpleQueue[_Child] = SimpleQueue()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with suppress(Empty):
            while True:
                self._idle.get_nowait().end()

    def judge(self, path: Path) -> Verdict:
        """The verdict on one file; raises nothing for whatever is wrong with it."""
        try:
            data = read_bytes(path)
            if ordinary(data):
                return _judged(data)
        except (OSError, ValueError, MemoryError) as error:
            return _refused(error)
        del data
        try:
            child = self._next()
        except OSError:  # no memory, handles or processes left for one: better unwatched than not read
            return _unwatched(path)
        verdict = child.judge(path)
        if child.alive:
            self._idle.put(child)
        return verdict

    def read(self, path: Path) -> Picture:
        """The picture of one file; one that is not ordinary is decoded here only once a process with limits could. Raises as
        ``read_image`` does."""
        data = read_bytes(path)
        if not ordinary(data) and (reason := self.judge(path).reason) is not None:
            raise ValueError(reason)
        return decode(data)

    def _next(self) -> _Child:
        try:
            return self._idle.get_nowait()
        except Empty:
            return _Child()


class _Child:
    """A process that judges one file after the other."""

    def __init__(self) -> None:
        """Raises OSError where no process can be had."""
        root = str(Path(__file__).parents[3])
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # each thread takes address space
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from {__name__} import serve; serve({SECONDS})"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # decoders written in C print what they find
            env=environment,
        )
        self.alive = True
        if self._process.stdout.readline() != _READY:
            self.end()
            raise OSError(f"the process for images ended with code {self._process.returncode}")

    def judge(self, path: Path) -> Verdict:
        stalled = threading.Timer(_WAIT, self._process.kill)
        stalled.start()
        try:
            self._process.stdin.write(json.dumps(str(path)).encode() + b"\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except OSError:  # it died before it was asked
            answer = b""
        finally:
            hung = not stalled.is_alive()
            stalled.cancel()
        if answer.endswith(b"\n"):
            return Verdict(*json.loads(answer))
        self.end()
        return _died(self._process.returncode, hung)

    def end(self) -> None:
        self.alive = False
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                pipe.close()
        try:
            self._process.wait(1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _died(code: int, hung: bool) -> Verdict:
    """The verdict on a file whose process ended over it."""
    if hung:
        return Verdict(reason=f"could not be read within {_WAIT} s; does its disk answer?", lasting=False)
    if code == -getattr(signal, "SIGPROF", 0):
        return Verdict(reason=f"takes more than {SECONDS} s to decode; save it again in another format")
    if code in (-signal.SIGSEGV, -signal.SIGABRT, -getattr(signal, "SIGBUS", 0), -signal.SIGFPE, -signal.SIGILL):
        return Verdict(reason=f"crashes the decoder ({signal.Signals(-code).name}); save it again in another format")
    by = f" by {signal.Signals(-code).name}" if -code in set(signal.Signals) else f" with code {code}"
    return Verdict(reason=f"the process that decoded it was ended{by}; was there too little memory?", lasting=False)


def serve(seconds: float) -> None:
    """The child: a path a line on stdin, its verdict on stdout, until stdin ends; ``seconds`` of processor time a file."""
    for name, action in (("SIGINT", signal.SIG_IGN), ("SIGUSR1", signal.SIG_IGN), ("SIGPROF", signal.SIG_DFL)):
        if hasattr(signal, name):  # the first two reach every process of a terminal and of a job; its parent decides
            signal.signal(getattr(signal, name), action)
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # a process a core reads images already
    _limit_memory()
    timer = signal.setitimer if hasattr(signal, "setitimer") else lambda *_: None  # where not, only the parent's clock watches
    sys.stdout.buffer.write(_READY)
    sys.stdout.buffer.flush()
    for line in sys.stdin.buffer:
        timer(getattr(signal, "ITIMER_PROF", 0), seconds)  # its signal ends the process
        verdict = _unwatched(json.loads(line))
        timer(getattr(signal, "ITIMER_PROF", 0), 0)
        sys.stdout.buffer.write(json.dumps(verdict).encode() + b"\n")
        sys.stdout.buffer.flush()


def _limit_memory() -> None:
    """What the process has now, and what a file may take, twice: once as it is encoded."""
    try:
        import resource  # POSIX

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        bound = pages * resource.getpagesize() + 2 * MAX_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (bound, resource.getrlimit(resource.RLIMIT_AS)[1]))
    except (ImportError, OSError, ValueError):  # no such limit here, or a stricter one
        return
