"""Two processes on a CPU equal one on the same global batch: losses, gradients, queue, running statistics; and a run of two
processes stops on a signal to any of them, goes on with any number of them, and survives the death of one."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import small_methods  # noqa: F401  names resnet10
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from engine import run_folder
from engine.build import spread
from engine.config import Config, OptimConfig, from_yaml
from engine.errors import ConfigError
from engine.evaluation import validation
from engine.pretrained import best_of
from engine.run_folder import RunFolder, RunFolderInUse
from engine.synthetic import dataset
from engine.train import main
from engine.training import checkpoint, optim, precision
from engine.training.distributed import choose_device, described, first_host, gpu_of, join, restarted
from engine.training.step import Step, choose
from engine.training.trainer import Trainer
from ppssl.byol import BYOL
from ppssl.encoder import FeatureNet, MaskBranch, Trunk, projection_head
from ppssl.lcr import LCR
from ppssl.method import Batch, Method
from ppssl.moco import MoCo
from ppssl.ppssl import PPSSL
from ppssl.settings import variant
from ppssl.simclr import SimCLR

CPU, WORLD = torch.device("cpu"), 2
ROOT = str(Path(__file__).parents[3])
B, SIDE, K, D, STEPS = 8, 32, 21, 6, 4  # the queue wraps around inside the run
# (method, batch-norm over all, head, queue in parts)
CASES = [
    ("moco", True, "mlp3_bn", False),
    ("moco", False, "mlp3_bn", True),
    ("published", True, "mlp2", True),
    ("published", False, "mlp2", False),
    ("guided", True, "mlp2", False),
    ("guided", False, "mlp2", False),
    ("lcr published", True, "mlp2", False),
    ("lcr guided", False, "mlp3_bn", True),
    ("simclr", True, "mlp3_bn", False),
    ("byol", True, "mlp3_bn", False),
    ("moco batch", True, "mlp2", False),
    ("moco both symmetric", False, "mlp3_bn", True),
    ("moco both gradient", False, "mlp3_bn", False),
    ("guided relations symmetric gradient", True, "mlp2", False),
    ("lcr guided both symmetric", False, "mlp2", True),
    ("guided image", False, "mlp2", False),
    ("moco frozen adamw", False, "mlp3_bn", False),
    ("moco lars", True, "mlp3_bn", False),
    ("guided frozen both symmetric", False, "mlp3_bn", True),
    ("lcr guided frozen adamw", False, "mlp2", False),
]
SWITCHES = {
    "batch": {"negatives": "batch"}, "both": {"negatives": "both", "empty_queue": True}, "symmetric": {"symmetric": True},
    "gradient": {"keys_with_gradient": True}, "frozen": {}, "adamw": {}, "lars": {},
}  # fmt: skip
"""What further words of a case mean to the contrast; ``frozen`` freezes the first stages, the optimizers clip."""


def build(name: str, sync: bool, head: str) -> Method:
    torch.manual_seed(0)
    trunk = Trunk("resnet10_w8_s16")
    options: dict = dict(dim=D, queue_size=K, bn_groups=1 if sync else WORLD, queue_dtype=torch.float64)
    head = projection_head(head, trunk.channels, D)
    words = name.split()
    trunk.freeze(("stem", "layer1") if "frozen" in words else ())
    name = " ".join(word for word in words if word not in SWITCHES)
    for word in words:
        options |= SWITCHES.get(word, {})
    if name == "moco":
        method: Method = MoCo(FeatureNet(trunk), head, **options)
    elif name == "simclr":
        method = SimCLR(FeatureNet(trunk), head)
    elif name == "byol":
        method = BYOL(FeatureNet(trunk), head, dim=D)
    elif name.startswith("lcr"):
        settings = variant("lcr", name.split()[1])
        branch = MaskBranch(trunk.channels, 5, minmax=settings.method.minmax, groups=options["bn_groups"])
        method = LCR(FeatureNet(trunk, branch), head, settings=settings, **options)
    else:
        name, _, target = name.partition(" ")
        settings = variant("ppssl", name, {"ais.target": target, "ais.temperature": 0.1} if target else {})
        branch = MaskBranch(trunk.channels, 5, minmax=settings.method.minmax, groups=options["bn_groups"])
        method = PPSSL(
            FeatureNet(trunk, branch), head, torch.randn(3, 7),
            settings=settings, embed=lambda x: x.detach().mean((2, 3)) @ look, teacher_dim=7, **options,
        )  # fmt: skip
    look = torch.randn(3, 7, dtype=torch.float64)
    with torch.no_grad():
        for parameter in method.parameters() if "frozen" not in words else ():  # away from the zeros that blocks begin with
            parameter.add_(0.1 * torch.randn_like(parameter))
    return method.double().train()


def batch(step: int, rank: int, processes: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    x_q, x_k = (torch.randn(B, 3, SIDE, SIDE, generator=generator, dtype=torch.float64) for _ in range(2))
    teacher = F.normalize(torch.randn(B, 7, generator=generator, dtype=torch.float64), dim=1)
    x_q, x_k, teacher, index = (t.chunk(processes)[rank] for t in (x_q, x_k, teacher, torch.arange(B)))
    return Batch(x_q, x_k, index, None, teacher)


def train(method: Method, name: str, rank: int, processes: int) -> dict[str, Tensor]:
    (kind,) = {"adamw", "lars"} & set(name.split()) or {"sgd"}
    optimizer = optim.build(method, OptimConfig(name=kind, lr=0.05, decay_norms=kind == "sgd"))  # type: ignore[arg-type]
    step = Step(
        method, optimizer, lr=lambda _: 0.05 if kind != "adamw" else 1e-3, decay=0.9, precision=precision.resolve(None, CPU),
        total_steps=STEPS, clip=None if kind == "sgd" else 0.5,
    )  # fmt: skip
    seen = {}
    for number in range(STEPS):
        output = step(batch(number, rank, processes))
        values = {"total": output.total} | output.terms | output.stats
        seen |= {f"step {number}: {name}": value.detach().clone() for name, value in values.items()}
    for i, state in step.optimizer.state_dict()["state"].items():
        seen |= {f"{what} {i}": tensor for what, tensor in state.items()}
    return seen | method.state_dict()


def work(rank: int, folder: str, recipe: str, ports: list[int]) -> None:
    """Everything that takes two processes, in one pair of them."""
    torch.set_num_threads(1)
    os.chdir(folder)
    compare_with_one(rank)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(WORLD), "WORLD_SIZE": str(WORLD)}
    os.environ["MASTER_ADDR"] = "127.0.0.1"

    def run(*arguments: str) -> int:
        os.environ["MASTER_PORT"] = str(ports.pop())  # one each: the first process may not have closed the one before
        return main(["--cfg", recipe, *arguments])

    codes = [run("--out", "whole")]
    stop_once_in(rank == 1, signal.SIGTERM)
    codes += [run("--out", "parts"), run("--out", "parts")]
    stop_once_in(rank == 0, signal.SIGINT)
    codes += [run("--out", "sharded", "queue.sharded=true")]
    # the processes measure different values, of which the first one's count
    measured = iter([0.5, 0.4, 0.3, 0.2] if rank == 0 else [0.1, 0.2, 0.3, 0.4])
    validation.headline = lambda records: {"rank1": next(measured)}
    codes += [run("--out", "early", "epochs=4", "eval.keep_best=rank1", "eval.patience=2", f"data.root={folder}/more")]
    torch.save(codes, f"codes{rank}.pt")


def stop_once_in(here: bool, number: int) -> None:
    """The next checkpoint is followed by a signal, to one process only."""
    save = Trainer.save

    def save_then_signal(self: Trainer) -> None:
        Trainer.save = save
        save(self)
        if here:
            signal.raise_signal(number)

    Trainer.save = save_then_signal


def compare_with_one(rank: int) -> None:
    cut, torch.Tensor.float = torch.Tensor.float, lambda t: t if t.dtype == torch.float64 else t.to(torch.float32)
    dist.init_process_group("gloo", init_method=f"file://{Path('store').absolute()}", rank=rank, world_size=WORLD)
    for number, (name, sync, head, sharded) in enumerate(CASES):
        method = build(name, sync, head)
        method.distribute(dist.group.WORLD.group_name, sync_bn=sync, shard_queue=sharded)
        several = train(method, name, rank, WORLD)
        if rank == 0:
            torch.save((several, train(build(name, sync, head), name, 0, 1)), f"case{number}.pt")
    dist.destroy_process_group()
    torch.Tensor.float = cut


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dataset.generate(
        tmp_path_factory.mktemp("world") / "birds", train_per_species=1, test_per_species=2, workers=1, progress=False
    )


@pytest.fixture(scope="module")
def pair(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have done their work."""
    folder = tmp_path_factory.mktemp("pair")
    recipe = folder / "tiny.yaml"
    recipe.write_text(TINY.replace("ROOT", str(world)))
    before = os.environ.get("PPSSL_CACHE")
    os.environ["PPSSL_CACHE"] = str(folder / "cache")
    try:
        dataset.generate(folder / "more", train_per_species=4, test_per_species=1, workers=1, progress=False)
        mp.spawn(work, (str(folder), str(recipe), free_ports(5)), nprocs=WORLD)
    finally:
        os.environ.pop("PPSSL_CACHE") if before is None else os.environ.update(PPSSL_CACHE=before)
    return folder


