"""The page about a run: its parts, what it says when something is missing, and that it needs nothing but itself."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from made_runs import draw, reported_run
from PIL import Image

from engine import run_folder
from engine.config import IadmConfig
from engine.pretrained import weights_file
from engine.report import charts, embedding
from engine.report.__main__ import main
from engine.report.render import write

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "_umap", lambda rows: None)  # compiling UMAP takes longer than all these tests


class Page(HTMLParser):
    """What a browser would find, with every tag closed."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.sections: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.drawings: list[dict[str, str | None]] = []
        self.addresses: list[str] = []
        self.headers: list[dict[str, str | None]] = []
        self.scripts = 0
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.addresses += [found[a] for a in ("src", "href", "srcset", "action", "xlink:href") if a in found]
        self.scripts += tag == "script"
        if tag == "section":
            self.sections.append(found["id"])
        if tag == "img":
            self.images.append(found)
        if tag == "svg":
            self.drawings.append(found)
        if tag == "th":
            self.headers.append(found)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"{tag} closes another tag"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)


def page(*runs: Path) -> Page:
    out = runs[0] / "report.html"
    write(runs, out, CPU)
    return Page(out.read_text())


def test_a_page_has_its_parts_and_needs_nothing_but_itself(photos: Path, tmp_path: Path) -> None:
    run = reported_run(tmp_path / "kites", photos)
    assert main([str(run)]) == 0
    text = (run / "report.html").read_text()
    found = Page(text)
    assert found.sections == [
        "numbers",
        "findings",
        "curves",
        "attention",
        "neighbors",
        "classes",
        "map",
        "duplicates",
        "speed",
        "config",
    ]
    assert found.scripts == 0 and all(a.startswith(("data:image/webp;base64,", "#")) for a in found.addresses)
    assert "http:" not in text and "https:" not in text and "url(" not in text and "@import" not in text
    assert all(image["alt"] for image in found.images) and all(d.get("aria-label") or d.get("aria-hidden") for d in found.drawings)
    assert all(h["scope"] in ("row", "col") for h in found.headers) and found.headers
    assert "rank-1 50.0 % from 20.0 % before training (+30.0)" in found.text
    assert "retrieval: leave-one-out; feature l2(gap(A * F)), 64-d; 12 queries of 3 classes of folder" in found.text
    assert "epoch 0 → 4; seed 0" in found.text
    assert "Blue Tit" in found.text and "002.Blue_Tit/4.png" not in found.text  # classes are called by their names
    charts_drawn = [d["aria-label"] for d in found.drawings if "Line chart" in (d.get("aria-label") or "")]
    assert [re.search("of (.*?) by epoch", c)[1] for c in charts_drawn] == [
        "rank-1", "rank-5", "mAP", "loss", "contrast", "contrast top-1", "learning rate", "images per second", "data wait",
    ]  # fmt: skip
    # 2 watched images with 2 maps at 3 moments, 8 queries with 5 neighbours, two pictures for each confused pair
    assert sum("at epoch" in image["alt"] for image in found.images) == 12
    assert sum(image["alt"].startswith("query") for image in found.images) == 8
    marks = [image["alt"].rpartition(", ")[2] for image in found.images if image["alt"].startswith("neighbor")]
    assert len(marks) == 40 and set(marks) <= {"same class", "another class"}
    assert found.text.count("✓") == marks.count("same class") + 1  # the legend's own
    assert "t-SNE" in found.text and len(text) < 1_000_000
    assert re.search("neighbour|colour|grey|licence|centre", text) is None  # the page's spelling is American
    assert all("loading" not in image for image in found.images)  # a picture that waits shows its alt text on paper
    closest = [float(x.replace("−", "-")) for x in re.findall(r"[✓✗] [A-Z][a-z]+ [A-Z][a-z]+ (−?\d\.\d{4})", found.text)]
    assert len(closest) == 40 and all(x > 0 if n % 5 == 0 else x <= 0 for n, x in enumerate(closest))
    assert "Two images of this list have a cosine of" in found.text
    assert "training 3 s" in found.text and "it was continued" not in found.text and "4 epochs in batches of 4" in found.text
    assert all(cell in ("protocol", "result", "how") for cell in re.findall('data-head="(.*?)"', text))


