"""The training loop: batches in, steps, log lines, checkpoints; resumes to the bit and stops on a signal without losing a step."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine import checkpoint, optim, precision
from engine.data import Loader
from engine.log import RunLog, rewind, say
from engine.profiling import Profile
from engine.step import Step, choose
from ppssl.method import Batch, Method, Output


class Summary(NamedTuple):
    """What a finished (or continued) ``fit`` did, in seconds and images."""

    steps: int
    seconds: float
    compile_seconds: float
    images_per_s: float
    data_wait: float
    checkpoint_seconds: float
    hook_seconds: float


class Stopped(Exception):
    """A signal asked to stop and everything is saved; ``code`` is the exit code: 130 for Ctrl-C, 75 ("saved, run me again") for
    SIGTERM and SIGUSR1."""

    def __init__(self, number: int, saved: Path | None):
        self.code = 130 if number == signal.SIGINT else 75
        where = f"saved {saved}" if saved else "nothing to save to (no run folder)"
        super().__init__(f"stopped by {signal.Signals(number).name}, {where}")


class Trainer:
    """Trains ``method`` on ``loader``.

        Trainer(method, loader, epochs=100, amp="bf16", out="runs/mine").fit()

    method: a ``ppssl.Method``; loader: anything with ``steps_per_epoch`` and ``batches(start_step, stop_step)`` yielding
    ``ppssl.Batch``; teacher: [N, E] embeddings by image index for methods with ``needs_teacher_embeddings``; hooks: called with
    the trainer after every epoch; out: run folder, None keeps nothing; profile: steady steps to
    profile into out/profile; info: plain data stored in every checkpoint.
    ``fit`` continues where ``resume`` has put it.
    """

    def __init__(
        self,
        method: Method,
        loader: Loader,
        *,
        epochs: int,
        lr: float = 0.03,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        schedule: str = "cosine",
        optimizer: str = "auto",
        ema_decay: float = 0.999,
        amp: str | None = None,
        compile: str = "auto",
        cuda_graph: str = "auto",
        device: torch.device | str | None = None,
        teacher: Tensor | None = None,
        out: str | Path | None = None,
        log_every: int = 10,
        save_every_steps: int | None = None,
        keep: int = 2,
        profile: int = 0,
        info: dict[str, Any] | None = None,
        hooks: Sequence[Callable[[Trainer], None]] = (),
    ):
        if method.needs_teacher_embeddings and teacher is None:
            raise ValueError("this method needs teacher embeddings; pass teacher=[N, E]")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.method = method.to(self.device, memory_format=torch.channels_last).train()
        self.loader, self.teacher, self.hooks = loader, teacher, list(hooks)
        self.epochs, self.total_steps = epochs, epochs * loader.steps_per_epoch
        self.precision = precision.resolve(amp, self.device)
        self.execution = choose(compile, cuda_graph, self.precision)
        frozen = {id(p) for p in method.ema_pairs()[1]}
        trained = [p for p in method.parameters() if p.requires_grad and id(p) not in frozen]
        self.step = Step(
            method,
            optim.sgd(trained, lr=lr, momentum=momentum, weight_decay=weight_decay, backend=optimizer),
            lr=lambda step: optim.learning_rate(step, self.total_steps, peak=lr, schedule=schedule),
            decay=ema_decay,
            precision=self.precision,
            total_steps=self.total_steps,
            compile=self.execution.compile,
            graph=self.execution.graph,
        )
        self.out = None if out is None else Path(out)
        self.log_every, self.keep, self.info = log_every, keep, info or {}
        self.profile = profile
        self.save_every = save_every_steps or loader.steps_per_epoch
        self.saved: Path | None = None
        self.log: RunLog | None = None

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.step.step // self.loader.steps_per_epoch

    def fit(self) -> Summary:
        """Trains to the end. Raises ``Stopped`` after a signal, ``FloatingPointError`` on a non-finite loss, naming step, terms
        and the last good checkpoint."""
        step, began = self.step, self.step.step
        batch_size, compiling, saving, hooking, started = 0, 0.0, 0.0, 0.0, time.perf_counter()
        self.log = RunLog(self.out, total_steps=self.total_steps, start_step=began, description=type(self.method).__name__)
        profile = Profile((self.out or Path()) / "profile", steps=self.profile, device=self.device)
        with _Signals() as asked, self.log as log, profile:
            for batch in log.watch(self.loader.batches(began, self.total_steps)):
                lr = step.lr(step.step)
                batch = self.with_teacher(batch)
                if step.step == began and self.execution.compile != "off":
                    output, compiling = self.first_step(batch)
                else:
                    output = step(batch)
                hooking += self.timed(profile.step)
                log.add(output, images=len(batch.index))
                batch_size = len(batch.index)
                last = step.step == self.total_steps
                epoch_ends = step.step % self.loader.steps_per_epoch == 0
                if step.step % self.log_every == 0 or last or asked.number:
                    self.check()
                    log.line(step=step.step, epoch=self.epoch, lr=lr)
                if step.step % self.save_every == 0 or last or asked.number:
                    saving += self.timed(self.save)
                if epoch_ends and self.hooks and not asked.number:
                    hooking += self.timed(*(lambda hook=hook: hook(self) for hook in self.hooks))
                if asked.number and not last:
                    raise Stopped(asked.number, self.saved)
        seconds = time.perf_counter() - started
        images = (step.step - began) * batch_size
        training = max(seconds - compiling - saving - hooking, 1e-9)
        return Summary(step.step - began, seconds, compiling, images / training, log.waited_total / training, saving, hooking)

    def first_step(self, batch: Batch) -> tuple[Output, float]:
        """The step that compiles: shown as such, its seconds left out of the speed."""
        say(f"compiling ({self.execution.compile}): minutes with a cold cache, seconds with a warm one")
        started = time.perf_counter()
        output = self.step(batch)
        float(output.total)  # waits for the device
        seconds = time.perf_counter() - started
        say(f"compiled in {seconds:.0f} s")
        self.log.leave_out(seconds)
        return output, seconds

    def timed(self, *calls: Callable[[], None]) -> float:
        """Makes ``calls``, which are not training, and returns their seconds; the log leaves them out of the speed."""
        started = time.perf_counter()
        for call in calls:
            call()
        seconds = time.perf_counter() - started
        self.log.leave_out(seconds)
        return seconds

    def with_teacher(self, batch: Batch) -> Batch:
        """The batch with its images' cached teacher embeddings, when the method wants them."""
        if not self.method.needs_teacher_embeddings:
            return batch
        return batch._replace(teacher=self.teacher[batch.index])

    def check(self) -> None:
        """Raises ``FloatingPointError`` when a step since the last check was not finite."""
        try:
            self.step.raise_if_bad()
        except FloatingPointError as error:
            good = self.saved or "none"
            raise FloatingPointError(f"{error}; last good checkpoint: {good}; a lower optim.lr or --amp off may help") from None

    def save(self) -> None:
        """Writes a checkpoint and the network's weights into the run folder, after checking that they are finite."""
        if self.out is None:
            return
        self.check()
        state = self.step.state_dict() | {
            "epoch": self.epoch,
            "method": self.method.state_dict(),
            "rng": checkpoint.rng_state(),
            "info": self.info,
        }
        self.saved = checkpoint.save(self.out / "checkpoints", state, keep=self.keep)
        checkpoint.save_weights(
            self.out / "weights.safetensors", self.method.network.weights(), {"step": str(self.step.step), "epoch": str(self.epoch)}
        )

    def resume(self, path: Path, state: dict[str, Any] | None = None) -> None:
        """Continues the checkpoint at ``path`` (``state`` when it is already read). Raises ``ValueError`` when it belongs to
        another method or network."""
        state = checkpoint.load(path) if state is None else state
        try:
            self.method.load_state_dict(state["method"])
            self.step.load_state_dict(state)
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(f"resume: {path} is of another method or network than this config's: {error}") from error
        checkpoint.load_rng_state(state["rng"])
        self.saved = path
        if self.out is not None:
            rewind(self.out, self.step.step)
        say(f"continuing {path} at step {self.step.step} of {self.total_steps}")


class _Signals:
    """While it is open, the first SIGINT, SIGTERM or SIGUSR1 is only noted in ``number``; a second one of SIGINT or SIGTERM ends
    the process at once, which spoils nothing: files are replaced whole."""

    def __init__(self) -> None:
        self.number = 0
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            try:
                self.previous[number] = signal.signal(number, self.note)
            except ValueError:  # not in the main thread: whoever runs us there handles signals
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def note(self, number: int, _frame: object) -> None:
        if self.number and number != signal.SIGUSR1:
            raise SystemExit(130 if number == signal.SIGINT else 75)
        self.number = number
        say(f"{signal.Signals(number).name}: finishing this step, then saving; once more stops at once")
