"""Queries in a gallery and the class-disjoint protocol: numbers by the definitions, and what is said of the two lists."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import CLASSES, draw, reported_run

from engine.data.catalog import load
from engine.evaluate import main
from engine.evaluation import ranking
from engine.evaluation.query_gallery import shared_photos
from engine.evaluation.retrieval import matching, retrieval


def brute_force(query, query_labels, gallery, gallery_labels, same, ks):
    """The definitions, one query and one rank at a time (pytorch-metric-learning's r_precision and mean_average_precision_at_r)."""
    unit_q, unit_g = (x.double() / x.double().norm(dim=1, keepdim=True) for x in (query, gallery))
    recall, precision, at_r, full = {k: [] for k in ks}, [], [], []
    for q in range(len(query)):
        others = [g for g in range(len(gallery)) if (q, g) not in same]
        ranked = sorted(others, key=lambda g: (-float(unit_q[q] @ unit_g[g]), g))
        correct = [int(gallery_labels[g]) == int(query_labels[q]) for g in ranked]
        r = sum(correct)
        if not r:
            continue
        for k in ks:
            recall[k].append(any(correct[:k]))
        precision.append(sum(correct[:r]) / r)
        at_r.append(sum(sum(correct[: i + 1]) / (i + 1) for i in range(r) if correct[i]) / r)
        full.append(sum(sum(correct[: i + 1]) / (i + 1) for i in range(len(correct)) if correct[i]) / r)
    return {k: float(np.mean(v)) for k, v in recall.items()}, *(float(np.mean(v)) for v in (precision, at_r, full)), len(full)


def made(n: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    return torch.eye(classes, 6)[labels] + 0.7 * torch.randn(n, 6, generator=generator), labels


@settings(max_examples=30, deadline=None)
@given(q=st.integers(1, 25), g=st.integers(1, 30), classes=st.integers(1, 6), pairs=st.integers(0, 12), seed=st.integers(0, 10**6))
def test_equal_to_brute_force(q: int, g: int, classes: int, pairs: int, seed: int) -> None:
    (query, query_labels), (gallery, gallery_labels) = made(q, classes, seed), made(g, classes + 1, seed + 1)
    generator = np.random.default_rng(seed)
    same = {(int(generator.integers(q)), int(generator.integers(g))) for _ in range(pairs)}
    ks = (1, 2, 4, 8)
    arguments = query, query_labels, gallery, gallery_labels
    possible = any(query_labels[i] == gallery_labels[j] and (i, j) not in same for i in range(q) for j in range(g))
    given_pairs = torch.tensor(sorted(same), dtype=torch.int64).view(-1, 2)
    if not possible:
        with pytest.raises(ValueError, match="another image of its class"):
            matching(*arguments, same=given_pairs, k=ks)
        return
    found = matching(*arguments, same=given_pairs, k=ks)
    recall, precision, at_r, full, queries = brute_force(*arguments, same, ks)
    assert found.recall == pytest.approx(recall) and found.queries == queries and found.excluded == q - queries
    assert (found.r_precision, found.map_at_r, found.mAP) == pytest.approx((precision, at_r, full), abs=1e-12)


def test_the_test_set_itself_is_leave_one_out_retrieval(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = made(60, 7, 3)
    itself = torch.arange(60)[:, None].expand(60, 2)
    found, usual = matching(x, labels, x, labels, same=itself, k=(1, 5)), retrieval(x, labels)
    assert (found.recall[1], found.recall[5], found.mAP) == pytest.approx(usual[:3], abs=1e-12)
    assert (found.queries, found.excluded) == usual[3:]
    monkeypatch.setattr(ranking, "_BLOCK_BYTES", 7 * 60 * ranking._ENTRY_BYTES)
    blocked = matching(x, labels, x, labels, same=itself, k=(1, 5))
    assert blocked.recall == found.recall and blocked[1:] == pytest.approx(found[1:], abs=1e-12)


def test_by_hand() -> None:
    """R = 3; of the class are the ranks 1, 3 and 5: Musgrave et al.'s way of counting."""
    angle = torch.deg2rad(torch.tensor([10.0, 20, 30, 40, 50]))
    gallery, query = torch.stack([angle.cos(), angle.sin()], 1), torch.tensor([[1.0, 0.0]])
    found = matching(query, [4], gallery, [4, 1, 4, 1, 4])
    assert found.r_precision == pytest.approx(2 / 3) and found.map_at_r == pytest.approx((1 + 2 / 3) / 3)
    assert found.mAP == pytest.approx((1 + 2 / 3 + 3 / 5) / 3) and found.recall[1] == 1


def test_unusable_input() -> None:
    x, labels = made(5, 2, 0)
    with pytest.raises(ValueError, match="one length"):
        matching(x, labels, x[:, :3], labels)
    with pytest.raises(ValueError, match="at least 1"):
        matching(x, labels, x, labels, k=(0, 1))


@pytest.fixture
def run(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PPSSL_CACHE", str(tmp_path / "cache"))
    return reported_run(tmp_path / "run", photos, maps=False)


def written(run: Path) -> list[dict]:
    return json.loads((run / "evaluation.json").read_text())


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_two_folders(run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    query, gallery = tmp_path / "query", tmp_path / "gallery"
    shutil.copytree(photos / "test", query)
    shutil.copytree(photos / "train", gallery)
    draw(query / "004.Only_Asked/0.png", 1, 40)
    draw(gallery / "000.Only_There/0.png", 1, 41)
    shutil.copy(query / CLASSES[0] / "1.png", gallery / CLASSES[0] / "the same photo.png")
    assert main([str(run), "--query", str(query), "--gallery", str(gallery), "--recall", "1,3"]) == 0
    told = said(capsys)
    assert "1 class of --query without a photo in --gallery (004.Only_Asked): 1 query cannot be answered and is excluded" in told
    assert "1 class of --gallery without a query (000.Only_There)" in told
    assert "1 photo of --query lies in --gallery too" in told and "left out of its own ranking" in told
    assert "13 images of 4 classes asked for in a gallery of 14 images of 4 classes" in told
    (record,) = written(run)
    assert (record["protocol"], record["queries"], record["excluded"]) == ("query-gallery", 12, 1)
    assert record["only_in_query"] == ["004.Only_Asked"] and record["only_in_gallery"] == ["000.Only_There"]
    assert record["shared_photos"] == 1 and not record["own_data"] and record["gallery_root"] == str(gallery)

    lists = [load("folder", root, train=".", progress=False).train for root in (query, gallery)]
    features = [torch.from_numpy(f) for f in features_of(run)]
    labels = [[images.classes[label] for label in images.labels] for images in lists]
    number = {name: i for i, name in enumerate(sorted({*labels[0], *labels[1]}))}
    labels = [[number[name] for name in names] for names in labels]
    same = {(lists[0].names.index(f"{CLASSES[0]}/1.png"), lists[1].names.index(f"{CLASSES[0]}/the same photo.png"))}
    recall, precision, at_r, full, _ = brute_force(features[0], labels[0], features[1], labels[1], same, (1, 3))
    assert (record["recall1"], record["recall3"], record["rank1"]) == pytest.approx((recall[1], recall[3], recall[1]))
    assert (record["r_precision"], record["map_at_r"], record["mAP"]) == pytest.approx((precision, at_r, full))
    assert main([str(run), "--query", str(query), "--gallery", str(gallery), "--recall", "1,3"]) == 0
    assert len(written(run)) == 1  # in the place of the older one
    assert main([str(run), "--query", str(gallery), "--gallery", str(query)]) == 0 and len(written(run)) == 2


def features_of(run: Path) -> list[np.ndarray]:
    from safetensors.numpy import load_file

    return [load_file(run / f"features/{name}.safetensors")["features"] for name in ("query", "gallery")]


def test_a_folder_against_itself_is_the_metric_learning_protocol(run: Path, photos: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(run), "--query", str(photos / "test"), "--gallery", str(photos / "test")]) == 0
    assert "12 photos of --query lie in --gallery too" in said(capsys)
    assert main([str(run), "--protocol", "metric-learning,retrieval"]) == 0
    told = said(capsys)
    assert "3 test classes of 3 have training images" in told and "not class-disjoint" in told
    pair, usual, metric = written(run)
    numbers = ("recall1", "recall2", "recall4", "recall8", "r_precision", "map_at_r", "mAP", "queries", "excluded")
    assert [pair[n] for n in numbers] == pytest.approx([metric[n] for n in numbers])
    assert (metric["rank1"], metric["mAP"]) == pytest.approx((usual["rank1"], usual["mAP"]))
    assert metric["disjoint"] is False and metric["own_data"] and metric["feature"] == usual["feature"]


def test_disjoint_classes(run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for split, classes in (("train", CLASSES[:1]), ("test", CLASSES[1:])):
        for name in classes:
            shutil.copytree(photos / "test" / name, tmp_path / "data" / split / name)
    assert main([str(run), "--protocol", "metric-learning", f"data.root={tmp_path / 'data'}"]) == 0
    (record,) = written(run)
    assert record["disjoint"] is True and "classes not seen in training" in record["setting"] and "warning" not in said(capsys)
    shutil.rmtree(tmp_path / "data/train")  # a test-only folder
    assert main([str(run), "--protocol", "metric-learning,retrieval", f"data.root={tmp_path / 'data'}"]) == 0
    assert main([str(run), "--protocol", "metric-learning", f"data.root={photos / 'test'}", "data.test=."]) == 0
    assert written(run)[-1]["images"] == 12


def test_other_data_by_a_recipe(run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in CLASSES:
        shutil.copytree(photos / "test" / name, tmp_path / "data/photos" / name)
    (tmp_path / "other.yaml").write_text(
        f"data: {{name: folder, root: '{tmp_path / 'data'}', test: photos, image_size: 224}}\nmethod: {{name: moco}}\n"
    )
    assert main([str(run), "--cfg", str(tmp_path / "other.yaml")]) == 0
    told = said(capsys)
    assert "all else is the run's own, images of 32 px" in told
    (record,) = written(run)
    assert record["images"] == 12 and record["image_size"] == 32 and record["root"] == str(tmp_path / "data")


def test_shared_photos_are_told_by_content(tmp_path: Path) -> None:
    for root, names in (("a", ("x/1.png", "x/2.png", "y/3.png")), ("b", ("x/9.png", "z/2.png"))):
        for i, name in enumerate(names):
            draw(tmp_path / root / name, 0, i + (root == "b"))
    lists = [load("folder", tmp_path / root, train=".", progress=False).train for root in ("a", "b")]
    assert shared_photos(*lists).tolist() == [[1, 0], [2, 1]]
    assert shared_photos(lists[0], lists[0]).tolist() == [[0, 0], [1, 1], [2, 2]]


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("train/001.Red_Kite", "has no labels"), (".", "holds splits and not classes; give one of them"),
        ("absent", "is not there"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked(query: str, words: str, run: Path, photos: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(run), "--query", str(photos / query), "--gallery", str(photos / "test")]) == 1
    assert words in said(capsys)


def test_no_common_class_and_usage(run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    draw(tmp_path / "asked/other/1.png", 0, 1)
    assert main([str(run), "--query", str(tmp_path / "asked"), "--gallery", str(photos / "test")]) == 1
    assert "have no class in common (other; 001.Red_Kite" in said(capsys)
    for line in (["--query", "x"], ["--query", "x", "--gallery", "y", "--protocol", "knn"], ["--recall", "0"]):
        with pytest.raises(SystemExit) as usage:
            main([str(run), *line])
        assert usage.value.code == 2
