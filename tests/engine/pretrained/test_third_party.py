"""Starting weights in the dialects of other projects: each file is written here as that project writes it."""

import argparse
import os
import pickle
import tarfile
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from engine.config import Config
from engine.pretrained import weights_file
from engine.pretrained.third_party import initialize
from engine.training import checkpoint
from ppssl.encoder import FeatureNet, Trunk, projection_head
from ppssl.moco import MoCo

DIM = 512


def resnet18(seed: int) -> nn.Module:
    """torchvision's own, with batch statistics that are not the initial ones."""
    torch.manual_seed(seed)
    net = torchvision.models.resnet18(num_classes=8)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return net


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return resnet18(3)


@pytest.fixture(scope="module")
def follower() -> nn.Module:
    return resnet18(4)


class Wrapped(nn.Module):
    """Modules by name: the state dict of a training script's model."""

    def __init__(self, **parts: nn.Module):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def under(prefix: str, module: nn.Module) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in module.state_dict().items()}


def without_fc(module: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t for n, t in module.state_dict().items() if not n.startswith("fc.")}


def moco(net: nn.Module, follower: nn.Module) -> dict:
    """MoCo: everything below module., the head in the encoder's fc, queue [D, K]."""
    state = under("module.encoder_q.", net) | under("module.encoder_k.", follower)
    state |= {"module.queue": torch.randn(8, 32), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    return {"epoch": 200, "arch": "resnet18", "state_dict": state, "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}}}


def learnmat(net: nn.Module, follower: nn.Module) -> dict:
    """LCR and LearnMat: MoCo's with the mask branch and, in LearnMat, the whole CLIP beside it."""
    file = moco(net, follower)
    file["state_dict"] |= {
        "module.conv16.weight": torch.randn(32, DIM, 1, 1),
        "module.bn16.weight": torch.ones(32),
        "module.text_fc.weight": torch.randn(512, DIM),
        "module.clip.visual.conv1.weight": torch.randn(768, 3, 32, 32),
        "module.clip.visual.transformer.resblocks.0.attn.in_proj_weight": torch.randn(9, 3),
    }
    return file


def solo_learn(net: nn.Module, follower: nn.Module) -> dict:
    """A Lightning checkpoint: backbone, momentum_backbone, projector, an online classifier."""
    state = under("backbone.", Wrapped(**dict(net.named_children()) | {"fc": nn.Identity()}))
    state |= under("momentum_backbone.", follower) | under("projector.", projection_head("mlp2", DIM, 8))
    state |= under("classifier.", nn.Linear(DIM, 10)) | {"queue": torch.randn(2, 8, 32)}
    loops = {"fit_loop": {"epoch_progress": {"total": {"ready": 400}}}}
    return {"epoch": 399, "global_step": 9, "pytorch-lightning_version": "2.1.2", "state_dict": state, "loops": loops}


def lightly(net: nn.Module, follower: nn.Module) -> dict:
    """A Lightning checkpoint whose backbone is nn.Sequential(*list(resnet.children())[:-1])."""
    headless, momentum = (nn.Sequential(*list(m.children())[:-1]) for m in (net, follower))
    state = under("backbone_momentum.", momentum) | under("backbone.", headless)
    state |= under("projection_head.layers.", projection_head("mlp2", DIM, 8))
    return {"epoch": 10, "state_dict": state}


def dino(net: nn.Module, follower: nn.Module) -> dict:
    return {"teacher": under("backbone.", follower), "student": under("module.backbone.", net), "epoch": 7}


def timm_train(net: nn.Module, follower: nn.Module) -> dict:
    """timm's train.py: its command line and an average of the weights beside them."""
    return {
        "arch": "resnet18", "args": argparse.Namespace(lr=0.1, model="resnet18"), "version": 2,
        "state_dict_ema": follower.state_dict(), "state_dict": net.state_dict(),
    }  # fmt: skip


FILES = {
    "moco": moco,
    "lcr and learnmat": learnmat,
    "moco-v3": lambda net, follower: {
        "state_dict": under("module.momentum_encoder.", follower) | under("module.base_encoder.", net)
    },
    "solo-learn": solo_learn,
    "lightly": lightly,
    "lightly, bare": lambda net, follower: nn.Sequential(*list(net.children())[:-1]).state_dict(),
    "dino": dino,
    "timm": timm_train,
    "torchvision": lambda net, follower: net.state_dict(),
    "distributed": lambda net, follower: under("module.", net),
    "compiled": lambda net, follower: under("_orig_mod.", net),
    "compiled inside distributed inside a model": lambda net, follower: {"model": under("module.encoder_q._orig_mod.", net)},
    "one compiled stage": lambda net, follower: {
        n.replace("layer1.", "layer1._orig_mod."): t for n, t in net.state_dict().items()
    },
}  # fmt: skip


@pytest.mark.parametrize("dialect", FILES)
def test_every_dialect_gives_the_same_trunk(dialect: str, net: nn.Module, follower: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "w.pth.tar"
    torch.save(FILES[dialect](net, follower), path)
    trunk = Trunk("resnet18")
    note = initialize(trunk, str(path))
    parameters, buffers = len(list(trunk.parameters())), len(list(trunk.buffers()))
    assert f"{parameters} of {parameters} parameters and {buffers} of {buffers} buffers" in note and "random" not in note
    assert all(torch.equal(t, net.state_dict()[n]) for n, t in trunk.state_dict().items())


def test_what_is_left_over_is_counted_by_module(net: nn.Module, follower: nn.Module, tmp_path: Path) -> None:
    torch.save(learnmat(net, follower), tmp_path / "w.pth.tar")
    note = initialize(Trunk("resnet18"), str(tmp_path / "w.pth.tar"))
    whole = len(follower.state_dict())
    assert "(below state_dict.encoder_q)" in note
    left = note.partition("left over in the file: ")[2].split(", ")
    assert {*left} == {
        f"encoder_k {whole}", "encoder_q 2", "queue 1", "queue_ptr 1", "conv16 1", "bn16 1", "text_fc 1", "clip 2"
    }  # fmt: skip


def test_own_weights_and_own_checkpoints(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trunk = Trunk("resnet18_w8")
    method = MoCo(FeatureNet(trunk), projection_head("mlp2", trunk.channels, 8), dim=8, queue_size=16)
    for p in method.encoder_k.parameters():
        p.data += 1
    weights_file.save_weights(tmp_path / "weights.safetensors", method.network.weights() | {"mask.conv.weight": torch.ones(2)}, {})
    state = {"step": 3, "epoch": 1, "method": method.state_dict(), "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}}}
    checkpoint.save(tmp_path, state, keep=1)
    for file in ("weights.safetensors", "step_000000003.pt"):
        fresh = Trunk("resnet18_w8")
        note = initialize(fresh, str(tmp_path / file))
        assert all(torch.equal(t, trunk.state_dict()[n]) for n, t in fresh.state_dict().items())
        assert ("encoder_q.trunk" in note) == file.endswith(".pt")


def test_partial_files_say_what_stays_random(net: nn.Module, tmp_path: Path) -> None:
    some = {n: t for n, t in net.state_dict().items() if n.startswith(("conv1", "layer1"))}
    save_file(some, tmp_path / "w.safetensors")
    trunk = Trunk("resnet18")
    note = initialize(trunk, str(tmp_path / "w.safetensors"))
    parameters = sum("num_batches" not in n and "running" not in n for n in some)
    assert f" {parameters} of " in note and "still random: " in note and "bn1 2" in note and "layer4 15" in note
    assert torch.equal(trunk.conv1.weight, net.conv1.weight)


def test_another_network_is_refused_by_shape(net: nn.Module, tmp_path: Path) -> None:
    save_file(without_fc(net), tmp_path / "w.safetensors")
    shape = r"another network than resnet50: its layer1\.0\.conv1\.weight is \[64, 64, 3, 3\].*encoder\.arch"
    with pytest.raises(ValueError, match=shape):
        initialize(Trunk("resnet50"), str(tmp_path / "w.safetensors"))
    cifar = without_fc(net) | {"conv1.weight": torch.randn(64, 3, 3, 3)}
    save_file(cifar, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"conv1\.weight is \[64, 3, 3, 3\]"):
        initialize(Trunk("resnet18"), str(tmp_path / "w.safetensors"))


class Runs:
    """Unpickled, it would make a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_runs_code_is_refused_and_does_nothing(net: nn.Module, tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    files = {"zip.pth": True, "legacy.pth": False}
    for name, zipped in files.items():
        torch.save({"state_dict": net.state_dict(), "extra": Runs(witness)}, tmp_path / name, _use_new_zipfile_serialization=zipped)
    (tmp_path / "bare.pkl").write_bytes(pickle.dumps(Runs(witness), protocol=2))
    for name in (*files, "bare.pkl"):
        with pytest.raises(ValueError, match=rf"encoder\.weights: .*{name}.*without running code.*mkdir.*weights_only=False"):
            initialize(Trunk("resnet18"), str(tmp_path / name))
    torch.save(net, tmp_path / "module.pth")
    with pytest.raises(ValueError, match=r"asks for torchvision\.models\.resnet\.ResNet"):
        initialize(Trunk("resnet18"), str(tmp_path / "module.pth"))
    assert not witness.exists()


def test_the_remedy_for_a_refused_pickle_works(net: nn.Module, tmp_path: Path) -> None:
    torch.save({"state_dict": under("backbone.", net), "hyper_parameters": Config()}, tmp_path / "solo.ckpt")
    with pytest.raises(ValueError, match=r"engine\.config\.schema\.Config") as refused:
        initialize(Trunk("resnet18"), str(tmp_path / "solo.ckpt"))
    exec(str(refused.value).partition('python -c "')[2].rstrip('"'), {})
    assert "(below backbone)" in initialize(Trunk("resnet18"), str(tmp_path / "solo.tensors.pth"))


def test_old_formats(net: nn.Module, tmp_path: Path) -> None:
    torch.save({"state_dict": net.state_dict()}, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    # before torch 1.6: another container, still plain tensors
    assert "60 of 60 parameters" in initialize(Trunk("resnet18"), str(tmp_path / "legacy.pth"))
    with tarfile.open(tmp_path / "old.pth", "w") as archive:  # before torch 0.2
        for name in ("sys_info", "pickle", "storages", "tensors"):
            (tmp_path / name).write_bytes(pickle.dumps({}))
            archive.add(tmp_path / name, name)
    with pytest.raises(ValueError, match=r"old\.pth cannot be read without running code"):
        initialize(Trunk("resnet18"), str(tmp_path / "old.pth"))


def test_nothing_matching_missing_or_unreadable_files_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"other": torch.ones(2)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"encoder\.weights: nothing in .*w\.safetensors.*other"):
        initialize(Trunk("resnet18"), str(tmp_path / "w.safetensors"))
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list\.pth holds a list"):
        initialize(Trunk("resnet18"), str(tmp_path / "list.pth"))
    with pytest.raises(FileNotFoundError, match=r"encoder\.weights.*absent\.pth"):
        initialize(Trunk("resnet18"), str(tmp_path / "absent.pth"))
    for name in ("junk.pth", "junk.safetensors"):
        (tmp_path / name).write_bytes(b"junk")
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            initialize(Trunk("resnet18"), str(tmp_path / name))
    with pytest.raises(ValueError, match="IMAGENET1K_V1"):
        initialize(Trunk("resnet18"), "IMAGENET")
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_a, **_k: (_ for _ in ()).throw(OSError("no network")))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"resnet18-.*\.pth.*encoder\.weights=none"):
        initialize(Trunk("resnet18"), "IMAGENET1K_V1")


def test_timms_names_are_torchvisions() -> None:
    timm = pytest.importorskip("timm")
    ours = set(Trunk("resnet50").state_dict())
    assert set(timm.create_model("resnet50", num_classes=0).state_dict()) == ours
    assert set(torchvision.models.resnet50().state_dict()) - ours == {"fc.weight", "fc.bias"}


def test_none_keeps_the_random_start() -> None:
    trunk = Trunk("resnet18_w8")
    before = trunk.conv1.weight.clone()
    assert "random" in initialize(trunk, "none") and torch.equal(trunk.conv1.weight, before)
