"""The training loop: steps, log lines, checkpoints. It resumes bit-identically and stops on a signal without losing a step."""

from __future__ import annotations

import re
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.config import Config, OptimConfig, RunConfig, flatten, to_yaml
from engine.console import say
from engine.data import ImageList, Loader, keep_freed_memory
from engine.errors import BrokenFile, WorkerDied
from engine.files import write_text
from engine.run_folder import RunFolder, write_classes
from engine.training import checkpoint, precision, signals
from engine.training.best import Best
from engine.training.distributed import ALONE, World, choose_device
from engine.training.guard import Health
from engine.training.log import Records, RunLog, Summary
from engine.training.optim import build, learning_rate, warmup_steps
from engine.training.profiling import Profile
from engine.training.resume import (
    Found,
    continue_in,
    find_checkpoint,
    known_settings,
    listing,
    refuse_other_run,
    say_changes,
)
from engine.training.step import Step, choose
from ppssl.method import Batch, Method, Output
from ppssl.momentum import KeyQueue
from ppssl.ops import gather


class Trainer:
    """Trains ``method`` on ``loader``.

        Trainer(method, loader, epochs=100, amp="bf16", out="runs/mine").fit()

    method: a ``ppssl.Method``. ema_decay, ema_schedule: of its momentum network, as ``ema.*``. loader: anything with
    ``steps_per_epoch`` and ``batches(start_step, stop_step)`` yielding ``ppssl.Batch``. optim, run: the sections ``optim`` and
    ``run`` of a config. teacher: [N, E] embeddings by image index, for methods with ``needs_teacher_embeddings``. hooks: called
    with the trainer after every epoch. profile: steady steps to profile.
    out: run folder, None keeps nothing. One process at a time trains there. A run that is already in it is continued where it is
    this one (``resume="auto"``) and moved aside with ``resume="none"``; a run with other settings is refused. ``engine.load(out)``
    gives the trained network.
    config: of a run that is built from one. images: the training list; checkpoints remember it, and another one is refused. world:
    the processes that share each batch (the method is distributed, the loader gives this one's part of it); the first one writes.
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
        ema_schedule: str = "constant",
        amp: str | None = None,
        device: torch.device | str | None = None,
        out: str | Path | None = None,
        teacher: Tensor | None = None,
        hooks: Sequence[Callable[[Trainer], None]] = (),
        resume: str = "auto",
        config: Config | None = None,
        images: ImageList | None = None,
        profile: int = 0,
        world: World = ALONE,
    ):
        optim, run = optim or OptimConfig(), run or RunConfig()
        if method.needs_teacher_embeddings and teacher is None:
            raise ValueError("this method needs teacher embeddings; pass teacher=[N, E]")
        self.device = torch.device(device) if device else choose_device(run.device)
        keep_freed_memory(self.device)
        self.method = method.to(self.device, memory_format=torch.channels_last).train()
        self.loader, self.teacher, self.hooks, self.world = loader, teacher, list(hooks), world
        self.loader_name = re.sub(r" \(\d+ workers\)$", "", getattr(loader, "name", type(loader).__name__))
        self.epochs, self.total_steps = epochs, epochs * loader.steps_per_epoch
        self.precision = precision.resolve(amp, self.device)
        self.execution = choose(run.compile, run.cuda_graph, self.precision, world.size)
        warmup = warmup_steps(optim.warmup, loader.steps_per_epoch, self.total_steps)
        self.step = Step(
            method,
            build(method, optim),
            lr=lambda step: learning_rate(step, self.total_steps, peak=optim.lr, schedule=optim.schedule, warmup=warmup),
            decay=ema_decay,
            precision=self.precision,
            total_steps=self.total_steps,
            compile=self.execution.compile,
            graph=self.execution.graph,
            max_bad_steps=run.max_bad_steps,
            decay_schedule=ema_schedule,
            clip=optim.clip,
        )
        self.out = Path(out) if out is not None and world.first else None
        self.resume_from, self.config, self.images = resume, config, images
        self.listing = listing(images) if images is not None else None
        self.settings = flatten(config) if config else known_settings(method, epochs, optim, run, ema_decay, amp, ema_schedule)
        self.log_every = run.log_every
        self.profile = profile
        self.save_every = run.save_every_steps or loader.steps_per_epoch
        self.saver = checkpoint.Saver(None if out is None else Path(out), keep=run.keep, writes=world.first)
        self.health = Health(self.step.parameters)
        self.saved_step = self.hooked_epoch = -1
        self.begun = self.save_is_due = self.is_ending = False
        self.best = Best(config.eval.keep_best, config.eval.patience) if config else Best()
        queue = next((module.size for module in method.modules() if isinstance(module, KeyQueue)), None)
        self.records = Records(
            self.out,
            self.settings,
            loggers=run.loggers,
            queue=queue,
            steps_per_epoch=loader.steps_per_epoch,
            total_steps=self.total_steps,
        )
        self.log: RunLog | None = None

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.step.steps_done // self.loader.steps_per_epoch

    @property
    def ended(self) -> bool:
        """Whether nothing is left to train: all epochs are done, or ``eval.patience`` ended the run."""
        return self.step.steps_done >= self.total_steps or self.best.ended

    def see_best(self, value: float, images: str = "") -> None:
        """Takes the value of ``eval.keep_best`` after this step: the best weights so far are saved with the checkpoint of this very
        step, and the run ends where ``eval.patience`` says so. For hooks; all processes call it with the same value.

        images: identity of the list that was evaluated, where it may change when the run is continued."""
        in_a_row = int(self.step.guard.in_a_row)
        if in_a_row:  # what follows bad steps is not saved yet
            say(f"step {self.step.steps_done}: it follows {in_a_row} bad steps and is not compared by {self.best.measure}")
            return
        self.save_is_due |= self.best.see(self.step.steps_done, self.epoch, value, images)
        if self.best.ended and self.step.steps_done < self.total_steps:
            say(f"ended early at epoch {self.epoch} of {self.epochs}: {self.best.told_end()}")

    def fit(self) -> Summary:
        """Trains to the end. Raises ``Stopped`` after a signal, ``FloatingPointError`` after ``max_bad_steps`` steps in a row whose
        loss or gradient was not finite, ``BrokenFile`` after a save when an image can no longer be read, ``OSError`` when nothing
        can be saved; each names the last good checkpoint; ``RunFolderInUse`` where another process trains in ``out``."""
        torch.backends.cudnn.benchmark = True  # every step has the same shapes
        out = self.saver.out
        with RunFolder(out).locked() if out is not None and self.world.first else nullcontext():
            if not self.begun:
                self.begin(out and find_checkpoint(self.resume_from, out, self.settings, self.world))
            return self._fit()

    def begin(self, found: Found | None) -> None:
        """Continues ``found`` (of ``find_checkpoint``). Without one makes ``out`` the folder of a new run: one that is already
        there is moved aside, not overwritten."""
        if found is not None:
            self.resume(*found)
        elif self.out is not None:
            RunFolder(self.out).move_aside()
        self.begun = True

    def write_settings(self, batch: Batch) -> None:
        """Writes config.yaml of a run that was built in code: what is known of it, with the batch's size and side."""
        self.settings |= {"batch_size": len(batch.index), "data.image_size": batch.x_q.shape[-1]}
        write_text(RunFolder(self.out).config, to_yaml(self.settings))
        write_classes(self.out, self.images.classes if self.images is not None else ())

    def _fit(self) -> Summary:
        step, began = self.step, self.step.steps_done
        batch_size, compiling, saving, hooking, started = 0, 0.0, 0.0, 0.0, time.perf_counter()
        self.log = RunLog(self.records, total_steps=self.total_steps, start_step=began, description=type(self.method).__name__)
        profile = Profile(RunFolder(self.out or Path()).profile, steps=self.profile, device=self.device)
        with signals.noted() as asked, self.log as log, profile, self.saver, self.saved_when_broken():
            hooked = self.hooked_epoch
            hooking += self.timed(self.run_hooks)  # a run that was stopped between an epoch's last step and its hooks
            if self.hooked_epoch != hooked and (self.save_is_due or self.ended):  # what they found is of this step
                self.is_ending = self.ended
                saving += self.timed(self.save)
            for batch in log.watch(() if self.ended else self.loader.batches(began, self.total_steps)):
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
                line = step.steps_done % self.log_every == 0 or last or stop
                if line:
                    self.write_line(lr)
                    self.check()
                if last or not stop:  # a run that is over anyway misses nothing
                    hooking += self.timed(self.run_hooks)
                if self.best.ended and not line:
                    self.write_line(lr)
                    self.check()
                last |= self.best.ended
                self.health.see(output.total)
                self.save_is_due |= step.steps_done % self.save_every == 0
                if self.save_is_due or last or stop:
                    self.is_ending = last or bool(stop)
                    saving += self.timed(self.save)
                if stop and not last:
                    saving += self.timed(self.saver.wait)
                    raise signals.Stopped(stop, self.saver.saved)
                if self.best.ended:
                    break
            saving += self.timed(self.saver.wait)
        seconds = time.perf_counter() - started
        images = (step.steps_done - began) * batch_size
        training = max(seconds - compiling - saving - hooking, 1e-9)
        waited = log.waited_total / training
        early = self.best.ended and step.steps_done < self.total_steps
        return Summary(
            step.steps_done - began, seconds, compiling, images / training, waited, saving, hooking, log.collapsed, early
        )

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
        """The due log line."""
        with self.writing(f"writing the log of step {self.step.steps_done}"):
            self.log.line(step=self.step.steps_done, epoch=self.epoch, lr=lr)

    @contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """What is done in here writes beside the checkpoints: an ``OSError`` names the last good one and the remedy."""
        try:
            yield
        except OSError as error:
            self.saver.wait()
            raise OSError(
                f"{what} failed ({error}); last good checkpoint: {self.saver.last_good()}; "
                f"{'make room, then ' * (error.errno in checkpoint.NO_ROOM)}run the same command: it continues there"
            ) from error

    def run_hooks(self) -> None:
        """Calls the hooks where an epoch has just ended, once per epoch. Before the save, which remembers it: nothing that they
        write is lost when the run dies."""
        if self.step.steps_done % self.loader.steps_per_epoch == 0 and self.epoch > max(0, self.hooked_epoch):
            for hook in self.hooks:
                with self.writing(f"what follows epoch {self.epoch} (evaluation, pictures)"):
                    hook(self)
            self.hooked_epoch = self.epoch

    @contextmanager
    def saved_when_broken(self) -> Iterator[None]:
        """When an image can no longer be read, by the loader or by a hook, or a process that loads images dies, what was learned
        until then is saved first. Not with several processes: the others wait elsewhere, and a state that is held in parts needs
        them all."""
        try:
            yield
        except (BrokenFile, WorkerDied) as error:
            if self.world.size == 1:
                self.is_ending = True
                self.save()
            self.saver.wait()
            raise type(error)(f"{error}; last good checkpoint: {self.saver.last_good()}") from None

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
        self.saver.set_aside()
        terms = ", ".join(f"{name} {value:.6g}" for name, value in streak.terms.items())
        good = self.saver.last_good()
        way = f"{'start again' if good == 'none' else 'continue there'} by the same command with a lower optim.lr"
        raise FloatingPointError(
            f"step {streak.step}: the loss or its gradient is not finite ({terms}), the first of {self.step.guard.patience} steps "
            f"in a row (run.max_bad_steps); last good checkpoint: {good}; {replay}; {way}"
            f"{', or afresh (--resume none) with amp=null (float32)' if self.precision.dtype else ''}"
        )

    def state(self) -> dict[str, Any]:
        """Everything a checkpoint restores."""
        return (
            self.step.state_dict()
            | {
                "epoch": self.epoch,
                "hooked_epoch": self.hooked_epoch,
                "method": self.method.state_dict(),
                "rng": checkpoint.rng_state(self.device),
                "best": self.best.state_dict(),
                "next": self.step.schedules(),
                "steps_per_epoch": self.loader.steps_per_epoch,
                "health": self.health.state_dict(),
                "loader": self.loader_name,
                "info": {"config": to_yaml(self.config)} if self.config else {"settings": self.settings},
            }
            | ({} if self.listing is None else {"images": self.listing})
        )

    def save(self) -> None:
        """Begins to write a checkpoint and the network's weights into the run folder, in the background. All processes call it:
        they hold parts of the state, one writes it. While bad steps follow one another it waits for a good one, unless the run ends
        here: a state that may be ruined takes no good one's place."""
        if (self.out is None and self.world.size == 1) or self.saved_step == self.step.steps_done:
            return
        self.check()
        in_a_row = int(self.step.guard.in_a_row)
        if in_a_row and not self.is_ending:
            return
        state = self.state()
        self.saved_step, self.save_is_due = self.step.steps_done, False
        if self.out is not None:
            doubt = f"it follows {in_a_row} bad steps" if in_a_row else self.health.doubt()
            metadata = {"step": str(self.step.steps_done), "epoch": str(self.epoch)} if not doubt or self.is_ending else None
            best = self.best.metadata(self.step.steps_done)
            weights = self.method.network.weights() if metadata or best else None
            self.saver.save(state, weights, metadata, doubt=doubt, best=best)

    def resume(self, path: Path, state: dict[str, Any] | None = None) -> None:
        """Continues the checkpoint at ``path`` (``state`` when it is already read). Raises ``ValueError`` when it belongs to
        another method or network, ``ConfigError`` when it is of other images or ``out`` holds another run."""
        self.begun = True
        state = checkpoint.load(path) if state is None else state
        places = refuse_other_run(path, state, self.out, self.images, self.loader_name, config=self.config)
        try:
            self.method.load_state_dict(state["method"])
            self.step.load_state_dict(state)
            checkpoint.load_rng_state(state["rng"], self.device)
            self.hooked_epoch = state["hooked_epoch"]
            self.health.load_state_dict(state.get("health", {}))
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = textwrap.shorten(str(error), 300)  # torch lists every name
            raise ValueError(f"resume: {path} is of another method or network than this config's: {reason}") from error
        if places is not None:
            self.method.renumber(places)
        self.saver.resume(path, state)
        self.records.rewind(self.step.steps_done)
        self.best.load_state_dict(state.get("best", {}), finished=self.step.steps_done >= self.total_steps)
        if self.out is not None:
            continue_in(self.out, path, self.step.steps_done)
            self.best.settle(self.out, self.step.steps_done, path, self.method.network.weights)
        if self.best.ended and self.step.steps_done < self.total_steps:
            say(f"{path} ended early at epoch {self.epoch} of {self.epochs}: {self.best.told_end()}")
            return
        say(f"continuing {path} at step {self.step.steps_done} of {self.total_steps}")
        if not self.ended:
            say_changes(state, path, self.settings, self.step.schedules(), self.total_steps)
