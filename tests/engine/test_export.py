"""Exported files, read back by the programs that they are for."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import torchvision
from made_runs import SIZE, exported_run
from PIL import Image
from safetensors.torch import load_file

import engine
import engine.pretrained.graph
from engine import run_folder
from engine.data import Transform
from engine.export import main
from engine.files import read_metadata


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported_run(tmp_path_factory.mktemp("runs") / "plain", arch="resnet18", method="moco")


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported_run(tmp_path_factory.mktemp("runs") / "masked", arch="resnet18_w8_s16")


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(7))


def test_torchvision_loads_strictly_and_computes_the_same(plain: Path) -> None:
    assert main([str(plain), "--to", "torchvision"]) == 0
    model = torchvision.models.resnet18()
    model.fc = torch.nn.Identity()
    path = plain / "export" / "resnet18_torchvision.safetensors"
    model.load_state_dict(load_file(path))
    check_preprocessing(read_metadata(path))
    pooled = model.eval()(images(3))
    torch.testing.assert_close(torch.nn.functional.normalize(pooled), engine.load(plain).features(images(3)))


def test_timm_loads_strictly_and_computes_the_same(plain: Path, tmp_path: Path) -> None:
    assert main([str(plain), "--to", "timm", "--out", str(tmp_path / "mine.safetensors")]) == 0
    model = timm.create_model("resnet18", num_classes=0)
    model.load_state_dict(load_file(tmp_path / "mine.safetensors"))
    pooled = model.eval()(images(3))
    torch.testing.assert_close(torch.nn.functional.normalize(pooled), engine.load(plain).features(images(3)))


def test_a_published_resnet50_leaves_its_mask_out_and_says_so(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    folder = exported_run(tmp_path / "run", arch="resnet50")
    assert main([str(folder), "--to", "torchvision", "--out", str(tmp_path)]) == 0
    tensors = load_file(tmp_path / "resnet50_torchvision.safetensors")
    wanted = torchvision.models.resnet50().state_dict()
    assert {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in wanted.items() if not n.startswith("fc.")}
    assert "trunk alone" in " ".join(capfd.readouterr().err.split())
    assert "trunk alone" in (tmp_path / "resnet50_torchvision.safetensors.md").read_text()


def lincls_load(path: Path, arch: str) -> torch.nn.Module:
    """What the linear probe of facebookresearch/moco does with ``--pretrained``: only the query encoder without its head is kept,
    stripped of its prefix, and nothing but the classifier may be missing."""
    model = torchvision.models.get_model(arch)
    prefix = "module.encoder_q."
    state = {
        name.removeprefix(prefix): tensor
        for name, tensor in torch.load(path, map_location="cpu")["state_dict"].items()
        if name.startswith(prefix) and not name.startswith(f"{prefix}fc")
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) == {"fc.weight", "fc.bias"} and not unexpected
    return model


def test_moco_s_linear_probe_loads_it(plain: Path) -> None:
    assert main([str(plain), "--to", "moco"]) == 0
    path = plain / "export" / "resnet18_moco.pth.tar"
    file = torch.load(path)
    assert (file["epoch"], file["arch"]) == (1, "resnet18")
    model = lincls_load(path, file["arch"])
    own = engine.load(plain).trunk.state_dict()
    assert all(torch.equal(t, own[n]) for n, t in model.state_dict().items() if not n.startswith("fc."))


def check_preprocessing(found: dict[str, str]) -> None:
    """A photo prepared by what the file itself says is what the library's own transform makes of it."""
    how = {key: json.loads(text) for key, text in found.items() if key != "format"}
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8))
    prepare = torchvision.transforms.Compose([
        torchvision.transforms.Resize(how["resize_short_side"]), torchvision.transforms.CenterCrop(how["center_crop"]),
        torchvision.transforms.ToTensor(), torchvision.transforms.Normalize(how["mean"], how["std"]),
    ])  # fmt: skip
    torch.testing.assert_close(prepare(photo), Transform(SIZE)(photo), atol=0.05, rtol=0)


@pytest.fixture(scope="module")
def onnx_file(masked: Path) -> Path:
    assert main([str(masked), "--to", "onnx"]) == 0
    return masked / "export" / "resnet18_w8_s16_onnx.onnx"


def test_onnx_gives_the_same_features_for_any_batch(onnx_file: Path, masked: Path) -> None:
    session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    network = engine.load(masked)
    for count in (1, 2, 7):
        ours = network.features(images(count))
        theirs = torch.from_numpy(session.run(None, {"images": images(count).numpy()})[0])
        assert theirs.shape == ours.shape == (count, network.trunk.channels)
        assert (theirs - ours).abs().max() < 1e-4
    check_preprocessing(session.get_modelmeta().custom_metadata_map)
    assert {p.name for p in onnx_file.parent.iterdir()} >= {onnx_file.name}
    assert not list(onnx_file.parent.glob("*.data"))  # the weights are inside


def test_torch_export_needs_nothing_of_this_project(masked: Path, tmp_path: Path) -> None:
    assert main([str(masked), "--to", "torch-export", "--out", str(tmp_path)]) == 0
    said = dict.fromkeys([f"{key}.json" for key in ("resize_short_side", "center_crop", "mean", "std")], "")
    program = torch.export.load(tmp_path / "resnet18_w8_s16_torch_export.pt2", extra_files=said)
    check_preprocessing({name.removesuffix(".json"): text for name, text in said.items()})
    calls = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert calls and all(call.startswith(("aten.", "<built-in function")) for call in calls)
    network = engine.load(masked)
    for count in (1, 2, 7):
        assert (program.module()(images(count)) - network.features(images(count))).abs().max() < 1e-4


