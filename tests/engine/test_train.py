"""``python -m engine.train`` from JPEG files to numbers: runs, resumes bit-identically, stops on signals, refuses what is wrong."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine import report, run, run_folder
from engine.config import flatten, from_yaml
from engine.evaluation import attention_maps, evaluator
from engine.synthetic import dataset
from engine.train import main
from engine.training import checkpoint
from engine.training.step import Step
from ppssl.moco import MoCo

TINY = """\
epochs: 2
batch_size: 8
method: {name: moco}
encoder: {arch: resnet18_w8_s16, weights: none, dim: 8}
queue: {size: 20}
ema: {decay: 0.9}
data: {name: cub, root: ROOT, image_size: 32, workers: 1, loader: torch}
run: {log_every: 2, save_every_steps: 3}
eval: {batch_size: 40}
"""
STEPS = 10  # 40 images, 2 epochs, batches of 8


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dataset.generate(
        tmp_path_factory.mktemp("world") / "birds", train_per_species=1, test_per_species=2, workers=1, progress=False
    )


@pytest.fixture
def recipe(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PPSSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.replace("ROOT", str(world)))
    return path


def events(out: Path) -> dict[str, list[int]]:
    """Steps by tag, as TensorBoard shows them."""
    found = EventAccumulator(str(out / "tensorboard")).Reload()
    return {tag: [event.step for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def states(out: Path) -> tuple[dict, dict]:
    newest = checkpoint.load(checkpoint.list_checkpoints(out / "checkpoints")[-1])
    return newest["method"], newest["optimizer"]["state"]


def assert_same_run(a: Path, b: Path) -> None:
    (method_a, optimizer_a), (method_b, optimizer_b) = states(a), states(b)
    assert method_a.keys() == method_b.keys()
    assert [n for n in method_a if not torch.equal(method_a[n], method_b[n])] == []
    for i, state in optimizer_a.items():
        assert torch.equal(state["momentum_buffer"], optimizer_b[i]["momentum_buffer"])
    # a line is the mean since the line before it: those that began after the interruption are equal
    losses = [[r["loss"] for r in run_folder.read_metrics(out) if r["kind"] == "train" and r["step"] >= 6] for out in (a, b)]
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_a_run_from_jpeg_files_to_retrieval_numbers(recipe: Path) -> None:
    assert main(["--cfg", str(recipe), "--amp"]) == 0
    out = Path("runs/tiny")  # the recipe's name
    assert from_yaml(out / "config.yaml").queue.size == 20
    records = run_folder.read_metrics(out)
    kinds = [r["kind"] for r in records]
    assert kinds[0] == "start" and kinds[-1] == "summary" and kinds.count("eval") == 2 and kinds.count("train") == STEPS // 2
    evaluated = [r for r in records if r["kind"] == "eval"]
    assert [r["epoch"] for r in evaluated] == [0, 2] and all(0 <= r[m] <= 1 for r in evaluated for m in ("rank1", "rank5", "mAP"))
    kept = json.loads((out / "evaluation.json").read_text())
    assert [(r["model"], r["epoch"], r["rank1"]) for r in kept] == [
        ("initial", 0, evaluated[0]["rank1"]), ("run", 2, evaluated[1]["rank1"])
    ]  # fmt: skip
    trained = [r for r in records if r["kind"] == "train"]
    assert all(
        r[name] >= 0 for r in trained for name in ("loss", "contrast", "contrast_top1", "grad_norm", "images_per_s", "data_wait")
    )
    assert len(checkpoint.list_checkpoints(out / "checkpoints")) == 2  # run.keep
    assert (out / "weights.safetensors").is_file() and (out / "bad_files.txt").is_file() and any((out / "tensorboard").iterdir())
    assert [look.epoch for look in attention_maps.read(out).looks] == [0, 1, 2] and "</html>" in (out / "report.html").read_text()


def test_interrupted_and_resumed_equals_uninterrupted_to_the_bit(recipe: Path, ctrl_c_at_first_save: Callable) -> None:
    assert main(["--cfg", str(recipe), "--out", "whole"]) == 0
    seen = ctrl_c_at_first_save()
    assert main(["--cfg", str(recipe), "--out", "parts"]) == 130
    assert seen == [3] and len(checkpoint.list_checkpoints(Path("parts/checkpoints"))) >= 1
    assert main(["--cfg", str(recipe), "--out", "parts"]) == 0
    assert_same_run(Path("whole"), Path("parts"))
    curves = events(Path("parts"))
    assert curves == events(Path("whole")) and curves["eval/rank1"] == [0, STEPS] and curves["train/loss"][-1] == STEPS
    assert "eval/mAP" in curves and not {"eval/queries", "eval/seconds", "train/step"} & curves.keys()


SWITCHES = (
    "queue.size=auto", "queue.start=empty", "ema.schedule=cosine", "contrast.symmetric=true", "contrast.negatives=both",
)  # fmt: skip


def test_a_queue_of_auto_is_written_down_and_the_run_goes_on_to_the_bit(
    recipe: Path, ctrl_c_at_first_save: Callable, capfd: pytest.CaptureFixture
) -> None:
    assert main(["--cfg", str(recipe), "--dry-run", *SWITCHES]) == 0
    assert main(["--cfg", str(recipe), "--out", "whole", *SWITCHES]) == 0
    assert "queue.size: 40 (auto, of 40 training photos)" in capfd.readouterr().err
    assert from_yaml(Path("whole/config.yaml")).queue.size == 40
    ctrl_c_at_first_save()
    assert main(["--cfg", str(recipe), "--out", "parts", *SWITCHES]) == 130
    assert main(["--cfg", str(recipe), "--out", "parts", *SWITCHES]) == 0
    assert "queue.size: 40 (as in the checkpoint)" in capfd.readouterr().err
    assert_same_run(Path("whole"), Path("parts"))
    method = states(Path("whole"))[0]
    assert method["queue.rows"].shape == (40, 8) and int(method["queue.filled"]) == 40 and int(method["queue.pointer"]) == 0
    assert main(["--cfg", str(recipe), "--out", "parts", *SWITCHES, "ema.schedule=constant"]) == 2
    assert "ema.schedule: the checkpoint" in " ".join(capfd.readouterr().err.split())


def test_keys_that_do_nothing_are_named(recipe: Path, capfd: pytest.CaptureFixture) -> None:
    line = ["method.name=simclr", "contrast.negatives=both", "ema.schedule=cosine", "iadm.cam_temperature=0.2"]
    assert main(["--cfg", str(recipe), "--dry-run", *line]) == 0
    shown = " ".join(capfd.readouterr().err.split())
    assert "contrast.negatives: does nothing here: simclr is symmetric" in shown
    assert "queue.size, iadm.cam_temperature: do nothing here: method simclr does not read it" in shown
    assert "ema.decay, ema.schedule: do nothing here: method simclr has no key network" in shown


@pytest.mark.parametrize("target", ["image", "relations"])
def test_a_run_learns_from_a_model_that_knows_no_text(target: str, recipe: Path, capfd: pytest.CaptureFixture) -> None:
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), "vit.safetensors")
    line = [
        "--cfg", str(recipe), "--out", target, "epochs=1", "method.name=ppssl", "method.variant=guided", "data.image_size=32",
        "encoder.arch=resnet18_w8_s16", "teacher.model=timm/test_vit", "teacher.weights=vit.safetensors", f"ais.target={target}",
        "teacher.image_size=64",
    ]  # fmt: skip
    assert main(line) == 0
    shown = " ".join(capfd.readouterr().err.split())
    assert (
        f"teacher: timm/test_vit, weights {Path('vit.safetensors').resolve()}; target {target}" in shown
        and "descriptions" not in shown
    )
    records = run_folder.read_metrics(Path(target))
    assert all(0 < r["ais"] < 3 for r in records if r["kind"] == "train")
    kept = json.loads(Path(target, "evaluation.json").read_text())
    assert [r["feature"] for r in kept if r["model"] == "teacher"] == ["image feature of timm/test_vit/vit.safetensors, 64-d"]
    assert main([*line, "teacher.view=query", "--resume", "none", "--dry-run"]) == 0
    assert main([*line, "ais.target=text"]) == 2
    assert "sees images and reads no text; use ais.target=image" in " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_sets_the_exit_code(number: int, code: int, recipe: Path) -> None:
    def send_when_training() -> None:
        while not (Path("stopped") / "checkpoints").is_dir():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send_when_training)
    sender.start()
    assert main(["--cfg", str(recipe), "--out", "stopped", "epochs=2000"]) == code
    sender.join()
    newest = checkpoint.list_checkpoints(Path("stopped/checkpoints"))[-1]
    assert checkpoint.load(newest)["step"] == int(newest.stem.split("_")[1]) > 0


def test_a_finished_run_is_shown_again_not_trained_again(recipe: Path, capfd: pytest.CaptureFixture) -> None:
    assert main(["--cfg", str(recipe)]) == 0
    capfd.readouterr()
    before = run_folder.read_metrics(Path("runs/tiny"))
    Path("runs/tiny/report.html").unlink()
    assert main(["--cfg", str(recipe)]) == 0
    shown = capfd.readouterr().err
    assert f"at step {STEPS} of {STEPS}" in shown and "runs/tiny was finished before" in shown
    assert run_folder.read_metrics(Path("runs/tiny")) == before and Path("runs/tiny/report.html").is_file()


def test_the_closing_lines_tell_what_was_measured(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    def said(*evaluations: dict) -> str:
        for record in evaluations:
            run_folder.append_metrics(tmp_path, {"kind": "eval", "step": 5} | record)
        run.closing_lines(tmp_path, {"steps": 0})
        (tmp_path / "metrics.jsonl").unlink()
        return " ".join(capfd.readouterr().err.split())

    first, last = ({"epoch": e, "protocol": "leave-one-out", "rank1": e / 2} for e in (0, 1))
    assert said(first, last).startswith("leave-one-out, epoch 0 -> epoch 1: rank1 0.0 % -> 50.0 %")
    assert said(last).startswith("leave-one-out, epoch 1: rank1 50.0 % run folder")
    unmeasured = {"epoch": 1, "protocol": "not applicable"}
    assert said(unmeasured | {"epoch": 0}, unmeasured).startswith("not applicable run folder")


def test_a_run_that_ended_before_it_was_evaluated_is_evaluated(recipe: Path) -> None:
    assert main(["--cfg", str(recipe)]) == 0
    path = Path("runs/tiny/metrics.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    first_of_the_end = next(i for i, line in enumerate(lines) if '"eval"' in line and f'"step": {STEPS},' in line)
    path.write_text("".join(lines[:first_of_the_end]))
    assert main(["--cfg", str(recipe)]) == 0
    kinds = [r["kind"] for r in run_folder.read_metrics(Path("runs/tiny"))]
    assert kinds.count("eval") == 2 and kinds.count("summary") == 1


def test_resume_none_moves_an_earlier_run_aside(recipe: Path) -> None:
    for _ in range(2):
        assert main(["--cfg", str(recipe), "--resume", "none", "epochs=1"]) == 0
    assert Path("runs/tiny/weights.safetensors").is_file() and Path("runs/tiny.1/weights.safetensors").is_file()


def test_a_run_records_its_images_and_where_they_lie(
    recipe: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here/birds").symlink_to(world)
    monkeypatch.chdir(tmp_path / "here")
    assert main(["--cfg", str(recipe), "data.root=birds", "--out", "run", "epochs=1"]) == 0
    assert from_yaml(Path("run/config.yaml")).data.root == str(tmp_path / "here/birds")
    (noted,) = [r for r in run_folder.read_metrics(Path("run")) if r["kind"] == "data"]
    assert noted["root"] == "../birds" and set(noted["lists"]) == {"train", "test"}
    records = json.loads(Path("run/evaluation.json").read_text())
    assert {r["fingerprint"] for r in records} == {noted["lists"]["test"][:16]} and all(r["own_data"] for r in records)
    lines = Path("run/metrics.jsonl").read_text().replace(noted["lists"]["test"], "0" * 64)
    Path("run/metrics.jsonl").write_text(lines)  # as if it had been tested on other images
    assert main(["--cfg", str(recipe), "data.root=birds", "--out", "run", "epochs=1"]) == 0
    assert "the images are not those of before step 5" in " ".join(capfd.readouterr().err.split())
    assert run_folder.read_data(Path("run"))["lists"]["test"] == "0" * 64  # what a finished run says of itself stays


def test_a_finished_run_keeps_the_settings_that_it_was_trained_by(recipe: Path, world: Path, tmp_path: Path) -> None:
    assert main(["--cfg", str(recipe), "--out", "run", "epochs=1"]) == 0
    config = Path("run/config.yaml").read_text()
    (tmp_path / "moved").symlink_to(world)
    assert main(["--cfg", str(recipe), "--out", "run", "epochs=1", "optim.lr=0.5", "data.root=moved"]) == 0
    then, now = (flatten(from_yaml(text)) for text in (config, Path("run/config.yaml").read_text()))
    assert now == then | {"data.root": str(tmp_path / "moved")}


@pytest.mark.parametrize("when", [0, 1, 2], ids=["before training", "between epochs", "after training"])
def test_a_full_disk_in_an_evaluation_names_the_file_the_checkpoint_and_the_remedy(
    when: int, recipe: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep, calls = evaluator.keep, []

    def full(path: Path, records: list, **options: object) -> list:
        calls.append(1)
        if len(calls) == when + 1:
            monkeypatch.setattr(Path, "write_text", no_space)
        return keep(path, records, **options)

    def no_space(self: Path, *_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluator, "keep", full)
    assert main(["--cfg", str(recipe), "--out", "full", "eval.every=1"]) == 1
    error = " ".join(capfd.readouterr().err.split())
    saved = ["none", "full/checkpoints/step_000000003.pt", "full/checkpoints/step_000000010.pt"][when]
    for words in ("evaluation", "full/evaluation.json", "No space left", f"last good checkpoint: {saved}", "make room"):
        assert words in error, error
    monkeypatch.undo()


def test_dry_run_runs_one_step_and_writes_nothing(recipe: Path, capfd: pytest.CaptureFixture) -> None:
    before = sorted(Path().rglob("*"))
    assert main(["--cfg", str(recipe), "--dry-run"]) == 0
    assert sorted(Path().rglob("*")) == before
    assert f"{STEPS} steps" in capfd.readouterr().err


def poison(monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], bool]) -> None:
    """Makes the loss of the n-th step (from 0) not finite where ``bad(n)``."""
    forward, calls = MoCo.forward, []

    def poisoned(self: MoCo, batch):
        calls.append(1)
        output = forward(self, batch)
        return output._replace(total=output.total * float("nan")) if bad(len(calls) - 1) else output

    monkeypatch.setattr(MoCo, "forward", poisoned)


def test_one_loss_that_is_not_finite_is_skipped_and_counted(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, lambda step: step == 4)
    assert main(["--cfg", str(recipe), "--out", "one"]) == 0
    assert [r["skipped"] for r in run_folder.read_metrics(Path("one")) if r["kind"] == "train"] == [0, 0, 1, 0, 0]
    assert all(math.isfinite(r["loss"]) for r in run_folder.read_metrics(Path("one")) if r["kind"] == "train")  # of the other steps


def test_a_streak_of_losses_that_are_not_finite_stops_the_run_and_names_everything(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    poison(monkeypatch, lambda step: step >= 4)
    assert main(["--cfg", str(recipe), "--out", "bad", "run.max_bad_steps=3"]) == 1
    error = capfd.readouterr().err.replace("\n", " ")
    assert "step 4" in error and "total nan" in error and "contrast" in error and "step_000000003.pt" in error
    assert "engine.replay bad/replay/step_000000004.pt" in error
    kept = checkpoint.list_checkpoints(Path("bad/checkpoints"))
    assert [p.name for p in kept] == ["step_000000003.pt"]  # none of the streak's
    assert all(torch.isfinite(t).all() for t in checkpoint.load(kept[0])["method"].values() if t.is_floating_point())


def ruin(monkeypatch: pytest.MonkeyPatch, after: int, factor: float) -> None:
    """Multiplies the weights after that step."""
    run = Step.__call__

    def ruining(self: Step, batch):
        output = run(self, batch)
        if self.steps_done == after:
            torch._foreach_mul_([p.data for p in self.parameters], factor)
        return output

    monkeypatch.setattr(Step, "__call__", ruining)


@pytest.mark.parametrize("factor", [1e30, 1e6], ids=["bad at once", "finite for a while"])
def test_ruined_weights_push_out_no_good_checkpoint_and_a_lower_rate_continues_there(
    factor: float, recipe: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    argv = ["--cfg", str(recipe), "--out", "ruined", "epochs=8", "run.save_every_steps=4", "run.keep=2", "run.log_every=1"]
    with monkeypatch.context() as patch:
        ruin(patch, 11, factor)
        if factor < 1e30:  # two saves later
            poison(patch, lambda step: step >= 21)
        assert main([*argv, "run.max_bad_steps=4"]) == 1
    error = " ".join(capfd.readouterr().err.split())
    assert "last good checkpoint: ruined/checkpoints/step_000000008.pt" in error and "lower optim.lr" in error
    assert [p.name for p in checkpoint.list_checkpoints(Path("ruined/checkpoints"))][-1] == "step_000000008.pt"
    left = [p.name for p in sorted(Path("ruined/checkpoints").glob("*.suspect"))]
    assert left == ([] if factor == 1e30 else ["step_000000016.suspect", "step_000000020.suspect"])
    assert main([*argv, "optim.lr=0.003", "optim.weight_decay=0.001"]) == 0
    said = " ".join(capfd.readouterr().err.split())
    assert "step_000000008.pt at step 8 of 40" in said
    assert "optim.lr: 0.003 from here on, 0.03 until" in said and "optim.weight_decay: 0.001 from here on" in said
    last = checkpoint.load(checkpoint.list_checkpoints(Path("ruined/checkpoints"))[-1])
    assert last["optimizer"]["param_groups"][0]["weight_decay"] == 0.001
    assert [r["lr"] for r in run_folder.read_metrics(Path("ruined")) if r["kind"] == "train" and r["step"] == 9][0] < 0.003


def test_a_run_stopped_in_a_streak_keeps_the_good_checkpoint_beside_what_it_saves(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["--cfg", str(recipe), "--out", "stopped", "run.save_every_steps=2", "run.keep=1", "run.log_every=1"]
    with monkeypatch.context() as patch:
        poison(patch, lambda step: step >= 4 and (step < 6 or signal.raise_signal(signal.SIGTERM) or True))
        assert main(argv) == 75
    names = [p.name for p in checkpoint.list_checkpoints(Path("stopped/checkpoints"))]
    assert names == ["step_000000004.pt", "step_000000007.pt"]
    assert "3 bad steps" in checkpoint.load(Path("stopped/checkpoints") / names[1])["doubt"]
    assert main(argv) == 0
    assert [p.name for p in checkpoint.list_checkpoints(Path("stopped/checkpoints"))] == ["step_000000010.pt"]


def fails(argv: list[str], capfd: pytest.CaptureFixture, *words: str, code: int = 1) -> None:
    """The command ends with ``code`` and one error line that holds ``words``, without a traceback."""
    assert main(argv) == code
    error = " ".join(capfd.readouterr().err.split())
    assert "error:" in error and "Traceback" not in error
    for word in words:
        assert word in error, f"{word!r} is not in {error!r}"


def test_a_checkpoint_of_another_config_or_method_is_refused(recipe: Path, capfd: pytest.CaptureFixture) -> None:
    assert main(["--cfg", str(recipe), "epochs=1"]) == 0
    words = "contrast.temperature", "0.2", "0.1", "--resume none"
    fails(["--cfg", str(recipe), "epochs=1", "contrast.temperature=0.1"], capfd, *words, code=2)
    fails(["--cfg", str(recipe), "epochs=1", "method.name=ppssl"], capfd, "method.name", "moco", "ppssl", code=2)
    assert main(["--cfg", str(recipe), "epochs=1", "run.log_every=1", "data.workers=0"]) == 0  # how it is executed may change


def test_damaged_and_foreign_checkpoints_are_refused(recipe: Path, capfd: pytest.CaptureFixture) -> None:
    Path("half.pt").write_bytes(b"PK\x03\x04half a file")
    fails(["--cfg", str(recipe), "--resume", "half.pt"], capfd, "half.pt")
    torch.save({"state_dict": {}}, "foreign.pt")
    fails(["--cfg", str(recipe), "--resume", "foreign.pt"], capfd, "foreign.pt", "encoder.weights")
    fails(["--cfg", str(recipe), "--resume", "absent.pt"], capfd, "absent.pt")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("batch_size=64 queue.size=64", ("64", "40", "batch_size")),
        ("data.root=/not/there", ("/not/there",)),
        ("encoder.arch=resnet19", ("encoder.arch", "resnet19")),
        ("encoder.weights=absent.safetensors", ("encoder.weights", "absent.safetensors")),
        ("encoder.weights=IMAGENET1K_V9", ("encoder.weights", "resnet18_w8_s16")),
        ("data.name=cars", ("cars",)),
        ("run.cuda_graph=on", ("run.cuda_graph", "GPU")),
        ("optim.backend=apex", ("optim.backend", "apex")),
    ],
)
def test_bad_input_gives_one_clear_error(override: str, words: tuple[str, ...], recipe: Path, capfd: pytest.CaptureFixture) -> None:
    fails(["--cfg", str(recipe), *override.split(), "--out", "never"], capfd, *words)
    assert not (Path("never") / "checkpoints").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method.name=byol9", ("method.name", "byol9", "moco", "ppssl")),
        ("data.root=null", ("data.root",)),
    ],
)
def test_config_errors_have_a_code_of_their_own(
    override: str, words: tuple[str, ...], recipe: Path, capfd: pytest.CaptureFixture
) -> None:
    fails(["--cfg", str(recipe), override, "--out", "never"], capfd, *words, code=2)


def test_without_pairs_of_a_class_nothing_is_evaluated(
    recipe: Path, world: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted((world / "images").rglob("*.jpg"))[:16]):
        (flat / f"{i}.jpg").symlink_to(path)
    assert main(["--cfg", str(recipe), "data.name=folder", f"data.root={flat}", "--out", "flat-run", "epochs=1"]) == 0
    assert "nothing to evaluate" in capfd.readouterr().err
    assert "eval" not in [r["kind"] for r in run_folder.read_metrics(Path("flat-run"))]


def test_training_without_labels_says_what_it_read_and_left_out_and_is_evaluated_on_a_labelled_test_split(
    recipe: Path, world: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    root = tmp_path / "photos"
    pictures = sorted((world / "images").rglob("*.jpg"))
    targets = [f"Training/{i}.jfif" for i in range(12)] + [f"validation/{c}/{i}.jpg" for c in "ab" for i in range(2)]
    for path, target in zip(pictures, targets, strict=False):
        (root / target).parent.mkdir(parents=True, exist_ok=True)
        (root / target).symlink_to(path)
    (root / "Training/notes.txt").write_text("mine")
    assert main(["--cfg", str(recipe), "data.name=folder", f"data.root={root}", "--out", "mixed", "epochs=1"]) == 0
    said = capfd.readouterr().err
    lines = [
        "train: 12 photos without labels from Training/",
        "test: 4 photos in 2 classes from validation/",
        "1 of 17 files left out: 1 x .txt; see mixed/bad_files.txt",
        "epoch 0: rank1",
    ]
    places = [said.index(line) for line in lines]
    assert places == sorted(places)


def test_records_are_json_lines(recipe: Path) -> None:
    assert main(["--cfg", str(recipe), "epochs=1"]) == 0
    for line in Path("runs/tiny/metrics.jsonl").read_text().splitlines():
        assert "step" in json.loads(line)


def test_the_last_lines_count_the_warnings_and_do_not_repeat_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for told, words in ((0, ""), (1, "1 warning above; the report lists what people do about it"), (2, "2 warnings above")):
        run.closing_lines(tmp_path, {"steps": 0, "collapsed": told > 0}, told)
        said = capsys.readouterr().err
        assert words in said and ("above" in said) is (told > 0) and "same feature" not in said


def test_black_images_are_told_once_and_once_in_the_report(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "test"):
        for number in range(8):
            picture = tmp_path / "black" / split / f"class_{number % 2}" / f"{number}.png"
            picture.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (0, 0, number)).save(picture)
    changes = ["data.name=folder", "data.root=black", "queue.size=8", "eval.every=1", "epochs=6", "run.loggers=[tensorboard,csv]"]
    assert main(["--cfg", str(recipe), "--out", "dark", *changes]) == 0
    said = capsys.readouterr().err
    assert said.count("all images give nearly the same feature") == 1 and said.count("collapsed feature") == 1
    assert "warning: step 1: collapsed feature: " in said and "1 warning above" in said
    assert Path("dark/report.html").read_text().count("all images give nearly the same feature") == 1
    assert main(["--cfg", str(recipe), "--out", "dark", *changes]) == 0  # it is finished
    assert "nearly the same" not in capsys.readouterr().err
    assert len(Path("dark/metrics.csv").read_text().splitlines()) == 1 + 3 + 7


def test_a_page_that_fails_costs_the_run_nothing(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr(report, "write", fail)
    assert main(["--cfg", str(recipe), "epochs=1"]) == 0
    told = capsys.readouterr().err
    assert "no report (RuntimeError: no ink)" in told and "python -m engine.report runs/tiny" in told
    assert run_folder.read_metrics(Path("runs/tiny"))[-1]["kind"] == "summary"


def test_a_second_process_is_refused_while_one_trains(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = "import sys; from pathlib import Path; from engine.run_folder import RunFolder\n"
    code += "with RunFolder(Path(sys.argv[1])).locked(): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        assert main(["--cfg", str(recipe), "--out", str(tmp_path / "run")]) == 1
        assert f"pid {other.pid}" in capsys.readouterr().err
        other.communicate(b"")
    assert not (tmp_path / "run").exists()
    assert main(["--cfg", str(recipe), "--out", str(tmp_path / "run"), "epochs=1"]) == 0


WINDOWS = """\
import multiprocessing, os, signal, sys
import torchvision
sys.modules |= dict.fromkeys(("fcntl", "triton", "nvidia", "nvidia.dali"))
del signal.SIGUSR1, os.sysconf, os.sched_getaffinity
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    from engine.train import main
    sys.exit(main(sys.argv[1:]))
"""


def test_a_system_without_posix_trains_and_says_that_nothing_is_locked(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "windows.py").write_text(WINDOWS)
    command = [sys.executable, str(tmp_path / "windows.py"), "--cfg", str(recipe), "epochs=1", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "no POSIX locks" in done.stderr and not (tmp_path / "run/.lock").exists()
    assert run_folder.read_metrics(tmp_path / "run")[-1]["kind"] == "summary"
