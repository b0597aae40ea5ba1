"""The training loop: steps, log lines, checkpoints. It resumes bit-identically and stops on a signal without losing a step."""

from __future__ import annotations

import os
import signal
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.config import Config, OptimConfig, RunConfig, flatten, to_yaml
from engine.console import console, say
from engine.data import Loader
from engine.errors import BrokenFile
from engine.files import write_text
from engine.run_folder import RunFolder, rewind_metrics
from engine.training import checkpoint, precision
from engine.training.distributed import ALONE, World
from engine.training.log import RunLog
from engine.training.optim import learning_rate, sgd
from engine.training.profiling import Profile
from engine.training.resume import find_checkpoint
from engine.training.step import Step, choose
from ppssl.method import METHODS, Batch, Method, Output
from ppssl.ops import gather


class Summary(NamedTuple):
    """What a finished (or continued) ``fit`` did, in seconds and images."""

    steps: int
    seconds: float
    compile_seconds: float
    images_per_s: float
    data_wait: float
    checkpoint_seconds: float
    hook_seconds: float
    collapsed: bool = False
    """All images gave nearly the same feature at the end."""


class Stopped(Exception):
    """A signal asked to stop and everything is saved; ``code`` is the exit code: 130 for Ctrl-C, 75 ("saved, run me again") for
    SIGTERM and SIGUSR1."""

    def __init__(self, number: int, saved: Path | None):
        self.code = _exit_code(number)
        where = f"saved {saved}" if saved else "there was nothing to save"
        super().__init__(f"stopped by {signal.Signals(number).name}, {where}")