def test_few_lines_and_a_run_that_was_continued(photos: Path, tmp_path: Path) -> None:
    run = reported_run(tmp_path / "short", photos, maps=False, epochs=1)
    records = run_folder.read_metrics(run)

    def again(kept: list[dict]) -> str:
        (run / "metrics.jsonl").unlink()
        for record in kept:
            run_folder.append_metrics(run, record)
        found = page(run)
        return found.text + " ".join(d.get("aria-label") or "" for d in found.drawings)

    start, summary = records[0], records[-1] | {"steps": 6, "seconds": 9.0, "hook_seconds": 4.0, "evaluation_seconds": 1.5}
    train, evaluated = ([r for r in records if r["kind"] == kind] for kind in ("train", "eval"))
    text = again([start, evaluated[0], train[0], evaluated[-1], summary])
    assert "1 epoch in batches" in text and "Line chart of rank-1 by epoch. short: 20.0 % at epoch 0, 50.0 % at epoch 4" in text
    assert "training 5 s" in text and "evaluation and maps 5.5 s" in text
    assert "it was continued, and the times are those of its last stretch" in text
    text = again([start, evaluated[0], train[0]])
    assert "No curves: each needs two points, and the log holds 1 training line and 1 evaluation." in text


def test_a_name_cannot_put_tags_into_the_page(photos: Path, tmp_path: Path) -> None:
    text = (reported_run(tmp_path / "<script>alert(1)<", photos) / "config.yaml").read_text()
    assert text  # the folder's name is legal
    found = page(tmp_path / "<script>alert(1)<")
    assert found.scripts == 0 and "<script>alert(1)<" in found.text


def test_several_runs_stand_side_by_side(photos: Path, tmp_path: Path) -> None:
    guided = reported_run(tmp_path / "guided", photos)
    plain = reported_run(tmp_path / "plain", photos, iadm=IadmConfig(weight=0.0))
    found = page(guided, plain)
    assert "guided plain rank-1 20.0 % → 50.0 % 20.0 % → 50.0 %" in found.text
    assert "iadm.weight null 0.0" in found.text
    loss = next(d["aria-label"] for d in found.drawings if "Line chart of loss" in (d.get("aria-label") or ""))
    assert "guided: 6 at" in loss and "plain: 6 at" in loss
    kinds = {re.sub(" at epoch.*", "", i["alt"]) for i in found.images if "at epoch" in i["alt"]}
    assert kinds == {f"{kind} of run {run}" for kind in ("mask A", "CAM") for run in ("guided", "plain")}


def test_every_missing_part_is_one_sentence(photos: Path, tmp_path: Path) -> None:
    run = reported_run(tmp_path / "bare", tmp_path / "gone", maps=False)
    (run / "metrics.jsonl").unlink()
    found = page(run)
    assert found.images == [] and "Nothing was evaluated" in found.text and "No curves" in found.text
    assert "No attention maps" in found.text and f"data.root={tmp_path / 'gone'} is not there" in found.text
    assert found.sections[-1] == "config" and "neither a start nor an end" in found.text

    without_weights = reported_run(tmp_path / "young", photos)
    (without_weights / "weights.safetensors").unlink()
    assert "No features: " in (young := page(without_weights)).text and "no weights.safetensors yet" in young.text
    damaged = reported_run(tmp_path / "damaged", photos)
    (damaged / "maps/step_000000006.safetensors").write_bytes(b"half a fi")
    assert "step_000000006.safetensors is not a safetensors file" in page(damaged).text


def test_photos_without_labels_get_neighbours_and_near_duplicates(tmp_path: Path) -> None:
    root = tmp_path / "holiday"
    for n in range(9):
        draw(root / f"day{n % 2}" / f"img_{n}.png", n % 3, n)
    with Image.open(root / "day0/img_2.png") as image:  # the same photograph, saved again, with losses
        image.save(root / "img_2 (copy).jpg", quality=92)
    run = reported_run(tmp_path / "run", root)
    records = [r for r in run_folder.read_metrics(run) if r["kind"] != "eval"]
    (run / "metrics.jsonl").unlink()
    for record in records:
        run_folder.append_metrics(run, record)
    found = page(run)
    assert "classes" not in found.sections and "Nothing was evaluated" in found.text
    assert "hits" not in found.text and "✓" not in found.text
    pairs = [i["alt"] for i in found.images if i["alt"].startswith("photo")]
    assert pairs[:2] == ["photo day0/img_2.png", "photo img_2 (copy).jpg"]  # the true pair stands first
    assert "agree in their pixels" in found.text and "= agree" in found.text


def test_it_is_an_error_when_the_folder_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(tmp_path)]) == 1
    assert "is not a run folder" in capsys.readouterr().err
    with pytest.raises(SystemExit) as usage:
        main([])
    assert usage.value.code == 2


def test_an_unwritten_page_leaves_the_old_one(photos: Path, tmp_path: Path) -> None:
    run = reported_run(tmp_path / "run", photos)
    (run / "report.html").write_text("old")
    shutil.rmtree(run / "maps")
    (run / "config.yaml").write_text("epochs: many")
    assert main([str(run)]) == 1
    assert (run / "report.html").read_text() == "old" and [p.name for p in run.glob(".*")] == []


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (3.0, 3.0), (-0.2, 0.031), (2.3e-7, 0.06), (0, 12345)])
def test_ticks_are_round_and_hold_the_range(low: float, high: float) -> None:
    found = charts.ticks(low, high, 4)
    steps = np.diff(found)
    assert found[0] <= low and found[-1] >= high and 3 <= len(found) <= 8
    assert np.allclose(steps, steps[0]) and f"{steps[0]:e}"[0] in "125"


