"""Starting weights under other projects' names."""

from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from engine import weights
from ppssl.encoder import Trunk


@pytest.fixture(scope="module")
def source() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return torchvision.models.resnet18().state_dict()


STYLES = {
    "torchvision": "",
    "moco": "module.encoder_q.",
    "moco-v3": "module.base_encoder.",
    "solo-learn": "backbone.",
    "compiled": "_orig_mod.",
    "compiled and wrapped": "module._orig_mod.",
    "own training state": "encoder_q.trunk.",
}


@pytest.mark.parametrize("style", STYLES)
def test_every_spelling_gives_the_same_trunk(style: str, source: dict, tmp_path: Path) -> None:
    prefix = STYLES[style]
    renamed = {prefix + n: t for n, t in source.items()}
    if style == "moco":
        renamed |= {n.replace("encoder_q", "encoder_k"): t + 1 for n, t in list(renamed.items())} | {
            "module.queue": torch.ones(4, 4)
        }
    torch.save({"state_dict": renamed, "epoch": 3}, tmp_path / "w.pth.tar")
    trunk = Trunk("resnet18")
    note = weights.initialise(trunk, str(tmp_path / "w.pth.tar"))
    parameters = len(list(trunk.parameters()))
    assert f"{parameters} of {parameters}" in note
    assert all(torch.equal(t, source[n]) for n, t in trunk.state_dict().items())


def test_safetensors_and_partial_matches_are_counted(source: dict, tmp_path: Path) -> None:
    some = {n: t for n, t in source.items() if n.startswith(("conv1", "layer1"))}
    save_file(some, tmp_path / "w.safetensors")
    trunk = Trunk("resnet18")
    assert f" {sum('num_batches' not in n and 'running' not in n for n in some)} of " in weights.initialise(
        trunk, str(tmp_path / "w.safetensors")
    )
    assert torch.equal(trunk.conv1.weight, source["conv1.weight"])


def test_nothing_matching_missing_or_unreadable_files_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"other": torch.ones(2)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"encoder\.weights: nothing in .*w\.safetensors.*other"):
        weights.initialise(Trunk("resnet18"), str(tmp_path / "w.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"encoder\.weights.*absent\.pth"):
        weights.initialise(Trunk("resnet18"), str(tmp_path / "absent.pth"))
    (tmp_path / "junk.pth").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"encoder\.weights.*junk\.pth"):
        weights.initialise(Trunk("resnet18"), str(tmp_path / "junk.pth"))
    with pytest.raises(ValueError, match="IMAGENET1K_V1"):
        weights.initialise(Trunk("resnet18"), "IMAGENET")
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_a, **_k: (_ for _ in ()).throw(OSError("no network")))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"resnet18-.*\.pth.*encoder\.weights=none"):
        weights.initialise(Trunk("resnet18"), "IMAGENET1K_V1")


def test_none_keeps_the_random_start() -> None:
    trunk = Trunk("resnet18_w8")
    before = trunk.conv1.weight.clone()
    assert "random" in weights.initialise(trunk, "none") and torch.equal(trunk.conv1.weight, before)
