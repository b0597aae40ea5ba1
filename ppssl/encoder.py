"""The encoder: trunks and the ResNet one, projection head, the max-out mask branch, and the network that is kept for inference."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from ppssl.batch_norm import (
    Freezable,
    Fusing,
    FusingBasicBlock,
    FusingBottleneck,
    fused_batch_norm,
    parts_here,
    update_running_statistics,
)
from ppssl.ops import gather, local_shard, maxout, maxout_image, world_size

RESNETS = {
    "resnet18": (FusingBasicBlock, (2, 2, 2, 2)),
    "resnet34": (FusingBasicBlock, (3, 4, 6, 3)),
    "resnet50": (FusingBottleneck, (3, 4, 6, 3)),
    "resnet101": (FusingBottleneck, (3, 4, 23, 3)),
    "resnet152": (FusingBottleneck, (3, 8, 36, 3)),
}
"""Block and blocks a stage of every network by name."""
LAYERS = ("layer1", "layer2", "layer3", "layer4")
_STAGES = ("stage1", "stage2", "stage3", "stage4")


class BaseTrunk(Freezable):
    """What every trunk offers: images to a map, without pooling and classifier. Its state dict has the names of the project that
    the architecture is from. One of your own sets the four attributes and ``maps``; its ``arch`` is any name that is free."""

    arch: str
    """``encoder.arch``."""
    channels: int
    """C of the output."""
    stride: int
    """Pixels of the image per cell of the map."""
    sources: tuple[str, ...] = LAYERS
    """Names of the maps on the way, from the image on; the last is the output."""
    watched: tuple[str, ...] = ()
    """The sources of ``watch``."""

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """[B, 3, S, S] -> maps [B, c, h, w] by name, the output last; those of ``watch`` at least."""
        raise NotImplementedError(f"{type(self).__name__}.maps")

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, C, S / stride, S / stride]."""
        return self.maps(images)[self.sources[-1]]

    def watch(self, sources: Sequence[str]) -> None:
        """Makes ``maps`` give these sources, ``image`` aside. Raises ``ValueError`` for one that the trunk does not have."""
        if unknown := [s for s in sources if s not in ("image", *self.sources)]:
            raise ValueError(f"iadm.sources: {unknown[0]!r} is no map of this trunk; use image, {', '.join(self.sources)}")
        self.watched = tuple(sources)