TINY = """\
epochs: 2
batch_size: 8
method: {name: moco}
encoder: {arch: resnet18_w8_s16, weights: none, dim: 8}
queue: {size: 21}
ema: {decay: 0.9}
data: {name: cub, root: ROOT, image_size: 32, workers: 0, loader: torch}
run: {log_every: 2, save_every_steps: 3}
eval: {batch_size: 30}
"""
TOTAL = 10  # 40 images, 2 epochs, batches of 8


def free_ports(count: int) -> list[int]:
    listeners = [socket.socket() for _ in range(count)]
    for listener in listeners:
        listener.bind(("127.0.0.1", 0))
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda i: "-".join(map(str, CASES[i])))
def test_two_processes_equal_one(pair: Path, number: int) -> None:
    several, one = torch.load(pair / f"case{number}.pt")
    assert several.keys() == one.keys() and any(name.startswith(("momentum", "exp_avg")) for name in one)
    assert ("queue.rows" in one) == (CASES[number][0] not in ("simclr", "byol", "moco batch"))
    assert int(one.get("queue.filled", K)) == K  # a queue that began empty is full
    for name, expected in one.items():
        bound = 1e-6 * expected.abs().max().clamp(min=1e-9) if expected.is_floating_point() else 0
        assert several[name].shape == expected.shape and (several[name] - expected).abs().max() <= bound, name


