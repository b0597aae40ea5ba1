"""GradCAM weighting: ``relu(sign sum_c act_c grad_c)``, or with ``mean_hw(grad_c)`` as the weight of channel c, pooled.

The product [B, C, H, W] is never in memory; each input is read once and only the map is written. The gradient to ``act`` is
that of the map, back through the pooling and zero where the map is not positive, times ``sign`` and the weights; ``grad`` is
a constant. Products and sums are float32 (float64 for float64 inputs), under autocast too.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference
from kernels.selection import check_floating, choose, refuse_double_backward

Weighting = Literal["elementwise", "channel"]
Pool = Literal["max", "mean"]

FEW_CHANNELS = 8
"""Up to this number of channels, the PyTorch path adds the products to the map one channel at a time."""
GROUP_ELEMENTS = 1 << 20
"""With more channels, so many elements of the product are held at a time, in one buffer (4 MiB of float32)."""


def gradcam(
    act: Tensor,
    grad: Tensor,
    *,
    size: tuple[int, int],
    weighting: Weighting = "elementwise",
    pool: Pool = "max",
    sign: int = 1,
    impl: Literal["auto", "triton", "torch", "reference"] = "auto",
) -> Tensor:
    """Class-activation map of an image or a feature map (Selvaraju et al. 2017; elementwise form: LCR and PP-SSL).

    Args:
        act: [B, C, H, W], the activations (or the image), NCHW or channels_last. Differentiable.
        grad: [B, C, H, W], the derivative with respect to act. It receives no gradient.
        size: (h, w) of the map. The Triton path takes H a multiple of h and W a multiple of w, W / w a power of two.
        weighting: ``"elementwise"`` multiplies act by grad, ``"channel"`` by the mean of grad over each channel.
        pool: how pixels become cells, after the ReLU (adaptive pooling).
        sign: +1 keeps what increases the differentiated quantity, -1 what decreases it.
        impl: ``"auto"`` is Triton on CUDA and the PyTorch path elsewhere.

    Returns:
        [B, h, w] float32 (float64 for float64 inputs).

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: wrong rank or shape, empty batch, a map larger than the input, unknown option.
        RuntimeError: second derivatives of a fused path.
    """
    check_floating("gradcam", act=act, grad=grad)
    if act.dim() != 4 or 0 in act.shape or act.shape != grad.shape:
        raise ValueError(f"gradcam: act and grad must be one non-empty [B, C, H, W], got {list(act.shape)} and {list(grad.shape)}")
    height, width = size
    if not (1 <= height <= act.shape[2] and 1 <= width <= act.shape[3]):
        raise ValueError(f"gradcam: size must lie between 1 and {list(act.shape[2:])}, got {tuple(size)}")
    if weighting not in ("elementwise", "channel"):
        raise ValueError(f"gradcam: weighting must be 'elementwise' or 'channel', got {weighting!r}")
    if pool not in ("max", "mean"):
        raise ValueError(f"gradcam: pool must be 'max' or 'mean', got {pool!r}")
    if sign not in (1, -1):
        raise ValueError(f"gradcam: sign must be 1 or -1, got {sign!r}")
    chosen = choose(
        "gradcam",
        impl,
        act if act.dtype == torch.float64 else grad,
        fast="torch",
        unsupported=_unsupported(act, height, width),
    )
    grad = grad.detach()
    if chosen == "reference":
        with torch.autocast(act.device.type, enabled=False):
            return reference.gradcam(act, grad, size=(height, width), weighting=weighting, pool=pool, sign=sign)
    return torch.ops.ppssl.gradcam(act, grad, height, width, weighting, pool, sign, chosen)


def _unsupported(act: Tensor, height: int, width: int) -> str | None:
    if act.shape[2] % height or act.shape[3] % width:
        return f"{list(act.shape[2:])} must be a multiple of size {(height, width)}"
    cell = act.shape[3] // width
    if cell & (cell - 1):
        return f"cells must be a power of two wide, got {cell}"
    return None


def _compute_dtype(act: Tensor, grad: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(act.dtype, grad.dtype), torch.float32)


@torch.library.custom_op("ppssl::gradcam", mutates_args=())
def _gradcam(act: Tensor, grad: Tensor, height: int, width: int, weighting: str, pool: str, sign: int, impl: str) -> Tensor:
    if impl == "triton":
        from kernels import gradcam_triton  # here, because triton may not be installed

        return gradcam_triton.forward(act, grad, height, width, weighting, pool, sign)
    cam = _cam(act, grad, weighting, sign)
    return cam if cam.shape[1:] == (height, width) else _pool(cam, height, width, pool)[0]


@_gradcam.register_fake
def _(act, grad, height, width, weighting, pool, sign, impl):
    return act.new_empty((act.shape[0], height, width), dtype=_compute_dtype(act, grad))


@torch.library.custom_op("ppssl::gradcam_backward", mutates_args=())
def _gradcam_backward(grad_map: Tensor, act: Tensor, grad: Tensor, weighting: str, pool: str, sign: int, impl: str) -> Tensor:
    """dact, in the dtype and memory order of act."""
    if impl == "triton":
        from kernels import gradcam_triton  # here, because triton may not be installed

        return gradcam_triton.backward(grad_map, act, grad, weighting, pool, sign)
    return _backward(grad_map, act, grad, weighting, pool, sign)


@_gradcam_backward.register_fake
def _(grad_map, act, grad, weighting, pool, sign, impl):
    return torch.empty_like(act)


def _setup_context(ctx, inputs, output):
    act, grad, _, _, ctx.weighting, ctx.pool, ctx.sign, ctx.impl = inputs
    ctx.save_for_backward(act, grad)


def _autograd(ctx, grad_map):
    refuse_double_backward("gradcam")
    grad_act = None
    if ctx.needs_input_grad[0]:
        act, grad = ctx.saved_tensors
        grad_act = torch.ops.ppssl.gradcam_backward(grad_map, act, grad, ctx.weighting, ctx.pool, ctx.sign, ctx.impl)
    return (
        grad_act,
        None,  # grad
        None,  # height
        None,  # width
        None,  # weighting
        None,  # pool
        None,  # sign
        None,  # impl
    )


_gradcam.register_autograd(_autograd, setup_context=_setup_context)


def _cam(act: Tensor, grad: Tensor, weighting: str, sign: int) -> Tensor:
    """relu(sign * sum_c act * weights): [B, H, W]."""
    dtype = _compute_dtype(act, grad)
    batch, channels, height, width = act.shape
    if weighting == "channel":
        weights = grad.to(dtype).mean(dim=(2, 3))  # [B, C]
        cam = torch.bmm(weights[:, None], act.to(dtype).flatten(2)).view(batch, height, width)
    elif channels <= FEW_CHANNELS:
        cam = act[:, 0].to(dtype) * grad[:, 0]
        for channel in range(1, channels):
            cam.addcmul_(act[:, channel].to(dtype), grad[:, channel].to(dtype))
    else:
        group = min(batch, max(1, GROUP_ELEMENTS // act[0].numel()))
        cam = torch.empty((batch, height, width), dtype=dtype, device=act.device)
        product = torch.empty_like(act[:group], dtype=dtype)
        for start in range(0, batch, group):
            part = slice(start, start + group)
            some = product[: cam[part].shape[0]]
            torch.sum(torch.mul(act[part].to(dtype), grad[part].to(dtype), out=some), 1, out=cam[part])
    return (cam if sign == 1 else cam.neg_()).relu_()


def _pool(cam: Tensor, height: int, width: int, pool: str) -> tuple[Tensor, Tensor | None]:
    """The map [B, h, w] and, for max pooling, the flat index of the pixel that is each cell's maximum."""
    if pool == "mean":
        return F.adaptive_avg_pool2d(cam, (height, width)), None
    return F.adaptive_max_pool2d(cam, (height, width), return_indices=True)


def _backward(grad_map, act, grad, weighting, pool, sign):
    dtype = _compute_dtype(act, grad)
    cam = _cam(act, grad, weighting, sign)
    grad_map = grad_map.to(dtype)
    if cam.shape == grad_map.shape:
        grad_cam = grad_map
    elif pool == "mean":
        grad_cam = torch.ops.aten._adaptive_avg_pool2d_backward(grad_map, cam)
    else:
        _, height, width = grad_map.shape
        _, index = _pool(cam, height, width, pool)
        grad_cam = torch.zeros_like(cam).flatten(1)
        grad_cam.scatter_add_(1, index.flatten(1), grad_map.flatten(1))
        grad_cam = grad_cam.view_as(cam)
    grad_cam = torch.where(cam > 0, grad_cam, 0).mul_(sign)[:, None]
    weights = grad.to(dtype)
    if weighting == "channel":
        weights = weights.mean(dim=(2, 3), keepdim=True)
    out = torch.empty_like(act)
    return out.copy_(grad_cam * weights)
