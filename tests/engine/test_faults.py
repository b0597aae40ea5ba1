"""Faults that a run survives: killed at any step, a disk that is full, images that vanish, signals, numbers that are not finite."""

import math
import multiprocessing
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import engine.training.trainer
from engine import build, files, run_folder
from engine.build import assemble
from engine.config import Config, from_yaml
from engine.data import teacher_cache
from engine.replay import main as replay_main
from engine.replay import replay
from engine.synthetic import dataset
from engine.train import main
from engine.training import checkpoint
from engine.training.step import Step
from engine.training.trainer import Trainer

CPU = torch.device("cpu")
RECIPE = """\
epochs: 2
batch_size: 8
method: {name: moco}
encoder: {arch: resnet18_w8_s16, weights: none, dim: 8}
queue: {size: 20}
ema: {decay: 0.9}
ais: {prompts: birds}
teacher: {model: birds, weights: birds}
data: {name: birds, root: ROOT, image_size: 32, workers: 0, loader: torch, resident: off}
run: {log_every: 1, save_every_steps: 2, keep: 9}
"""
STEPS = 10  # 40 images, 2 epochs, batches of 8


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums depend on the number of threads in their last bit, and runs of this process are compared with those of others."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    os.environ["PPSSL_CACHE"] = str(folder / "cache")  # for this file's processes too
    yield dataset.generate(folder / "birds", train_per_species=1, test_per_species=1, workers=1, progress=False)
    del os.environ["PPSSL_CACHE"]


@pytest.fixture
def recipe(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.replace("ROOT", str(world)))
    return path