def final(folder: Path) -> dict[str, Tensor]:
    state = checkpoint.load(checkpoint.list_checkpoints(folder / "checkpoints")[-1])
    momenta = {f"momentum {i}": s["momentum_buffer"] for i, s in state["optimizer"]["state"].items()}
    return state["method"] | momenta | {"step": torch.tensor(state["step"])}


def test_a_run_of_two_processes_is_written_by_the_first(pair: Path) -> None:
    assert from_yaml(pair / "whole/config.yaml").bn.groups == WORLD  # what was computed is written down
    records = run_folder.read_metrics(pair / "whole")
    kinds = [r["kind"] for r in records]
    assert kinds.count("start") == kinds.count("summary") == 1 and kinds.count("eval") == 2 and kinds.count("train") == TOTAL // 2
    assert int(final(pair / "whole")["step"]) == TOTAL
    writers = {path.name.split(".")[-2] for path in (pair / "whole/tensorboard").iterdir()}  # process ids
    assert len(writers) == 1


def test_a_signal_to_any_process_stops_all_at_one_step_and_the_run_goes_on_to_the_bit(pair: Path) -> None:
    codes = [torch.load(pair / f"codes{rank}.pt") for rank in range(WORLD)]
    assert codes == [[0, 75, 0, 130, 0]] * WORLD
    whole, parts = final(pair / "whole"), final(pair / "parts")
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []


def test_all_processes_end_early_at_the_same_step(pair: Path) -> None:
    state = checkpoint.load(checkpoint.list_checkpoints(pair / "early/checkpoints")[-1])
    steps = state["steps_per_epoch"]
    # 0.5 was before training, so that epoch 1 is the best
    best = {name: state["best"][name] for name in ("measure", "mark", "since")}
    assert state["step"] == 3 * steps and best == {"measure": "rank1", "mark": [steps, 1, 0.4], "since": 2}
    records = run_folder.read_metrics(pair / "early")
    assert records[-1]["kind"] == "summary" and records[-1]["ended_early"]
    assert best_of(pair / "early")["step"] == str(steps)


