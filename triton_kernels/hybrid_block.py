"""Triton kernels and launchers of `pyext.ops.hybrid_block`, whose docstring holds the equations.

Two kernels for the squeeze cell of a module, then the gates by `gated_excitation`, which write into the block's buffer.
Unlike the CPU and CUDA kernels, these write the map between the convolutions, after BN and ReLU, to memory: a tile in
Triton cannot be read at an offset, which the 3x3 convolution needs. Accumulation is in float32, without TF32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gated_excitation as gates
from .tiles import _activated, _block, _load

if triton.knobs.runtime.interpret:
    from . import interpreter  # noqa: F401  (repairs loop bounds under NumPy 2.4)

NUM_SQUEEZE = 10
"""Tensors of the squeeze cell, which precede the gates' parameters and running statistics."""
BLOCK_P = 64


@triton.jit
def _place(program, across, BLOCK: tl.constexpr, positions, BLOCK_P: tl.constexpr):
    """Image, first row of the result and positions of a program of a flat grid."""
    blocks_p, blocks = tl.cdiv(positions, BLOCK_P), tl.cdiv(across, BLOCK)
    rest = program // blocks_p
    position = program % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P)
    return (rest // blocks).to(tl.int64), rest % blocks * BLOCK + tl.arange(0, BLOCK), position


@triton.jit
def squeeze_kernel(
    x, norm1, conv, norm2, result, stride_n, stride_c, stride_h, stride_w, channels, squeeze, positions, width, eps,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """result[image, s, p] = relu(BN(sum_c conv[s, c] relu(BN(x))[image, c, p])): a tile of one image."""
    image, row, position = _place(tl.program_id(0), squeeze, BLOCK_S, positions, BLOCK_P)
    inside = position < positions
    place = (position // width).to(tl.int64) * stride_h + (position % width).to(tl.int64) * stride_w
    x += image * stride_n
    total = tl.zeros([BLOCK_S, BLOCK_P], tl.float32)
    for start in range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        mask = channel < channels
        tile = channel.to(tl.int64)[:, None] * stride_c + place[None, :]
        a = _activated(_load(x, tile, mask[:, None] & inside[None, :]), norm1, channel, mask, eps)
        index = row.to(tl.int64)[:, None] * channels + channel[None, :]
        w = _load(conv, index, (row < squeeze)[:, None] & mask[None, :])
        element = result.dtype.element_ty
        total = tl.dot(w.to(element), a.to(element), total, input_precision="ieee")
    y = _activated(total, norm2, row, row < squeeze, eps)
    target = (image * squeeze + row)[:, None] * positions + position[None, :]
    tl.store(result + target, y.to(result.dtype.element_ty), (row < squeeze)[:, None] & inside[None, :])


@triton.jit
def grouped_kernel(
    squeezed, conv, u, groups, inputs, outputs, height, width, out_height, out_width, stride,
    BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The grouped 3x3 convolution: a tile of one group's `outputs` channels, from its `inputs` channels."""
    positions = out_height * out_width
    image_group, row, position = _place(tl.program_id(0), outputs, BLOCK_G, positions, BLOCK_P)
    group = image_group % groups
    squeezed += image_group * inputs * height * width
    y, x = position // out_width * stride - 1, position % out_width * stride - 1
    total = tl.zeros([BLOCK_G, BLOCK_P], tl.float32)
    for tap in range(0, tl.where(height > 0, 9, 0)):  # hidden from the compiler, which would unroll the loop
        down, right = y + tap // 3, x + tap % 3
        inside = (position < positions) & (down >= 0) & (down < height) & (right >= 0) & (right < width)
        for start in range(0, inputs, BLOCK_C):
            channel = start + tl.arange(0, BLOCK_C)
            mask = channel < inputs
            place = channel.to(tl.int64)[:, None] * (height * width) + (down * width + right)[None, :]
            a = tl.load(squeezed + place, mask[:, None] & inside[None, :], 0.0)
            index = ((group * outputs + row)[:, None] * inputs + channel[None, :]) * 9 + tap
            w = _load(conv, index, (row < outputs)[:, None] & mask[None, :])
            total = tl.dot(w.to(a.dtype), a, total, input_precision="ieee")
    target = (image_group * outputs + row)[:, None] * positions + position[None, :]
    mask = (row < outputs)[:, None] & (position < positions)[None, :]
    tl.store(u + target, total.to(u.dtype.element_ty), mask)


def _squeeze_cell(x: Tensor, tensors: Sequence[Tensor], growth: int, groups: int, stride: int, eps: float) -> Tensor:
    """u of one module, NCHW in x's dtype."""
    images, channels, height, width = x.shape
    conv1, conv2 = tensors[4], tensors[9]
    squeeze = conv1.shape[0]
    out_height, out_width = (height - 1) // stride + 1, (width - 1) // stride + 1
    squeezed = x.new_empty((images, squeeze, height, width))
    u = x.new_empty((images, growth, out_height, out_width))
    block_s, block_g = _block(squeeze, x.dtype), _block(growth // groups, x.dtype)
    tiles = images * triton.cdiv(squeeze, block_s) * triton.cdiv(height * width, BLOCK_P)
    squeeze_kernel[(tiles,)](
        x, tuple(tensors[:4]), conv1, tuple(tensors[5:9]), squeezed, *x.stride(), channels, squeeze, height * width,
        width, eps, BLOCK_S=block_s, BLOCK_C=16, BLOCK_P=BLOCK_P,
    )  # fmt: skip
    tiles = images * groups * triton.cdiv(growth // groups, block_g) * triton.cdiv(out_height * out_width, BLOCK_P)
    grouped_kernel[(tiles,)](
        squeezed, conv2, u, groups, squeeze // groups, growth // groups, height, width, out_height, out_width, stride,
        BLOCK_G=block_g, BLOCK_C=min(32, _block(squeeze // groups, x.dtype)), BLOCK_P=BLOCK_P,
    )  # fmt: skip
    return u


@torch.no_grad()
def forward(x: Tensor, tensors: Sequence[Tensor], extents: Sequence[int], eps: float) -> Tensor:
    """The result of the block, NCHW in x's dtype; `extents` is `pyext.ops.hybrid_block.Extents`.

    `x` is (N, C, H, W) of any strides, `tensors` are those of `hybrid_block`, in x's dtype or float32.
    """
    modules, _, growth, groups, _, _, stride, dense = extents
    images, channels, height, width = x.shape
    out_channels = channels + modules * growth if dense else growth
    out = x.new_empty((images, out_channels, (height - 1) // stride + 1, (width - 1) // stride + 1))
    if images == 0:
        return out
    if dense:
        out[:, :channels].copy_(x)
    per_module = len(tensors) // modules
    num_running = len(gates.Running._fields)
    with torch.cuda.device_of(x):
        for m in range(modules):
            module = [t.contiguous() for t in tensors[m * per_module : (m + 1) * per_module]]
            first = channels + m * growth if dense else 0
            source = out[:, :first] if dense else x
            u = _squeeze_cell(source, module[:NUM_SQUEEZE], growth, groups, stride, eps)
            parameters, running = module[NUM_SQUEEZE:-num_running], module[-num_running:]
            gates.forward_out(u, parameters, running, False, eps, out[:, first : first + growth])
    return out