@pytest.fixture(scope="module")
def uninterrupted(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of ``RECIPE`` that nothing went wrong in."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "tiny.yaml").write_text(RECIPE.replace("ROOT", str(world)))
    assert main(["--cfg", str(folder / "tiny.yaml"), "--out", str(folder / "run")]) == 0
    return folder / "run"


def last_state(out: Path) -> dict:
    return checkpoint.load(checkpoint.list_checkpoints(out / "checkpoints")[-1])


def assert_equal(a: object, b: object, where: str = "state") -> None:
    """To the bit, through nested containers."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}.{i}")
    else:
        assert a == b, where


def assert_same_run(out: Path, other: Path) -> None:
    """Everything in the last checkpoint but where the run folder is, and every logged loss."""
    states = [last_state(folder) for folder in (out, other)]
    for state in states:
        assert state.pop("info")
    assert_equal(*states)
    losses = [{r["step"]: r["loss"] for r in run_folder.read_metrics(folder) if r["kind"] == "train"} for folder in (out, other)]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS


@pytest.mark.parametrize(
    ("loader", "overrides", "amp", "compile"),  # loader: "resident" keeps the decoded set in memory
    [
        ("torch", {"name": "moco"}, None, "off"),
        ("dali", {"name": "moco"}, "bf16", "encoder"),
        ("torch", {"name": "ppssl", "variant": "published"}, "bf16", "off"),
        ("dali", {"name": "ppssl", "variant": "published"}, None, "off"),
        ("torch", {"name": "ppssl", "variant": "guided"}, None, "off"),
        ("dali", {"name": "ppssl", "variant": "guided"}, "bf16", "off"),
        ("torch", {"name": "ldfs"}, None, "off"),
        ("resident", {"name": "ppssl", "variant": "guided"}, None, "off"),
        ("dali", {"name": "byol"}, None, "off"),
    ],
)
def test_every_configuration_resumes_to_the_bit_in_the_middle_of_an_epoch(
    loader: str, overrides: dict, amp: str | None, compile: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compile == "encoder":  # Inductor takes a minute; the graph that it would get is the same
        monkeypatch.setattr(engine.training.trainer, "Step", lambda *args, **options: Step(*args, **options, backend="aot_eager"))
    cfg = from_yaml(recipe)
    data = {"resident": "host", "loader": "auto"} if loader == "resident" else {"loader": loader}
    cfg = replace(
        cfg, epochs=1, amp=amp, method=replace(cfg.method, **overrides), data=replace(cfg.data, workers=1, **data),
        run=replace(cfg.run, compile=compile),
    )  # fmt: skip

    def trainer(name: str) -> Trainer:
        return make(cfg, tmp_path / name)

    whole = trainer("whole")
    whole.fit()
    whole.loader.close()
    resumed = trainer("resumed")
    resumed.resume(tmp_path / "whole/checkpoints/step_000000002.pt")
    resumed.fit()
    resumed.loader.close()
    assert resumed.step.steps_done == 5
    states = [checkpoint.load(tmp_path / name / "checkpoints/step_000000005.pt") for name in ("whole", "resumed")]
    assert_equal(*states)
    losses = [[r["loss"] for r in run_folder.read_metrics(tmp_path / name) if r["step"] > 2] for name in ("whole", "resumed")]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    torch._dynamo.reset()


def make(cfg: Config, out: Path) -> Trainer:
    cfg = build.resolve(cfg, CPU)
    cache = files.cache_folder()
    images = build.data(cfg, cache_dir=cache, progress=False)
    teacher = build.teacher(cfg, CPU)
    return assemble(cfg, images, CPU, teacher=teacher, out=out, cache=cache, embed=lambda t: teacher_cache.embeddings(
        t, images.train, device=CPU, cache_dir=cache, workers=0
    ))  # fmt: skip


def start(*argv: str, program: str = "") -> subprocess.Popen:
    """``python -m engine.train`` in a process of its own; ``program`` is run before it, in the same process."""
    code = f"import sys, torch\n{program}\nfrom engine.train import main\nsys.exit(main(sys.argv[1:]))"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as this process: one_thread
    return subprocess.Popen([sys.executable, "-c", code, *argv], stderr=subprocess.PIPE, text=True, env=environment)


def test_killed_three_times_a_run_ends_as_if_nothing_had_happened(recipe: Path, uninterrupted: Path) -> None:
    """kill -9 lands anywhere: between steps, in one, in a save. What is saved at most every second step is all that is redone."""
    chance = random.Random(0)
    # the process that is to be killed dwells in every step, so that the moment is chosen and not the machine's
    slow = """
import time
from engine.training.step import Step
run = Step.__call__
def dwell(self, batch):
    time.sleep(0.1)
    return run(self, batch)
Step.__call__ = dwell
"""
    out = Path("killed")
    goal = 0
    for _ in range(3):
        goal += chance.randint(1, 3)
        process = start("--cfg", str(recipe), "--out", str(out), program=slow)
        while process.poll() is None and not any(r["kind"] == "train" and r["step"] >= goal for r in run_folder.read_metrics(out)):
            time.sleep(0.01)
        time.sleep(chance.random() * 0.1)
        process.kill()
        assert process.wait() == -signal.SIGKILL, process.stderr.read()
        kept = checkpoint.list_checkpoints(out / "checkpoints")
        assert len(kept) >= (goal - 1) // 2 and all(checkpoint.load(path) for path in kept)
    assert main(["--cfg", str(recipe), "--out", str(out)]) == 0
    assert_same_run(out, uninterrupted)
    assert not list(out.rglob("*.tmp"))


def test_a_second_signal_ends_the_process_at_once_and_spoils_nothing(recipe: Path, uninterrupted: Path) -> None:
    hang = """
import time
from ppssl.moco import MoCo
forward, calls = MoCo.forward, []
def hanging(self, batch):
    calls.append(1)
    if len(calls) == 4:
        print("hangs", file=sys.stderr, flush=True)
        time.sleep(600)
    return forward(self, batch)
MoCo.forward = hanging
"""
    process = start("--cfg", str(recipe), "--out", "twice", program=hang)
    for number, word in ((signal.SIGTERM, "hangs"), (signal.SIGINT, "once more")):
        for line in process.stderr:
            if word in line:
                break
        process.send_signal(number)
    assert process.wait() == 130
    assert [p.name for p in checkpoint.list_checkpoints(Path("twice/checkpoints"))] == ["step_000000002.pt"]
    assert main(["--cfg", str(recipe), "--out", "twice"]) == 0
    assert_same_run(Path("twice"), uninterrupted)


def after_the_first_save(monkeypatch: pytest.MonkeyPatch, action: Callable[[], None]) -> None:
    save, done = Trainer.save, []

    def save_and_act(self: Trainer) -> None:
        save(self)
        if not done:
            self.saver.wait()
            done.append(1)
            action()

    monkeypatch.setattr(Trainer, "save", save_and_act)


@pytest.mark.parametrize("way", ["limit", "injected"])
def test_a_full_disk_ends_the_run_with_what_was_saved(
    way: str, recipe: Path, uninterrupted: Path, capfd: pytest.CaptureFixture
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def no_space(self: object, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        if way == "limit":
            after_the_first_save(patch, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1])))
        else:
            after_the_first_save(patch, lambda: patch.setattr(checkpoint._Hashed, "write", no_space))
        try:
            # events with pictures would meet the limit before a checkpoint does
            assert main(["--cfg", str(recipe), "--out", "full", "run.loggers=[csv]"]) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = " ".join(capfd.readouterr().err.split())
    for words in ("step 4 could not be saved", "last good checkpoint: full/checkpoints/step_000000002.pt", "run.keep", "continues"):
        assert words in error
    assert [p.name for p in checkpoint.list_checkpoints(Path("full/checkpoints"))] == ["step_000000002.pt"]
    assert main(["--cfg", str(recipe), "--out", "full"]) == 0
    assert_same_run(Path("full"), uninterrupted)


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_an_image_that_vanishes_stops_the_run_after_a_save_and_the_run_goes_on_when_it_is_back(
    loader: str, recipe: Path, world: Path, uninterrupted: Path, capfd: pytest.CaptureFixture
) -> None:
    images = sorted((world / "images").rglob("*.jpg"))
    hidden = world / "hidden"
    with pytest.MonkeyPatch.context() as patch:
        after_the_first_save(patch, lambda: (world / "images").rename(hidden))
        try:
            assert main(["--cfg", str(recipe), "--out", "gone", f"data.loader={loader}"]) == 1
        finally:
            hidden.rename(world / "images")
    error = " ".join(capfd.readouterr().err.split())
    saved = checkpoint.list_checkpoints(Path("gone/checkpoints"))[-1]
    assert any(f"{path}: unreadable now" in error for path in images) and f"last good checkpoint: {saved}" in error
    taken = max(r["step"] for r in run_folder.read_metrics(Path("gone")) if r["kind"] == "train")
    assert checkpoint.load(saved)["step"] == taken  # nothing lost
    assert main(["--cfg", str(recipe), "--out", "gone", f"data.loader={loader}"]) == 0
    if loader == "torch":
        assert_same_run(Path("gone"), uninterrupted)


def test_a_killed_worker_stops_the_run_after_a_save_and_the_run_goes_on(
    recipe: Path, uninterrupted: Path, capfd: pytest.CaptureFixture
) -> None:
    def kill_workers() -> None:
        for worker in multiprocessing.active_children():
            worker.kill()

    with pytest.MonkeyPatch.context() as patch:
        after_the_first_save(patch, kill_workers)
        assert main(["--cfg", str(recipe), "--out", "killed", "data.workers=1"]) == 1
    error = " ".join(capfd.readouterr().err.split())
    saved = checkpoint.list_checkpoints(Path("killed/checkpoints"))[-1]
    assert "was ended by SIGKILL" in error and f"last good checkpoint: {saved}" in error and "Traceback" not in error
    assert main(["--cfg", str(recipe), "--out", "killed", "data.workers=1"]) == 0
    assert_same_run(Path("killed"), uninterrupted)


def test_a_damaged_newest_checkpoint_is_passed_over(recipe: Path, uninterrupted: Path, capfd: pytest.CaptureFixture) -> None:
    assert main(["--cfg", str(recipe), "--out", "damaged"]) == 0
    newest = checkpoint.list_checkpoints(Path("damaged/checkpoints"))[-1]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    (newest.parent / ".step_000000012.pt.x.tmp").write_bytes(b"half")
    capfd.readouterr()
    assert main(["--cfg", str(recipe), "--out", "damaged"]) == 0
    error = capfd.readouterr().err
    assert f"{newest} is damaged" in error and "at step 8 of 10" in error
    assert_same_run(Path("damaged"), uninterrupted)
    assert not list(Path("damaged").rglob("*.tmp"))


def test_hooks_that_a_signal_kept_from_running_run_when_the_run_goes_on(recipe: Path, tmp_path: Path) -> None:
    cfg, seen = from_yaml(recipe), []

    def hook(trainer: Trainer) -> None:
        seen.append(trainer.epoch)

    trainer = make(cfg, tmp_path / "hooked")
    trainer.hooks.append(hook)
    run = trainer.step.run

    def signalled(batch):
        if trainer.step.steps_done == 4:  # the last step of the first epoch
            signal.raise_signal(signal.SIGTERM)
        return run(batch)

    trainer.step.run = signalled
    with pytest.raises(engine.training.Stopped) as stopped:
        trainer.fit()
    assert stopped.value.code == 75 and seen == []
    trainer = make(cfg, tmp_path / "hooked")
    trainer.hooks.append(hook)
    trainer.resume(tmp_path / "hooked/checkpoints/step_000000005.pt")
    trainer.fit()
    assert seen == [1, 2]
    trainer = make(cfg, tmp_path / "hooked")
    trainer.hooks.append(hook)
    trainer.resume(tmp_path / "hooked/checkpoints/step_000000010.pt")
    trainer.fit()
    assert seen == [1, 2]  # once per epoch


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_training_says_run_me_again(
    number: int, recipe: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("engine.build.data", lambda *_, **__: signal.raise_signal(number))
    before = signal.getsignal(number)
    assert main(["--cfg", str(recipe), "--out", "early"]) == 75
    assert "nothing to save" in capfd.readouterr().err and signal.getsignal(number) == before


def test_a_streak_of_bad_steps_leaves_a_bundle_that_reproduces_it(
    recipe: Path, world: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["--cfg", str(recipe), "--out", "bad", "optim.lr=1e25", "run.max_bad_steps=3", "epochs=9", "method.name=ppssl"]
    assert main(argv) == 1
    (bundle,) = Path("bad/replay").iterdir()
    assert f"python -m engine.replay {bundle}" in " ".join(capfd.readouterr().err.split())
    result = replay(bundle)
    assert result.reproduced and result.first is not None and len(result.images) == 8
    for name, then in result.then.items():  # to the bit
        assert result.now[name] == then or math.isnan(result.now[name]) and math.isnan(then), name
    assert replay_main([str(bundle)]) == 0
    assert "first place that is not finite: the" in capfd.readouterr().err

    state = checkpoint.load(bundle)
    healthy, earlier = bundle.with_name("healthy.pt"), Path("bad/checkpoints/step_000000002.pt")
    assert main(["--cfg", str(recipe), "--out", "bad", "epochs=9", "method.name=ppssl", "run.keep=99"]) == 0
    checkpoint.write(healthy, checkpoint.load(earlier) | {"replay": state["replay"]})
    assert replay_main([str(healthy)]) == 1
    assert "now draws other images" in capfd.readouterr().err
    assert replay_main([str(earlier)]) == 1
    assert "no replay bundle" in capfd.readouterr().err


def test_a_full_disk_does_not_hide_why_a_run_ends(
    recipe: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoint.write

    def no_room(path: Path, state: dict) -> object:
        if path.parent.name == "replay":
            raise OSError(28, "No space left on device")
        return write(path, state)

    monkeypatch.setattr(checkpoint, "write", no_room)
    assert main(["--cfg", str(recipe), "--out", "bad", "optim.lr=1e25", "run.max_bad_steps=3", "epochs=9"]) == 1
    error = " ".join(capfd.readouterr().err.split())
    assert "not finite" in error and "could not be written" in error and "No space left" in error and "Traceback" not in error


def test_training_opens_no_connection(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket, address: object) -> None:
        raise AssertionError(f"a connection to {address}")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: refuse(None, a))
    assert main(["--cfg", str(recipe), "--out", "offline", "epochs=1", "method.name=ppssl"]) == 0