def test_one_process_continues_what_two_with_a_queue_in_parts_began(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = final(pair / "sharded")
    assert 3 <= int(begun["step"]) < TOTAL and begun["queue.rows"].shape == (21, 8)
    monkeypatch.chdir(pair)
    monkeypatch.setenv("PPSSL_CACHE", str(pair / "cache"))
    assert main(["--cfg", "tiny.yaml", "--out", "sharded"]) == 2  # bn.groups differs: that would be another computation
    assert main(["--cfg", "tiny.yaml", "--out", "sharded", "bn.groups=2"]) == 0
    whole, continued = final(pair / "whole"), final(pair / "sharded")
    for name, expected in whole.items():
        assert torch.allclose(continued[name], expected, rtol=1e-4, atol=1e-5), name
    evaluated = [[r["mAP"] for r in run_folder.read_metrics(pair / run) if r["kind"] == "eval"] for run in ("whole", "sharded")]
    assert evaluated[0] == pytest.approx(evaluated[1], abs=0.01)


def test_a_killed_process_is_restarted_by_torchrun_and_the_run_ends_as_if_nothing_had_been(pair: Path) -> None:
    script = pair / "killed.py"
    script.write_text(
        textwrap.dedent("""\
        import os, signal, sys
        import torch
        from engine.train import main
        from engine.training.trainer import Trainer

        torch.set_num_threads(1)
        save = Trainer.save

        def save_then_die(self):
            save(self)
            if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1" and self.step.steps_done >= 6:
                os.kill(os.getpid(), signal.SIGKILL)

        Trainer.save = save_then_die
        sys.exit(main(sys.argv[1:]))
    """)
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={WORLD}", "--max-restarts=1",
         f"--master-port={free_ports(1)[0]}", "--monitor-interval=0.1", str(script), "--cfg", "tiny.yaml", "--out", "killed",
         "--resume", "none"],
        cwd=pair, env=os.environ | {"PPSSL_CACHE": str(pair / "cache"), "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"continuing killed/checkpoints/step_00000000[36].pt", done.stderr), done.stderr
    whole, killed = final(pair / "whole"), final(pair / "killed")
    assert [name for name in whole if not torch.equal(whole[name], killed[name])] == []


def test_processes_end_with_a_launcher_that_is_killed_and_the_run_can_be_started_again_at_once(tmp_path: Path) -> None:
    script = tmp_path / "orphans.py"
    script.write_text(
        textwrap.dedent("""\
        import contextlib, os, time
        from pathlib import Path
        from engine.run_folder import RunFolder
        from engine.training import distributed

        world = distributed.join()
        with RunFolder(Path("run")).locked() if world.first else contextlib.nullcontext():
            Path(f"{os.getpid()}.pid").touch()
            time.sleep(300)
    """)
    )
    port = f"--master-port={free_ports(1)[0]}"
    launcher = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={WORLD}", port, script.name],
        cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        until = time.monotonic() + 120
        while len(pids := [int(path.stem) for path in tmp_path.glob("*.pid")]) < WORLD:
            assert launcher.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        assert is_locked(tmp_path / "run")
    finally:
        launcher.kill()
        launcher.wait()
    until = time.monotonic() + 5
    while any(map(is_running, pids)) or is_locked(tmp_path / "run"):
        assert time.monotonic() < until, "a process outlives its launcher"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"  # a zombie waits for init only
    except OSError:
        return False


def is_locked(folder: Path) -> bool:
    try:
        with RunFolder(folder).locked():
            return False
    except RunFolderInUse:
        return True


TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "9"}
SLURM = {
    "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "123",
}  # fmt: skip


def test_the_launchers_variables() -> None:
    world, *address = described(TORCHRUN)
    assert (world.rank, world.size, world.local_rank, world.local_size, *address) == (3, 4, 1, 2, "a", "9") and not world.first
    world, *address = described(SLURM)
    assert (world.rank, world.size, world.local_rank, world.local_size, *address) == (5, 8, 1, 4, "gpu07", "20123")
    for alone in ({}, {"WORLD_SIZE": "1"}, {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, SLURM | {"SLURM_NTASKS": "1"}):
        assert described(alone) is None
    assert not restarted({}) and not restarted({"SLURM_RESTART_COUNT": "0"}) and restarted({"TORCHELASTIC_RESTART_COUNT": "2"})


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "4"}, "RANK: is not set"),
        (TORCHRUN | {"RANK": "4"}, "RANK: 4 is not below"),
        (TORCHRUN | {"WORLD_SIZE": "two"}, "WORLD_SIZE: is 'two'"),
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, "MASTER_ADDR: not set"),
    ],
)
def test_variables_that_do_not_fit_are_named(variables: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        described(variables)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("gpu03", "gpu03"), ("gpu[03-07,12],big1", "gpu03"), ("a1,a2", "a1"), ("n[1,3]-ib", "n1-ib"), ("", "")],
)
def test_the_first_host_of_a_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_a_process_needs_a_gpu_of_its_own() -> None:
    assert gpu_of(1, 2, TORCHRUN) == 1 and gpu_of(3, 1, SLURM) == 0
    with pytest.raises(ConfigError, match="LOCAL_RANK: 2, but this machine shows 2 GPUs"):
        gpu_of(2, 2, TORCHRUN)