def test_a_long_line_keeps_its_shape_in_few_points() -> None:
    points = [(float(x), np.sin(x / 400)) for x in range(5000)] + [(5000.0, float("nan"))]
    chart = charts.line_chart("wave", {"run": points, "silent": []}, x_name="step")
    line = chart.lines[0]
    assert line.path.count("L") < 250 and chart.lines[1] is None
    xs = [float(p.split()[0]) for p in line.path[1:].split("L")]
    ys = [float(p.split()[1]) for p in line.path[1:].split("L")]
    assert xs == sorted(xs) and min(xs) >= 0 and max(xs) <= charts.WIDTH and 0 <= min(ys) < 20 and 150 < max(ys) <= charts.HEIGHT
    assert charts.line_chart("nothing", {"run": [(0.0, 1.0)]}, x_name="step") is None


def test_the_map_takes_part_of_many_images() -> None:
    features = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    made = embedding.layout(features)
    assert made.points.shape == (30, 2) and made.points.min() >= 0 and made.points.max() <= 1
    assert np.array_equal(made.points, embedding.layout(features).points)
    embedding_most, embedding.MOST = embedding.MOST, 10
    try:
        part = embedding.layout(features)
    finally:
        embedding.MOST = embedding_most
    assert len(part.points) == 10 and part.chosen[0] == 0 and part.chosen[-1] == 29 and "10 of 30 images" in part.how


def test_everything_that_was_evaluated_is_in_one_table(photos: Path, tmp_path: Path) -> None:
    run = reported_run(tmp_path / "run", photos)
    about = {"feature": "l2(gap(F))", "setting": "as asked"}
    records = [
        {"model": "initial", "protocol": "retrieval", "epoch": 0, "step": 0, "rank1": 0.125, "mAP": 0.5} | about,
        {"model": "run", "protocol": "knn", "k": 20, "epoch": 2, "step": 6, "top1": 0.2} | about,
        {"model": "run", "protocol": "knn", "k": 20, "epoch": 4, "step": 12, "top1": 0.75, "top5": 1.0} | about,
        {"model": "run", "protocol": "linear", "solver": "convex", "fraction": 20.0, "epoch": 4, "step": 12, "top1": 0.3} | about,
        {"model": "teacher", "protocol": "retrieval", "epoch": None, "step": None, "rank1": 0.4} | about,
        {"model": "other", "protocol": "retrieval", "epoch": None, "step": 1, "top1": None} | about,
    ]
    (run / "evaluation.json").write_text(json.dumps(records))
    found = page(run).text
    assert "initial, epoch 0 retrieval rank-1 12.5 % mAP 50.0 % as asked; feature l2(gap(F))" in found
    assert "run, epoch 4 kNN, k 20 top-1 75.0 % top-5 100.0 %" in found and "20.0 % as asked" not in found
    assert "linear convex, 20 % of the labels top-1 30.0 %" in found and "teacher retrieval rank-1 40.0 %" in found
    absent = {"model": "run", "protocol": "knn", "epoch": 4, "step": 12, "top1": None} | about
    (run / "evaluation.json").write_text(json.dumps([absent]))
    assert "run, epoch 4 kNN not applicable as asked" in page(run).text
    assert "other retrieval not applicable as asked" in found
    (run / "evaluation.json").write_text("{half")
    assert "All that was evaluated" not in page(run).text


def test_a_collapsed_network_gets_no_map_but_the_page(photos: Path, tmp_path: Path) -> None:
    run = reported_run(tmp_path / "collapsed", photos)
    tensors = {name: torch.zeros_like(t) for name, t in weights_file.load_weights(run / "weights.safetensors").items()}
    tensors["layer4.1.bn2.bias"] += 1
    weights_file.save_weights(run / "weights.safetensors", tensors, {"step": "12", "epoch": "4"})
    with pytest.raises(ValueError, match="tells nothing apart"):
        embedding.layout(torch.ones(9, 4))  # t-SNE would end the process
    run_folder.append_metrics(run, {"kind": "train", "step": 12, "epoch": 4, "spread": 0.001, "collapsed": True})
    found = page(run)
    assert "No embedding map: the features of all images are the same" in found.text
    assert found.text.count("all images give nearly the same feature") == 1 and "collapsed feature from epoch 4" in found.text
    assert "What people do: look at the images and at their views" in found.text
    assert "neighbors" in found.sections and "Line chart of loss" in str(found.drawings)
