"""Trunks by name: the ResNets of ``encoder.py`` and every model of timm that gives a map or patch tokens; how an image enters one.

A timm trunk is timm's own model under timm's own parameter names, with the interface of ``BaseTrunk`` in front of its forward pass.
timm is imported where it is used: it takes seconds, and a ResNet needs none of it.
"""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppssl.encoder import BaseTrunk, Trunk

PREFIX = "timm/"
"""How ``encoder.arch`` begins for a model of timm."""
# What lets a model take images of other sizes than it was made for, by the families that have it.
_SIZES: tuple[dict[str, bool], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})
_REFUSALS = (AssertionError, RuntimeError, ValueError, TypeError, IndexError)
"""By which models refuse an image size."""


class DilatedDepthwise(nn.Conv2d):
    """A depthwise convolution with dilation, as an output stride brings into EfficientNets and ConvNeXts, whose gradients a CPU
    computes by shifted products: the library's own path takes 4 to 14 times as long for kernels of 3 and 5, 1.4 times for 7.
    Elsewhere it is ``nn.Conv2d``."""

    @staticmethod
    def fits(conv: nn.Module) -> bool:
        """Whether ``conv`` is one, of stride 1 and an output as large as its input."""
        if type(conv) is not nn.Conv2d or not conv.groups == conv.in_channels == conv.out_channels > 1 or conv.dilation[0] < 2:
            return False
        (height, width), (dilation, other) = conv.kernel_size, conv.dilation
        same = height == width and height % 2 == 1 and dilation == other and conv.padding == (dilation * (height // 2),) * 2
        return same and conv.stride == (1, 1) and conv.padding_mode == "zeros"

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, h, w]."""
        if x.device.type != "cpu" or not (torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)):
            return super().forward(x)
        y = _Shifted.apply(x, self.weight, self.dilation[0])
        return y if self.bias is None else y + self.bias.to(y.dtype)[:, None, None]


class _Shifted(torch.autograd.Function):
    """The gradient by x is a depthwise convolution too, with the kernel turned round; that by a tap of the kernel is the sum over
    all positions of the output's gradient times the input that the tap saw."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx: Any, x: Tensor, weight: Tensor, dilation: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dilation = dilation
        return _convolve(x, weight, dilation)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,), (x, weight), dilation = gradients, ctx.saved_tensors, ctx.dilation
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = _convolve(grad, weight.flip(2, 3), dilation).to(x.dtype)
        if ctx.needs_input_grad[1]:
            # positions first, channels last: as the memory lies, so that a shift is a view and the sum runs over rows
            g, seen = grad.permute(2, 3, 0, 1), x.permute(2, 3, 0, 1)
            (height, width), taps = x.shape[2:], weight.shape[2]
            shifts = [(i - taps // 2) * dilation for i in range(taps)]
            sums = []
            for down in (max(-height, min(height, s)) for s in shifts):  # further away a tap sees nothing
                for right in (max(-width, min(width, s)) for s in shifts):
                    at = g[max(0, -down) : height - max(0, down), max(0, -right) : width - max(0, right)]
                    under = seen[max(0, down) : height + min(0, down), max(0, right) : width + min(0, right)]
                    sums.append((at * under).sum((0, 1, 2), dtype=torch.promote_types(weight.dtype, torch.float32)))
            of_weight = torch.stack(sums, 1).view(weight.shape).to(weight.dtype)
        return of_x, of_weight, None


def _convolve(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    return F.conv2d(x, weight, None, 1, dilation * (weight.shape[2] // 2), dilation, weight.shape[0])


class ImageInput(NamedTuple):
    """How an image enters a trunk: what its weights were trained for."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """Of RGB in [0, 1]."""
    interpolation: Literal["bilinear", "bicubic"]
    """Of the clean view; random views are bilinear, as their recipe has it."""
    crop: float
    """Side of the center crop over the short side of the resized image."""
    rounds_down: bool = False
    """The short side is rounded down, as timm does, and not to the nearest."""

    def resize(self, side: int) -> int:
        """Short side in pixels of the clean image before its center crop of ``side``: 256 for 224 where ``crop`` is 0.875."""
        return max(side, math.floor(side / self.crop) if self.rounds_down else round(side / self.crop))


IMAGENET = ImageInput((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear", 0.875)
"""What torchvision's ResNets take."""


class TimmTrunk(BaseTrunk):
    """Mixed into the class of a timm model by ``build_trunk``.

    ``sources`` are ``stage1`` ... as the model's ``feature_info`` lists them: stages of a convolutional or hierarchical network,
    blocks of a ViT. The last is the output, which a model may have made from its last stage by a convolution or a norm.
    """

    name: str
    """As timm knows the model, without a weights tag."""
    tag: str
    """Of the weights that ``encoder.weights=timm`` takes; "" where timm has none."""
    options: dict[str, Any]
    """What ``timm.create_model`` was told beside the name."""
    native_side: int
    """Side in pixels of the images that the weights were trained for."""
    _places: dict[str, str]
    """Source: the module whose output it is."""
    _seen: dict[str, Tensor]

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, C, h, w]."""
        return self._as_map(self.forward_features(images))

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """The maps of the watched sources by name, the output last."""
        feature = self(images)
        seen = {name: self._seen.pop(name) for name in [*self._seen]}
        return seen | {self.sources[-1]: feature}

    def watch(self, sources: Sequence[str]) -> None:
        super().watch(sources)
        for name in sources:
            if name in self.sources[:-1]:
                # a bound method: a deep copy of the trunk then keeps its own maps
                self.get_submodule(self._places[name]).register_forward_hook(functools.partial(self._keep, name))

    def parts(self) -> dict[str, tuple[str, ...]]:
        """``stem``, what comes before the first stage, and the stages, the last with all that follows it. Found by the order in
        which the model calls its modules. Where the first map is made by a single layer or by the stem, as in timm's ResNets,
        both names are of all that is before it."""
        twin = copy.deepcopy(self).to("meta").eval()
        places = [(self._places[name], name) for name in self.sources]
        begun: set[str] = set()
        ended: set[str] = set()
        first_call: dict[str, tuple[bool, int]] = {}  # module: whether the first stage had begun, and how many had ended

        def enter(name: str, *_: Any) -> None:
            begun.update(source for place, source in places if place == name)
            first_call.setdefault(name, (self.sources[0] in begun, len(ended)))

        def leave(name: str, *_: Any) -> None:
            ended.update(source for place, source in places[:-1] if place == name)

        for name, module in twin.named_modules():
            module.register_forward_pre_hook(functools.partial(enter, name))
            module.register_forward_hook(functools.partial(leave, name))
        with torch.no_grad():
            twin(torch.empty(2, 3, self.native_side, self.native_side, device="meta"))
        found: dict[str, list[str]] = {part: [] for part in ("stem", *self.sources)}
        for name, module in self.named_modules():
            if [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
                called = name
                while called not in first_call:  # its tensors are used by the module that holds it
                    called = called.rpartition(".")[0]
                began, stage = first_call[called] if called or not name else (True, -1)  # or they are of no use here
                found[self.sources[stage] if began else "stem"].append(name)
        first = self.sources[0]
        if not found["stem"] or not {*found[first]} - {places[0][0]}:
            found["stem"] = found[first] = found["stem"] + found[first]
        return {part: tuple(names) for part, names in found.items() if names}

    def map_side(self, side: int) -> int:
        """Cells of the map's side for images of ``side`` pixels. Raises ``ValueError`` for a size that the model does not take."""
        return self._probe(side)[2]

    def _probe(self, side: int) -> tuple[int, ...]:
        """The shape of the map of images of ``side`` pixels without computing it."""
        twin = copy.deepcopy(self).to("meta").eval()
        try:
            with torch.no_grad():
                shape = twin(torch.empty(2, 3, side, side, device="meta")).shape
        except _REFUSALS as error:
            other = f" or another multiple of its stride, {self.stride}" if side != self.native_side else ""
            raise ValueError(
                f"data.image_size: {self.arch} cannot take images of {side} px ({str(error).strip() or type(error).__name__}); use "
                f"{self.native_side}{other}"
            ) from error
        return tuple(shape)

    def _as_map(self, x: Tensor) -> Tensor:
        """What a module of the model gives, as [B, C, h, w]: patch tokens [B, N, C] of square images without the
        prefix, [B, h, w, C], or the map itself."""
        if not isinstance(x, Tensor) or x.ndim not in (3, 4):
            what = type(x).__name__ if not isinstance(x, Tensor) else list(x.shape)
            raise ValueError(f"encoder.arch: {self.arch} gives neither a map nor patch tokens but {what}; choose another model")
        if x.ndim == 3:
            side = math.isqrt(x.shape[1] - self._prefix(x))
            x = x[:, self._prefix(x) :].transpose(1, 2).unflatten(2, (side, side))
        elif getattr(self, "output_fmt", None) == "NHWC":
            x = x.permute(0, 3, 1, 2)
        else:
            return x
        return x.contiguous(memory_format=torch.channels_last)

    def _prefix(self, tokens: Tensor) -> int:
        """Class and register tokens before the patches; early blocks of some models have none yet."""
        count, length = int(getattr(self, "num_prefix_tokens", hasattr(self, "cls_token"))), tokens.shape[1]
        for prefix in (count, 0) if length > count else ():
            if math.isqrt(length - prefix) ** 2 == length - prefix:
                return prefix
        raise ValueError(
            f"encoder.arch: the {tokens.shape[1]} tokens of {self.arch} are no square of patches; choose another model"
        )

    def _keep(self, name: str, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """Remembers the map of a module's output and gives it back in the model's own form: gradients pass through it."""
        kept = self._seen[name] = self._as_map(output)
        if output.ndim == 3:
            return torch.cat((output[:, : self._prefix(output)], kept.flatten(2).transpose(1, 2)), 1)
        return kept.permute(0, 2, 3, 1) if getattr(self, "output_fmt", None) == "NHWC" else kept


def build_trunk(arch: str) -> BaseTrunk:
    """The trunk that ``encoder.arch`` names, with random weights: a ResNet of ``encoder.Trunk``, or ``timm/<name>[_s8|_s16|_s32]``
    with the output stride where the model has a choice. Raises ``ValueError`` naming the key."""
    if not arch.startswith(PREFIX):
        return Trunk(arch)
    import timm  # heavy

    name, stride = _split(arch)
    model = create(arch, name, {} if stride is None else {"output_stride": stride})
    for module in model.modules():  # a step draws no random numbers: a checkpoint holds no generator, and a twin is equal
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif hasattr(module, "drop_prob"):  # stochastic depth, which several models have by default
            module.drop_prob = 0.0
        elif DilatedDepthwise.fits(module):
            module.__class__ = DilatedDepthwise
    listed = [entry["module"] for entry in getattr(model, "feature_info", None) or [{"module": ""}]]
    modules = dict(model.named_modules())
    model.__class__ = type(f"{type(model).__name__}Trunk", (TimmTrunk, type(model)), {})
    model.arch, model.name = arch, timm.models.split_model_name_tag(name)[0]
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    model.tag, model.native_side = (config.tag or "", config.input_size[-1]) if config else ("", 224)
    places = {f"stage{i}": place for i, place in enumerate(listed, 1)}
    # a few models list modules that they do not have; the last source is the output, wherever it is made
    model.sources = tuple(s for s, place in places.items() if place in modules or place is listed[-1])
    model._places, model._seen = places, {}
    model.stride = stride or 32  # for the probe's message; the probe tells
    shape = model._probe(model.native_side)
    model.channels, model.stride = shape[1], model.native_side // shape[2]
    return model


def image_input(arch: str, weights: str = "none") -> ImageInput:
    """How images enter the trunk ``encoder.arch``: ImageNet's statistics for a ResNet, the data config of a timm model, that of
    the tag where ``weights`` names one. Raises ``ValueError`` for a model that timm does not have."""
    if not arch.startswith(PREFIX):
        return IMAGENET
    import timm  # heavy

    name = _split(arch)[0]
    config = timm.get_pretrained_cfg(tagged(name, weights), allow_unregistered=True) or timm.get_pretrained_cfg(name)
    data = timm.data.resolve_data_config(pretrained_cfg=config.to_dict() if config else {})
    interpolation = "bilinear" if data["interpolation"] == "bilinear" else "bicubic"
    return ImageInput(tuple(data["mean"]), tuple(data["std"]), interpolation, data["crop_pct"], rounds_down=True)


def tagged(name: str, weights: str) -> str:
    """The timm name of the weights that ``encoder.weights`` asks for: ``timm`` keeps the tag in ``name`` or the default one,
    ``timm:TAG`` puts another in its place; anything else asks for none of timm's and leaves the name."""
    return f"{name.split('.')[0]}.{weights.removeprefix('timm:')}" if weights.startswith("timm:") else name


def _split(arch: str) -> tuple[str, int | None]:
    """(timm's name, output stride) of ``timm/<name>[_s8|_s16|_s32]``. Raises ``ValueError`` where timm has no such model."""
    import difflib

    import timm  # heavy

    name = arch.removeprefix(PREFIX)
    match = re.fullmatch(r"(.+)_s(8|16|32)", name)
    for candidate, stride in ((name, None), (match[1], int(match[2])) if match else (name, None)):
        if timm.is_model(candidate):
            return candidate, stride
    near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), 3, 0.5)
    known = ", ".join(PREFIX + close for close in near) or "what timm.list_models() lists"
    raise ValueError(f"encoder.arch: timm {timm.__version__} has no model {name!r}; near it are {known}")


def create(arch: str, name: str, options: dict[str, Any]) -> Any:
    """The timm model without a classifier, for images of any size where it can. Raises ``ValueError`` for an output stride where it
    has none to choose."""
    import timm  # heavy

    for sizes in _SIZES:
        try:
            model = timm.create_model(name, **{"pretrained": False, "num_classes": 0} | options | sizes)
            model.options = {key: value for key, value in (options | sizes).items() if key != "pretrained"}
            return model
        except TypeError as error:
            if sizes and next(iter(sizes)) in str(error):
                continue
            if "output_stride" in options and "output_stride" in str(error):
                break
            raise
        except (AssertionError, NotImplementedError) as error:
            if "output_stride" not in options:
                raise
            raise ValueError(f"encoder.arch: {arch} cannot have that output stride ({error}); use {PREFIX}{name}") from error
    raise ValueError(f"encoder.arch: {PREFIX}{name} has no output stride to choose; use {PREFIX}{name}, without _s8, _s16 or _s32")
