"""Starting weights in the dialects of other projects: each file is written here as that project writes it."""

import argparse
import os
import pickle
import re
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


def test_what_else_is_in_the_file_is_said_by_what_it_is_for(net: nn.Module, follower: nn.Module, tmp_path: Path) -> None:
    torch.save(learnmat(net, follower), tmp_path / "w.pth.tar")
    note = initialize(Trunk("resnet18"), str(tmp_path / "w.pth.tar"))
    assert "(below state_dict.encoder_q)" in note
    left = note.partition("not used of the file: ")[2].split(", ")
    assert {*left} == {"head", "momentum network", "queue", "mask branch", "text model", "optimizer"}
    torch.save({"state_dict": solo_learn(net, follower)["state_dict"] | {"whatever.x": torch.ones(1)}}, tmp_path / "s.ckpt")
    note = initialize(Trunk("resnet18"), str(tmp_path / "s.ckpt"))
    assert {*note.partition("not used of the file: ")[2].split(", ")} == {
        "momentum network", "projection head", "head", "queue", "whatever"
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


def test_a_trunk_that_is_not_wholly_found_is_refused_unless_that_is_asked_for(net: nn.Module, tmp_path: Path) -> None:
    some = {f"model.{n}": t for n, t in net.state_dict().items() if n.startswith(("conv1", "layer1"))}
    save_file(some, tmp_path / "w.safetensors")
    file, trunk = str(tmp_path / "w.safetensors"), Trunk("resnet18")
    before = trunk.layer4[0].conv1.weight.clone()
    with pytest.raises(ValueError, match=r"encoder\.weights: .*w\.safetensors.*it lacks bn1\.weight.*encoder\.partial=true"):
        initialize(trunk, file)
    note = initialize(trunk, file, partial=True)
    assert "13 of 60 parameters and 12 of 60 buffers" in note and "encoder.partial: it lacks bn1.weight" in note
    assert torch.equal(trunk.conv1.weight, net.conv1.weight) and torch.equal(trunk.layer4[0].conv1.weight, before)


def test_not_even_in_part_is_a_file_taken_of_which_nothing_fits(tmp_path: Path) -> None:
    save_file({"conv1.weight": torch.ones(2, 3, 7, 7), "bn1.weight": torch.ones(2)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"its bn1\.weight is \[2\], here it is \[8\]") as refused:
        initialize(Trunk("resnet18_w8"), str(tmp_path / "w.safetensors"), partial=True)
    assert "partial" not in str(refused.value)


def test_a_name_counts_before_a_position(net: nn.Module, tmp_path: Path) -> None:
    file = without_fc(net) | {"0.weight": torch.randn_like(net.conv1.weight)}
    for state in (file, dict(reversed(file.items()))):
        torch.save(state, tmp_path / "w.pth")
        trunk = Trunk("resnet18")
        initialize(trunk, str(tmp_path / "w.pth"), partial=True)
        assert torch.equal(trunk.conv1.weight, net.conv1.weight)


def test_batch_counts_may_be_missing_and_running_statistics_may_not(net: nn.Module, tmp_path: Path) -> None:
    save_file({n: t for n, t in without_fc(net).items() if "num_batches" not in n}, tmp_path / "w.safetensors")
    assert "60 of 60 parameters and 40 of 60 buffers" in initialize(Trunk("resnet18"), str(tmp_path / "w.safetensors"))
    save_file({n: t for n, t in without_fc(net).items() if "running" not in n}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"it lacks bn1\.running_mean"):
        initialize(Trunk("resnet18"), str(tmp_path / "w.safetensors"))


def blocks(arch: str, prefix: str = "") -> dict[str, torch.Tensor]:
    """The state of a narrow network: as deep as torchvision's, with an eighth of its channels."""
    return under(prefix, Trunk(f"{arch}_w8"))


@pytest.mark.parametrize(
    ("there", "here", "words"),
    [
        (
            "resnet101",
            "resnet50",
            r"it also has module\.encoder_q\.layer3\.6\.conv1\.weight, .*layer3\.22.*encoder\.arch=resnet101_w8,",
        ),
        ("resnet50", "resnet101", r"it lacks layer3\.6\.conv1\.weight.*layer3\.22.*encoder\.arch=resnet50_w8,"),
        ("resnet34", "resnet18", r"it also has module\.encoder_q\.layer1\.2\.conv1\.weight.*encoder\.arch=resnet34_w8,"),
        ("resnet18", "resnet34", r"it lacks layer1\.2\.conv1\.weight.*encoder\.arch=resnet18_w8,"),
    ],
)
def test_a_network_of_another_depth_is_refused_with_its_name(there: str, here: str, words: str, tmp_path: Path) -> None:
    torch.save({"state_dict": blocks(there, "module.encoder_q.")}, tmp_path / "w.pth.tar")
    trunk = Trunk(f"{here}_w8")
    before = {n: t.clone() for n, t in trunk.state_dict().items()}
    with pytest.raises(ValueError, match=rf"another network than {here}_w8: {words}"):
        initialize(trunk, str(tmp_path / "w.pth.tar"))
    assert all(torch.equal(t, before[n]) for n, t in trunk.state_dict().items())
    assert "encoder.partial: it " in initialize(trunk, str(tmp_path / "w.pth.tar"), partial=True)


def test_a_position_in_a_sequence_is_quoted_as_it_stands_in_the_file(tmp_path: Path) -> None:
    places = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    split = {tuple(name.split(".", 1)): tensor for name, tensor in blocks("resnet34").items()}
    file = {f"backbone.{places[first]}.{rest}": tensor for (first, rest), tensor in split.items()}
    torch.save({"state_dict": file}, tmp_path / "w.ckpt")
    with pytest.raises(ValueError, match=r"it also has backbone\.4\.2\.conv1\.weight"):
        initialize(Trunk("resnet18_w8"), str(tmp_path / "w.ckpt"))
    with pytest.raises(ValueError, match=r"its backbone\.0\.weight is \[8, 3, 7, 7\], here it is \[64, 3, 7, 7\]"):
        initialize(Trunk("resnet34"), str(tmp_path / "w.ckpt"))


def test_timms_relatives_of_a_resnet_are_refused(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model("seresnet18").state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"it also has layer1\.0\.se\.fc1\.weight.*encoder\.weights to a file of this network"):
        initialize(Trunk("resnet18"), str(tmp_path / "w.pth"))
    # nothing in its tensors tells it from a resnet18: only its name does, wherever it is written
    blur = timm.create_model("resnetblur18").state_dict()
    says = r"it is named resnetblur18, which has the same tensors"
    torch.save(blur, tmp_path / "resnetblur18-84f4748f.pth")
    torch.save({"arch": "resnetblur18", "state_dict": blur}, tmp_path / "arch.pth.tar")
    torch.save({"args": argparse.Namespace(model="resnetblur18"), "state_dict": blur}, tmp_path / "args.pth.tar")
    for name in ("resnetblur18-84f4748f.pth", "arch.pth.tar", "args.pth.tar"):
        with pytest.raises(ValueError, match=says):
            initialize(Trunk("resnet18"), str(tmp_path / name))
    (tmp_path / "hub").mkdir()
    save_file(blur, tmp_path / "hub/model.safetensors")
    (tmp_path / "hub/config.json").write_text('{"architecture": "resnetblur18"}')
    with pytest.raises(ValueError, match=says):
        initialize(Trunk("resnet18"), str(tmp_path / "hub/model.safetensors"))
    (tmp_path / "hub/config.json").write_text('{"architecture": "resnet18"}')
    assert "60 of 60" in initialize(Trunk("resnet18"), str(tmp_path / "hub/model.safetensors"))


def test_another_network_is_refused_by_shape(net: nn.Module, tmp_path: Path) -> None:
    save_file(without_fc(net), tmp_path / "w.safetensors")
    shape = r"another network than resnet50: its layer1\.0\.conv1\.weight is \[64, 64, 3, 3\].*encoder\.arch=resnet18,"
    with pytest.raises(ValueError, match=shape):
        initialize(Trunk("resnet50"), str(tmp_path / "w.safetensors"))
    cifar = without_fc(net) | {"conv1.weight": torch.randn(64, 3, 3, 3)}
    save_file(cifar, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"its conv1\.weight is \[64, 3, 3, 3\].*encoder\.weights to a file of this network"):
        initialize(Trunk("resnet18"), str(tmp_path / "w.safetensors"))


def test_numbers_that_cannot_be_weights_are_refused(net: nn.Module, tmp_path: Path) -> None:
    state = without_fc(net)
    bad = state["layer2.0.conv1.weight"].clone()
    for value in (float("nan"), float("inf")):
        bad[3, 0, 0, 0] = value
        save_file(state | {"layer2.0.conv1.weight": bad, "head": bad.clone()}, tmp_path / "w.safetensors")
        with pytest.raises(ValueError, match=r"w\.safetensors: 1 of the .* numbers of layer2\.0\.conv1\.weight are not finite"):
            initialize(Trunk("resnet18"), str(tmp_path / "w.safetensors"))
    save_file(state | {"conv1.weight": state["conv1.weight"].to(torch.int8)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"its conv1\.weight is torch\.int8, here it is torch\.float32"):
        initialize(Trunk("resnet18"), str(tmp_path / "w.safetensors"))
    half = {n: t.half() if t.is_floating_point() else t for n, t in state.items()}
    save_file(half, tmp_path / "w.safetensors")
    assert "60 of 60 parameters" in initialize(Trunk("resnet18"), str(tmp_path / "w.safetensors"))


def test_names_of_a_file_cannot_drive_the_terminal(net: nn.Module, tmp_path: Path) -> None:
    torch.save({"\x1b[2Jq": under("\x1b]0;x\x07.", net), "\x1b[31m": {"\x9bz": torch.ones(1)}}, tmp_path / "w.pth")
    assert initialize(Trunk("resnet18"), str(tmp_path / "w.pth")).isprintable()
    for state in ({"\x1b[2J": torch.ones(1)}, {f"\x1b[2J.{n}": t for n, t in net.state_dict().items()}):
        torch.save(state, tmp_path / "w.pth")
        with pytest.raises(ValueError, match=r"x1b") as refused:
            initialize(Trunk("resnet50"), str(tmp_path / "w.pth"))
        assert str(refused.value).isprintable()


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
        with pytest.raises(ValueError, match=rf"encoder\.weights: .*{name} cannot be read without running code.*mkdir") as refused:
            initialize(Trunk("resnet18"), str(tmp_path / name))
        assert "weights_only" not in str(refused.value)
    assert not witness.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_whole_model_is_refused_with_what_its_author_can_do(zipped: bool, net: nn.Module, tmp_path: Path) -> None:
    for name, content in {"model.pth": net, "inside.pth": {"model": net, "epoch": 3}}.items():
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match=r"holds a whole model \(torchvision\.models\.resnet\.ResNet\)") as refused:
            initialize(Trunk("resnet18"), str(tmp_path / name))
        assert "weights_only" not in str(refused.value)
        remedy = re.search(r"torch\.save\(model.*?'weights\.pth'\)", str(refused.value))[0]
        exec(remedy.replace("weights.pth", str(tmp_path / "weights.pth")), {"torch": torch, "model": net})
        assert "60 of 60 parameters" in initialize(Trunk("resnet18"), str(tmp_path / "weights.pth"))


@pytest.mark.parametrize("zipped", [True, False])
def test_objects_beside_the_tensors_are_neither_built_nor_in_the_way(zipped: bool, net: nn.Module, tmp_path: Path) -> None:
    file = {"state_dict": under("backbone.", net), "hyper_parameters": Config(), "where": Path("x"), "run": Counted()}
    torch.save(file, tmp_path / "solo.ckpt", _use_new_zipfile_serialization=zipped)
    Counted.built = 0
    note = initialize(Trunk("resnet18"), str(tmp_path / "solo.ckpt"))
    assert "(below state_dict.backbone)" in note and "not built: " in note and "engine.config.schema.Config" in note
    assert Counted.built == 0


class Counted:
    """Unpickled, it would count."""

    built = 0

    def __setstate__(self, state: object) -> None:
        Counted.built += 1

    def __getstate__(self) -> dict[str, int]:
        return {"x": 1}


def test_old_formats(net: nn.Module, tmp_path: Path) -> None:
    torch.save({"state_dict": net.state_dict()}, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    # before torch 1.6: another container, still plain tensors
    assert "60 of 60 parameters" in initialize(Trunk("resnet18"), str(tmp_path / "legacy.pth"))
    with tarfile.open(tmp_path / "old.pth", "w") as archive:  # before torch 0.2
        for name in ("sys_info", "pickle", "storages", "tensors"):
            (tmp_path / name).write_bytes(pickle.dumps({}))
            archive.add(tmp_path / name, name)
    with pytest.raises(ValueError, match=r"old\.pth is a file of PyTorch before 0\.2; .*state_dict"):
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
    with pytest.raises(OSError, match=r"resnet18-.*\.pth.*encoder\.weights=none"):
        initialize(Trunk("resnet18"), "IMAGENET1K_V1")
    (tmp_path / "hub/checkpoints").mkdir(parents=True, exist_ok=True)
    (tmp_path / "hub/checkpoints/resnet18-f37072fd.pth").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(ValueError, match=r"resnet18-f37072fd\.pth is cut short or damaged.*; download it again"):
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
