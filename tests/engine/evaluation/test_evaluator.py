"""Judging beside a run: when it is due, what it writes, and that the run does not notice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from miniatures import picture

from engine import build, run_folder
from engine.config import Config, TeacherConfig, from_yaml
from engine.data import catalog
from engine.data.catalog import Catalog
from engine.evaluate import show
from engine.evaluation.evaluator import SHARE, Candidate, Evaluator, check, evaluate_features, headline, keep
from engine.evaluation.features import extract
from engine.synthetic import dataset
from engine.training.log import Records
from ppssl.encoder import FeatureNet, MaskBranch, Trunk

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    root = dataset.generate(
        tmp_path_factory.mktemp("world") / "birds", train_per_species=2, test_per_species=2, workers=1, progress=False
    )
    return catalog.load("birds", root, progress=False)


def config(every: int | str = 0, protocols: str = "retrieval, knn") -> Config:
    return from_yaml(
        f"eval: {{every: {every}, batch_size: 40, protocols: [{protocols}]}}\nmethod: {{name: moco}}\n"
        "data: {name: birds, image_size: 32, workers: 0}\nencoder: {arch: resnet18_w8_s16, weights: none}"
    )


def trainer(epoch: int, out: Path, epochs: int = 10, masked: bool = False) -> SimpleNamespace:
    trunk = Trunk("resnet18_w8_s16")
    network = FeatureNet(trunk, MaskBranch(trunk.channels, 4, minmax="image") if masked else None)
    return SimpleNamespace(
        epoch=epoch, epochs=epochs, step=SimpleNamespace(steps_done=5 * epoch), method=SimpleNamespace(network=network),
        log=SimpleNamespace(opened=0.0), records=Records(out), ended=epoch >= epochs,
    )  # fmt: skip


def test_a_line_of_the_log_and_the_records(images: Catalog, tmp_path: Path):
    evaluates = Evaluator(tmp_path, config(), images, CPU)
    evaluates(trainer(0, tmp_path))
    evaluates(trainer(3, tmp_path, masked=True))
    first, last = run_folder.read_metrics(tmp_path)
    assert (first["kind"], first["epoch"], first["step"], first["split"]) == ("eval", 0, 0, "test")
    assert first["protocol"].startswith("retrieval: leave-one-out inside the test split, cosine; knn: k 80, ")
    assert first["feature"].startswith("l2(gap(F)), ") and last["feature"].startswith("l2(gap(A * F)), ")
    records = json.loads((tmp_path / "evaluation.json").read_text())
    assert [(r["model"], r["epoch"], r["protocol"]) for r in records] == [
        ("initial", 0, "retrieval"), *[("initial", 0, "knn")] * 3, ("run", 3, "retrieval"), *[("run", 3, "knn")] * 3,
    ]  # fmt: skip
    assert all(0 <= r["top1"] <= 1 for r in records if r["protocol"] == "knn")
    assert {n: last[n] for n in ("rank1", "rank5", "mAP", "knn_top1")} == headline(records[4:])
    assert last["knn_top1"] == records[-1]["top1"] and records[-1]["k"] == 80  # 200, but the bank holds 80


def test_the_teacher_is_evaluated_too(images: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PPSSL_CACHE", str(tmp_path / "cache"))
    cfg = replace(config(), method=replace(config().method, name="ppssl"), teacher=TeacherConfig("birds", "birds"))
    Evaluator(tmp_path, cfg, images, CPU).teacher(build.teacher(cfg, CPU))
    records = json.loads((tmp_path / "evaluation.json").read_text())
    assert [(r["model"], r["epoch"], r["protocol"]) for r in records] == [("teacher", None, p) for p in ("retrieval", *["knn"] * 3)]
    assert "image feature of" in records[0]["feature"] and not run_folder.read_metrics(tmp_path)  # the log's curves are the run's
    Evaluator(tmp_path, config(), images, CPU).teacher(build.teacher(config(), CPU))  # MoCo has none


def test_a_run_does_not_notice_that_it_is_evaluated(images: Catalog, tmp_path: Path):
    subject = trainer(1, tmp_path)
    before, modes = torch.get_rng_state(), [m.training for m in subject.method.network.modules()]
    Evaluator(tmp_path, config(protocols="retrieval, knn, linear"), images, CPU)(subject)
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in subject.method.network.modules()] == modes
    assert 0 <= run_folder.read_metrics(tmp_path)[0]["linear_top1"] <= 1


def test_every_n_epochs_and_never_after_the_last(images: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    evaluates = Evaluator(tmp_path, config(every=3), images, CPU)
    monkeypatch.setattr(Evaluator, "__call__", lambda self, t: seen.append(t.epoch))
    seen: list[int] = []
    for epoch in range(1, 11):
        evaluates.after_epoch(trainer(epoch, tmp_path, epochs=9))
    assert seen == [3, 6] and evaluates.times == 2
    assert "2, " in evaluates.closing(100.0) and "% of the training time" in evaluates.closing(100.0)


def test_auto_stays_below_its_share(images: Catalog, tmp_path: Path):
    """Epochs of 10 s and evaluations of 1.5 s by a made-up clock: never above 2 %, and not much rarer than that allows."""
    evaluates = Evaluator(tmp_path, config(every="auto"), images, CPU)
    evaluates.cost, trained, evaluated = 1.5, 0.0, []
    for epoch in range(1, 101):
        trained += 10.0
        if evaluates.is_due(epoch, trained):
            evaluates.spent += evaluates.cost
            evaluated.append(epoch)
        assert evaluates.spent <= SHARE * trained
    assert evaluated[0] == 8 and len(evaluated) == 13  # 20 s of 1,000 pay for thirteen
    evaluates.cost = 1e6
    assert not evaluates.is_due(101, trained + 10)


def test_resuming_forgets_what_came_later_and_knows_the_cost(images: Catalog, tmp_path: Path):
    evaluates = Evaluator(tmp_path, config(), images, CPU)
    for epoch in (0, 2, 4):
        evaluates(trainer(epoch, tmp_path))
    run_folder.rewind_metrics(tmp_path, 10)
    again = Evaluator(tmp_path, config(), images, CPU)
    again.resume(10)
    assert again.cost == run_folder.read_metrics(tmp_path)[-1]["seconds"] > 0
    assert {r["epoch"] for r in json.loads((tmp_path / "evaluation.json").read_text())} == {0, 2}


def test_without_labels_there_is_nothing_to_do(images: Catalog, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    flat = Catalog(replace(images.train, labels=None), None, ())
    evaluates = Evaluator(tmp_path, config(every=1), flat, CPU)
    evaluates(trainer(0, tmp_path))
    evaluates.teacher(object())  # not even looked at
    evaluates.after_epoch(trainer(1, tmp_path))
    assert "nothing to evaluate the features by" in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir()) and evaluates.closing(1.0) is None
    with pytest.raises(ValueError, match="has no labels"):
        check(flat, ["retrieval"])


def test_training_without_labels_is_evaluated_by_retrieval(images: Catalog, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    unlabelled = images._replace(train=replace(images.train, labels=None))
    evaluates = Evaluator(tmp_path, config(), unlabelled, CPU)
    evaluates(trainer(0, tmp_path))
    assert " ".join(capsys.readouterr().err.split()).count("knn left out: there are no labelled training images") == 1
    assert {r["protocol"] for r in json.loads((tmp_path / "evaluation.json").read_text())} == {"retrieval"}
    learned = Evaluator(tmp_path / "other", config(protocols="knn, linear"), unlabelled, CPU)
    learned(trainer(0, tmp_path / "other"))
    assert "nothing is evaluated; eval.protocols=[retrieval] needs none" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "other").exists()


def test_good_features_get_good_marks_from_every_protocol(images: Catalog):
    def features(some: catalog.ImageList, split: str) -> torch.Tensor:
        noise = np.random.default_rng(len(some)).normal(0, 0.05, (len(some), len(some.classes)))
        return torch.from_numpy(np.eye(len(some.classes))[some.labels] + noise).float()

    candidate = Candidate("run", "class and noise", 1, 1, features)
    records = evaluate_features(
        candidate, images, config(), CPU, protocols=("retrieval", "knn", "linear"), fractions=(100, 50), solvers=("convex", "sgd")
    )
    assert headline(records)["rank1"] > 0.95 and headline(records)["linear_top1"] > 0.95
    probes = [(r["solver"], r["fraction"], r["train_images"]) for r in records if r["protocol"] == "linear"]
    assert probes == [("convex", 100, 80), ("sgd", 100, 80), ("sgd", 50, 40)]  # one image per class: none to choose on
    assert all(r["top1"] > 0.95 for r in records if r["protocol"] == "linear")
    for record in records:
        assert {"protocol", "setting", "feature", "split", "epoch", "step", "model", "seconds"} <= record.keys()


def test_a_single_class_is_not_applicable(images: Catalog, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    one = images._replace(test=replace(images.test, labels=np.zeros_like(images.test.labels)))
    evaluates = Evaluator(tmp_path, config(), one, CPU)
    evaluates(trainer(1, tmp_path))
    records = json.loads((tmp_path / "evaluation.json").read_text())
    assert [(r["protocol"], r["top1"], r["classes"]) for r in records] == [("retrieval", None, 1), ("knn", None, 1)]
    (logged,) = run_folder.read_metrics(tmp_path)
    assert (
        not {"rank1", "mAP", "knn_top1"} & {*logged}
        and "retrieval: not applicable: the test split has a single class" in logged["protocol"]
    )
    said = capsys.readouterr().err
    assert "not applicable, the test split has a single class" in said and "no protocol is applicable" in said and "100" not in said
    show(records)
    assert capsys.readouterr().err.count("not applicable") >= 2


def test_a_constant_feature_is_told(images: Catalog, capsys: pytest.CaptureFixture[str]):
    def one(some: catalog.ImageList, split: str) -> torch.Tensor:
        return torch.ones(len(some), 8) + 1e-5 * torch.randn(len(some), 8)

    evaluate_features(Candidate("run", "constant", 1, 1, one), images, config(), CPU, protocols=["retrieval"])
    assert "all images give nearly the same feature" in capsys.readouterr().err


def test_records_take_the_place_of_older_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "evaluation.json"
    record = {"model": "run", "protocol": "knn", "k": 10, "epoch": 1, "step": 5, "top1": 0.1}
    assert keep(path, [record, record | {"k": 20}]) == json.loads(path.read_text())
    kept = keep(path, [record | {"top1": 0.2}, record | {"epoch": 2, "step": 10}])
    assert [(r["k"], r["epoch"], r["top1"]) for r in kept] == [(20, 1, 0.1), (10, 1, 0.2), (10, 2, 0.1)]
    assert [r["epoch"] for r in keep(path, [], until=5)] == [1, 1]
    path.write_text("[{")
    assert keep(path, [record]) == [record] and "cannot be read" in " ".join(capsys.readouterr().err.split())


def test_what_learns_from_training_labels_does_not_apply_to_classes_without_any(
    images: Catalog, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    others = replace(images.test, labels=images.test.labels + len(images.test.classes), classes=2 * images.test.classes)
    open_set = Catalog(images.train, others, ())
    Evaluator(tmp_path, config(protocols="retrieval, knn, linear"), open_set, CPU)(trainer(1, tmp_path))
    (line,) = run_folder.read_metrics(tmp_path)
    assert "rank1" in line and not {"knn_top1", "linear_top1"} & line.keys() and "knn: not applicable" in line["protocol"]
    records = json.loads((tmp_path / "evaluation.json").read_text())
    assert [(r["protocol"], r.get("top1")) for r in records] == [("retrieval", None), ("knn", None), ("linear", None)]
    assert "knn, linear: not applicable, no test class has a training image" in capsys.readouterr().err
    show(records)
    printed = capsys.readouterr().err
    assert printed.count("not applicable") == 4 and "top1 0.00 %" not in printed  # two rows, two notes


def test_photos_without_labels_are_no_neighbors(tmp_path: Path):
    for i, name in enumerate(f"set/{split}/{c}/{n}.png" for split in ("train", "test") for c in "ab" for n in range(2)):
        picture(tmp_path / name, (32, 32), seed=i)
    for i in range(3):
        picture(tmp_path / "inbox" / f"{i}.png", (32, 32), seed=i)
    plain = catalog.load("folder", tmp_path / "set", progress=False)
    mixed = catalog.load("folder", tmp_path / "set", extra_roots=(str(tmp_path / "inbox"),), progress=False)
    assert len(mixed.train) == 7 and mixed.train.labels is None
    network = FeatureNet(Trunk("resnet18_w8_s16")).eval()
    cfg = config(protocols="knn, linear")
    candidate = Candidate("run", "", None, None, lambda images, split: extract(network, images, cfg, CPU, None))
    found = [evaluate_features(candidate, images, cfg, CPU, protocols=("knn", "linear")) for images in (plain, mixed)]
    numbers = [[(r["protocol"], r["top1"], r.get("bank")) for r in records] for records in found]
    assert numbers[0] == numbers[1] and numbers[0][0][2] == 4
