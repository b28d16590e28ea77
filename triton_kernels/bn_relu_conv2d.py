"""Triton kernels and launchers of `pyext.ops.bn_relu_conv2d`, whose docstring holds the equations.

A convolution is one matrix product per tap of its kernel, of a tile of channels by a block of positions, which runs
through the positions of all images: small maps fill it too. Its operand z = relu(BN(x)) is made from x for every tap
and never written.

    moments_kernel, merge_kernel   mean and variance: partial ones of stretches of positions, merged in float64
    forward_kernel                 out = sum over taps of w[tap] z[shifted]
    map_gradient_kernel            grad_out times w, back through ReLU; both sums of the normalisation's gradient
    correction_kernel              what grad_x owes to the batch statistics, in place; in training only
    weight_gradient_kernel         grad_out times z, over a stretch of positions

With stride 2 a position of x meets the taps of its parity alone: one launch per parity of row and column, nine taps
in all instead of nine each. Sums over blocks are written and then added in a fixed order, in float64, so results do
not change from run to run. Accumulation is in float32, without TF32.

Floor and what is done, for n elements of x and m of out, of b bytes, with d multiply-adds for an element of out (H200:
4.3 TB/s, 770 TFLOP/s bfloat16). Statistics b n bytes. Forward b (n + m) bytes, 2 d m operations. Backward 4 d m
operations; b (2 n + m) bytes in evaluation, b (3 n + 2 m) in training, whose sums over x must be known before grad_x.
Done instead: b (3 n + 2 m) and b (6 n + 2 m), as the two gradients are two kernels and the correction reads and writes
grad_x again; and x is read and normalised once more per block of out's channels and per tap, from cache. One step on
64x108x32x32 to 48 in bfloat16 (bench/test_bn_relu_conv2d.py): 90 MB and 2 GFLOP, floor 21 us, all of it memory; done
132 MB, 31 us. Not measured: no GPU has run this.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import MAX_BLOCK, MAX_BLOCK_FLOAT32, _activated, _block, _load, _normalised, _statistics

if triton.knobs.runtime.interpret:
    from . import interpreter  # noqa: F401  (repairs loop bounds under NumPy 2.4)

BLOCK_P = 64
BLOCK_P_FLOAT32 = 32
POINTWISE_C = 16
POINTWISE_P = 128
"""Blocks of the kernels without products."""
SPLITS = 64
"""Stretches that `merge_kernel` merges at a time."""
PROGRAMS = 2048
"""Programs that split sums aim at: some for each of the multiprocessors of a large GPU."""


@triton.jit
def _image_and_position(block, positions, BLOCK_P: tl.constexpr, FLAT: tl.constexpr):
    """Those of a block of the `positions` of all images, images in 64 bits; FLAT: it lies within one image."""
    first = tl.cast(block, tl.int64) * BLOCK_P
    image = first // positions
    place = (first - image * positions).to(tl.int32) + tl.arange(0, BLOCK_P)
    if FLAT:
        image += tl.zeros([BLOCK_P], tl.int64)
    else:
        image += place // positions
        place %= positions
    return image, place


@triton.jit
def _offset(image, row, column, strides):
    return image * strides[0] + row.to(tl.int64) * strides[2] + column.to(tl.int64) * strides[3]


@triton.jit
def _flat_offset(image, position, strides):
    """`_offset` where rows follow each other without a gap: the compiler sees that positions are adjacent."""
    return image * strides[0] + position.to(tl.int64) * strides[3]


@triton.jit
def _dense_index(image, channel, position, channels, positions):
    """Of a tile [channels, positions] of a contiguous (N, C, H, W) tensor."""
    place = image * (tl.cast(channels, tl.int64) * positions) + position
    return (channel.to(tl.int64) * positions)[:, None] + place[None, :]


@triton.jit
def _tile(x, channel, mask, offset, inside, stride_c):
    """A tile [channels, positions] in float32, zeros where there is none."""
    index = channel.to(tl.int64)[:, None] * stride_c + offset[None, :]
    return _load(x, index, mask[:, None] & inside[None, :])


@triton.jit
def moments_kernel(
    x, partial, strides, images, channels, height, width, split_positions, splits,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """partial[:, split, channel]: mean of x - origin and sum of squared distances from it, over a stretch of positions.

    The origin is the channel's very first value, so a mean far larger than the spread costs no digits; within a stretch
    sums are centred on the mean of its first block, and none crosses lanes before the end.
    """
    blocks_c = tl.cdiv(channels, BLOCK_C)
    split = tl.program_id(0) // blocks_c
    channel = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = channel < channels
    blocks = split_positions // BLOCK_P
    origin = _load(x, channel.to(tl.int64) * strides[1], mask)
    centre = tl.zeros([BLOCK_C], tl.float32)
    total = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    squares = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    count = 0
    for i in range(0, blocks):
        image, position = _image_and_position(tl.cast(split, tl.int64) * blocks + i, height * width, BLOCK_P, FLAT)
        inside = image < images
        if FLAT:
            offset = _flat_offset(image, position, strides)
        else:
            offset = _offset(image, position // width, position % width, strides)
        tile = _tile(x, channel, mask, offset, inside, strides[1])
        tile = tl.where(inside[None, :], tile - origin[:, None], 0.0)
        number = tl.sum(inside.to(tl.int32), axis=0)
        count += number
        if i == 0:
            centre = tl.sum(tile, axis=1) / number
        distance = tl.where(inside[None, :], tile - centre[:, None], 0.0)
        total += distance
        squares += distance * distance
    step = tl.sum(total, axis=1) / count
    target = tl.cast(split, tl.int64) * channels + channel
    tl.store(partial + target, centre + step, mask)
    spread = tl.sum(squares, axis=1) - step * step * count
    tl.store(partial + tl.cast(splits, tl.int64) * channels + target, tl.where(spread < 0.0, 0.0, spread), mask)


@triton.jit
def merge_kernel(
    x, partial, mean, var, stride_c, count, channels, split_positions, splits,
    BLOCK_C: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Merges what `moments_kernel` wrote; `count` is the number of all positions."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = channel < channels
    total = tl.zeros([BLOCK_C], tl.float64)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        inside = (split < splits)[:, None] & mask[None, :]
        index = split.to(tl.int64)[:, None] * channels + channel[None, :]
        positions = tl.minimum(count - split.to(tl.int64) * split_positions, split_positions).to(tl.float64)
        total += tl.sum(tl.load(partial + index, inside, 0.0).to(tl.float64) * positions[:, None], axis=0)
    middle = total / count
    squares = tl.zeros([BLOCK_C], tl.float64)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        inside = (split < splits)[:, None] & mask[None, :]
        index = split.to(tl.int64)[:, None] * channels + channel[None, :]
        positions = tl.minimum(count - split.to(tl.int64) * split_positions, split_positions).to(tl.float64)
        away = tl.load(partial + index, inside, 0.0).to(tl.float64) - middle[None, :]
        within = tl.load(partial + tl.cast(splits, tl.int64) * channels + index, inside, 0.0).to(tl.float64)
        squares += tl.sum(tl.where(inside, within + away * away * positions[:, None], 0.0), axis=0)
    middle += tl.load(x + channel.to(tl.int64) * stride_c, mask, 0.0).to(tl.float64)
    tl.store(mean + channel, middle.to(tl.float32), mask)
    tl.store(var + channel, (squares / count).to(tl.float32), mask)


@triton.jit
def forward_kernel(
    x, norm, weight, out, strides, images, groups, inputs, outputs, height, width, out_height, out_width,
    STRIDE: tl.constexpr, taps, blocks_p, eps,
    SIDE: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """A tile of one group's `outputs` channels, from its `inputs` channels; weight[tap, output, input]."""
    blocks_o, positions = tl.cdiv(outputs, BLOCK_O), out_height * out_width
    rest = tl.program_id(0) // blocks_o
    row = tl.program_id(0) % blocks_o * BLOCK_O + tl.arange(0, BLOCK_O)
    group = rest // blocks_p
    image, position = _image_and_position(rest % blocks_p, positions, BLOCK_P, FLAT)
    top, left = position // out_width * STRIDE - SIDE // 2, position % out_width * STRIDE - SIDE // 2
    out_channel = (group * outputs + row).to(tl.int64)
    total = tl.zeros([BLOCK_O, BLOCK_P], tl.float32)
    for start in range(0, inputs, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        mask = column < inputs
        channel = group * inputs + column
        for tap in range(0, taps):
            down, right = top + tap // SIDE, left + tap % SIDE
            inside = (image < images) & (down >= 0) & (down < height) & (right >= 0) & (right < width)
            if FLAT and SIDE == 1:
                offset = _flat_offset(image, position, strides)
            else:
                offset = _offset(image, down, right, strides)
            index = (tl.cast(tap, tl.int64) * groups * outputs + out_channel)[:, None] * inputs + column[None, :]
            w = tl.load(weight + index, (row < outputs)[:, None] & mask[None, :], 0.0)
            a = _activated(_tile(x, channel, mask, offset, inside, strides[1]), norm, channel, mask, eps)
            a = tl.where(inside[None, :], a, 0.0).to(x.dtype.element_ty)
            total = tl.dot(w, a, total, input_precision="ieee")
    index = _dense_index(image, out_channel, position, groups * outputs, positions)
    tl.store(out + index, total.to(out.dtype.element_ty), (row < outputs)[:, None] & (image < images)[None, :])


@triton.jit
def map_gradient_kernel(
    grad_out, x, norm, weight, grad_x, partial, out_strides, strides, images, groups, inputs, outputs, height, width,
    out_height, out_width, STRIDE: tl.constexpr, parity, first_tap, taps, blocks_p, first_block, blocks, eps,
    TRAINING: tl.constexpr, SIDE: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    FLAT: tl.constexpr,
):  # fmt: skip
    """A tile of one group's `inputs` channels, at the rows and columns of one `parity` (row's, column's).

    In training grad_x receives the gradient of the normalised map, which `correction_kernel` completes.
    partial[:, first_block + block, channel]: the tile's parts of norm_bias's and norm_weight's gradients.
    """
    blocks_c = tl.cdiv(inputs, BLOCK_C)
    rest = tl.program_id(0) // blocks_c
    column = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = column < inputs
    group, block = rest // blocks_p, rest % blocks_p
    channel = group * inputs + column
    across = tl.cdiv(width - parity[1], STRIDE)
    image, place = _image_and_position(block, tl.cdiv(height - parity[0], STRIDE) * across, BLOCK_P, FLAT)
    at_y, at_x = place // across * STRIDE + parity[0], place % across * STRIDE + parity[1]
    inside = image < images
    total = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for start in range(0, outputs, BLOCK_O):
        row = start + tl.arange(0, BLOCK_O)
        out_channel = group * outputs + row
        for tap in range(0, taps[0] * taps[1]):
            tap_y, tap_x = first_tap[0] + tap // taps[1] * STRIDE, first_tap[1] + tap % taps[1] * STRIDE
            # Numerators are multiples of the stride.
            up, left = (at_y + SIDE // 2 - tap_y) // STRIDE, (at_x + SIDE // 2 - tap_x) // STRIDE
            met = inside & (up >= 0) & (up < out_height) & (left >= 0) & (left < out_width)
            if FLAT and SIDE == 1:
                offset = _flat_offset(image, place, out_strides)
            else:
                offset = _offset(image, up, left, out_strides)
            g = _tile(grad_out, out_channel, row < outputs, offset, met, out_strides[1]).to(x.dtype.element_ty)
            index = (tl.cast(tap_y * SIDE + tap_x, tl.int64) * groups * outputs + out_channel)[:, None] * inputs
            w = tl.load(weight + index + column[None, :], (row < outputs)[:, None] & mask[None, :], 0.0)
            total = tl.dot(tl.trans(w), g, total, input_precision="ieee")
    if FLAT:
        offset = _flat_offset(image, place, strides)
    else:
        offset = _offset(image, at_y, at_x, strides)
    tile = _tile(x, channel, mask, offset, inside, strides[1])
    # As torch's ReLU: no gradient where its result is 0, and NaN is no such place.
    total = tl.where((_normalised(tile, norm, channel, mask, eps) <= 0.0) | ~inside[None, :], 0.0, total)
    mean, rstd = _statistics(norm, channel, mask, eps)
    normalised = (tile - mean[:, None]) * rstd[:, None]
    target = partial + tl.cast(first_block + block, tl.int64) * (groups * inputs) + channel
    tl.store(target, tl.sum(total, axis=1), mask)
    of_weight = tl.sum(tl.where(inside[None, :], total * normalised, 0.0), axis=1)
    tl.store(target + tl.cast(blocks, tl.int64) * (groups * inputs), of_weight, mask)
    if not TRAINING:
        total *= (_load(norm[0], channel, mask) * rstd)[:, None]
    if not FLAT:
        place = at_y * width + at_x
    index = _dense_index(image, channel, place, groups * inputs, height * width)
    tl.store(grad_x + index, total.to(grad_x.dtype.element_ty), mask[:, None] & inside[None, :])


@triton.jit
def correction_kernel(
    grad_x, x, norm, sums, strides, images, channels, height, width, count, eps,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """grad_x = w / sqrt(var + eps) (g - mean(g) - n mean(g n)), for g in grad_x and n the normalised x."""
    blocks_c, positions = tl.cdiv(channels, BLOCK_C), height * width
    channel = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = channel < channels
    image, position = _image_and_position(tl.program_id(0) // blocks_c, positions, BLOCK_P, FLAT)
    inside = image < images
    if FLAT:
        offset = _flat_offset(image, position, strides)
    else:
        offset = _offset(image, position // width, position % width, strides)
    tile = _tile(x, channel, mask, offset, inside, strides[1])
    mean, rstd = _statistics(norm, channel, mask, eps)
    normalised = (tile - mean[:, None]) * rstd[:, None]
    of_bias = _load(sums, channel, mask) / count
    of_weight = _load(sums + channels, channel, mask) / count
    index = _dense_index(image, channel, position, channels, positions)
    g = _load(grad_x, index, mask[:, None] & inside[None, :])
    g = (g - of_bias[:, None] - normalised * of_weight[:, None]) * (_load(norm[0], channel, mask) * rstd)[:, None]
    tl.store(grad_x + index, g.to(grad_x.dtype.element_ty), mask[:, None] & inside[None, :])


@triton.jit
def weight_gradient_kernel(
    grad_out, x, norm, partial, out_strides, strides, images, groups, inputs, outputs, height, width, out_height,
    out_width, STRIDE: tl.constexpr, taps, split_blocks, eps,
    SIDE: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """partial[split, output, input, tap] over a stretch of `split_blocks` blocks of positions of the result."""
    blocks_o, blocks_c = tl.cdiv(outputs, BLOCK_O), tl.cdiv(inputs, BLOCK_C)
    tap, rest = tl.program_id(0) % taps, tl.program_id(0) // taps
    column = rest % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    rest = rest // blocks_c
    row = rest % blocks_o * BLOCK_O + tl.arange(0, BLOCK_O)
    rest = rest // blocks_o
    group, split = rest % groups, (rest // groups).to(tl.int64)
    mask = column < inputs
    channel, out_channel = group * inputs + column, group * outputs + row
    total = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
    for i in range(0, split_blocks):
        image, position = _image_and_position(split * split_blocks + i, out_height * out_width, BLOCK_P, FLAT)
        up, left = position // out_width, position % out_width
        down, right = up * STRIDE + tap // SIDE - SIDE // 2, left * STRIDE + tap % SIDE - SIDE // 2
        inside = (image < images) & (down >= 0) & (down < height) & (right >= 0) & (right < width)
        if FLAT and SIDE == 1:
            offset = _flat_offset(image, position, strides)
        else:
            offset = _offset(image, down, right, strides)
        if FLAT:
            out_offset = _flat_offset(image, position, out_strides)
        else:
            out_offset = _offset(image, up, left, out_strides)
        a = _activated(_tile(x, channel, mask, offset, inside, strides[1]), norm, channel, mask, eps)
        a = tl.where(inside[None, :], a, 0.0).to(x.dtype.element_ty)
        g = _tile(grad_out, out_channel, row < outputs, out_offset, inside, out_strides[1]).to(x.dtype.element_ty)
        total = tl.dot(g, tl.trans(a), total, input_precision="ieee")
    target = ((split * groups * outputs + out_channel)[:, None] * inputs + column[None, :]) * taps + tap
    tl.store(partial + target, total, (row < outputs)[:, None] & mask[None, :])


class _Convolution(NamedTuple):
    """Sizes that kernels of both passes have, in the order of their arguments."""

    images: int
    groups: int
    inputs: int
    outputs: int
    height: int
    width: int
    out_height: int
    out_width: int
    stride: int

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        return self.images, self.groups * self.outputs, self.out_height, self.out_width


def _convolution(x: Tensor, conv_weight: Tensor, stride: int, groups: int) -> _Convolution:
    images, channels, height, width = x.shape
    out_height, out_width = (height - 1) // stride + 1, (width - 1) // stride + 1
    sizes = channels // groups, conv_weight.shape[0] // groups
    return _Convolution(images, groups, *sizes, height, width, out_height, out_width, stride)


def _taps_first(conv_weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[k k, outputs, inputs of a group] in the dtype of the products: neighbours in a tile are neighbours in memory."""
    return conv_weight.to(dtype).permute(2, 3, 0, 1).contiguous()


def _positions(dtype: torch.dtype) -> int:
    """Positions of the tile that a program adds up, or adds up over at a time."""
    return BLOCK_P_FLOAT32 if dtype == torch.float32 else BLOCK_P


def _depth(extent: int, dtype: torch.dtype) -> int:
    """Channels that a tile adds up over at a time."""
    return min(_block(extent, dtype), MAX_BLOCK_FLOAT32 // 2 if dtype == torch.float32 else MAX_BLOCK // 2)


def _warps(rows: int, columns: int, registers: int = 255) -> dict[str, int]:
    """Of a program with a tile of rows by columns. The bound is there because ptxas left to itself spills a few
    registers where another block then fits."""
    return {"num_warps": 8, "maxnreg": registers} if rows * columns > 2048 else {"num_warps": 4}


def _is_flat(positions: int, block: int, *maps: Tensor) -> bool:
    """Whether blocks of positions lie within an image, and rows follow each other in every map."""
    adjacent = (m.shape[2] == 1 or m.stride(2) == m.shape[3] * m.stride(3) for m in maps)
    return positions % block == 0 and all(adjacent)


def _pointwise(x: Tensor) -> dict[str, int | bool]:
    """Blocks of the kernels that have a program for each of POINTWISE_C channels and POINTWISE_P positions."""
    flat = _is_flat(x.shape[2] * x.shape[3], POINTWISE_P, x)
    return {"BLOCK_C": POINTWISE_C, "BLOCK_P": POINTWISE_P, "FLAT": flat}


def _split(blocks: int, programs: int) -> tuple[int, int]:
    """Stretches of how many blocks, and how many of them, for `programs` programs per stretch."""
    length = triton.cdiv(blocks, max(1, min(blocks, PROGRAMS // programs)))
    return length, triton.cdiv(blocks, length)


@torch.no_grad()
def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of x (N, C, H, W) of any strides over all but the channels, float32; 0 for N = 0."""
    images, channels, height, width = x.shape
    count = images * height * width
    mean, var = (x.new_zeros((channels,), dtype=torch.float32) for _ in range(2))
    if count == 0:
        return mean, var
    blocks_c = triton.cdiv(channels, POINTWISE_C)
    length, splits = _split(triton.cdiv(count, POINTWISE_P), blocks_c)
    partial = mean.new_empty((2, splits, channels))
    with torch.cuda.device_of(x):
        moments_kernel[(blocks_c * splits,)](
            x, partial, x.stride(), images, channels, height, width, length * POINTWISE_P, splits, **_pointwise(x)
        )
        merge_kernel[(blocks_c,)](
            x, partial, mean, var, x.stride(1), count, channels, length * POINTWISE_P, splits,
            BLOCK_C=POINTWISE_C, SPLITS=SPLITS,
        )  # fmt: skip
    return mean, var


@torch.no_grad()
def forward(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, conv_weight: Tensor, mean: Tensor, var: Tensor, training: bool,
    eps: float, stride: int, groups: int,
) -> Tensor:  # fmt: skip
    """The result, NCHW in x's dtype; arguments as in the operator, `mean` and `var` those of the mode."""
    sizes = _convolution(x, conv_weight, stride, groups)
    out = x.new_empty(sizes.out_shape)
    if x.shape[0] == 0:
        return out
    norm = tuple(t.contiguous() for t in (norm_weight, norm_bias, mean, var))
    side = conv_weight.shape[-1]
    block_o, block_p, positions = _block(sizes.outputs, x.dtype), _positions(x.dtype), out.shape[2] * out.shape[3]
    blocks_p = triton.cdiv(sizes.images * positions, block_p)
    with torch.cuda.device_of(x):
        forward_kernel[(groups * blocks_p * triton.cdiv(sizes.outputs, block_o),)](
            x, norm, _taps_first(conv_weight, x.dtype), out, x.stride(), *sizes, side * side, blocks_p, eps,
            SIDE=side, BLOCK_O=block_o, BLOCK_C=_depth(sizes.inputs, x.dtype), BLOCK_P=block_p,
            FLAT=stride == 1 and _is_flat(positions, block_p, x), **_warps(block_o, block_p, 128),
        )  # fmt: skip
    return out


def _taps_of(parity: int, side: int, stride: int) -> tuple[int, int]:
    """The first tap, and how many `stride` apart, that rows of x of one parity meet: those with row + pad = tap mod
    stride."""
    first = (parity + side // 2) % stride
    return first, max(0, triton.cdiv(side - first, stride))


class _Backward:
    """One backward pass: its arguments as kernels take them."""

    def __init__(
        self, grad_out: Tensor, x: Tensor, norm: tuple[Tensor, ...], conv_weight: Tensor, eps: float,
        sizes: _Convolution,
    ) -> None:  # fmt: skip
        self.grad_out, self.x, self.norm, self.conv_weight, self.eps, self.sizes = (
            grad_out, x, norm, conv_weight, eps, sizes,
        )  # fmt: skip
        self.side, self.block_p = conv_weight.shape[-1], _positions(x.dtype)

    def input_gradient(self, training: bool) -> tuple[Tensor, Tensor]:
        """grad_x, and the gradients of norm_bias and norm_weight, float32 (2, C)."""
        x, sizes, stride = self.x, self.sizes, self.sizes.stride
        grad_x = x.new_empty(x.shape)
        extents = [
            (row, column, triton.cdiv(sizes.height - row, stride) * triton.cdiv(sizes.width - column, stride))
            for row in range(stride)
            for column in range(stride)
        ]
        blocks = [triton.cdiv(sizes.images * positions, self.block_p) for *_, positions in extents]
        partial = x.new_empty((2, sum(blocks), x.shape[1]), dtype=torch.float32)
        weight = _taps_first(self.conv_weight, x.dtype)
        first = 0
        for (row, column, positions), number in zip(extents, blocks, strict=True):
            if number:
                self._launch_parity(grad_x, partial, weight, (row, column), positions, first, number, training)
            first += number
        sums = partial.sum(1, dtype=torch.float64).float()
        if training:
            self._correct(grad_x, sums)
        return grad_x, sums

    def _launch_parity(
        self, grad_x: Tensor, partial: Tensor, weight: Tensor, parity: tuple[int, int], positions: int, first: int,
        number: int, training: bool,
    ) -> None:  # fmt: skip
        x, sizes, side = self.x, self.sizes, self.side
        first_tap, taps = zip(*(_taps_of(p, side, sizes.stride) for p in parity), strict=True)
        block_c = _block(sizes.inputs, x.dtype)
        maps = (x, self.grad_out) if side == 1 else (x,)
        map_gradient_kernel[(sizes.groups * number * triton.cdiv(sizes.inputs, block_c),)](
            self.grad_out, x, self.norm, weight, grad_x, partial, self.grad_out.stride(), x.stride(), *sizes, parity,
            first_tap, taps, number, first, partial.shape[1], self.eps,
            TRAINING=training, SIDE=side, BLOCK_O=_depth(sizes.outputs, x.dtype), BLOCK_C=block_c,
            BLOCK_P=self.block_p, FLAT=sizes.stride == 1 and _is_flat(positions, self.block_p, *maps),
            **_warps(block_c, self.block_p),
        )  # fmt: skip

    def _correct(self, grad_x: Tensor, sums: Tensor) -> None:
        images, channels, height, width = self.x.shape
        count = images * height * width
        blocks = triton.cdiv(count, POINTWISE_P) * triton.cdiv(channels, POINTWISE_C)
        correction_kernel[(blocks,)](
            grad_x, self.x, self.norm, sums, self.x.stride(), images, channels, height, width, count, self.eps,
            **_pointwise(self.x),
        )  # fmt: skip

    def weight_gradient(self) -> Tensor:
        """Float32, of conv_weight's shape."""
        x, sizes, side = self.x, self.sizes, self.side
        block_o, block_c = _block(sizes.outputs, x.dtype), _block(sizes.inputs, x.dtype)
        positions = sizes.out_height * sizes.out_width
        tiles = sizes.groups * side**2 * triton.cdiv(sizes.outputs, block_o) * triton.cdiv(sizes.inputs, block_c)
        length, splits = _split(triton.cdiv(sizes.images * positions, self.block_p), tiles)
        partial = x.new_empty((splits, *self.conv_weight.shape), dtype=torch.float32)
        weight_gradient_kernel[(tiles * splits,)](
            self.grad_out, x, self.norm, partial, self.grad_out.stride(), x.stride(), *sizes, side * side, length,
            self.eps, SIDE=side, BLOCK_O=block_o, BLOCK_C=block_c, BLOCK_P=self.block_p,
            FLAT=sizes.stride == 1 and _is_flat(positions, self.block_p, x, self.grad_out), **_warps(block_o, block_c),
        )  # fmt: skip
        return partial.sum(0, dtype=torch.float64).float()


@torch.no_grad()
def backward(
    grad_out: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, conv_weight: Tensor, mean: Tensor,
    var: Tensor, training: bool, eps: float, stride: int, groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """grad_x, NCHW in x's dtype, and the gradients of norm_weight, norm_bias and conv_weight in float32.

    `grad_out` has any strides; the other arguments are those of `forward`.
    """
    if x.shape[0] == 0:
        of_weight, of_bias, of_conv = (
            torch.zeros(p.shape, device=x.device) for p in (norm_weight, norm_bias, conv_weight)
        )
        return x.new_empty(x.shape), of_weight, of_bias, of_conv
    norm = tuple(t.contiguous() for t in (norm_weight, norm_bias, mean, var))
    sizes = _convolution(x, conv_weight, stride, groups)
    pass_ = _Backward(grad_out, x, norm, conv_weight, eps, sizes)
    with torch.cuda.device_of(x):
        grad_x, (of_bias, of_weight) = pass_.input_gradient(training)
        return grad_x, of_weight.clone(), of_bias.clone(), pass_.weight_gradient()
