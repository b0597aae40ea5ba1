"""``python -m engine.evaluate``: runs and weights files, baselines, what is written, what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from engine import build, run_folder
from engine.config import Config, from_yaml, to_yaml
from engine.evaluate import main, retrieval
from engine.evaluation import linear
from engine.pretrained import model_card
from engine.pretrained.weights_file import save_weights
from engine.report import run as report_run


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A labelled folder: three colors, of which one class has a single test image."""
    root = tmp_path / "photos"
    generator = np.random.default_rng(0)
    for split, counts in (("train", (4, 4, 4)), ("test", (3, 4, 1))):
        for label, count in enumerate(counts):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 40, (48, 60, 3)) + 200 * np.eye(3)[label]
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


def small_config(root: Path) -> Config:
    data = f"data: {{name: folder, root: '{root}', image_size: 32, workers: 0}}\n"
    network = "method: {name: moco}\nencoder: {arch: resnet18_w8, weights: none, dim: 8}\n"
    return from_yaml(data + network + "eval: {batch_size: 3}\nbatch_size: 2\nqueue: {size: 4, dtype: float32}")


@pytest.fixture
def run(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder as training leaves it, with weights that are not the initial ones."""
    monkeypatch.setenv("PPSSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(linear, "PENALTIES", (1e-2, 1e-4))
    cfg = small_config(photos)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(cfg))
    network = build.initial_network(replace(cfg, seed=1))
    save_weights(folder / "weights.safetensors", network.weights(), {"step": "12", "epoch": "3"})
    return folder


def written(path: Path) -> list[dict]:
    return json.loads(path.read_text())


def without_seconds(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records]


def test_the_command_prints_and_writes(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert main([str(run)]) == 0  # eval.protocols
    (record,) = written(run / "evaluation.json")
    assert (record["model"], record["protocol"], record["split"], record["data"]) == ("run", "retrieval", "test", "folder")
    assert (record["epoch"], record["step"], record["images"], record["classes"]) == (3, 12, 8, 3)
    assert (record["queries"], record["excluded"]) == (7, 1) and record["feature"] == "l2(gap(F)), 64-d"
    shown = " ".join(capsys.readouterr().err.split())
    for word in ("leave-one-out", "l2(gap(F))", "test split: 8 images", f"{100 * record['rank1']:.2f} %", "evaluation.json"):
        assert word in shown
    assert main([str(run), "--out", str(tmp_path / "mine.json")]) == 0
    assert without_seconds(written(tmp_path / "mine.json")) == without_seconds([record | {"source": str(run)}])
    features = load_file(run / "features" / "test.safetensors")["features"]
    labels = build.data(from_yaml(run / "config.yaml"), cache_dir=None).test.labels
    assert retrieval(features, labels) == tuple(record[name] for name in ("rank1", "rank5", "mAP", "queries", "excluded"))


def shown_in_card(run: Path) -> str:
    return " ".join(model_card._table(model_card.metrics(run, [])))


@pytest.mark.parametrize("recorded", [True, False], ids=["a run that knows its images", "a run of an earlier version"])
def test_other_data_are_added_beside_and_are_no_results_of_the_run(
    recorded: bool, run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    other = tmp_path / "other"
    shutil.copytree(photos / "train", other / "train")
    shutil.copytree(photos / "train", other / "test")
    if recorded:
        lists = build.data(from_yaml(run / "config.yaml"), cache_dir=None)
        run_folder.append_data(run, 0, str(photos), {"train": lists.train.identity, "test": lists.test.identity})
    line = [str(run), "--protocol", "retrieval,knn"]
    assert main(line) == 0
    own, card = written(run / "evaluation.json"), shown_in_card(run)
    assert all(r["own_data"] and r["root"] == str(photos) for r in own)
    capsys.readouterr()
    assert main([*line, f"data.root={other}"]) == 0
    assert "not the images of the run" in said(capsys)
    records = written(run / "evaluation.json")
    assert records[: len(own)] == own and len(records) == 2 * len(own)
    assert all(not r["own_data"] and r["root"] == str(other) and r["images"] == 12 for r in records[len(own) :])
    assert shown_in_card(run) == card and [r for r in report_run._evaluation(run)] == own
    assert main([*line, f"data.root={other}"]) == 0 and len(written(run / "evaluation.json")) == len(records)  # each once


def test_a_copy_of_the_data_is_the_same_and_changed_images_are_not(run: Path, photos: Path, tmp_path: Path):
    lists = build.data(from_yaml(run / "config.yaml"), cache_dir=None)
    run_folder.append_data(run, 0, str(photos), {"train": lists.train.identity, "test": lists.test.identity})
    assert main([str(run)]) == 0
    shutil.copytree(photos, tmp_path / "copy", copy_function=shutil.copy)
    assert main([str(run), f"data.root={tmp_path / 'copy'}"]) == 0
    (record,) = written(run / "evaluation.json")
    assert record["own_data"] and record["root"] == str(tmp_path / "copy")
    (photos / "test/class0/0.png").unlink()
    assert main([str(run)]) == 0
    first, second = written(run / "evaluation.json")
    assert first == record and second["images"] == 7 and not second["own_data"]


def test_another_precision_and_another_run_are_other_records(run: Path, tmp_path: Path):
    for line in ([], ["amp=bf16"]):
        assert main([str(run), *line]) == 0
    assert [r["amp"] for r in written(run / "evaluation.json")] == [None, "bf16"]
    shutil.copytree(run, tmp_path / "second")
    for folder in (run, tmp_path / "second", run):
        assert main([str(folder), "--out", str(tmp_path / "both.json")]) == 0
    assert [Path(r["source"]).name for r in written(tmp_path / "both.json")] == ["second", "run"]


def test_records_that_do_not_say_which_images_they_are_of_are_replaced(run: Path):
    assert main([str(run)]) == 0
    (record,) = written(run / "evaluation.json")
    old = {k: v for k, v in record.items() if k not in ("fingerprint", "own_data", "root", "amp")}
    (run / "evaluation.json").write_text(json.dumps([old]))
    assert main([str(run)]) == 0
    assert without_seconds(written(run / "evaluation.json")) == without_seconds([record])


@pytest.mark.parametrize("kept", ["relative", "absolute"], ids=["as an earlier version wrote it", "moved as a whole"])
def test_a_run_is_evaluated_from_any_folder_and_after_both_have_moved(
    kept: str, run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    if kept == "relative":
        (run / "config.yaml").write_text(to_yaml(small_config(Path("photos"))))
        elsewhere = tmp_path
    else:
        run_folder.append_data(run, 0, str(photos), {"train": "x", "test": "y"})
        elsewhere = tmp_path / "moved"
        elsewhere.mkdir()
        for folder in (run, photos):
            folder.rename(elsewhere / folder.name)
    monkeypatch.chdir("/")
    assert main([str(elsewhere / "run")]) == 0
    assert written(elsewhere / "run/evaluation.json")[0]["root"] == str(elsewhere / "photos")
    assert f"{elsewhere / 'photos'} is taken" in said(capsys)
    assert report_run.read(elsewhere / "run", torch.device("cpu")).split == "test"
    (elsewhere / "photos").rename(elsewhere / "gone")
    assert main([str(elsewhere / "run")]) == 1
    assert "photos" in said(capsys)


def test_all_protocols_fractions_and_row_0(run: Path, capsys: pytest.CaptureFixture[str]):
    line = [str(run), "--protocol", "retrieval,knn,linear", "--fractions", "100,50,20", "--baselines"]
    assert main(line) == 0
    records = written(run / "evaluation.json")
    assert {r["model"] for r in records} == {"run", "initial"}  # MoCo has no teacher
    for model, epoch in (("run", 3), ("initial", 0)):
        own = [r for r in records if r["model"] == model]
        assert {r["epoch"] for r in own} == {epoch}
        assert [(r["protocol"], r.get("solver"), r.get("fraction"), r.get("k")) for r in own] == [
            ("retrieval", None, None, None), ("knn", None, None, 10), ("knn", None, None, 12),
            ("linear", "convex", 100, None), ("linear", "sgd", 100, None),
            ("linear", "convex", 50, None), ("linear", "sgd", 50, None), ("linear", "sgd", 20, None),
        ]  # fmt: skip
        assert [r["train_images"] for r in own[3:]] == [12, 12, 6, 6, 3]
        assert [r["train_images_a_class"] for r in own[3:]] == [[4, 4], [4, 4], [2, 2], [2, 2], [1, 1]]
        assert all(0 <= r["top1"] <= 1 for r in own[1:])
    shown = " ".join(capsys.readouterr().err.split())
    for word in ("knn, k 12", "linear sgd, 50 %", "3 training images", "draw 0", "initial", "convex, 20 %: left out"):
        assert word in shown
    # Asked again, records take the place of the older ones.
    assert main([str(run), "--protocol", "linear,retrieval", "--baselines"]) == 0
    again = without_seconds(written(run / "evaluation.json"))
    assert len(again) == len(records) and all(record in again for record in without_seconds(records))


def test_row_0_of_a_run_with_a_teacher(run: Path, photos: Path):
    text = to_yaml(small_config(photos)).replace("name: moco", "name: ppssl").replace("ViT-B-32-quickgelu", "birds")
    cfg = from_yaml(text.replace("weights: openai", "weights: birds"))
    (run / "config.yaml").write_text(to_yaml(cfg))
    save_weights(run / "weights.safetensors", build.initial_network(cfg).weights(), {"step": "0", "epoch": "0"})
    assert main([str(run), "--baselines"]) == 0
    mine, initial, teacher = written(run / "evaluation.json")
    assert [r["model"] for r in (mine, initial, teacher)] == ["run", "initial", "teacher"]
    assert mine["feature"] == initial["feature"] == "l2(gap(A * F)), 64-d" and mine["mAP"] == initial["mAP"]
    assert "image feature of" in teacher["feature"] and teacher["epoch"] is None and 0 <= teacher["rank1"] <= 1


def test_a_weights_file_with_a_recipe(run: Path, tmp_path: Path):
    assert main([str(run)]) == 0
    (expected,) = written(run / "evaluation.json")
    recipe = tmp_path / "recipe.yaml"
    shutil.copy(run / "config.yaml", recipe)
    tensors = load_file(run / "weights.safetensors")
    torch.save({"state_dict": {f"module.encoder_q.{name}": tensor for name, tensor in tensors.items()}}, tmp_path / "moco.pth")
    shutil.copy(run / "weights.safetensors", tmp_path / "mine.safetensors")
    for name in ("moco.pth", "mine.safetensors"):
        assert main([str(tmp_path / name), "--cfg", str(recipe), "eval.batch_size=3"]) == 0
        (record,) = written((tmp_path / name).with_suffix(".evaluation.json"))
        assert (record["model"], record["epoch"]) == ("weights", None)
        assert all(record[n] == expected[n] for n in ("rank1", "rank5", "mAP", "feature"))


def test_a_weights_file_with_a_mask_branch(run: Path, photos: Path, tmp_path: Path):
    cfg = from_yaml(to_yaml(small_config(photos)).replace("name: moco", "name: lcr"))
    (tmp_path / "lcr.yaml").write_text(to_yaml(cfg))
    save_weights(tmp_path / "lcr.safetensors", build.initial_network(cfg).weights(), {})
    assert main([str(tmp_path / "lcr.safetensors"), "--cfg", str(tmp_path / "lcr.yaml")]) == 0
    assert written(tmp_path / "lcr.evaluation.json")[0]["feature"] == "l2(gap(A * F)), 64-d"


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_data_that_cannot_be_evaluated(run: Path, photos: Path, capsys: pytest.CaptureFixture[str]):
    flat = photos / "test" / "class1"
    assert main([str(run), f"data.root={flat}"]) == 1
    text = said(capsys)
    assert "has no labels" in text and "engine.search" in text and "engine.report" in text

    shutil.rmtree(photos / "test")
    assert main([str(run)]) == 1
    text = said(capsys)
    assert "no labelled test split" in text and "test/<class>" in text and "--split train" in text
    assert main([str(run), "--protocol", "retrieval", "--split", "train"]) == 0
    assert written(run / "evaluation.json")[-1]["split"] == "train"
    assert main([str(run), "--protocol", "retrieval,knn", "--split", "train"]) == 1
    assert "leaves the asked image out" in said(capsys)
    assert main([str(run), f"data.root={photos / 'gone'}"]) == 1
    assert "gone" in said(capsys)


@pytest.mark.parametrize("train", ["without labels", "not there"])
def test_a_test_split_is_enough_for_retrieval(train: str, run: Path, photos: Path, capsys: pytest.CaptureFixture[str]):
    shutil.rmtree(photos / "train" / "class0")
    for file in list((photos / "train").rglob("*.png")):
        file.rename(photos / "train" / f"{file.parent.name}-{file.name}")
    for folder in ("class1", "class2"):
        (photos / "train" / folder).rmdir()
    if train == "not there":
        shutil.rmtree(photos / "train")
    assert main([str(run), "--protocol", "retrieval,knn"]) == 0
    assert "knn left out: there are no labelled training images" in said(capsys)
    (record,) = written(run / "evaluation.json")
    assert record["protocol"] == "retrieval" and record["split"] == "test" and record["images"] == 8
    assert main([str(run), "--protocol", "knn,linear"]) == 1
    text = said(capsys)
    assert "knn and linear learn from labelled training images" in text and "--protocol retrieval" in text
    assert main([str(run), "--protocol", "knn"]) == 1 and "knn learns from" in said(capsys)
    assert main([str(run), "--protocol", "retrieval", "--split", "train"]) == 1
    assert "have no labels" in said(capsys)


def test_every_class_with_a_single_image(run: Path, photos: Path, capsys: pytest.CaptureFixture[str]):
    for label in (0, 1):
        for file in sorted((photos / "test" / f"class{label}").iterdir())[1:]:
            file.unlink()
    assert main([str(run)]) == 1
    assert "no class has two images" in said(capsys)


def test_test_classes_without_training_images_count_as_wrong(run: Path, photos: Path, capsys: pytest.CaptureFixture[str]):
    shutil.rmtree(photos / "train" / "class0")
    assert main([str(run), "--protocol", "knn,linear"]) == 0
    assert "3 of 8 test images are of classes without training images" in said(capsys)
    assert all(r["unseen"] == 3 and r["top1"] <= 5 / 8 for r in written(run / "evaluation.json"))


def test_what_is_no_run_and_no_weights_file(run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(tmp_path / "nothing")]) == 1
    assert "run folder or a weights file" in said(capsys)
    assert main([str(photos)]) == 1
    assert "not a run folder" in said(capsys)

    recipe = str(run / "config.yaml")
    for name, content in (("a.safetensors", b"no tensors"), ("a.pth", b"no tensors"), ("a.txt", b"")):
        (tmp_path / name).write_bytes(content)
        assert main([str(tmp_path / name), "--cfg", recipe]) == 1
        assert name in said(capsys)
    assert main([str(tmp_path / "a.pth")]) == 1
    assert "--cfg" in said(capsys)
    save_weights(tmp_path / "other.safetensors", {"word.embedding": torch.zeros(3)}, {})
    assert main([str(tmp_path / "other.safetensors"), "--cfg", recipe]) == 1
    assert "nothing in" in said(capsys)

    assert main([str(run), "encoder.arch=resnet50"]) == 1
    assert "evaluated as it was trained" in said(capsys)
    (run / "weights.safetensors").unlink()
    assert main([str(run)]) == 1
    assert "weights.safetensors" in said(capsys)


@pytest.mark.parametrize(
    "line",
    [[], ["x", "y"], ["x", "--protocol", "svm"], ["x", "--protocol", ""], ["x", "--fractions", "0,50"], ["x", "--fractions", "a"]],
)
def test_usage(line: list[str]):
    with pytest.raises(SystemExit) as caught:
        main(line)
    assert caught.value.code == 2


def test_the_former_name_of_an_option_names_the_new_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(run), "--row0"])
    assert stopped.value.code == 2 and "--baselines" in capsys.readouterr().err


def test_a_timm_model_by_its_name(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setenv("PPSSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    line = ["timm/mobilenetv3_small_050", f"data.root={photos}", "encoder.weights=none", "data.image_size=32"]
    assert main([*line, "--protocol", "retrieval,metric-learning"]) == 0
    records = written(tmp_path / "timm-mobilenetv3_small_050.evaluation.json")
    assert [(r["model"], r["protocol"], r["images"]) for r in records] == [
        ("weights", "retrieval", 8), ("weights", "metric-learning", 8)
    ]  # fmt: skip
    assert records[0]["mAP"] == pytest.approx(records[1]["mAP"]) and "not class-disjoint" in said(capsys)
    assert main([*line, "--split", "train", "--protocol", "metric-learning"]) == 1
    assert "--split train: metric-learning is of the test split" in said(capsys)
