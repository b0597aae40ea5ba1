"""Trunk, heads, mask branch, and the network that is kept."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from ppssl.batch_norm import group_batch_norm
from ppssl.encoder import (
    LAYERS,
    FeatureNet,
    MaskBranch,
    Trunk,
    projection_head,
    scale_to_unit,
)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_trunk_is_torchvisions_resnet_by_name_and_value(arch: str) -> None:
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, arch)().eval()
    ours = Trunk(arch).eval()
    expected = {n: t for n, t in theirs.state_dict().items() if not n.startswith("fc.")}
    assert ours.state_dict().keys() == expected.keys()
    ours.load_state_dict(expected)
    images = torch.randn(1, 3, 64, 64)
    maps = {}
    theirs.layer4.register_forward_hook(lambda _m, _i, out: maps.update(layer4=out))
    theirs.layer2.register_forward_hook(lambda _m, _i, out: maps.update(layer2=out))
    with torch.no_grad():
        theirs(images)
        found = ours.maps(images)
    assert torch.equal(found["layer4"], maps["layer4"]) and torch.equal(found["layer2"], maps["layer2"])
    assert ours.channels == maps["layer4"].shape[1]


def passes(trunk: Trunk, images: torch.Tensor, times: int = 2) -> dict[str, torch.Tensor]:
    """The maps of every stage, the gradients of two derivatives of one forward pass, and the buffers after ``times`` of them."""
    for _ in range(times):
        x = images.clone().requires_grad_()
        maps = trunk.maps(x)
        (by_image,) = torch.autograd.grad(maps["layer4"].square().mean(), x, retain_graph=True)
        trunk.zero_grad()
        sum(m.mul(by_image.mean() + 1).sin().mean() for m in maps.values()).backward()
    grads = {f"d{name}": p.grad for name, p in trunk.named_parameters()}
    return maps | {"dx": by_image} | grads | {name: b.clone() for name, b in trunk.named_buffers()}


def shallow(arch: str) -> Trunk:
    """One block a stage: Triton's interpreter is slow."""
    torch.manual_seed(0)
    trunk = Trunk(arch)
    for name in LAYERS:
        setattr(trunk, name, trunk.get_submodule(name)[:1])
    return trunk


@pytest.mark.parametrize(("arch", "groups"), [("resnet18_w8_s16", 2), ("resnet50_w8_s16", 1)])
def test_a_fused_trunk_is_the_trunk(arch: str, groups: int, kernel_device: torch.device) -> None:
    trunk = group_batch_norm(shallow(arch), groups).to(kernel_device, memory_format=torch.channels_last).train()
    for name, p in trunk.named_parameters():
        if "bn" in name or "downsample.1" in name:  # blocks that begin as the identity would hide most of it
            nn.init.uniform_(p, 0.5, 1.5)
    fused = copy.deepcopy(trunk)
    fused.fuse_batch_norm()
    images = torch.randn(4, 3, 32, 32, device=kernel_device).to(memory_format=torch.channels_last)
    truth = passes(copy.deepcopy(trunk).double(), images.double())
    assert fused.state_dict().keys() == trunk.state_dict().keys()
    eager, ours = passes(trunk, images), passes(fused, images)
    for name, true in truth.items():
        if name.endswith("num_batches_tracked"):
            assert torch.equal(ours[name], true), name
            continue
        scale = true.abs().max().item() + 1e-12
        error, budget = ((t[name].double() - true).abs().max().item() / scale for t in (ours, eager))
        assert error <= 4 * budget + 1e-5, f"{name}: {error:.1e}, torch {budget:.1e}"
    trunk.load_state_dict(fused.state_dict())
    assert torch.equal(fused.eval()(images), trunk.eval()(images))


def test_a_fused_trunk_trains_under_autocast_and_repeats_itself_to_the_bit(kernel_device: torch.device) -> None:
    trunk = shallow("resnet18_w8_s16").to(kernel_device, memory_format=torch.channels_last).train()
    trunk.fuse_batch_norm()
    images, results = torch.randn(2, 3, 32, 32, device=kernel_device), []
    for copied in (trunk, copy.deepcopy(trunk)):
        with torch.autocast(kernel_device.type, dtype=torch.bfloat16):
            results.append(passes(copied, images))
    assert results[0]["layer4"].dtype == torch.bfloat16
    assert all(torch.equal(t, results[1][name]) for name, t in results[0].items())


@pytest.mark.parametrize(
    ("arch", "channels", "side"),
    [("resnet18_w8", 64, 3), ("resnet18_w8_s16", 64, 6), ("resnet18_w8_s8", 64, 12), ("resnet50_w8_s16", 256, 6)],
)
def test_width_and_output_stride(arch: str, channels: int, side: int) -> None:
    trunk = Trunk(arch)
    assert trunk(torch.zeros(2, 3, 96, 96)).shape == (2, channels, side, side)
    assert trunk.channels == channels and 96 // trunk.stride == side