class Trunk(BaseTrunk):
    """A ResNet without pooling and classifier, under torchvision's parameter names.

    ``arch`` is ``<resnet name>[_w<base width>][_s<output stride>]``: ``resnet50`` is torchvision's, ``resnet18_w32_s16`` has
    half its channels and no striding in its last stage, so that a small image still gives a map worth attending to.

    Attributes: ``channels`` C of the output, ``stride`` pixels of the image per cell of the map.
    Raises ``ValueError`` for an unknown name.
    """

    fused = False

    def __init__(self, arch: str):
        super().__init__()
        match = re.fullmatch(r"(resnet\d+)(?:_w(\d+))?(?:_s(8|16|32))?", arch)
        if match is None or match[1] not in RESNETS:
            raise ValueError(
                f"encoder.arch: {arch!r} is not known; use one of {', '.join(RESNETS)}, optionally with _w<base width> and "
                f"_s<8|16|32> (output stride), e.g. resnet18_w32_s16"
            )
        block, depths = RESNETS[match[1]]
        width, self.stride = int(match[2] or 64), int(match[3] or 32)
        self.arch = arch
        self.channels = 8 * width * block.expansion
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = width
        for i, depth in enumerate(depths):
            planes = width * 2**i
            reached = 4 * 2**i  # output stride if this stage strides as usual
            stride = 2 if i > 0 and reached <= self.stride else 1
            self.add_module(LAYERS[i], _stage(block, channels, planes, depth, stride))
            channels = planes * block.expansion
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, (BasicBlock, Bottleneck)):
                # blocks begin as the identity (Goyal et al. 2017): otherwise all images start with nearly the same feature and
                # contrast from random weights takes several times as long to find its way
                nn.init.zeros_(module.bn3.weight if isinstance(module, Bottleneck) else module.bn2.weight)

    def fuse_batch_norm(self) -> None:
        """From now on, batch-norm, the sum with the shortcut and ReLU are one op while training; names and values stay. It needs
        CUDA tensors of at most 32 bits, or Triton's interpreter."""
        for module in self.modules():
            if isinstance(module, (Trunk, Fusing)):
                module.fused = True

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """The output of every stage by name, ``layer1`` ... ``layer4``."""
        x = self.conv1(images)
        x = fused_batch_norm(self.bn1, x) if self.fused and self.training else self.relu(self.bn1(x))
        x = self.maxpool(x)
        maps = {}
        for name in LAYERS:
            x = maps[name] = self.get_submodule(name)(x)
        return maps

    def parts(self) -> dict[str, tuple[str, ...]]:
        """``stem`` (``conv1``, ``bn1``) and ``layer1`` ... ``layer4``."""
        inside = [name for name, _ in self.named_modules()]
        return {"stem": ("conv1", "bn1")} | {part: tuple(n for n in inside if n.split(".")[0] == part) for part in LAYERS}

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """timm's rule for layers with rates of their own, that of its ResNets: the stem and every block, or stage if ``coarse``."""
        return {"stem": r"^conv1|^bn1", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def freeze(self, parts: Sequence[str]) -> None:
        """``stage1`` ... ``stage4``, as timm calls them, are other names of ``layer1`` ... ``layer4``."""
        super().freeze([f"layer{part[5:]}" if part in _STAGES else part for part in parts])


class _PickedFirst(nn.Conv2d):
    """A strided 1x1 convolution of fewer than 8 channels. Of these oneDNN's weight gradient is wrong where it uses AVX2, and it
    writes outside its memory (torch 2.11), so that the pixels are picked before the convolution."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, out, h / stride, w / stride]."""
        down, right = self.stride
        return F.conv2d(x[:, :, ::down, ::right], self.weight, self.bias)


def _stage(block: type[nn.Module], channels: int, planes: int, depth: int, stride: int) -> nn.Sequential:
    out = planes * block.expansion
    shortcut = None
    if stride != 1 or channels != out:
        conv = _PickedFirst if stride != 1 and channels < 8 else nn.Conv2d
        shortcut = nn.Sequential(conv(channels, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out))
    blocks = [block(channels, planes, stride, shortcut)]
    blocks += [block(out, planes) for _ in range(depth - 1)]
    return nn.Sequential(*blocks)


def projection_head(kind: str, channels: int, dim: int) -> nn.Sequential:
    """[B, C] -> [B, dim]. ``mlp2``: Linear-ReLU-Linear (MoCo v2, the published code). ``mlp3_bn``: (Linear-BN-ReLU) x 2,
    Linear-BN (the paper's text)."""
    if kind == "mlp2":
        return nn.Sequential(nn.Linear(channels, channels), nn.ReLU(inplace=True), nn.Linear(channels, dim))
    if kind == "mlp3_bn":
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.Linear(channels, channels, bias=False), nn.BatchNorm1d(channels), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers, nn.Linear(channels, dim, bias=False), nn.BatchNorm1d(dim))
    raise ValueError(f"encoder.head: {kind!r} is not known; use mlp2 or mlp3_bn")


class Encoder(nn.Module):
    """Trunk and head: images to the contrastive embedding."""

    def __init__(self, trunk: nn.Module, head: nn.Module):
        super().__init__()
        self.trunk, self.head = trunk, head

    def project(self, pooled: Tensor) -> Tensor:
        """Pooled feature [B, C] -> unit rows [B, D] float32."""
        return F.normalize(self.head(pooled).float(), dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] -> unit rows [B, D] float32."""
        return self.project(global_average_pool(self.trunk(images)))


def global_average_pool(feature: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, C]."""
    return feature.mean(dim=(2, 3))


def masked_average_pool(feature: Tensor, mask: Tensor) -> Tensor:
    """gap(A * F): [B, C, h, w] and [B, h, w] -> [B, C]."""
    return (mask[:, None].to(feature.dtype) * feature).mean(dim=(2, 3))


class Masked(NamedTuple):
    """What the mask branch gives."""

    mask: Tensor
    """A, [B, h, w] float32 in [0, 1]."""
    pooled: Tensor
    """gap(A * F), [B, C]."""