class Trainer:
    """Trains ``method`` on ``loader``.

        Trainer(method, loader, epochs=100, amp="bf16", out="runs/mine").fit()

    method: a ``ppssl.Method``. loader: anything with ``steps_per_epoch`` and ``batches(start_step, stop_step)`` yielding
    ``ppssl.Batch``. optim, run: the sections ``optim`` and ``run`` of a config. teacher: [N, E] embeddings by image index, for
    methods with ``needs_teacher_embeddings``. hooks: called with the trainer after every epoch. profile: steady steps to profile.
    out: run folder, None keeps nothing. One process at a time trains there. A run that is already in it is continued where it is
    this one (``resume="auto"``) and moved aside with ``resume="none"``; a run with other settings is refused. ``engine.load(out)``
    gives the trained network.
    config: of a run that is built from one; its caller has made ``out`` ready. world: the processes that share each batch (the
    method is distributed, the loader gives this one's part of it), of which the first has ``out``.
    """

    def __init__(
        self,
        method: Method,
        loader: Loader,
        *,
        epochs: int,
        optim: OptimConfig | None = None,
        run: RunConfig | None = None,
        ema_decay: float = 0.999,
        amp: str | None = None,
        device: torch.device | str | None = None,
        out: str | Path | None = None,
        teacher: Tensor | None = None,
        hooks: Sequence[Callable[[Trainer], None]] = (),
        resume: str = "auto",
        config: Config | None = None,
        profile: int = 0,
        world: World = ALONE,
    ):
        optim, run = optim or OptimConfig(), run or RunConfig()
        if method.needs_teacher_embeddings and teacher is None:
            raise ValueError("this method needs teacher embeddings; pass teacher=[N, E]")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.method = method.to(self.device, memory_format=torch.channels_last).train()
        self.loader, self.teacher, self.hooks, self.world = loader, teacher, list(hooks), world
        self.epochs, self.total_steps = epochs, epochs * loader.steps_per_epoch
        self.precision = precision.resolve(amp, self.device)
        self.execution = choose(run.compile, run.cuda_graph, self.precision, world.size)
        self.step = Step(
            method,
            sgd(
                method.trained_parameters(),
                lr=optim.lr,
                momentum=optim.momentum,
                weight_decay=optim.weight_decay,
                backend=optim.backend,
            ),
            lr=lambda step: learning_rate(step, self.total_steps, peak=optim.lr, schedule=optim.schedule),
            decay=ema_decay,
            precision=self.precision,
            total_steps=self.total_steps,
            compile=self.execution.compile,
            graph=self.execution.graph,
            max_bad_steps=run.max_bad_steps,
        )
        self.out = None if out is None else Path(out)
        self.resume_from, self.config = resume, config
        self.settings = flatten(config) if config else known_settings(method, self, optim, run, ema_decay, amp)
        self.log_every = run.log_every
        self.profile = profile
        self.save_every = run.save_every_steps or loader.steps_per_epoch
        self.saver = checkpoint.Saver(self.out or Path(), keep=run.keep)
        self.saved_step = self.hooked_epoch = -1
        self.folder_is_ready = self.out is None or config is not None  # whoever has a config has made the folder ready
        self.log: RunLog | None = None

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.step.steps_done // self.loader.steps_per_epoch

    def fit(self) -> Summary:
        """Trains to the end. Raises ``Stopped`` after a signal, ``FloatingPointError`` after ``max_bad_steps`` steps in a row whose
        loss or gradient was not finite, ``BrokenFile`` after a save when an image can no longer be read, ``OSError`` when nothing
        can be saved; each names the last good checkpoint; ``RunFolderInUse`` where another process trains in ``out``."""
        torch.backends.cudnn.benchmark = True  # every step has the same shapes
        with RunFolder(self.out).locked() if self.out is not None else nullcontext():
            self.prepare_folder()
            return self._fit()

    def prepare_folder(self) -> None:
        """Makes ``out`` the folder of this run: continues the run that is there, or moves it aside, as ``resume`` says.

        Raises ``ConfigError`` where a setting that must not change differs from the run that is there.
        """
        if self.folder_is_ready:
            return
        self.folder_is_ready = True
        found = find_checkpoint(self.resume_from, self.out, self.settings)
        if found is not None:
            self.resume(*found)
        else:
            RunFolder(self.out).move_aside()

    def write_settings(self, batch: Batch) -> None:
        """Writes config.yaml of a run that was built in code: what is known of it, with the batch's size and side."""
        self.settings |= {"batch_size": len(batch.index), "data.image_size": batch.x_q.shape[-1]}
        text = to_yaml(self.settings)
        write_text(RunFolder(self.out).config, text)

    def _fit(self) -> Summary:
        step, began = self.step, self.step.steps_done
        batch_size, compiling, saving, hooking, started = 0, 0.0, 0.0, 0.0, time.perf_counter()
        self.log = RunLog(self.out, total_steps=self.total_steps, start_step=began, description=type(self.method).__name__)
        profile = Profile(RunFolder(self.out or Path()).profile, steps=self.profile, device=self.device)
        asked = _Signals()
        signals = _handlers(asked, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        with signals, self.log as log, profile, self.saver, self.saved_when_broken():
            hooking += self.timed(self.run_hooks)  # a run that was stopped between an epoch's last step and its hooks
            for batch in log.watch(self.loader.batches(began, self.total_steps)):
                lr = step.lr(step.steps_done)
                batch = self.with_teacher(batch)
                if step.steps_done == began and self.out is not None and self.config is None:
                    self.write_settings(batch)
                if step.steps_done == began and self.execution.compile != "off":
                    output, compiling = self.first_step(batch)
                else:
                    output = step(batch)
                hooking += self.timed(profile.step)
                batch_size = len(batch.index) * self.world.size
                log.add(output, images=batch_size)
                self.saver.poll()
                stop = self.world.vote(asked.number)
                last = step.steps_done == self.total_steps
                if step.steps_done % self.log_every == 0 or last or stop:
                    self.check()
                    self.write_line(lr)
                if not stop:
                    hooking += self.timed(self.run_hooks)
                if step.steps_done % self.save_every == 0 or last or stop:
                    saving += self.timed(self.save)
                if stop and not last:
                    saving += self.timed(self.saver.wait)
                    raise Stopped(stop, self.saver.saved)
            saving += self.timed(self.saver.wait)
        seconds = time.perf_counter() - started
        images = (step.steps_done - began) * batch_size
        training = max(seconds - compiling - saving - hooking, 1e-9)
        waited = log.waited_total / training
        return Summary(step.steps_done - began, seconds, compiling, images / training, waited, saving, hooking, log.collapsed)

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

    def write_line(self, lr: float) -> None:
        """The due log line. Raises ``OSError`` naming the last good checkpoint when it cannot be written."""
        try:
            self.log.line(step=self.step.steps_done, epoch=self.epoch, lr=lr)
        except OSError as error:
            self.saver.wait()
            raise OSError(
                f"the log of step {self.step.steps_done} could not be written in {self.out} ({error}); last good checkpoint: "
                f"{self.saver.saved or 'none'}; make room, then run the same command: it continues there"
            ) from error

    def run_hooks(self) -> None:
        """Calls the hooks where an epoch has just ended, once per epoch. Before the save, which remembers it: nothing that they
        write is lost when the run dies."""
        if self.step.steps_done % self.loader.steps_per_epoch == 0 and self.epoch > max(0, self.hooked_epoch):
            for hook in self.hooks:
                hook(self)
            self.hooked_epoch = self.epoch

    @contextmanager
    def saved_when_broken(self) -> Iterator[None]:
        """When an image can no longer be read, by the loader or by a hook, what was learned until then is saved first. Not with
        several processes: the others wait elsewhere, and a state that is held in parts needs them all."""
        try:
            yield
        except BrokenFile as error:
            if self.world.size == 1:
                self.save()
            self.saver.wait()
            raise BrokenFile(f"{error}; last good checkpoint: {self.saver.saved or 'none'}") from None

    def with_teacher(self, batch: Batch) -> Batch:
        """The batch with its images' cached teacher embeddings, when the method wants them."""
        if not self.method.needs_teacher_embeddings:
            return batch
        return batch._replace(teacher=self.teacher[batch.index])

    def check(self) -> None:
        """Raises ``FloatingPointError`` after a streak of bad steps, having written what ``python -m engine.replay`` needs to run
        the first of them again."""
        streak = self.step.guard.streak()
        if streak is None:
            return
        self.saver.wait()
        state, replay = self.state(), "no run folder keeps it for a replay"
        again = {"index": gather(streak.index, self.method.group), "terms": streak.terms}
        if self.out is not None:
            bundle = RunFolder(self.out).replay / f"step_{streak.step:09d}.pt"
            replay = f"to run that step again: python -m engine.replay {bundle}"
            try:
                checkpoint.write(bundle, state | {"step": streak.step, "replay": again})
            except OSError as error:  # it must not hide why the run ends
                replay = f"{bundle} for a replay could not be written ({error})"
        terms = ", ".join(f"{name} {value:.6g}" for name, value in streak.terms.items())
        raise FloatingPointError(
            f"step {streak.step}: the loss or its gradient is not finite ({terms}), the first of {self.step.guard.patience} steps "
            f"in a row (run.max_bad_steps); last good checkpoint: {self.saver.saved or 'none'}; {replay}; "
            f"a lower optim.lr{' or amp=null (float32)' if self.precision.dtype else ''} may help"
        )

    def state(self) -> dict[str, Any]:
        """Everything a checkpoint restores."""
        return self.step.state_dict() | {
            "epoch": self.epoch,
            "hooked_epoch": self.hooked_epoch,
            "method": self.method.state_dict(),
            "rng": checkpoint.rng_state(),
            "info": {"config": to_yaml(self.config)} if self.config else {"settings": self.settings},
        }

    def save(self) -> None:
        """Begins to write a checkpoint and the network's weights into the run folder, in the background; their numbers are finite,
        since a step that is not changes nothing. All processes call it: they hold parts of the state, one writes it."""
        if (self.out is None and self.world.size == 1) or self.saved_step == self.step.steps_done:
            return
        self.check()
        state = self.state()
        self.saved_step = self.step.steps_done
        if self.out is not None:
            metadata = {"step": str(self.step.steps_done), "epoch": str(self.epoch)}
            self.saver.save(state, self.method.network.weights(), metadata)

    def resume(self, path: Path, state: dict[str, Any] | None = None) -> None:
        """Continues the checkpoint at ``path`` (``state`` when it is already read). Raises ``ValueError`` when it belongs to
        another method or network."""
        self.folder_is_ready = True
        state = checkpoint.load(path) if state is None else state
        try:
            self.method.load_state_dict(state["method"])
            self.step.load_state_dict(state)
            checkpoint.load_rng_state(state["rng"])
            self.hooked_epoch = state["hooked_epoch"]
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = textwrap.shorten(str(error), 300)  # torch lists every name
            raise ValueError(f"resume: {path} is of another method or network than this config's: {reason}") from error
        self.saver.saved = path
        if self.out is not None:
            rewind_metrics(self.out, self.step.steps_done)
        say(f"continuing {path} at step {self.step.steps_done} of {self.total_steps}")


def known_settings(
    method: Method, trainer: Trainer, optim: OptimConfig, run: RunConfig, ema_decay: float, amp: str | None
) -> dict[str, Any]:
    """{dotted key: value} of a run that was built in code, as far as it can be told: enough to load its network again where the
    method is registered, and to refuse another run's folder."""
    sections = {"optim": optim, "run": run}
    known = {"epochs": trainer.epochs, "amp": amp, "ema.decay": ema_decay}
    known |= {
        f"{name}.{field.name}": getattr(section, field.name) for name, section in sections.items() for field in fields(section)
    }
    known["method.name"] = METHODS.name_of(type(method)) or type(method).__name__
    network = method.network if type(method).network is not Method.network else None
    if network is not None:
        known["encoder.arch"] = getattr(network.trunk, "arch", type(network.trunk).__name__)
        known["encoder.weights"] = "none"
    if network is not None and network.mask is not None:
        known |= {"method.minmax": network.mask.minmax, "method.maxout_width": network.mask.conv.out_channels}
    return known


@contextmanager
def _handlers(handler: Callable[[int, Any], None], *numbers: int) -> Iterator[None]:
    """``handler`` in place of what the process does on these signals; nothing outside of the main thread, which cannot set any:
    whoever runs us there handles signals."""
    main = threading.current_thread() is threading.main_thread()
    previous = [(number, signal.signal(number, handler)) for number in numbers] if main else []
    try:
        yield
    finally:
        for number, before in previous:
            signal.signal(number, before)


def signals_stop_at_once() -> AbstractContextManager[None]:
    """SIGTERM and SIGUSR1 raise ``Stopped``: for all that is not training, where nothing is to be finished or saved."""

    def stop(number: int, _frame: object) -> None:
        raise Stopped(number, None)

    return _handlers(stop, signal.SIGTERM, signal.SIGUSR1)


class _Signals:
    """Notes the first SIGINT, SIGTERM or SIGUSR1 in ``number``; a second one of SIGINT or SIGTERM ends the process at once, which
    spoils nothing: files are replaced whole."""

    number = 0

    def __call__(self, number: int, _frame: object) -> None:
        if self.number and number != signal.SIGUSR1:
            console.show_cursor()
            os._exit(_exit_code(number))  # an exception would wait for the thread that saves, and for the loader
        self.number = number
        say(f"{signal.Signals(number).name}: finishing this step, then saving; once more stops at once")


def _exit_code(number: int) -> int:
    return 130 if number == signal.SIGINT else 75
