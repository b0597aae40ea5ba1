"""The inference feature as a graph: what goes in, what comes out, and what the file says of itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from made_runs import SIZE, exported_run
from PIL import Image

import engine
from engine.export import main
from engine.pretrained import export
from engine.pretrained.graph import opsets
from engine.run_folder import write_classes

NAMES = ("001.Red_Kite", "Möwe, | grau")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = exported_run(tmp_path_factory.mktemp("runs") / "run", arch="resnet18_w8_s16", variant="guided")
    write_classes(folder, NAMES)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, draw, paths = tmp_path_factory.mktemp("photos"), np.random.default_rng(0), []
    for i in range(3):
        paths.append(folder / f"{i}.png")
        Image.fromarray(draw.integers(0, 256, (90, 120, 3), dtype=np.uint8)).save(paths[-1])
    return paths


def prepared(pictures: list[Path], how: dict) -> torch.Tensor:
    """Photos as whoever has nothing but the file's metadata prepares them."""
    rows = []
    for path in pictures:
        image, side = Image.open(path), how["center_crop"]
        scale = how["resize_short_side"] / min(image.size)
        image = image.resize([round(n * scale) for n in image.size], Image.Resampling.BILINEAR)
        left, top = ((n - side) // 2 for n in image.size)
        pixels = np.asarray(image.crop((left, top, left + side, top + side)), np.float32) / 255
        rows.append(torch.from_numpy((pixels - np.float32(how["mean"])) / np.float32(how["std"])).permute(2, 0, 1))
    return torch.stack(rows)


@pytest.mark.parametrize("normalize", [False, True])
def test_an_onnx_file_s_own_metadata_are_enough_for_a_photo(
    normalize: bool, run: Path, pictures: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    out = tmp_path / "net.onnx"
    assert main([str(run), "--to", "onnx", "--out", str(out), "--opset", "19", *["--normalize"] * normalize]) == 0
    assert "features differ by at most" in " ".join(capfd.readouterr().err.split())
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    how = {key: json.loads(text) for key, text in session.get_modelmeta().custom_metadata_map.items()}
    assert how["class_names"] == list(NAMES) and how["arch"] == "resnet18_w8_s16" and how["dimension"] == 64
    assert (how["step"], how["epoch"], how["engine_version"]) == (46, 1, engine.__version__)
    assert how["feature"] == "l2(gap(A * F))" and how["interpolation"].startswith("bilinear")
    assert ("normalized_inside" in how) == normalize and (how["std"] == [1, 1, 1]) == normalize
    images = prepared(pictures, how)
    assert not normalize or 0 <= images.min() <= images.max() <= 1
    theirs = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    torch.testing.assert_close(theirs, engine.load(run).embed(pictures), atol=2e-3, rtol=0)
    assert onnx.load(out).opset_import[0].version == 19
    page, card = (out.with_name(f"net.onnx{suffix}").read_text() for suffix in (".md", ".json"))
    use = json.loads(card)["use"]
    assert ("inside the graph, which takes RGB in [0, 1]" in page) == normalize == ("RGB in [0, 1] ->" in use)
    scope = {"onnxruntime": onnxruntime, "json": json, "images": images.numpy()}
    exec(use.replace(out.name, str(out)), scope)  # the card's own lines
    assert np.array_equal(scope["features"], theirs.numpy()) and scope["how"] == how
    assert r"2: 001.Red_Kite, Möwe, \| grau" in page


def test_the_map_pools_to_the_feature(run: Path, pictures: list[Path], tmp_path: Path) -> None:
    path = export(run, "torch-export", tmp_path / "net.pt2", with_map=True, normalize=True)
    said = {"arch.json": "", "normalized_inside.json": "", "mean.json": ""}
    program = torch.export.load(path, extra_files=said)
    assert json.loads(said["arch.json"]) == "resnet18_w8_s16" and json.loads(said["mean.json"]) == [0, 0, 0]
    inside = json.loads(said["normalized_inside.json"])
    network = engine.load(run)
    images = torch.stack([network.transform(path) for path in pictures])
    mean, std = (torch.tensor(inside[key]).view(3, 1, 1) for key in ("mean", "std"))
    features, found = program.module()(images * std + mean)
    torch.testing.assert_close(features, network.features(images), atol=1e-5, rtol=0)
    assert found.shape == (3, 64, SIZE // 16, SIZE // 16)
    with torch.no_grad():
        feature = network.trunk(images)
        expected = network.mask(feature).mask[:, None] * feature
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    scope = {"torch": torch, "images": images}
    exec(json.loads(path.with_name("net.pt2.json").read_text())["use"].replace("net.pt2", str(path)), scope)
    assert scope["features"].shape == (3, 64) and scope["map"].shape == found.shape


def fails(argv: list[str], capfd: pytest.CaptureFixture, *words: str) -> None:
    assert main(argv) == 1
    error = " ".join(capfd.readouterr().err.split())
    assert "Traceback" not in error and all(word in error for word in words), error


def test_opsets_beyond_the_exporter_s_are_refused_by_their_range(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    lowest, highest = opsets()
    out = ["--out", str(tmp_path / "x.onnx")]
    for wrong in (lowest - 1, highest + 1):
        fails([str(run), "--to", "onnx", *out, "--opset", str(wrong)], capfd, f"--opset {wrong}", f"opsets {lowest} to {highest}")
    monkeypatch.setattr("engine.pretrained.graph.opsets", lambda: (9, 30))  # torch warns and keeps its own
    fails([str(run), "--to", "onnx", *out, "--opset", "17"], capfd, "could only be written as opset 18")

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("unsupported model IR version")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    fails([str(run), "--to", "onnx", *out], capfd, "does not read what was written as opset", "lower --opset", "IR version")
    assert not list(tmp_path.iterdir())


def test_what_only_a_graph_can_do_is_refused_elsewhere(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    plain = str(exported_run(tmp_path / "plain", arch="resnet18", method="moco"))
    fails([plain, "--to", "timm", "--normalize"], capfd, "--normalize", "no graph")
    fails([plain, "--to", "hf", "--map"], capfd, "--map", "no graph")
    fails([plain, "--to", "torch-export", "--opset", "19"], capfd, "--opset 19", "--to onnx only")