@pytest.mark.parametrize("arch", ["resnet18_w2", "resnet18_w4_s16", "resnet18_w8"])
def test_gradients_of_narrow_trunks(arch: str) -> None:
    """A CPU's library has kernels of its own for few channels, some of which have been wrong."""
    torch.manual_seed(0)
    single = Trunk(arch).to(memory_format=torch.channels_last).train()
    for module in single.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    double = copy.deepcopy(single).double()
    images = torch.randn(8, 3, 64, 64).to(memory_format=torch.channels_last)
    for trunk, batch in ((single, images), (double, images.double())):
        sum(feature.square().sum() for feature in trunk.maps(batch).values()).backward()
    for (name, found), expected in zip(single.named_parameters(), double.parameters(), strict=True):
        error = (found.grad - expected.grad).norm() / expected.grad.norm()
        assert error < 1e-3, (name, error)


@pytest.mark.parametrize("arch", ["resnet", "vgg16", "resnet18_s4", "resnet18_s16_w8"])
def test_unknown_architectures_are_named(arch: str) -> None:
    with pytest.raises(ValueError, match=rf"encoder\.arch.*{arch}"):
        Trunk(arch)


def test_heads() -> None:
    x = torch.randn(4, 16)
    kinds = {
        "mlp2": [nn.Linear, nn.ReLU, nn.Linear],
        "mlp3_bn": [nn.Linear, nn.BatchNorm1d, nn.ReLU] * 2 + [nn.Linear, nn.BatchNorm1d],
    }
    for kind, layers in kinds.items():
        head = projection_head(kind, 16, 5)
        assert [type(m) for m in head] == layers and head(x).shape == (4, 5)
    with pytest.raises(ValueError, match="mlp9"):
        projection_head("mlp9", 16, 5)


@pytest.mark.parametrize("minmax", ["batch", "image"])
def test_mask_branch_is_conv_bn_relu_max_minmax_hadamard_pool(minmax: str) -> None:
    torch.manual_seed(0)
    branch, feature = MaskBranch(12, 7, minmax=minmax), torch.randn(5, 12, 4, 4)
    plain = nn.BatchNorm2d(7)
    for training in (True, False):
        branch.train(training)
        plain.train(training)
        out = branch(feature)
        mask = scale_to_unit(torch.relu(plain(branch.conv(feature))).max(1).values, minmax)
        assert torch.allclose(out.mask, mask, atol=1e-6)
        assert torch.allclose(out.pooled, (mask[:, None] * feature).mean((2, 3)), atol=1e-6)
        assert torch.allclose(branch.bn.running_mean, plain.running_mean, atol=1e-6)
        assert torch.allclose(branch.bn.running_var, plain.running_var, atol=1e-6)


def test_scale_to_unit_ranges_over_the_batch_or_each_image() -> None:
    z = torch.tensor([[[1.0, 2.0]], [[3.0, 5.0]]])
    assert torch.allclose(scale_to_unit(z, "batch"), torch.tensor([[[0.0, 0.25]], [[0.5, 1.0]]]), atol=1e-6)
    assert torch.allclose(scale_to_unit(z, "image"), torch.tensor([[[0.0, 1.0]], [[0.0, 1.0]]]), atol=1e-6)
    assert torch.equal(scale_to_unit(torch.ones(2, 1, 2), "image"), torch.zeros(2, 1, 2))


def test_grouped_mask_branch_normalizes_by_part_and_scales_over_all() -> None:
    torch.manual_seed(0)
    feature = torch.randn(6, 12, 4, 4)
    grouped = MaskBranch(12, 7, minmax="batch", groups=2)
    phi = []
    for part in feature.chunk(2):
        phi.append(torch.relu(nn.BatchNorm2d(7)(grouped.conv(part))).max(1).values)
    mask = scale_to_unit(torch.cat(phi), "batch")
    out = grouped(feature)
    assert torch.allclose(out.mask, mask, atol=1e-6)
    assert torch.allclose(out.pooled, (mask[:, None] * feature).mean((2, 3)), atol=1e-6)


def test_feature_net_gives_unit_rows_and_its_weights_round_trip() -> None:
    torch.manual_seed(0)
    images = torch.randn(3, 3, 64, 64)
    for masked in (False, True):
        net, other = (
            FeatureNet(t := Trunk("resnet18_w8_s16"), MaskBranch(t.channels, 4, minmax="image") if masked else None).eval()
            for _ in range(2)
        )
        with torch.no_grad():
            feature = net(images)
            assert torch.allclose(feature.norm(dim=1), torch.ones(3)) and not torch.allclose(feature, other(images))
            other.load_weights(net.weights())
            assert torch.equal(other(images), feature)
        assert ("mask.conv.weight" in net.weights()) == masked and "conv1.weight" in net.weights()
