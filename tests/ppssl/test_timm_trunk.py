"""Trunks of timm: maps, stages, training, how images enter. One small model of each family, random weights."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import timm
import torch
from error_budget import assert_within_budget
from PIL import Image
from small_methods import DIM, QUEUE, batch, build_by_name, step_of
from torch import nn

from engine.data import Transform
from ppssl import PPSSL
from ppssl.batch_norm import GroupedBatchNorm, group_batch_norm
from ppssl.encoder import BaseTrunk, FeatureNet, MaskBranch, projection_head
from ppssl.settings import variant
from ppssl.timm_trunk import IMAGENET, DilatedDepthwise, build_trunk, image_input, tagged

# name: channels, stride, stages
FAMILIES = {
    "resnet18": (512, 32, 5),
    "resnet18_s16": (512, 16, 5),
    "convnext_atto": (320, 32, 4),
    "convnext_atto_s16": (320, 16, 4),
    "tf_efficientnet_lite0": (1280, 32, 5),
    "tf_efficientnet_lite0_s8": (1280, 8, 5),
    "regnety_002": (368, 32, 5),
    "mobilenetv3_small_050": (288, 32, 5),
    "vit_tiny_patch16_224": (192, 16, 12),
    "vit_small_patch16_dinov3": (384, 16, 12),
    "swin_tiny_patch4_window7_224": (768, 32, 4),
    "swinv2_tiny_window8_256": (768, 32, 4),
}
TRAINED = [name for name in FAMILIES if not name.endswith(("_s8", "_s16", "dinov3", "256"))]


def guided(trunk: BaseTrunk, *sources: str) -> PPSSL:
    settings = variant("ppssl", "guided", {"iadm.sources": sources or ("image",)})
    network = FeatureNet(trunk, MaskBranch(trunk.channels, 8, minmax="image"))
    head = projection_head("mlp2", trunk.channels, DIM)
    method = PPSSL(network, head, torch.randn(8, 5), settings=settings, dim=DIM, queue_size=QUEUE)
    return method.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_map_is_what_timm_s_own_model_makes_of_the_image(name: str) -> None:
    torch.manual_seed(0)
    trunk = build_trunk(f"timm/{name}").eval()
    channels, stride, stages = FAMILIES[name]
    assert (trunk.channels, trunk.stride, len(trunk.sources)) == (channels, stride, stages)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        found = trunk(images)
    assert found.shape == (2, channels, 64 // stride, 64 // stride) and trunk.map_side(64) == 64 // stride
    plain, _, cut = name.rpartition("_s")
    options = {"output_stride": int(cut)} if cut in ("8", "16") else {}
    sizes = {"dynamic_img_size": True} if name.startswith("vit") else {"strict_img_size": False} if "swin" in name else {}
    theirs = timm.create_model(plain if options else name, num_classes=0, **options, **sizes).eval()
    theirs.load_state_dict(trunk.state_dict())  # timm's own names, all of them
    with torch.no_grad():
        wanted = theirs.forward_features(images)
    if wanted.ndim == 3:
        wanted = wanted[:, theirs.num_prefix_tokens :].transpose(1, 2).unflatten(2, found.shape[2:])
    elif "swin" in name:
        wanted = wanted.permute(0, 3, 1, 2)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", TRAINED)
def test_every_stage_is_a_map_through_which_the_output_s_gradient_passes(name: str) -> None:
    torch.manual_seed(0)
    trunk = build_trunk(f"timm/{name}").train()
    images = torch.randn(2, 3, 64, 64)
    plain = copy.deepcopy(trunk)(images)
    trunk.watch(trunk.sources)
    maps = trunk.maps(images)
    assert list(maps) == list(trunk.sources)
    torch.testing.assert_close(maps[trunk.sources[-1]], plain)  # watching changes nothing
    sides = [m.shape[2] for m in maps.values()]
    assert all(m.ndim == 4 and m.shape[2] == m.shape[3] for m in maps.values()) and sides == sorted(sides, reverse=True)
    gradients = torch.autograd.grad(plain.sum() * 0 + maps[trunk.sources[-1]].mean((2, 3)).square().sum(), list(maps.values()))
    assert all(float(g.abs().max()) > 0 for g in gradients)
    twin = copy.deepcopy(trunk)
    twin.maps(images)
    assert not trunk._seen and not twin._seen  # a copy keeps its own maps


@pytest.mark.parametrize("name", TRAINED)
def test_a_step_of_moco_and_of_guided_ppssl_moves_what_the_feature_is_made_of(name: str) -> None:
    torch.manual_seed(0)
    trunk = build_trunk(f"timm/{name}")
    unused = {n for n, _ in trunk.named_parameters() if n.startswith(("head.norm", "conv_head")) and "efficientnet" not in name}
    for method in (build_by_name("moco", copy.deepcopy(trunk)), guided(trunk, "image", trunk.sources[1])):
        step = step_of(method.to(memory_format=torch.channels_last))
        before = {n: p.clone() for n, p in method.encoder_q.trunk.named_parameters()}
        for seed in range(2):  # blocks that begin as the identity pass a gradient on from the second step
            output = step(batch(2, seed=seed))
            assert float(output.stats["skipped"]) == 0 and torch.isfinite(output.total)
        still = {n for n, p in method.encoder_q.trunk.named_parameters() if torch.equal(p, before[n])}
        assert still <= unused
        method.attention(torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("name", ["convnext_atto", "vit_tiny_patch16_224"])
def test_the_compiled_step_computes_the_same(name: str) -> None:
    torch._dynamo.reset()
    steps = []
    for compile in ("off", "step"):
        torch.manual_seed(0)
        method = build_by_name("moco", build_trunk(f"timm/{name}")) if "convnext" not in name else guided(
            build_trunk(f"timm/{name}"), "image", "stage2"
        )  # fmt: skip
        steps.append(step_of(method.to(memory_format=torch.channels_last), compile=compile, backend="aot_eager"))
    plain, compiled = (step(batch(2)) for step in steps)
    torch.testing.assert_close(compiled.total, plain.total)
    for one, other in zip(*(step.parameters for step in steps), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_gradient_in_another_memory_order_changes_no_update() -> None:
    torch.manual_seed(0)
    methods = [guided(build_trunk("timm/convnext_atto")) for _ in range(2)]
    methods[1].load_state_dict(methods[0].state_dict())
    methods[1].to(memory_format=torch.contiguous_format)  # its downsampling convolutions give channels_last gradients
    for method in methods:
        step_of(method)(batch(2))
    for one, other in zip(*(method.parameters() for method in methods), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_bfloat16_trains_too() -> None:
    output = step_of(guided(build_trunk("timm/vit_tiny_patch16_224"), "stage3"), amp="bf16")(batch(2))
    assert torch.isfinite(output.total) and float(output.stats["skipped"]) == 0


@pytest.mark.parametrize("name", ["regnety_002", "tf_efficientnet_lite0"])
def test_group_batch_norm_keeps_the_activation_that_timm_puts_into_it(name: str) -> None:
    torch.manual_seed(0)
    trunk = build_trunk(f"timm/{name}").train()
    groups = group_batch_norm(copy.deepcopy(trunk), 2)
    assert any(isinstance(m, GroupedBatchNorm) for m in groups.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in groups.modules())
    assert groups.state_dict().keys() == trunk.state_dict().keys()
    images = torch.randn(4, 3, 64, 64)
    parts = torch.cat([copy.deepcopy(trunk)(part) for part in images.chunk(2)])
    torch.testing.assert_close(groups(images), parts, rtol=1e-3, atol=1e-4)


def test_a_step_draws_no_random_numbers() -> None:
    trunk = build_trunk("timm/swin_tiny_patch4_window7_224").train()  # has stochastic depth by default
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(trunk(images), trunk(images))


@pytest.mark.parametrize(
    ("arch", "words"),
    [
        ("timm/convnext_ato", ["convnext_ato", "timm/convnext_atto"]),
        ("timm/vit_tiny_patch16_224_s8", ["no output stride", "timm/vit_tiny_patch16_224"]),
        ("timm/crossvit_tiny_240", ["neither a map nor patch tokens", "another model"]),
        ("timm/pit_ti_224", ["no square of patches"]),
    ],
)
def test_what_is_no_trunk_is_refused_by_name(arch: str, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"encoder\.arch") as error:
        build_trunk(arch)
    assert all(word in str(error.value) for word in words), error.value


def test_a_size_that_a_model_does_not_take_names_one_that_it_does() -> None:
    with pytest.raises(ValueError, match=r"data\.image_size: .*vit_small_patch14_dinov2 cannot take images of 100 px.*use 518 or"):
        build_trunk("timm/vit_small_patch14_dinov2").map_side(100)


def test_a_source_that_the_trunk_does_not_have_names_those_that_it_has() -> None:
    with pytest.raises(ValueError, match=r"iadm\.sources: 'layer4'.*image, stage1, stage2, stage3, stage4"):
        guided(build_trunk("timm/convnext_atto"), "layer4")


def test_how_an_image_enters_follows_from_the_names_alone() -> None:
    assert image_input("resnet50", "IMAGENET1K_V1") is image_input("resnet18_w32_s16") is IMAGENET
    assert [IMAGENET.resize(side) for side in (32, 96, 224)] == [round(side * 256 / 224) for side in (32, 96, 224)]
    lite = image_input("timm/tf_efficientnet_lite0_s16", "/some/file.pth")
    assert lite.mean == lite.std == (0.5, 0.5, 0.5) and lite.interpolation == "bicubic"
    # the tag counts, in encoder.arch or in encoder.weights
    augreg, dino = image_input("timm/vit_base_patch16_224"), image_input("timm/vit_base_patch16_224.dino", "timm")
    clip = image_input("timm/vit_base_patch16_224", "timm:dino")
    assert clip == dino and tagged("vit_base_patch16_224.dino", "timm") == "vit_base_patch16_224.dino"
    assert image_input("timm/vit_base_patch16_clip_224").mean != augreg.mean


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "vit_tiny_patch16_224", "convnext_atto"])
def test_the_evaluation_transform_is_timm_s(name: str) -> None:
    data = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    theirs = timm.data.create_transform(**data | {"input_size": (3, 160, 160)}, is_training=False)
    pixels = np.random.default_rng(0).integers(0, 255, (15, 20, 3), np.uint8)
    photo = Image.fromarray(pixels).resize((400, 300))
    torch.testing.assert_close(Transform(160, image_input(f"timm/{name}"))(photo), theirs(photo), atol=1e-5, rtol=1e-5)


FIRST = {  # what is frozen with stem and stage1, by the beginning of its name
    "resnet18": ("conv1", "bn1"),
    "tf_efficientnet_lite0": ("conv_stem", "bn1", "blocks.0"),
    "mobilenetv3_small_050": ("conv_stem", "bn1"),
    "regnety_002": ("stem",),
    "convnext_atto": ("stem", "stages.0"),
    "vit_tiny_patch16_224": ("cls_token", "pos_embed", "patch_embed", "blocks.0"),
    "swin_tiny_patch4_window7_224": ("patch_embed", "layers.0"),
}


@pytest.mark.parametrize("name", FIRST)
def test_parts_of_a_model_of_timm_are_frozen_up_to_a_stage(name: str) -> None:
    torch.manual_seed(0)
    trunk = build_trunk(f"timm/{name}").train()
    parts = trunk.parts()
    assert [*parts] == ["stem", *trunk.sources]
    with_tensors = {n.rpartition(".")[0] for n in trunk.state_dict()}
    assert with_tensors == {n for names in parts.values() for n in names}
    trunk.freeze(("stem", "stage1"))
    frozen = {n for n, p in trunk.named_parameters() if not p.requires_grad}
    first = tuple(f"{top}." for top in FIRST[name])
    assert frozen == {n for n, _ in trunk.named_parameters() if f"{n}.".startswith(first)}
    norms = {n: m.training for n, m in trunk.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert all(training != f"{n}.".startswith(first) for n, training in norms.items())
    assert trunk.constant[0] == "stage1" and trunk.sources[1] not in trunk.constant
    trunk.watch(("stage1", "stage2"))
    maps = trunk.maps(torch.randn(2, 3, 64, 64))
    assert not maps["stage1"].requires_grad and maps["stage2"].requires_grad


def test_a_part_that_a_model_does_not_have_is_named_with_those_it_has() -> None:
    trunk = build_trunk("timm/convnext_atto")
    for part in ("bn", "stage5", "layer1"):
        with pytest.raises(
            ValueError, match=f"encoder.freeze: '{part}' is no part of timm/convnext_atto; use stem, stage1, .*, stage4$"
        ):
            trunk.freeze((part,))
    assert all(p.requires_grad for p in trunk.parameters()) and trunk.frozen == ()


@pytest.mark.parametrize(("taps", "dilation", "side"), [(3, 2, 6), (5, 2, 3), (5, 2, 7), (7, 4, 9)])
@pytest.mark.parametrize("bias", [False, True])
def test_dilated_depthwise_convolutions_have_torch_s_gradients(taps: int, dilation: int, side: int, bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 6, taps, padding=dilation * (taps // 2), dilation=dilation, groups=6, bias=bias)
    assert DilatedDepthwise.fits(plain)
    truth, ours = copy.deepcopy(plain).double(), copy.deepcopy(plain)
    ours.__class__ = DilatedDepthwise
    images = torch.randn(2, 6, side, side).to(memory_format=torch.channels_last)
    upward = torch.randn(2, 6, side, side)

    def gradients(conv: nn.Conv2d, dtype: torch.dtype) -> list[torch.Tensor]:
        x = images.to(dtype).requires_grad_()
        y = conv(x)
        return [y.detach(), *torch.autograd.grad(y, [x, *conv.parameters()], upward.to(dtype))]

    found = zip(gradients(ours, torch.float32), gradients(plain, torch.float32), gradients(truth, torch.float64), strict=True)
    for mine, eager, exact in found:
        assert_within_budget(f"{taps} taps", mine, eager, exact)
    with torch.no_grad():
        assert torch.equal(ours(images), plain(images))


def test_dilated_depthwise_convolutions_in_bfloat16() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 5, padding=4, dilation=2, groups=8, bias=False)
    images = torch.randn(4, 8, 6, 6, requires_grad=True)
    (exact,) = torch.autograd.grad(conv(images).square().sum(), conv.weight)
    conv.__class__ = DilatedDepthwise
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(images)
        loss = y.float().square().sum()
    found, of_images = torch.autograd.grad(loss, [conv.weight, images])
    assert y.dtype == torch.bfloat16 and found.dtype == of_images.dtype == torch.float32
    assert (found - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize(("arch", "count"), [("timm/tf_efficientnet_lite0_s16", 4), ("timm/tf_efficientnet_lite0", 0)])
def test_an_output_stride_brings_dilated_depthwise_convolutions(arch: str, count: int) -> None:
    trunk = build_trunk(arch)
    assert sum(isinstance(module, DilatedDepthwise) for module in trunk.modules()) == count
    assert list(trunk.state_dict()) == list(timm.create_model("tf_efficientnet_lite0", num_classes=0).state_dict())