@torch.no_grad()
def test_published_depends_on_the_batch_and_the_card_says_so(masked: Path, tmp_path: Path) -> None:
    found = {}
    for minmax in ("batch", "image"):
        path = tmp_path / f"{minmax}.pt2"
        assert main([str(masked), "--to", "torch-export", "--out", str(path), "--minmax", minmax]) == 0
        model = torch.export.load(path).module()
        together, alone = model(images(4)), torch.cat([model(image[None]) for image in images(4)])
        card = json.loads(path.with_name(path.name + ".json").read_text())
        assert card["network"]["mask_scaled_over"] == minmax
        found[minmax] = float((together - alone).abs().max()), card["notes"][0]
    assert found["batch"][0] > 1e-3 and "depends on the images" in found["batch"][1] and "--minmax image" in found["batch"][1]
    assert found["image"][0] < 1e-5 and "per image" in found["image"][1]


def test_the_card(plain: Path) -> None:
    record = {"model": "run", "protocol": "linear", "setting": "SGD", "fraction": 20, "epoch": 1, "top1": 0.375}
    (plain / "evaluation.json").write_text(json.dumps([record | {"run": "/somebody/runs/plain"}]))
    assert main([str(plain), "--to", "torchvision"]) == 0
    path = plain / "export" / "resnet18_torchvision.safetensors"
    text = path.with_name(path.name + ".json").read_text()
    facts = json.loads(text)
    assert facts["metrics"]["last"]["rank1"] == 0.5 and facts["metrics"]["evaluation"][0]["top1"] == 0.375
    assert facts["training"]["commit"] == "0123456789ab" and (facts["training"]["epoch"], facts["training"]["step"]) == (1, 46)
    assert facts["preprocessing"]["resize_short_side"] == 73 and facts["preprocessing"]["center_crop"] == SIZE
    assert facts["preprocessing"]["mean"] == [0.485, 0.456, 0.406]
    assert facts["network"]["dimension"] == 512 and facts["config"]["queue.size"] == 65536
    assert facts["config"]["data.root"] == "CUB_200_2011" and "/somebody" not in text  # no paths of the machine
    assert "terms of their own" in facts["license"] and "cub" in facts["license"]
    page = path.with_name(path.name + ".md").read_text()
    for word in (
        "resnet18", "epoch 1", "512-d", "rank1 50.00 %",
        "| run, epoch 1 | linear; SGD; 20 % of the labels | top1 37.50 % |", "0.229", "load_state_dict", facts["sha256"],
    ):  # fmt: skip
        assert word in page
    assert page.count("| linear;") == 1 and page.count("rank1 25.00 %") == page.count("rank1 50.00 %") == 1
    scope: dict = {"torchvision": torchvision, "torch": torch}
    exec(facts["use"].replace(path.name, str(path)), scope)  # the card's own lines
    assert isinstance(scope["model"].fc, torch.nn.Identity)


def test_the_card_lists_what_the_log_and_the_records_both_hold_once(plain: Path) -> None:
    about = {"model": "run", "setting": "as trained", "epoch": 1}
    records = [about | {"protocol": "retrieval", "rank1": 0.5}, about | {"protocol": "knn", "k": 200, "top1": None}]
    (plain / "evaluation.json").write_text(json.dumps(records))
    assert main([str(plain), "--to", "torchvision"]) == 0
    page = (plain / "export/resnet18_torchvision.safetensors.md").read_text()
    assert page.count("rank1 50.00 %") == 1 and "| run, epoch 1 | retrieval; as trained | rank1 50.00 % |" in page
    assert page.count("rank1 25.00 %") == 1  # before training: the log alone has it


def test_the_commit_is_of_this_source_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if (Path(run_folder.__file__).parents[1] / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?", run_folder.commit())
    monkeypatch.setattr(run_folder, "__file__", str(tmp_path / "engine" / "run_folder.py"))
    assert run_folder.commit() is None


def fails(argv: list[str], capfd: pytest.CaptureFixture, *words: str) -> None:
    assert main(argv) == 1
    error = " ".join(capfd.readouterr().err.split())
    assert "Traceback" not in error
    for word in ("error:", *words):
        assert word in error, f"{word!r} is not in {error!r}"


def test_what_cannot_be_exported(
    plain: Path, masked: Path, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails([str(tmp_path), "--to", "onnx"], capfd, "not a run folder")
    fails([str(masked), "--to", "timm"], capfd, "resnet18_w8_s16", "--to onnx")
    fails([str(plain), "--to", "onnx", "--minmax", "image"], capfd, "--minmax image", "no mask")
    fails([str(plain), "--to", "moco", "--out", str(tmp_path / "x.onnx")], capfd, "x.onnx", ".pth.tar")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    fails([str(masked), "--to", "onnx"], capfd, "onnxruntime", "pip install '.[export]'")
    monkeypatch.undo()
    with pytest.raises(SystemExit):
        main([str(plain), "--to", "coreml"])


def test_a_graph_that_computes_something_else_is_not_kept(
    masked: Path, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = engine.pretrained.graph.Plain.forward
    monkeypatch.setattr(engine.pretrained.graph.Plain, "forward", lambda self, images: forward(self, 0.5 * images))
    fails([str(masked), "--to", "torch-export", "--out", str(tmp_path)], capfd, "differ by", "nothing was written")
    assert list(tmp_path.iterdir()) == []
