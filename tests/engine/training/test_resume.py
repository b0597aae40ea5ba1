"""What may continue a checkpoint: the same images, in the run's own folder or an empty one, and which loader did what."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_runs import draw

from engine import run_folder
from engine.config import ConfigError
from engine.data.catalog import ImageList, load
from engine.train import main
from engine.training import checkpoint
from engine.training.resume import listing, refuse_change, refuse_other_images, refuse_other_run

RECIPE = """\
epochs: 3
batch_size: 4
method: {name: moco}
encoder: {arch: resnet18_w8_s16, weights: none, dim: 8}
queue: {size: 8, exclude_same_image: true}
data: {name: folder, root: photos, image_size: 32, workers: 0, loader: torch, resident: off}
run: {log_every: 1, save_every_steps: 2, keep: 9}
"""


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve images without labels, and a recipe of nine steps over them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PPSSL_CACHE", str(tmp_path / "cache"))
    for number in range(12):
        draw(tmp_path / "photos" / f"{number:02}.png", number % 3, number)
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    return tmp_path / "photos"


def images(root: Path) -> ImageList:
    return load("folder", root, progress=False).train


def train(*argv: str) -> int:
    return main(["--cfg", "tiny.yaml", *argv])


def said(capfd: pytest.CaptureFixture) -> str:
    return " ".join(capfd.readouterr().err.split())


def remove_two(root: Path) -> None:
    for name in ("03.png", "07.png"):
        (root / name).unlink()


def add_one(root: Path) -> None:
    draw(root / "new.png", 0, 77)


def change_one(root: Path) -> None:
    shutil.copy(root / "04.png", root / "05.png")
    with (root / "05.png").open("ab") as file:
        file.write(b"more")


CHANGES = [
    (remove_two, "2 removed (03.png, 07.png) of 12"),
    (add_one, "1 added (new.png) of 12"),
    (change_one, "1 changed (05.png) of 12"),
]


@pytest.mark.parametrize(("change", "words"), CHANGES, ids=["removed", "added", "changed"])
@pytest.mark.parametrize("finished", [False, True], ids=["in the middle", "finished"])
def test_other_images_are_refused_with_counts_and_examples(
    change: Callable[[Path], None], words: str, finished: bool, photos: Path, capfd: pytest.CaptureFixture
) -> None:
    assert train("--out", "run") == 0
    if not finished:
        for path in checkpoint.list_checkpoints(Path("run/checkpoints"))[2:]:
            path.unlink()
    change(photos)
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    assert train("--out", "run") == 2
    text = said(capfd)
    for part in (words, str(photos), "data.allow_change=true", "--resume none"):
        assert part in text
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before
    assert train("--out", "run", "--resume", "none") == 0
    assert Path("run.1/weights.safetensors").is_file()


def test_a_change_that_is_accepted_is_said_and_what_is_remembered_follows(photos: Path, capfd: pytest.CaptureFixture) -> None:
    assert train("--out", "run") == 0
    for path in checkpoint.list_checkpoints(Path("run/checkpoints"))[3:]:
        path.unlink()
    then = images(photos)
    before = checkpoint.load(Path("run/checkpoints/step_000000006.pt"))["method"]["queue.index"].tolist()
    (photos / "00.png").rename(photos / "zz.png")
    now = images(photos)
    places = refuse_other_images(listing(then), now, Path("x"), allow=True)
    assert [now.names[places[i]] if places[i] >= 0 else None for i in before] == [
        None if then.names[i] == "00.png" else then.names[i] for i in before
    ]
    assert train("--out", "run", "data.allow_change=true") == 0
    assert "1 added (zz.png), 1 removed (00.png)" in said(capfd)
    last = checkpoint.load(checkpoint.list_checkpoints(Path("run/checkpoints"))[-1])
    assert last["step"] == 9 and listing(now)["fingerprint"] == last["images"]["fingerprint"]
    assert train("--out", "run") == 0  # these are its images now


def test_a_setting_that_chooses_other_images_is_named(photos: Path, capfd: pytest.CaptureFixture) -> None:
    assert train("--out", "run") == 0
    said(capfd)
    assert train("--out", "run", "data.fraction=0.75", "epochs=4") == 2
    told = said(capfd)
    assert "data.fraction=0.75 (was 1.0): the training images in" in told and "Set it back" in told and "data.root:" not in told
    assert train("--out", "run", "data.fraction=0.75", "data.allow_change=true", "epochs=4") == 0


def test_a_copy_of_the_images_is_taken_and_said(photos: Path, capfd: pytest.CaptureFixture) -> None:
    then = images(photos)
    shutil.copytree(photos, "copy", copy_function=shutil.copy)
    for number, path in enumerate(sorted(Path("copy").iterdir())):
        os.utime(path, ns=(number, number))
    copy = images(Path("copy"))
    assert copy.fingerprint != then.fingerprint and copy.identity == then.identity
    assert refuse_other_images(listing(then), copy, Path("x")) is None
    assert "other modification times" in said(capfd)
    assert refuse_other_images(listing(then), then, Path("x")) is None and said(capfd) == ""


def test_another_order_of_the_same_images_is_no_copy(photos: Path) -> None:
    then = images(photos)
    turned = replace(then, names=then.names[::-1], file_sizes=then.file_sizes[::-1], fingerprint="other")
    with pytest.raises(ConfigError, match="another order of 12"):
        refuse_other_images(listing(then), turned, Path("x"))
    assert refuse_other_images(listing(then), turned, Path("x"), allow=True).tolist() == [*range(11, -1, -1), -1]


def test_a_checkpoint_that_does_not_know_its_images_is_continued_with_a_line(photos: Path, capfd: pytest.CaptureFixture) -> None:
    assert train("--out", "run") == 0
    for path in checkpoint.list_checkpoints(Path("run/checkpoints")):
        state = checkpoint.load(path)
        for new in ("images", "health", "loader", "doubt", "good", "good_step"):  # as version 637275a wrote it
            del state[new]
        checkpoint.write(path, state)
    remove_two(photos)
    add_one(photos)
    add_one(photos / "more")
    assert train("--out", "run") == 0
    assert "does not say which images" in said(capfd)


def test_a_name_of_a_file_does_nothing_to_the_terminal(photos: Path) -> None:
    then = images(photos)
    with pytest.raises(ConfigError) as refused:
        refuse_other_images(listing(then), replace(then, names=(*then.names[1:], "\x1b[2J"), fingerprint="other"), Path("x"))
    assert "\x1b" not in str(refused.value) and "\\x1b[2J" in str(refused.value)


def test_a_checkpoint_goes_to_an_empty_folder_or_its_own_never_to_another_run(photos: Path, capfd: pytest.CaptureFixture) -> None:
    assert train("--out", "a") == 0 and train("--out", "b", "seed=1") == 0
    before = {path: path.read_bytes() for path in Path("b").rglob("*") if path.is_file()}
    for source in ("a", "a/checkpoints/step_000000004.pt"):
        assert train("--out", "b", "--resume", source) == 2
        assert "would be mixed" in said(capfd)
    assert {path: path.read_bytes() for path in Path("b").rglob("*") if path.is_file()} == before

    again = "--out", "c", "--resume", "a/checkpoints/step_000000004.pt"
    assert train(*again) == 0
    first = run_folder.read_metrics(Path("c"))[0]
    assert first["kind"] == "resume" and first["from"] == str(Path("a/checkpoints/step_000000004.pt").resolve())
    for path in checkpoint.list_checkpoints(Path("c/checkpoints"))[2:]:  # as if it had been killed
        path.unlink()
    capfd.readouterr()
    assert train(*again) == 0
    assert "continuing c/checkpoints/step_000000008.pt" in said(capfd)  # the same command continues
    shutil.rmtree("c/checkpoints")
    assert train(*again) == 0
    states = [checkpoint.load(Path(run) / "checkpoints/step_000000009.pt")["method"] for run in ("a", "c")]
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []
    assert train("--out", "c", "--resume", "b") == 2


def test_an_earlier_checkpoint_of_the_same_run_sets_the_later_ones_aside(photos: Path, capfd: pytest.CaptureFixture) -> None:
    assert train("--out", "a") == 0
    assert train("--out", "a", "--resume", "a/checkpoints/step_000000004.pt", "optim.lr=0.01") == 0
    assert "step_000000009.pt is of a later step" in said(capfd)
    assert {path.stem for path in Path("a/checkpoints").glob("*.later")} == {f"step_00000000{n}" for n in (6, 8, 9)}
    steps = [r["step"] for r in run_folder.read_metrics(Path("a")) if r["kind"] == "train"]
    assert steps == list(range(1, 10))


def test_another_loader_is_said(capfd: pytest.CaptureFixture) -> None:
    def compare(then: dict, now: str) -> str:
        refuse_other_run(Path("x.pt"), then, None, None, now)
        return said(capfd)

    assert "loader: dali (cpu) from here on, torch until x.pt" in compare({"loader": "torch"}, "dali (cpu)")
    assert compare({"loader": "torch"}, "torch") == compare({}, "dali (cpu)") == ""


@pytest.mark.parametrize(
    ("then", "now", "processes", "way"),
    [(1, 2, 2, "start 1 to continue"), (6, 4, 4, "start 1 or 2 or 3 or 6 to"), (2, 1, 1, "give bn.groups=2 to continue")],
)
def test_the_number_of_processes_that_can_continue_is_named(then: int, now: int, processes: int, way: str) -> None:
    with pytest.raises(ConfigError, match=way):
        refuse_change({"bn.groups": then}, {"bn.groups": now}, Path("x.pt"), processes)
