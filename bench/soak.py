"""``python -m bench.soak --minutes 20 --kills 20``: a small run of the demo through everything that ends a run, compared with the
same run undisturbed.

Killed (SIGKILL) at random steps and while it starts, asked to stop (SIGTERM), its disk full (RLIMIT_FSIZE of the live process), its
memory at an end (RLIMIT_AS, likewise), an image removed or unreadable for a while, and started twice at random moments. It must
continue each time from its newest checkpoint, never lose a step before that, end with the same weights, momentum, losses and
evaluations as the undisturbed run, and leave no process behind; of two starters one trains and the other one is refused; the
undisturbed run must not grow in memory, file handles or threads. A second pair of runs, shorter, has two processes under torchrun,
which starts them again when one of them is killed. Prints what happened as JSON; exit code 0 when all of it holds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from engine import run_folder
from engine.console import say
from engine.synthetic import dataset
from engine.training import checkpoint

# The demo's recipe on so few small images that a step takes some 50 ms.
SMALL = (
    "epochs=120", "batch_size=16", "queue.size=32", "encoder.arch=resnet18_w8_s16", "data.image_size=32", "eval.every=30",
    "run.log_every=1", "run.save_every_steps=7", "run.keep=3", "data.workers=1",
    "data.resident=off",  # so that every epoch opens every file
)  # fmt: skip
SAVE_EVERY, EPOCHS, PER_SPECIES, BATCH = 7, 120, 2, 16
STEPS = EPOCHS * (PER_SPECIES * len(dataset.SPECIES) // BATCH)
TORCHRUN_EPOCHS = 60
GROWTH_MIB, GROWTH = 16, 0.02
KINDS = ("signal", "full disk", "no memory", "image gone", "read error", "two starters")
"""Disturbances beside kills."""


class Run:
    """A run folder and the processes that continue it one after the other; ``mark`` is how they and their children are found."""

    def __init__(self, folder: Path, images: Path, until: float, *, launcher: Sequence[str] = (), epochs: int = EPOCHS):
        self.folder, self.until, self.mark = folder, until, f"SOAK_MARK={uuid.uuid4().hex}"
        self.errors = folder.with_name(f"{folder.name}.txt")
        settings = ["--cfg", "demo", "--amp", f"data.root={images}", "--out", str(folder), *SMALL, f"epochs={epochs}"]
        self.command = [sys.executable, *launcher, "-m", "engine.train", *settings]

    def start(self, errors: Path | None = None) -> subprocess.Popen:
        """errors: takes what it writes for the person at the terminal, if not the run's own file."""
        name, _, value = self.mark.partition("=")
        with (errors or self.errors).open("w") as file:
            return subprocess.Popen(self.command, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1", name: value})

    def said(self, errors: Path | None = None) -> str:
        """What the last process wrote for the person at the terminal."""
        return (errors or self.errors).read_text(encoding="utf-8", errors="replace")

    def step(self) -> int:
        """The last step in the log, from its end: this is asked a hundred times a second."""
        try:
            with (self.folder / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
                found = re.findall(rb'^\{"kind": "train", "step": (\d+),.*\}$', file.read(), re.MULTILINE)
        except FileNotFoundError:
            return 0
        return int(found[-1]) if found else 0

    def saved(self) -> int:
        """The step of the newest checkpoint that is whole."""
        for path in reversed(checkpoint.list_checkpoints(self.folder / "checkpoints")):
            try:
                return checkpoint.load(path)["step"]
            except ValueError:
                continue
        return 0

    def wait(self, process: subprocess.Popen, done: Callable[[], bool]) -> bool:
        """Waits until ``done()``; False when the process has ended before."""
        while not done():
            if process.poll() is not None:
                return False
            if time.monotonic() > self.until:
                process.kill()
                raise TimeoutError("out of time; give more --minutes or fewer --kills")
            time.sleep(0.01)
        return True

    def processes(self, variable: str = "") -> list[int]:
        """Living processes with our mark, and with ``variable`` (NAME=value) in their environment."""
        found = []
        for environment in Path("/proc").glob("[0-9]*/environ"):
            try:
                given = environment.read_bytes().split(b"\0")
            except OSError:  # it has just ended
                continue
            if self.mark.encode() in given and (not variable or variable.encode() in given):
                found.append(int(environment.parent.name))
        return found

    def left_behind(self) -> int:
        """Processes with our mark some seconds after the run has ended: workers look for their parent every five."""
        for _ in range(80):
            if not self.processes():
                return 0
            time.sleep(0.1)
        return len(self.processes())


def disturb(run: Run, kind: str, goal: int, chance: random.Random, images: Path) -> str | None:
    """One process of ``run`` and what ends it after step ``goal``; what was wrong with it, or None."""
    before = run.saved()
    process = run.start()
    if kind == "two starters":
        return two_starters(run, process, before, chance)
    if kind == "kill at start":
        time.sleep(chance.random() * 6)
    elif not run.wait(process, lambda: run.step() >= goal):
        return f"{kind}: ended by itself with code {process.returncode}: {run.said()[-500:]}"
    time.sleep(chance.random() * 0.1)  # anywhere in a step
    picture = chance.choice(training_images(images))
    hidden = picture.with_suffix(".hidden")
    if kind.startswith("kill"):
        process.kill()
    elif kind == "signal":
        process.send_signal(signal.SIGTERM)
    elif kind == "full disk":
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    elif kind == "no memory":
        taken = int(Path(f"/proc/{process.pid}/statm").read_text().split()[0]) * resource.getpagesize()
        resource.prlimit(process.pid, resource.RLIMIT_AS, (taken, taken))
        until = run.step() + 3 * SAVE_EVERY  # what it has may do for a while
        if run.wait(process, lambda: run.step() >= until):
            process.kill()
    else:  # gone, or there and unreadable for whoever trains, root included
        picture.rename(hidden)
        if kind == "read error":
            picture.symlink_to(picture.name)
    run.wait(process, lambda: process.poll() is not None)
    said, code = run.said(), process.wait()
    if hidden.exists():
        hidden.replace(picture)
    want = {"signal": (75, "saved"), "full disk": (1, "last good checkpoint")}
    want |= dict.fromkeys(("image gone", "read error"), (1, str(picture)))
    code_wanted, words = want.get(kind, (-signal.SIGKILL, ""))
    if not (code if kind == "no memory" else code == code_wanted and words in said):
        return f"{kind}: code {code}, {said[-500:]}"
    if before and f"at step {before} of" not in said and kind != "kill at start":
        return f"{kind}: did not continue at step {before}: {said[:500]}"
    return lost(run, kind, before)


def lost(run: Run, kind: str, before: int) -> str | None:
    """What is wrong with the checkpoints that a process left which began at step ``before``, or None."""
    steps = run.step() - run.saved()
    allowed = 0 if kind in ("signal", "image gone", "read error") else 2 * SAVE_EVERY  # a save in flight, and the steps since
    if not 0 <= steps <= allowed or run.saved() < before:
        return f"{kind}: {steps} steps after the last checkpoint are gone, {allowed} may be"
    return None


def two_starters(run: Run, first: subprocess.Popen, before: int, chance: random.Random) -> str | None:
    """A second process of the same run at a random moment of the ``first``: one of them is refused, the other one trains on and is
    killed."""
    time.sleep(chance.random() * 8)
    errors = run.errors.with_suffix(".second.txt")
    second = run.start(errors)
    run.wait(first, lambda: second.poll() is not None)
    trains, refused, said = (first, second, run.said(errors)) if first.poll() is None else (second, first, run.said())
    if trains.poll() is None:
        if refused.wait() != 1 or "another process (pid" not in said:
            return f"two starters: code {refused.returncode}, {said[-500:]}"
        goal = run.step() + 1
        run.wait(trains, lambda: run.step() >= goal)
        trains.kill()
    elif 0 not in (first.wait(), second.wait()):  # both have ended, and neither came to the end of the run
        return f"two starters: codes {first.returncode} and {second.returncode}: {run.said()[-500:]}, {run.said(errors)[-500:]}"
    trains.wait()
    return lost(run, "two starters", before)


def torchrun(out: Path, images: Path, until: float, kills: int, chance: random.Random) -> list[str]:
    """Two processes under torchrun, of which one is killed ``kills`` times, and the same undisturbed; what was wrong."""
    steps = TORCHRUN_EPOCHS * STEPS // EPOCHS
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--max-restarts={kills}"]
    alone, run = (Run(out / name, images, until, launcher=launcher, epochs=TORCHRUN_EPOCHS) for name in ("two", "two_disturbed"))
    for each, times in ((alone, 0), (run, kills)):
        process, goal = each.start(), 0
        for _ in range(times):
            goal = max(each.step() + 1, goal + chance.randint(1, steps // (times + 1)))
            rank = chance.randrange(2)
            if not each.wait(process, lambda each=each, goal=goal: each.step() >= goal):
                break
            before = each.saved()
            for pid in sorted(each.processes(f"RANK={rank}"))[:1]:  # its workers end with it
                os.kill(pid, signal.SIGKILL)
            say(f"rank {rank} of 2 killed after step {each.step()}, newest checkpoint {before}")
        each.wait(process, lambda process=process: process.poll() is not None)
        if process.wait():
            return [f"torchrun ended with code {process.returncode}: {each.said()[-1000:]}"]
    return compare(alone, run, steps)


def compare(alone: Run, run: Run, steps: int) -> list[str]:
    """What differs between the undisturbed and the disturbed run, and what the latter left."""
    (state, losses, evaluated), (state_2, losses_2, evaluated_2) = results(alone.folder), results(run.folder)
    wrong = [] if same(state, state_2) else ["the last checkpoints differ"]
    wrong += [] if losses == losses_2 and len(losses) == steps else ["the losses differ"]
    wrong += [] if evaluated == evaluated_2 else [f"the evaluations differ: {evaluated}, {evaluated_2}"]
    temporaries = [p.name for p in run.folder.rglob("*.tmp")]
    wrong += [f"left over: {temporaries}"] if temporaries else []
    wrong += [f"{n} processes left behind"] if (n := run.left_behind()) else []
    return [f"{run.folder.name}: {what}" for what in wrong]


def training_images(images: Path) -> list[Path]:
    """Paths of the training images, each of which is in every epoch."""
    names, split = (
        dict(line.split(maxsplit=1) for line in (images / file).read_text(encoding="utf-8").splitlines())
        for file in ("images.txt", "train_test_split.txt")
    )
    return [images / "images" / name for i, name in names.items() if split[i] == "1"]


def watch(run: Run, process: subprocess.Popen) -> dict[str, list[float]]:
    """Resident MiB, file handles and threads of the process at every tenth step."""
    seen: dict[str, list[float]] = {"memory_mib": [], "file_handles": [], "threads": []}
    own, last = Path(f"/proc/{process.pid}"), 0
    while run.wait(process, lambda last=last: run.step() >= last + 10):
        last = run.step()
        try:
            status = dict(line.split(":", 1) for line in (own / "status").read_text().splitlines() if ":" in line)
            seen["memory_mib"].append(int(status["VmRSS"].split()[0]) / 1024)
            seen["threads"].append(int(status["Threads"]))
            seen["file_handles"].append(len(list((own / "fd").iterdir())))
        except (OSError, KeyError):
            break
        if last + 10 >= STEPS:
            break
    return seen


def same(a: object, b: object) -> bool:
    """Bit-identical equality, through nested containers."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def results(folder: Path) -> tuple[dict, dict, dict]:
    """The last checkpoint without the run folder's name, the loss of every step, the evaluation at every step that has one."""
    state = checkpoint.load(checkpoint.list_checkpoints(folder / "checkpoints")[-1])
    state.pop("info")
    records = run_folder.read_metrics(folder)
    losses = {r["step"]: r["loss"] for r in records if r["kind"] == "train"}
    return state, losses, {r["step"]: (r["rank1"], r["mAP"]) for r in records if r["kind"] == "eval"}


def main() -> int:
    parser = argparse.ArgumentParser("python -m bench.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20, help="give up after so long")
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs; of each other disturbance there are an eighth as many")
    parser.add_argument("--rank-kills", type=int, default=3, help="kills of one of two processes under torchrun; 0 leaves it out")
    parser.add_argument("--out", type=Path, help="folder for both runs (default: a temporary one)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments that are chosen")
    args = parser.parse_args()
    until, chance, wrong = time.monotonic() + 60 * args.minutes, random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or Path(scratch)
        os.environ.setdefault("PPSSL_CACHE", str(out / "cache"))
        images = dataset.generate(out / "birds", train_per_species=PER_SPECIES, test_per_species=2, progress=False)
        alone = Run(out / "alone", images, until)
        process = alone.start()
        seen = watch(alone, process)
        if process.wait():
            raise RuntimeError(f"the undisturbed run ended with code {process.returncode}: {alone.said()[-2000:]}")

        run = Run(out / "disturbed", images, until)
        kinds = ["kill"] * (args.kills - args.kills // 10) + ["kill at start"] * (args.kills // 10)
        kinds += list(KINDS) * max(1, args.kills // 8)
        chance.shuffle(kinds)
        most, goal = STEPS // (len(kinds) + 1), 0
        for kind in kinds:
            goal = max(run.step() + 1, goal + chance.randint(1, most))
            error = disturb(run, kind, min(goal, STEPS - 20), chance, images)
            say(f"{kind} after step {run.step()}, newest checkpoint {run.saved()}: {error or 'as expected'}")
            wrong += [error] if error else []
        process = run.start()
        if process.wait():
            wrong.append(f"the last process ended with code {process.returncode}: {run.said()[-500:]}")
        wrong += compare(alone, run, STEPS)
        if args.rank_kills:
            wrong += torchrun(out, images, until, args.rank_kills, chance)
    grown = {}
    for name, values in seen.items():
        quarter = len(values) // 4
        grown[name] = early, late = statistics.median(values[quarter : 2 * quarter]), statistics.median(values[-quarter:])
        allowed = max(GROWTH_MIB, GROWTH * early) if name == "memory_mib" else 0
        wrong += [f"{name} grew from {early:.0f} to {late:.0f}"] if late > early + allowed else []
    events = Counter(kinds) + Counter({"rank killed": args.rank_kills})
    print(json.dumps({
        "steps": STEPS, "disturbances": events, "second and last quarter of the undisturbed run": grown, "wrong": wrong,
        "minutes": round((time.monotonic() - until) / 60 + args.minutes, 1),
    }, indent=2))  # fmt: skip
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