def config(**values: int | bool) -> Config:
    text = "".join(f"{name.replace('__', ': {')}: {value}{'}' * ('__' in name)}\n" for name, value in values.items())
    return from_yaml(text)


def test_what_cannot_be_spread_is_refused() -> None:
    assert spread(config(batch_size=8), 4, 2).bn.groups == 4
    assert spread(config(batch_size=8, bn__sync="true"), 4, 2).bn.groups == 1
    assert spread(config(batch_size=8, bn__groups=4), 2, 2).bn.groups == 4
    with pytest.raises(ConfigError, match="batch_size: 9 .* use 8 or 10"):
        spread(config(batch_size=9), 2, 2)
    with pytest.raises(ConfigError, match="bn.groups: 2 parts .* 4 processes"):
        spread(config(batch_size=8, bn__groups=2), 4, 2)
    with pytest.raises(ValueError, match=r"run\.cuda_graph"):
        choose("off", "on", precision.Precision(torch.device("cuda"), None, False, ""), processes=2)

    class Lonely(Method):
        pass

    with pytest.raises(NotImplementedError, match="one process only"):
        Lonely().distribute("several", sync_bn=False, shard_queue=False)


def test_a_device_is_named_and_one_that_is_not_there_says_what_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"GPU {number}")
    for asked in ("cpu", "cuda", "cuda:0", "cuda:1"):
        assert choose_device(asked) == torch.device(asked)
    assert choose_device() == torch.device("cuda")
    with pytest.raises(
        ConfigError, match=r"run\.device: 'cuda:2' is not there; this machine has cpu, cuda:0 \(GPU 0\), cuda:1 \(GPU 1\)$"
    ):
        choose_device("cuda:2")
    with pytest.raises(ConfigError, match=r"--device: 'gpu' is no device; write auto, cpu, cuda, cuda:N or mps"):
        choose_device("gpu", "--device")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device() == torch.device("cpu")
    with pytest.raises(ConfigError, match="'mps' is not there; this machine has cpu;"):
        choose_device("mps")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match=r"no GPU is visible \(CUDA_VISIBLE_DEVICES=''\), see engine\.doctor"):
        choose_device("cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("mps") == torch.device("mps") and choose_device() == torch.device("cpu")
    assert precision.resolve("bf16", torch.device("mps")).dtype is None


def test_a_run_takes_the_device_it_is_given(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert join({}, "cpu").device == CPU and join({}).size == 1
    monkeypatch.setattr("engine.training.distributed.end_with_parent", lambda: None)
    with pytest.raises(ConfigError, match=r"run\.device: cuda:1 names one device, and there are 4 processes"):
        join(TORCHRUN, "cuda:1")
    assert from_yaml("run: {device: 'cuda:7'}").run.device == "cuda:7"
    with pytest.raises(ConfigError, match=r"run\.device: got 'gpu0', must be auto, cpu, cuda, cuda:N"):
        from_yaml("run: {device: gpu0}")
    if not torch.cuda.is_available():
        assert main(["--cfg", "demo", "--device", "cuda:9"]) == 2
        assert "run.device: 'cuda:9' is not there; this machine has cpu" in " ".join(capsys.readouterr().err.split())
