"""GradCAM weighting on CUDA, each input read once.

Few channels (an image): a program is one row of cells. It adds up the products of the channels at every pixel, applies the
ReLU and pools in registers, so the full-size map is never written. Many channels (a feature map): a program is a block of
positions and walks over the channels; the map is small and is pooled afterwards. The weights of ``"channel"`` are the means
of ``grad``, from a separate kernel, which is then the only one that reads ``grad``. Sums are float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.configs import Config, Variant, Workload, architecture, lookup, table
from kernels.selection import interpreting

FEW_CHANNELS = 8
"""Up to this number of channels, the kernel does the pooling."""
INTERPRETED = Config(rows=16, cols=16, warps=1, stages=1)
KERNELS = ("image", "map", "mean", "scale")


@triton.jit
def _image_kernel(
    act_ptr,  # [B, C, H, W]
    grad_ptr,  # [B, C, H, W], or [B, C] float32 channel weights
    out_ptr,  # [B, h, w]
    width,
    n_cols,
    stride_ab, stride_ac, stride_ah, stride_aw,
    stride_gb, stride_gc, stride_gh, stride_gw,
    CHANNEL: tl.constexpr,
    POOL_MAX: tl.constexpr,
    SIGN: tl.constexpr,
    CHANNELS: tl.constexpr,
    CELL_H: tl.constexpr,
    CELL_W: tl.constexpr,  # a power of two
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,  # a power of two of whole cells
):  # fmt: skip
    # 1. One row of cells of one image.
    image = tl.program_id(0)
    band = tl.program_id(1)
    offs_w = tl.arange(0, BLOCK_W)
    inside = offs_w < width
    act = act_ptr + image.to(tl.int64) * stride_ab
    grad = grad_ptr + image.to(tl.int64) * stride_gb
    pooled = tl.zeros([ROWS, BLOCK_W], tl.float32)
    for step in tl.range(0, tl.cdiv(CELL_H, ROWS)):
        offs_r = step * ROWS + tl.arange(0, ROWS)
        row = band * CELL_H + offs_r
        mask = (offs_r < CELL_H)[:, None] & inside[None, :]
        # 2. cam = relu(+- sum_c a_c g_c) at every pixel; g_c is the gradient, or its mean as the channel's weight.
        total = tl.zeros([ROWS, BLOCK_W], tl.float32)
        for c in tl.static_range(CHANNELS):
            a = tl.load(act + c * stride_ac + row[:, None] * stride_ah + offs_w[None, :] * stride_aw, mask=mask, other=0.0).to(
                tl.float32
            )
            if CHANNEL:
                total += a * tl.load(grad + c * stride_gc)
            else:
                g = tl.load(grad + c * stride_gc + row[:, None] * stride_gh + offs_w[None, :] * stride_gw, mask=mask, other=0.0).to(
                    tl.float32
                )
                total += a * g
        cam = tl.maximum(total * SIGN, 0.0, propagate_nan=tl.PropagateNan.ALL)
        cam = tl.where(mask, cam, 0.0)
        # 3. Pooled over the pixel rows of the cells: maximum or sum.
        if POOL_MAX:
            pooled = tl.maximum(pooled, cam, propagate_nan=tl.PropagateNan.ALL)
        else:
            pooled += cam
    # 4. Over their columns, and out.
    cells: tl.constexpr = BLOCK_W // CELL_W
    if POOL_MAX:
        by_cell = tl.reshape(tl.max(pooled, 0), [cells, CELL_W])
        poison = tl.reshape(tl.sum(pooled * 0.0, 0), [cells, CELL_W])  # tl.max drops NaN
        cell = tl.max(by_cell, 1) + tl.sum(poison, 1)
    else:
        cell = tl.sum(tl.reshape(tl.sum(pooled, 0), [cells, CELL_W]), 1) / (CELL_H * CELL_W)
    column = tl.arange(0, cells)
    out = out_ptr + (image * tl.num_programs(1) + band) * n_cols + column
    tl.store(out, cell, mask=column < n_cols)


@triton.jit
def _mean_kernel(
    x_ptr,  # [B, C, S]
    mean_ptr,  # [B, C]
    n_positions,
    n_channels,
    stride_b, stride_c, stride_s,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    # 1. The channels of this program.
    image = tl.program_id(0)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < n_channels
    # 2. mean_c = (1 / S) sum_s x_cs.
    total = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for block in tl.range(0, tl.cdiv(n_positions, BLOCK_S)):
        offs_s = block * BLOCK_S + tl.arange(0, BLOCK_S)
        pointers = x_ptr + image.to(tl.int64) * stride_b + offs_s[:, None] * stride_s + offs_c[None, :] * stride_c
        total += tl.load(pointers, mask=(offs_s < n_positions)[:, None] & mask_c[None, :], other=0.0).to(tl.float32)
    tl.store(mean_ptr + image * n_channels + offs_c, tl.sum(total, 0) / n_positions, mask=mask_c)


@triton.jit
def _map_kernel(
    act_ptr,  # [B, C, S]
    grad_ptr,  # [B, C, S], or [B, C] float32 channel weights
    cam_ptr,  # [B, S] relu of the weighted sum
    n_positions,
    n_channels,
    stride_ab, stride_ac, stride_as,
    stride_gb, stride_gc, stride_gs,
    CHANNEL: tl.constexpr,
    SIGN: tl.constexpr,
    EVEN_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    # 1. The positions of this program.
    image = tl.program_id(0)
    offs_s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    mask_s = offs_s < n_positions
    act = act_ptr + image.to(tl.int64) * stride_ab + offs_s[:, None] * stride_as
    grad = grad_ptr + image.to(tl.int64) * stride_gb
    # 2. s = sum_c a_c g_c, one block of channels at a time.
    total = tl.zeros([BLOCK_S], tl.float32)
    for block in tl.range(0, tl.cdiv(n_channels, BLOCK_C), num_stages=STAGES):
        offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
        mask = mask_s[:, None]
        if not EVEN_C:
            mask = mask & (offs_c < n_channels)[None, :]
        a = tl.load(act + offs_c[None, :] * stride_ac, mask=mask, other=0.0).to(tl.float32)
        if CHANNEL:
            g = tl.load(grad + offs_c * stride_gc, mask=offs_c < n_channels, other=0.0)[None, :]
        else:
            pointers = grad + offs_s[:, None] * stride_gs + offs_c[None, :] * stride_gc
            g = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(a * g, 1)
    # 3. cam = relu(+- s).
    cam = tl.maximum(total * SIGN, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(cam_ptr + image * n_positions + offs_s, cam, mask=mask_s)


@triton.jit
def _scale_kernel(
    coefficient_ptr,  # [B, S]
    grad_ptr,  # [B, C, S], or [B, C] float32 channel weights
    out_ptr,  # [B, C, S]
    n_positions,
    n_channels,
    stride_gb, stride_gc, stride_gs,
    stride_ob, stride_oc, stride_os,
    CHANNEL: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0)
    offs_s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    offs_c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (offs_s < n_positions)[:, None] & (offs_c < n_channels)[None, :]
    # 1. coefficient = +- [cam > 0] dL/dcam of every position.
    coefficient = tl.load(coefficient_ptr + image * n_positions + offs_s, mask=offs_s < n_positions, other=0.0)
    grad = grad_ptr + image.to(tl.int64) * stride_gb
    if CHANNEL:
        g = tl.load(grad + offs_c * stride_gc, mask=offs_c < n_channels, other=0.0)[None, :]
    else:
        pointers = grad + offs_s[:, None] * stride_gs + offs_c[None, :] * stride_gc
        g = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    # 2. dL/da_c = coefficient g_c.
    out = out_ptr + image.to(tl.int64) * stride_ob + offs_s[:, None] * stride_os + offs_c[None, :] * stride_oc
    tl.store(out, (coefficient[:, None] * g).to(out_ptr.dtype.element_ty), mask=mask)


def _config(kernel: str, tensor: Tensor) -> Config:
    if interpreting():
        return INTERPRETED
    return lookup(architecture(tensor.device), f"gradcam {kernel}", "any", 1, 0)


def _channel_weights(grad: Tensor) -> Tensor:
    """mean_hw(grad): [B, C] float32."""
    x = grad.flatten(2)
    batch, channels, positions = x.shape
    config = _config("mean", x)
    means = torch.empty((batch, channels), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _mean_kernel[(batch, triton.cdiv(channels, config.cols))](
            x,
            means,
            positions,
            channels,
            *x.stride(),
            BLOCK_S=config.rows,
            BLOCK_C=config.cols,
            num_warps=config.warps,
        )
    return means


def _cam(act: Tensor, weights: Tensor, channel: bool, sign: int) -> Tensor:
    """relu of the weighted sum at every position: [B, H, W]. The weights are like grad, or [B, C]."""
    batch, channels, height, width = act.shape
    config = _config("map", act)
    cam = torch.empty((batch, height, width), dtype=torch.float32, device=act.device)
    x = act.flatten(2)
    weights = weights[:, :, None] if channel else weights.flatten(2)
    with torch.cuda.device_of(act):
        _map_kernel[(batch, triton.cdiv(height * width, config.rows))](
            x,
            weights,
            cam,
            height * width,
            channels,
            *x.stride(),
            *weights.stride(),
            CHANNEL=channel,
            SIGN=sign,
            EVEN_C=channels % config.cols == 0,
            BLOCK_S=config.rows,
            BLOCK_C=config.cols,
            STAGES=config.stages,
            num_warps=config.warps,
            num_stages=config.stages,
        )
    return cam


def forward(act: Tensor, grad: Tensor, height: int, width: int, weighting: str, pool: str, sign: int) -> Tensor:
    """[B, height, width] float32."""
    batch, channels = act.shape[:2]
    channel = weighting == "channel"
    weights = _channel_weights(grad) if channel else grad
    if channels > FEW_CHANNELS:
        cam = _cam(act, weights, channel, sign)
        if cam.shape[1:] == (height, width):
            return cam
        pooling = F.adaptive_max_pool2d if pool == "max" else F.adaptive_avg_pool2d
        return pooling(cam, (height, width))
    cell_h, cell_w = act.shape[2] // height, act.shape[3] // width
    config = _config("image", act)
    out = torch.empty((batch, height, width), dtype=torch.float32, device=act.device)
    strides = (*weights.stride(), 0, 0) if channel else weights.stride()
    with torch.cuda.device_of(act):
        _image_kernel[(batch, height)](
            act,
            weights,
            out,
            act.shape[3],
            width,
            *act.stride(),
            *strides,
            CHANNEL=channel,
            POOL_MAX=pool == "max",
            SIGN=sign,
            CHANNELS=channels,
            CELL_H=cell_h,
            CELL_W=cell_w,
            ROWS=min(config.rows, triton.next_power_of_2(cell_h)),
            BLOCK_W=triton.next_power_of_2(width) * cell_w,
            num_warps=config.warps,
        )
    return out


def backward(grad_map: Tensor, act: Tensor, grad: Tensor, weighting: str, pool: str, sign: int) -> Tensor:
    """The gradient to act: that of the map at the pixels it came from, times the weights. Recomputes the sum."""
    batch, channels, height, width = act.shape
    channel = weighting == "channel"
    weights = _channel_weights(grad) if channel else grad
    cam = _cam(act, weights, channel, sign)
    coefficient = grad_map.float()
    if coefficient.shape != cam.shape:
        if pool == "mean":
            coefficient = torch.ops.aten._adaptive_avg_pool2d_backward(coefficient.contiguous(), cam)
        else:
            _, index = F.adaptive_max_pool2d(cam, grad_map.shape[1:], return_indices=True)
            coefficient = torch.zeros_like(cam).flatten(1).scatter_add_(1, index.flatten(1), coefficient.flatten(1))
    coefficient = torch.where(cam > 0, sign * coefficient.view_as(cam), 0)
    out = torch.empty_like(act)
    flat = out.flatten(2)  # a view, unless the memory order of the positions of act forbids one
    config = _config("scale", act)
    weights = weights[:, :, None] if channel else weights.flatten(2)
    with torch.cuda.device_of(act):
        _scale_kernel[(batch, triton.cdiv(height * width, config.rows), triton.cdiv(channels, config.cols))](
            coefficient,
            weights,
            flat,
            height * width,
            channels,
            *weights.stride(),
            *flat.stride(),
            CHANNEL=channel,
            BLOCK_S=config.rows,
            BLOCK_C=config.cols,
            num_warps=config.warps,
        )
    return out if flat.data_ptr() == out.data_ptr() else out.copy_(flat.view_as(act))


EXCEPTIONS = {
    ("gradcam image * nhwc *", "*", "loads"): "three interleaved channels of 16 bits have no wide load",
}
"""See ``registry.exceptions``."""


def variants(arch: str) -> list[Variant]:
    """Images of 3 x 224 x 224 to 7 x 7, NCHW and channels_last, and channels_last feature maps."""
    found = []

    def add(name, kernel, types, constants, config, kind, scalars):
        types = types | dict.fromkeys(scalars, "i32")
        types = {arg: types[arg] for arg in kernel.arg_names if arg in types and arg not in constants}
        aligned = tuple(arg for arg in types if arg.startswith("stride") or arg in ("width", "n_channels"))
        found.append(Variant(f"gradcam {name}", kernel, types, constants, aligned, config.warps, config.stages, kind))

    configs = {name: Config(**table()[arch][f"gradcam {name}"]["any"]["1"]["0"]) for name in KERNELS}
    outer = [f"stride_{tensor}{axis}" for tensor in "ag" for axis in "bch"]
    for pixel, order in (("bf16", "nchw"), ("fp32", "nchw"), ("bf16", "nhwc")):
        unit = dict(stride_aw=1, stride_gw=1)
        if order == "nhwc":
            unit = dict(stride_aw=3, stride_gw=3, stride_ac=1, stride_gc=1)
        for pool_max in (True, False):
            add(f"image {pixel} {order} {'max' if pool_max else 'mean'}", _image_kernel,
                dict(act_ptr=f"*{pixel}", grad_ptr=f"*{pixel}", out_ptr="*fp32"),
                unit | dict(CHANNEL=False, POOL_MAX=pool_max, SIGN=1 if pool_max else -1, CHANNELS=3, CELL_H=32, CELL_W=32,
                            ROWS=configs["image"].rows, BLOCK_W=256),
                configs["image"], "stream", ["width", "n_cols", *outer])  # fmt: skip
    inner = ["n_positions", "n_channels"]
    strides = ["stride_ab", "stride_as", "stride_gb", "stride_gs"]
    for pixel in ("bf16", "fp32"):
        tile = dict(stride_ac=1, stride_gc=1, SIGN=1, EVEN_C=True, BLOCK_S=configs["map"].rows,
                    BLOCK_C=configs["map"].cols, STAGES=configs["map"].stages)  # fmt: skip
        add(f"map {pixel}", _map_kernel, dict(act_ptr=f"*{pixel}", grad_ptr=f"*{pixel}", cam_ptr="*fp32"),
            tile | dict(CHANNEL=False), configs["map"], "stream", inner + strides)  # fmt: skip
        add(f"map {pixel} channel", _map_kernel, dict(act_ptr=f"*{pixel}", grad_ptr="*fp32", cam_ptr="*fp32"),
            tile | dict(CHANNEL=True, stride_gs=0), configs["map"], "stream", inner + strides)  # fmt: skip
        add(f"mean {pixel}", _mean_kernel, dict(x_ptr=f"*{pixel}", mean_ptr="*fp32"),
            dict(stride_c=1, BLOCK_S=configs["mean"].rows, BLOCK_C=configs["mean"].cols), configs["mean"], "stream",
            [*inner, "stride_b", "stride_s"])  # fmt: skip
        add(f"scale {pixel}", _scale_kernel,
            dict(coefficient_ptr="*fp32", grad_ptr=f"*{pixel}", out_ptr=f"*{pixel}"),
            dict(stride_gc=1, stride_oc=1, CHANNEL=False, BLOCK_S=configs["scale"].rows,
                 BLOCK_C=configs["scale"].cols), configs["scale"], "stream",
            [*inner, "stride_gb", "stride_gs", "stride_ob", "stride_os"])  # fmt: skip
    # the gradient of a mean over positions is not channels_last, though the feature is
    tile = dict(stride_ac=1, stride_gs=1, SIGN=1, EVEN_C=True, CHANNEL=False, BLOCK_S=configs["map"].rows,
                BLOCK_C=configs["map"].cols, STAGES=configs["map"].stages)  # fmt: skip
    add("map bf16 grad nchw", _map_kernel, dict(act_ptr="*bf16", grad_ptr="*bf16", cam_ptr="*fp32"), tile, configs["map"], "stream",
        [*inner, "stride_ab", "stride_as", "stride_gb", "stride_gc"])  # fmt: skip
    return found


def candidates(key: str, committed: Config) -> Iterator[Config]:
    """The configurations that a sweep tries; the kernel of images has no columns to choose."""
    if key == "gradcam image":
        grid = itertools.product((1, 2, 4, 8, 16), (committed.cols,), (2, 4, 8), (1,))
    else:
        grid = itertools.product((8, 16, 32, 64), (64, 128, 256, 512), (4, 8), (1, 2, 3))
    return map(Config._make, grid)


def workload(key: str, operand: str, width: int, batch: int, device: str) -> Workload:
    """Images [128, 3, 224, 224] pooled to 7 x 7, forward only; or channels_last features [128, 2048, 7, 7] and their gradient."""
    shape = (128, 3, 224, 224) if key == "gradcam image" else (128, 2048, 7, 7)
    act, grad = (torch.randn(shape, device=device).bfloat16() for _ in range(2))
    if key != "gradcam image":
        act, grad = (tensor.to(memory_format=torch.channels_last) for tensor in (act, grad))
        act.requires_grad_()
    weighting = "channel" if key == "gradcam mean" else "elementwise"
    return Workload("gradcam", dict(act=act, grad=grad, size=(7, 7), weighting=weighting))