class MaskBranch(nn.Module):
    """The max-out mask A = minmax(max over channels of relu(bn(conv1x1(F)))) and the masked, pooled feature gap(A * F).

    ``minmax``: ``batch`` scales by the extremes of the whole batch (published), ``image`` per image, so that no image depends on
    its batch mates. ``groups`` batch statistics are taken over that many equal parts of the batch (imitates as many processes).
    ``group`` names the processes that share the batch, with whose images it is always scaled; ``sync`` shares the statistics too.
    """

    def __init__(self, channels: int, width: int = 32, *, minmax: str = "batch", groups: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.minmax, self.groups = minmax, groups
        self.group, self.sync = "", False

    def distribute(self, group: str, *, sync: bool) -> None:
        """Makes this one of the processes of ``group``."""
        self.group, self.sync, self.groups = group, sync, parts_here(self.groups, group, sync=sync)

    def forward(self, feature: Tensor) -> Masked:
        """[B, C, h, w] -> mask [B, h, w], pooled [B, C]. In training mode the running statistics move."""
        weight = self.conv.weight.flatten(1)
        group = self.group if self.training else ""
        if not self.training or self.groups == 1 and (self.sync or not group or self.minmax == "image"):
            shared = group if self.sync else ""
            out = maxout(feature, weight, *_bn_arguments(self.bn), **_bn_mode(self.bn), minmax=self.minmax, group=shared)
            update_running_statistics(self.bn, out.mean, out.var, feature.numel() // feature.shape[1] * world_size(shared))
            return Masked(out.mask, out.pooled)
        parts = feature.chunk(self.groups)
        outs = [maxout(p, weight, *_bn_arguments(self.bn), **_bn_mode(self.bn), minmax=None) for p in parts]
        mean, var = (torch.stack(t).mean(0) for t in zip(*[(o.mean, o.var) for o in outs], strict=True))
        update_running_statistics(self.bn, mean, var, parts[0].numel() // feature.shape[1])
        mask = torch.cat([o.mask for o in outs])
        if self.minmax == "batch":
            # the range is that of the global batch, over all parts and processes
            mask = local_shard(scale_to_unit(gather(mask, group), "batch"), group)
        else:
            mask = scale_to_unit(mask, self.minmax)
        return Masked(mask, masked_average_pool(feature, mask))


class ImageMaskBranch(nn.Module):
    """IADM's image branch: the same mask from the image's three channels, pooled to the feature map's size.

    ``bn`` is the feature branch's own module when it is shared (published: two statistics mix in one buffer), a fresh one
    otherwise. Its batch statistics are nine moments of the colors of the whole batch, over all parts and all processes of
    ``group``.
    """

    def __init__(self, width: int, bn: nn.BatchNorm2d | None, *, minmax: str, pool: str):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 1, bias=False)
        self.own_bn = nn.BatchNorm2d(width) if bn is None else None
        self._shared = (bn,)  # in a tuple: shared, not owned, so its tensors appear once in the state dict
        self.minmax, self.pool, self.group = minmax, pool, ""

    @property
    def bn(self) -> nn.BatchNorm2d:
        return self._shared[0] if self.own_bn is None else self.own_bn

    def distribute(self, group: str, *, sync: bool) -> None:
        """Makes this one of the processes of ``group``, which share these statistics with or without ``sync``."""
        self.group = group

    def forward(self, images: Tensor, cell: int) -> Tensor:
        """[B, 3, S, S] -> [B, S / cell, S / cell]; ``cell`` in pixels."""
        group = self.group if self.training else ""
        out = maxout_image(
            images, self.conv.weight.flatten(1), *_bn_arguments(self.bn), **_bn_mode(self.bn),
            cell=cell, minmax=self.minmax, pool=self.pool, group=group,
        )  # fmt: skip
        update_running_statistics(self.bn, out.mean, out.var, images.numel() // 3 * world_size(group))
        return out.mask


def scale_to_unit(z: Tensor, over: str) -> Tensor:
    """sigma(z) = (z - min) / (1e-7 + max(z - min)), the extremes taken over the ``batch`` or per ``image``; z [B, h, w]."""
    dims = (0, 1, 2) if over == "batch" else (1, 2)
    z = z - z.amin(dims, keepdim=True)
    return z / (1e-7 + z.amax(dims, keepdim=True))


def _bn_arguments(bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    return bn.weight, bn.bias


def _bn_mode(bn: nn.BatchNorm2d) -> dict:
    return dict(running_mean=bn.running_mean, running_var=bn.running_var, training=bn.training, eps=bn.eps)


class FeatureNet(nn.Module):
    """The network that is kept: trunk, optional mask branch, pooling, L2. ``mask.*`` beside the trunk's own names.

    Raises ``TypeError`` for a trunk that does not extend ``BaseTrunk``.
    """

    transform: Callable[[Any], Tensor] | None = None
    """A PIL image or an image file -> [3, S, S], the input it was trained for; set by whoever knows that (``engine.load``)."""
    class_names: tuple[str, ...] = ()
    """Of the data set it was trained on, by label; set by ``engine.load``, empty where the run does not know them."""

    def __init__(self, trunk: BaseTrunk, mask: MaskBranch | None = None):
        super().__init__()
        if not isinstance(trunk, BaseTrunk):
            raise TypeError(
                f"a trunk must extend ppssl.encoder.BaseTrunk, got {type(trunk).__name__}: give it arch, channels, stride and "
                f"maps(images), as ppssl/README.md shows (A trunk of your own)"
            )
        self.trunk, self.mask = trunk, mask

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] normalized images -> unit rows [B, C] float32: l2(gap(F)), or l2(gap(A * F)) with a mask branch."""
        feature = self.trunk(images)
        pooled = global_average_pool(feature) if self.mask is None else self.mask(feature).pooled
        return F.normalize(pooled.float(), dim=1)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """The call without gradients, on the network's device: [B, 3, S, S] normalized images -> unit rows [B, C] float32.

        Raises ``ValueError`` for anything else, or in training mode, in which features depend on the batch and move its statistics.
        """
        if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3:
            given = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(
                f"features: expected normalized images [B, 3, S, S], got {given}; for PIL images or files: "
                f"network.embed(images), or torch.stack([network.transform(image) for image in images]), with network = "
                f"engine.load(RUN)"
            )
        if self.training:
            raise ValueError("features: the network is in training mode; call its eval() first")
        return self(images.to(next(self.parameters()).device))

    def embed(self, images: Iterable[Any], *, batch_size: int = 32, threads: int | None = None) -> Tensor:
        """Image files and PIL images -> unit rows [N, C] float32 on the CPU, in their order, each prepared by ``transform``.

        batch_size: images in memory at once; in variant ``published`` the mask is scaled over the batch, and so is part of the
        result. threads: that decode files; None takes one per CPU core, eight at most.
        Raises ``ValueError`` naming the first image that cannot be read, for a single path in place of a list, in training mode,
        and for a network without a ``transform``.
        """
        if isinstance(images, (str, os.PathLike)) or not isinstance(images, Iterable):
            raise ValueError(f"embed: expected a list of image files or PIL images, got one ({images!r:.200}); give [image]")
        if self.transform is None:
            raise ValueError("embed: this network has no transform; engine.load(RUN) sets it, or set network.transform yourself")
        if batch_size < 1:
            raise ValueError(f"embed: batch_size: got {batch_size}, must be at least 1")
        rows, waiting = [torch.empty(0, self.trunk.channels)], iter(images)
        with ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool:
            while batch := list(itertools.islice(waiting, batch_size)):
                rows.append(self.features(torch.stack(list(pool.map(self._prepared, batch)))).cpu())
        return torch.cat(rows)

    def _prepared(self, image: Any) -> Tensor:
        try:
            return self.transform(image)
        except (OSError, ValueError, TypeError, AttributeError) as error:  # the last two: what is neither a path nor an image
            raise ValueError(f"embed: {image!s:.1000} cannot be read as an image ({error})") from error

    def weights(self) -> dict[str, Tensor]:
        """Tensors by exchange name: the trunk's under its own names (torchvision's or timm's), the branch's under ``mask.``."""
        tensors = dict(self.trunk.state_dict())
        if self.mask is not None:
            tensors |= {f"mask.{n}": t for n, t in self.mask.state_dict().items()}
        return tensors

    def load_weights(self, tensors: dict[str, Tensor]) -> None:
        """The reverse of ``weights``; every name must match."""
        branch = {n[5:]: t for n, t in tensors.items() if n.startswith("mask.")}
        self.trunk.load_state_dict({n: t for n, t in tensors.items() if not n.startswith("mask.")})
        if self.mask is not None:
            self.mask.load_state_dict(branch)
