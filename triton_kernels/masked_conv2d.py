"""Triton kernels and launchers of `pyext.ops.masked_conv2d`, whose docstring holds the equations.

Forward and x's gradient are one implicit matrix product: rows are kept channels of the result, columns positions, depth
kept channels of the source times taps. Weights are gathered through the lists as they are multiplied. A tile has
positions of one image; where maps are small it has several images, which are then taken in the order of their
sub-networks, so that one list does for all. x's gradient splits positions by their remainder under the stride: those of
one remainder meet the same taps, with dv as source, as in a convolution of stride 1.
The weight's gradient has depth over positions, in chunks that lie within one sub-network; a second pass adds the chunks
in a fixed order and scatters the sums into the whole weight. Small groups, where a matrix product would be mostly
zeros, are multiplied element by element.

Products of bfloat16 and float16 are on tensor cores, of float32 too if torch allows TF32 in convolutions; sums are in
float32. Results do not change from run to run.

Least traffic and work, b bytes per element: forward N (I H W + O H' W') b bytes and 2 N O I k k' H' W' operations; the
backward pass reads grad_out, out and x and writes grad_x, and has twice the operations. 64 images of 28 x 28, 128 to
128 kept channels, 3 x 3, bfloat16: 25.7 MB, 6 us at 4.3 TB/s, and 14.8 GFLOP, 19 us at 770 TFLOP/s (an H200);
backward 51 MB, 12 us, and 29.6 GFLOP, 38 us. Depthwise, on 128 kept channels: 25.7 MB forward, 51 MB backward, and
operations that do not count. On top of that come dv, 12.8 MB, written once and read by both products; v in float32
where a gate without activation is differentiated; and the weight's gradient by chunks. No speed was measured yet.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

if triton.knobs.runtime.interpret:
    from . import interpreter  # noqa: F401  (repairs loop bounds under NumPy 2.4)

MAX_DIRECT = 4
"""Channels of a group, on both sides, up to which it is multiplied element by element."""
MIN_BLOCK = 16
"""The least extent that `tl.dot` takes."""
WANTED_PROGRAMS = 1024
"""Enough for a large GPU, the same on each, so that results are."""
FULL_GPU = 264
"""Programs below which a smaller tile leaves less of a large GPU idle: two for each of its multiprocessors."""
LEAST_POSITIONS = 64
LEAST_STEPS = 16
"""Tiles of positions that a program of the weight's gradient adds up, where there are as many."""
INT32_OFFSETS = 2**31
ORDER_BLOCK, ORDER_WITH = 16, 256
INVERSE_BLOCK = 16
SHIFT_BLOCK, SHIFT_WITH = 16, 64
OUTPUT_TILE = 1024
SUM_BLOCK = 512
RELU6 = tl.constexpr(2)
SUBNETS_AT_ONCE = tl.constexpr(64)
LIST_BLOCK = tl.constexpr(256)


# ----- shared device functions


@triton.jit
def _stretch(tile, begins, images, subnets, size, MIXED: tl.constexpr):
    """Sub-network, first image and end of the images of a tile of `size`, images counted in their order.

    A sub-network's tiles begin at floor(its first image / size) + its number: as many as it needs, or one more, before
    those of the next, so that no table of tiles is needed. The last sub-network, `subnets`, is none.
    """
    subnet = tl.zeros((), tl.int32)
    if MIXED:
        for start in range(0, subnets + 1, SUBNETS_AT_ONCE):
            index = start + tl.arange(0, SUBNETS_AT_ONCE)
            base = tl.load(begins + index, index <= subnets, 0) // size + index
            subnet += tl.sum(((base <= tile) & (index <= subnets)).to(tl.int32), axis=0)
        subnet -= 1
        first, images = tl.load(begins + subnet), tl.load(begins + subnet + 1)
        tile -= first // size + subnet
        first += tile * size
    else:
        first = tile * size
    return subnet, first, images


@triton.jit
def _subnet(subnet_of, image, subnets, MIXED: tl.constexpr):
    """The sub-network of an image; `subnets` for a number that is none."""
    subnet = tl.zeros((), tl.int32)
    if MIXED:
        number = tl.load(subnet_of + image)
        subnet = tl.where((number >= 0) & (number < subnets), number, subnets).to(tl.int32)
    return subnet


@triton.jit
def _positions(
    image, stop, block, order, positions, MIXED: tl.constexpr, INDEX: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Images, positions and whether they exist, of a tile of BLOCK_Q positions of each of BLOCK_P / BLOCK_Q images from
    `image` on, counted in their order up to `stop`. One image is a scalar, and itself."""
    offset = tl.arange(0, BLOCK_P)
    if BLOCK_P == BLOCK_Q:
        p = tl.cast(block, INDEX) * BLOCK_P + offset
        exists = p < positions
    else:
        p = tl.cast(block, INDEX) * BLOCK_Q + offset % BLOCK_Q
        image += offset // BLOCK_Q
        exists = (p < positions) & (image < stop)
        if MIXED:
            image = tl.load(order + image, exists, 0).to(tl.int64)
    return image, p, exists


@triton.jit
def _place(p, columns, step, origin, tap, taps_w, tap_step, extents, strides, POINTWISE: tl.constexpr):
    """Offsets of the source, within an image and channel, that positions meet under a tap, and which are inside."""
    if POINTWISE:
        return p * strides[3], p >= 0
    else:
        y = p // columns * step[0] + origin[0] + tap // taps_w * tap_step[0]
        x = p % columns * step[1] + origin[1] + tap % taps_w * tap_step[1]
        return y * strides[2] + x * strides[3], (y >= 0) & (y < extents[0]) & (x >= 0) & (x < extents[1])


@triton.jit
def _channels(lists, subnet, subnets, length, at, end, group, per_group, INDEX: tl.constexpr):
    """Channels at places of a sub-network's list, and which of them are of the group."""
    channel = tl.load(lists + subnet.to(tl.int64) * length + at, (at < end) & (subnet < subnets), -1)
    own = (channel >= group * per_group) & (channel < (group + 1) * per_group)
    return tl.where(own, channel, 0).to(INDEX), own


@triton.jit
def _span(lists, subnet, subnets, length, group, per_group):
    """Between which places of its list a sub-network's channels of a group lie."""
    low, high = length, 0
    for start in range(0, length, LIST_BLOCK):
        at = start + tl.arange(0, LIST_BLOCK)
        _, own = _channels(lists, subnet, subnets, length, at, length, group, per_group, tl.int32)
        low = tl.minimum(low, tl.min(tl.where(own, at, length), axis=0))
        high = tl.maximum(high, tl.max(tl.where(own, at + 1, 0), axis=0))
    return low, high


@triton.jit
def _activated(v, ACTIVATION: tl.constexpr):
    """Comparisons keep NaN, which tl.maximum would drop."""
    if ACTIVATION != 0:
        v = tl.where(v < 0.0, 0.0, v)
    if ACTIVATION == RELU6:
        v = tl.where(v > 6.0, 6.0, v)
    return v


@triton.jit
def _finished(
    v, channel, kept, image, exists, at, length, scale, shift, gate, ACTIVATION: tl.constexpr, ONE_IMAGE: tl.constexpr
):  # fmt: skip
    """A tile [rows, positions] of the result from that of sums; rows that are not kept are 0."""
    if scale is not None:
        v *= tl.load(scale + channel, kept, 0.0).to(tl.float32)[:, None]
    if shift is not None:
        v += tl.load(shift + channel, kept, 0.0).to(tl.float32)[:, None]
    if gate is not None:
        if ONE_IMAGE:
            v *= tl.load(gate + image * length + at, kept, 0.0).to(tl.float32)[:, None]
        else:
            place = (image * length)[None, :] + at[:, None]
            v *= tl.load(gate + place, kept[:, None] & exists[None, :], 0.0).to(tl.float32)
    return tl.where(kept[:, None], _activated(v, ACTIVATION), 0.0)


@triton.jit
def _store_tile(
    target, strides, at, image, p, columns, value, mask, INDEX: tl.constexpr, FLAT: tl.constexpr
):  # fmt: skip
    """FLAT: positions are evenly spaced, across rows of the map, too."""
    place = p * strides[3] if FLAT else p // columns * strides[2] + p % columns * strides[3]
    target += image * strides[0]
    pointer = (target + place)[None, :] + (at.to(INDEX) * strides[1])[:, None]
    tl.store(pointer, value.to(target.dtype.element_ty), mask)


# ----- kernels


@triton.jit
def order_kernel(subnets, order, begins, images, count, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr):
    """Images in the order of their sub-networks, and where each of `count` begins; `count` itself is any other number.

    An image's rank is how many stand before it, which takes no more than comparisons.
    """
    item = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = tl.load(subnets + item, item < images, count)
    own = tl.where((own >= 0) & (own < count), own, count)
    rank = tl.zeros([BLOCK], tl.int32)
    begin = tl.zeros([BLOCK], tl.int32)
    for start in range(0, images, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        other = tl.load(subnets + m, m < images, count)
        other = tl.where((other >= 0) & (other < count), other, count)[None, :]
        earlier = (other < own[:, None]) | ((other == own[:, None]) & (m[None, :] < item[:, None]))
        rank += tl.sum((earlier & (m < images)[None, :]).to(tl.int32), axis=1)
        begin += tl.sum(((other < item[:, None]) & (m < images)[None, :]).to(tl.int32), axis=1)
    tl.store(order + rank, item, item < images)
    tl.store(begins + item, begin, item < count + 2)


@triton.jit
def inverse_kernel(lists, inverse, channels, length, BLOCK: tl.constexpr):
    """inverse[subnet, channel]: the channel's place in the sub-network's list, -1 if there is none."""
    blocks = tl.cdiv(channels, BLOCK)
    subnet = (tl.program_id(0) // blocks).to(tl.int64)
    channel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    found = tl.full([BLOCK], -1, tl.int32)
    for start in range(0, length, LIST_BLOCK):
        at = start + tl.arange(0, LIST_BLOCK)
        kept = tl.load(lists + subnet * length + at, at < length, -1)
        found = tl.maximum(found, tl.max(tl.where(kept[None, :] == channel[:, None], at[None, :], -1), axis=1))
    tl.store(inverse + subnet * channels + channel, found, channel < channels)


@triton.jit
def _operands(
    i, taps_h, taps_w, of_depths, weight, weight_strides, scale, kept, of_source, p, exists,
    TRANSPOSED: tl.constexpr, POINTWISE: tl.constexpr, INDEX: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tiles [rows, depths] of the weight and [depths, positions] of the source: a block of depths under one tap."""
    depths, low, high, first_channel, end_channel = of_depths
    source, source_strides, columns, extents, origin, step, tap_step = of_source
    taps = taps_h * taps_w
    tap = i % taps
    k = low + i // taps * BLOCK_K + tl.arange(0, BLOCK_K)
    depth = tl.load(depths + k, k < high, -1)
    present = (depth >= first_channel) & (depth < end_channel)
    depth = tl.where(present, depth, first_channel).to(INDEX)
    offset = (depth if TRANSPOSED else depth - first_channel) * weight_strides[1]
    offset += tap // taps_w * weight_strides[2] + tap % taps_w * weight_strides[3]
    element = source.dtype.element_ty
    if TRANSPOSED:  # lanes along what lies close together in memory
        w = tl.load(weight[None, :] + offset[:, None], present[:, None] & kept[None, :], 0.0)
        if scale is not None:
            w = w.to(tl.float32) * tl.load(scale + depth, present, 0.0).to(tl.float32)[:, None]
        w = tl.trans(w.to(element))
    else:
        w = tl.load(weight[:, None] + offset[None, :], kept[:, None] & present[None, :], 0.0).to(element)
    place, inside = _place(p, columns, step, origin, tap, taps_w, tap_step, extents, source_strides, POINTWISE)
    mask = present[:, None] & (inside & exists)[None, :]
    return w, tl.load((source + place)[None, :] + (k.to(INDEX) * source_strides[1])[:, None], mask, 0.0)


@triton.jit
def product_kernel(
    source, weight, scale, shift, gate, target, rows, depths, subnet_of, order, begins,
    source_strides, weight_strides, target_strides, extents, origin, step, tap_step, taps_h, taps_w,
    images, columns, positions, position_blocks, subnets, num_rows, num_depths, groups, rows_per_group,
    depths_per_group, row_blocks,
    ACTIVATION: tl.constexpr, TRANSPOSED: tl.constexpr, MIXED: tl.constexpr, GROUPED: tl.constexpr,
    POINTWISE: tl.constexpr, FLAT: tl.constexpr, AHEAD: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """target[image, row, p] = sum over depths and taps of weight times source: a tile of rows of one group.

    TRANSPOSED: the weight's first two dimensions have changed places, and `scale` belongs to the depth. AHEAD: operands
    are loaded one step before they are multiplied, which the compiler does by itself for elements of 32 bits.
    """
    block, rest = tl.program_id(0) % row_blocks, tl.program_id(0) // row_blocks
    group, rest = rest % groups, rest // groups
    position_block, tile = rest % position_blocks, (rest // position_blocks).to(tl.int64)
    if BLOCK_P == BLOCK_Q:
        subnet, first, stop = _subnet(subnet_of, tile, subnets, MIXED), tile, images
    else:
        subnet, first, stop = _stretch(tile, begins, images, subnets, BLOCK_P // BLOCK_Q, MIXED)
    row_low, row_high, low, high = 0, num_rows, 0, num_depths
    if GROUPED:
        row_low, row_high = _span(rows, subnet, subnets, num_rows, group, rows_per_group)
    if GROUPED or MIXED:
        low, high = _span(depths, subnet, subnets, num_depths, group, depths_per_group)
    row_low += block * BLOCK_R
    if (row_low >= row_high) | (first >= stop):
        return
    at = row_low + tl.arange(0, BLOCK_R)
    channel, kept = _channels(rows, subnet, subnets, num_rows, at, row_high, group, rows_per_group, INDEX)
    if MIXED:
        high = tl.where(tl.max(kept.to(tl.int32), axis=0) == 0, low, high)

    image, p, exists = _positions(first, stop, position_block, order, positions, MIXED, INDEX, BLOCK_P, BLOCK_Q)
    source += image * source_strides[0]
    weight += (channel - group * rows_per_group if TRANSPOSED else channel) * weight_strides[0]
    depths += subnet.to(tl.int64) * num_depths
    high = tl.where(subnet < subnets, high, low)
    of_depths = depths, low, high, group * depths_per_group, (group + 1) * depths_per_group
    of_source = source, source_strides, columns, extents, origin, step, tap_step
    taps = taps_h * taps_w
    steps = tl.cdiv(tl.maximum(high - low, 0), BLOCK_K) * taps
    sums = tl.zeros([BLOCK_R, BLOCK_P], tl.float32)
    if AHEAD:
        w, a = _operands(
            0, taps_h, taps_w, of_depths, weight, weight_strides, scale, kept, of_source, p, exists,
            TRANSPOSED, POINTWISE, INDEX, BLOCK_K,
        )  # fmt: skip
    for i in range(0, steps):
        if AHEAD:
            next_w, next_a = _operands(
                i + 1, taps_h, taps_w, of_depths, weight, weight_strides, scale, kept, of_source, p, exists,
                TRANSPOSED, POINTWISE, INDEX, BLOCK_K,
            )  # fmt: skip
            sums = tl.dot(w, a, sums, input_precision=PRECISION)
            w, a = next_w, next_a
        else:
            w, a = _operands(
                i, taps_h, taps_w, of_depths, weight, weight_strides, scale, kept, of_source, p, exists,
                TRANSPOSED, POINTWISE, INDEX, BLOCK_K,
            )  # fmt: skip
            sums = tl.dot(w, a, sums, input_precision=PRECISION)
    # Computed anew, which the compiler must not see: kept over the loop, they would take all registers.
    first += tl.minimum(steps, 0)
    image, p, exists = _positions(first, stop, position_block, order, positions, MIXED, INDEX, BLOCK_P, BLOCK_Q)
    if TRANSPOSED:
        v = tl.where(kept[:, None], sums, 0.0)
    else:
        v = _finished(
            sums, channel, kept, image, exists, at, num_rows, scale, shift, gate, ACTIVATION, BLOCK_P == BLOCK_Q
        )  # fmt: skip
    # Rows of no group are another program's, or were zeros from the start.
    stored = kept if GROUPED else at < row_high
    _store_tile(
        target, target_strides, at, image, p, columns, v, stored[:, None] & exists[None, :], INDEX, FLAT
    )  # fmt: skip


@triton.jit
def direct_kernel(
    source, weight, scale, shift, gate, target, rows, inverse, subnet_of, order, begins,
    source_strides, weight_strides, target_strides, extents, origin, step, tap_step, taps_h, taps_w,
    images, columns, positions, position_blocks, subnets, num_rows, row_channels, depth_channels, rows_per_group,
    depths_per_group, row_blocks,
    ACTIVATION: tl.constexpr, TRANSPOSED: tl.constexpr, MIXED: tl.constexpr, POINTWISE: tl.constexpr,
    FLAT: tl.constexpr, INDEX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """`product_kernel` element by element, for small groups; `inverse` tells where a channel of the source stands."""
    block, rest = tl.program_id(0) % row_blocks, tl.program_id(0) // row_blocks
    position_block, tile = rest % position_blocks, (rest // position_blocks).to(tl.int64)
    if BLOCK_P == BLOCK_Q:
        subnet, first, stop = _subnet(subnet_of, tile, subnets, MIXED), tile, images
    else:
        subnet, first, stop = _stretch(tile, begins, images, subnets, BLOCK_P // BLOCK_Q, MIXED)
    if first >= stop:
        return
    at = block * BLOCK_R + tl.arange(0, BLOCK_R)
    channel, kept = _channels(rows, subnet, subnets, num_rows, at, num_rows, 0, row_channels, INDEX)
    group = channel // rows_per_group
    image, p, exists = _positions(first, stop, position_block, order, positions, MIXED, INDEX, BLOCK_P, BLOCK_Q)
    source += image * source_strides[0]
    weight += (channel - group * rows_per_group if TRANSPOSED else channel) * weight_strides[0]
    inverse += subnet.to(tl.int64) * depth_channels
    taps = taps_h * taps_w
    sums = tl.zeros([BLOCK_R, BLOCK_P], tl.float32)
    for i in range(0, depths_per_group * taps):
        tap = i % taps
        depth = group * depths_per_group + i // taps
        k = tl.load(inverse + depth, kept, -1)
        offset = (depth if TRANSPOSED else i // taps) * weight_strides[1]
        offset += tap // taps_w * weight_strides[2] + tap % taps_w * weight_strides[3]
        w = tl.load(weight + offset, k >= 0, 0.0).to(tl.float32)
        if TRANSPOSED and scale is not None:
            w *= tl.load(scale + depth, k >= 0, 0.0).to(tl.float32)
        place, inside = _place(
            p, columns, step, origin, tap, taps_w, tap_step, extents, source_strides, POINTWISE
        )  # fmt: skip
        mask = (k >= 0)[:, None] & (inside & exists)[None, :]
        a = tl.load((source + place)[None, :] + (k.to(INDEX) * source_strides[1])[:, None], mask, 0.0)
        sums += w[:, None] * a.to(tl.float32)
    if TRANSPOSED:
        v = sums
    else:
        v = _finished(
            sums, channel, kept, image, exists, at, num_rows, scale, shift, gate, ACTIVATION, BLOCK_P == BLOCK_Q
        )  # fmt: skip
    stored = (at < num_rows)[:, None] & exists[None, :]
    _store_tile(target, target_strides, at, image, p, columns, v, stored, INDEX, FLAT)


@triton.jit
def output_gradient_kernel(
    grad_out, out, gate, dv, row_sums, grad_gate, outputs, subnet_of, grad_strides, out_strides,
    total_rows, num_rows, columns, positions, subnets, channels,
    ACTIVATION: tl.constexpr, MIXED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dv after the gate, its sum by row, and the gate's gradient: some rows (image, kept output).

    `out` is that of the operator, or without activation v itself, if the gate's gradient is asked for.
    """
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    image, at = r // num_rows, r % num_rows
    subnet = tl.zeros([BLOCK_R], tl.int64)
    if MIXED:
        subnet = tl.load(subnet_of + image, r < total_rows, -1)
    known = (r < total_rows) & (subnet >= 0) & (subnet < subnets)
    channel = tl.load(outputs + subnet * num_rows + at, known, -1)
    kept = (channel >= 0) & (channel < channels)
    factor = tl.full([BLOCK_R], 1.0, tl.float32)
    if gate is not None:
        factor = tl.load(gate + r, kept, 0.0).to(tl.float32)
    grad_out += image * grad_strides[0] + at * grad_strides[1]
    if out is not None:
        out += image * out_strides[0] + at * out_strides[1]
    sums = tl.zeros([BLOCK_R], tl.float32)
    products = tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, positions, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        row, column = (p // columns).to(tl.int64), (p % columns).to(tl.int64)
        mask = kept[:, None] & (p < positions)[None, :]
        place = row * grad_strides[2] + column * grad_strides[3]
        g = tl.load(grad_out[:, None] + place[None, :], mask, 0.0).to(tl.float32)
        if out is not None:
            place = row * out_strides[2] + column * out_strides[3]
            y = tl.load(out[:, None] + place[None, :], mask, 0.0).to(tl.float32)
            if ACTIVATION != 0:
                g = tl.where(y <= 0.0, 0.0, g)
            if ACTIVATION == RELU6:
                g = tl.where(y >= 6.0, 0.0, g)
            products += tl.sum(g * y, axis=1)
        g *= factor[:, None]
        sums += tl.sum(g, axis=1)
        if dv is not None:
            inside = (r < total_rows)[:, None] & (p < positions)[None, :]
            tl.store(dv + r[:, None] * positions + p[None, :], g.to(dv.dtype.element_ty), inside)
    if row_sums is not None:
        tl.store(row_sums + r, sums, r < total_rows)
    if grad_gate is not None:
        if ACTIVATION != 0:
            products = tl.where(factor == 0.0, 0.0, products / factor)
        tl.store(grad_gate + r, products, r < total_rows)


@triton.jit
def shift_gradient_kernel(
    row_sums, inverse, subnet_of, grad_shift, images, num_rows, subnets, channels,
    MIXED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad_shift[channel]: the sum over images of the channel's row sums, where it is kept."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, images, BLOCK_N):
        image = start + tl.arange(0, BLOCK_N).to(tl.int64)
        subnet = tl.zeros([BLOCK_N], tl.int64)
        if MIXED:
            subnet = tl.load(subnet_of + image, image < images, -1)
        known = (image < images) & (subnet >= 0) & (subnet < subnets)
        mask = known[:, None] & (channel < channels)[None, :]
        at = tl.load(inverse + subnet[:, None] * channels + channel[None, :], mask, -1)
        sums += tl.sum(tl.load(row_sums + image[:, None] * num_rows + at, at >= 0, 0.0), axis=0)
    tl.store(grad_shift + channel, sums, channel < channels)


@triton.jit
def _gradient_operands(
    i, of_chunk, of_dv, of_x, MIXED: tl.constexpr, POINTWISE: tl.constexpr, FLAT: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, MET: tl.constexpr = False,
):  # fmt: skip
    """Tiles [rows, positions] of dv and [columns, positions] of x: a block of positions of a chunk.

    MET: dv, too, is 0 where the tap leads out of the map.
    """
    first, stop, order, block, blocks, positions, columns = of_chunk
    dv, dv_strides, at_offset, kept = of_dv
    x, x_strides, k_offset, present, extents, origin, step, tap_step, tap, taps_w = of_x
    begin = first + i // blocks * (BLOCK_P // BLOCK_Q)
    more = begin < stop
    if MIXED and BLOCK_P == BLOCK_Q:
        begin = tl.load(order + begin, more, 0).to(tl.int64)
    image, p, exists = _positions(
        begin, stop, block + i % blocks, order, positions, MIXED, INDEX, BLOCK_P, BLOCK_Q
    )  # fmt: skip
    exists = exists & more
    x_place, inside = _place(p, columns, step, origin, tap, taps_w, tap_step, extents, x_strides, POINTWISE)
    met = inside & exists
    place = p * dv_strides[3] if FLAT else p // columns * dv_strides[2] + p % columns * dv_strides[3]
    pointer = (dv + image * dv_strides[0] + place)[None, :] + at_offset[:, None]
    d = tl.load(pointer, kept[:, None] & exists[None, :], 0.0)
    if MET:
        d = tl.where(met[None, :], d, 0.0)
    pointer = (x + image * x_strides[0] + x_place)[None, :] + k_offset[:, None]
    return d, tl.load(pointer, present[:, None] & met[None, :], 0.0)


@triton.jit
def _any_nan(sums):
    return tl.max((sums != sums).to(tl.int32)) != 0


@triton.jit
def chunk_kernel(
    dv, x, partial, outputs, inputs, order, begins, dv_strides, x_strides, extents, origin, step, tap_step,
    taps_h, taps_w, images, columns, positions, subnets, num_outputs, num_inputs, groups, outputs_per_group,
    inputs_per_group, row_blocks, column_blocks, chunk_images, chunk_blocks, position_chunks,
    MIXED: tl.constexpr, GROUPED: tl.constexpr, POINTWISE: tl.constexpr, FLAT: tl.constexpr, AHEAD: tl.constexpr,
    PRECISION: tl.constexpr, INDEX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """partial[chunk, tap, place of output, input within its group] = sum over the chunk of dv times x.

    A chunk is `chunk_images` images of one sub-network by `chunk_blocks` blocks of BLOCK_Q positions.
    """
    block, rest = tl.program_id(0) % row_blocks, tl.program_id(0) // row_blocks
    column_block, rest = rest % column_blocks, rest // column_blocks
    tap, rest = rest % (taps_h * taps_w), rest // (taps_h * taps_w)
    group, chunk = rest % groups, (rest // groups).to(tl.int64)
    subnet, first, stop = _stretch(chunk // position_chunks, begins, images, subnets, chunk_images, MIXED)
    stop = tl.minimum(stop, first + chunk_images)
    row_low, row_high, low, high = 0, num_outputs, 0, num_inputs
    if GROUPED:
        row_low, row_high = _span(outputs, subnet, subnets, num_outputs, group, outputs_per_group)
        low, high = _span(inputs, subnet, subnets, num_inputs, group, inputs_per_group)
    row_low += block * BLOCK_R
    low += column_block * BLOCK_C
    if (first >= stop) | (row_low >= row_high) | (low >= high):
        return
    at, k = row_low + tl.arange(0, BLOCK_R), low + tl.arange(0, BLOCK_C)
    _, kept = _channels(outputs, subnet, subnets, num_outputs, at, row_high, group, outputs_per_group, INDEX)
    channel, present = _channels(inputs, subnet, subnets, num_inputs, k, high, group, inputs_per_group, INDEX)
    if tl.max(kept.to(tl.int32), axis=0) * tl.max(present.to(tl.int32), axis=0) == 0:
        return
    block = (chunk % position_chunks).to(tl.int32) * chunk_blocks
    blocks = tl.minimum(block + chunk_blocks, tl.cdiv(positions, BLOCK_Q)) - block
    of_chunk = first, stop, order, block, blocks, positions, columns
    of_dv = dv, dv_strides, at.to(INDEX) * dv_strides[1], kept
    of_x = x, x_strides, k.to(INDEX) * x_strides[1], present, extents, origin, step, tap_step, tap, taps_w
    steps = tl.cdiv(stop - first, BLOCK_P // BLOCK_Q).to(tl.int32) * blocks
    sums = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    if AHEAD:
        d, a = _gradient_operands(0, of_chunk, of_dv, of_x, MIXED, POINTWISE, FLAT, INDEX, BLOCK_P, BLOCK_Q)
    for i in range(0, steps):
        if AHEAD:
            next_d, next_a = _gradient_operands(
                i + 1, of_chunk, of_dv, of_x, MIXED, POINTWISE, FLAT, INDEX, BLOCK_P, BLOCK_Q
            )  # fmt: skip
            sums = tl.dot(d, tl.trans(a), sums, input_precision=PRECISION)
            d, a = next_d, next_a
        else:
            d, a = _gradient_operands(i, of_chunk, of_dv, of_x, MIXED, POINTWISE, FLAT, INDEX, BLOCK_P, BLOCK_Q)
            sums = tl.dot(d, tl.trans(a), sums, input_precision=PRECISION)
    if not POINTWISE:  # noqa: SIM102  (one is a constant of the kernel, the other is not)
        # Times the 0 of a place outside of the map, NaN and infinity are NaN: such a tile is added up without them.
        if _any_nan(sums):
            sums = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
            for i in tl.range(0, steps, num_stages=1, disable_licm=True):
                d, a = _gradient_operands(
                    i, of_chunk, of_dv, of_x, MIXED, POINTWISE, FLAT, INDEX, BLOCK_P, BLOCK_Q, True
                )  # fmt: skip
                sums = tl.dot(d, tl.trans(a), sums, input_precision=PRECISION)
    partial += (chunk * (taps_h * taps_w) + tap) * num_outputs * inputs_per_group
    offset = at.to(tl.int64)[:, None] * inputs_per_group + (channel - group * inputs_per_group)[None, :]
    tl.store(partial + offset, sums, kept[:, None] & present[None, :])


@triton.jit
def direct_chunk_kernel(
    dv, x, partial, outputs, inverse, order, begins, dv_strides, x_strides, extents, origin, step, tap_step,
    taps_h, taps_w, images, columns, positions, subnets, num_outputs, output_channels, input_channels,
    outputs_per_group, inputs_per_group, row_blocks, chunk_images, chunk_blocks, position_chunks,
    MIXED: tl.constexpr, POINTWISE: tl.constexpr, FLAT: tl.constexpr, INDEX: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """`chunk_kernel` element by element, for small groups."""
    block, rest = tl.program_id(0) % row_blocks, tl.program_id(0) // row_blocks
    tap, rest = rest % (taps_h * taps_w), rest // (taps_h * taps_w)
    own_input, chunk = rest % inputs_per_group, (rest // inputs_per_group).to(tl.int64)
    subnet, first, stop = _stretch(chunk // position_chunks, begins, images, subnets, chunk_images, MIXED)
    stop = tl.minimum(stop, first + chunk_images)
    if first >= stop:
        return
    at = block * BLOCK_R + tl.arange(0, BLOCK_R)
    channel, kept = _channels(outputs, subnet, subnets, num_outputs, at, num_outputs, 0, output_channels, INDEX)
    source = channel // outputs_per_group * inputs_per_group + own_input
    k = tl.load(inverse + subnet.to(tl.int64) * input_channels + source, kept, -1)
    block = (chunk % position_chunks).to(tl.int32) * chunk_blocks
    blocks = tl.minimum(block + chunk_blocks, tl.cdiv(positions, BLOCK_Q)) - block
    of_chunk = first, stop, order, block, blocks, positions, columns
    of_dv = dv, dv_strides, at.to(INDEX) * dv_strides[1], k >= 0
    of_x = x, x_strides, k.to(INDEX) * x_strides[1], k >= 0, extents, origin, step, tap_step, tap, taps_w
    sums = tl.zeros([BLOCK_R, BLOCK_P], tl.float32)
    steps = tl.cdiv(stop - first, BLOCK_P // BLOCK_Q).to(tl.int32) * blocks
    for i in range(0, steps):
        d, a = _gradient_operands(i, of_chunk, of_dv, of_x, MIXED, POINTWISE, FLAT, INDEX, BLOCK_P, BLOCK_Q)
        sums += d.to(tl.float32) * a.to(tl.float32)
    if not POINTWISE:  # noqa: SIM102  (one is a constant of the kernel, the other is not)
        if _any_nan(sums):  # as in `chunk_kernel`
            sums = tl.zeros([BLOCK_R, BLOCK_P], tl.float32)
            for i in tl.range(0, steps, num_stages=1, disable_licm=True):
                d, a = _gradient_operands(
                    i, of_chunk, of_dv, of_x, MIXED, POINTWISE, FLAT, INDEX, BLOCK_P, BLOCK_Q, True
                )  # fmt: skip
                sums += d.to(tl.float32) * a.to(tl.float32)
    partial += (chunk * (taps_h * taps_w) + tap) * num_outputs * inputs_per_group
    tl.store(partial + at.to(tl.int64) * inputs_per_group + own_input, tl.sum(sums, axis=1), k >= 0)


@triton.jit
def chunk_sum_kernel(
    partial, inverse_outputs, inverse_inputs, begins, weight, scale, grad_weight, grad_scale, weight_strides,
    taps_h, taps_w, images, subnets, num_outputs, output_channels, input_channels, outputs_per_group,
    inputs_per_group, column_blocks, chunk_images, position_chunks,
    MIXED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The whole weight's gradient, a stretch of one output's elements; grad_scale[block, output]: that of the scale."""
    block, output = tl.program_id(0) % column_blocks, (tl.program_id(0) // column_blocks).to(tl.int64)
    taps = taps_h * taps_w
    e = block * BLOCK + tl.arange(0, BLOCK)
    own_input, tap = e // taps, e % taps
    exists = own_input < inputs_per_group
    channel = output // outputs_per_group * inputs_per_group + own_input
    sums = tl.zeros([BLOCK], tl.float32)
    for subnet in range(0, subnets):
        at = tl.load(inverse_outputs + tl.cast(subnet, tl.int64) * output_channels + output)
        if at >= 0:
            k = tl.load(inverse_inputs + tl.cast(subnet, tl.int64) * input_channels + channel, exists, -1)
            base, count = 0, images
            if MIXED:
                first = tl.load(begins + subnet).to(tl.int32)
                base, count = first // chunk_images + subnet, tl.load(begins + subnet + 1).to(tl.int32) - first
            place = (tap * num_outputs + at) * tl.cast(inputs_per_group, tl.int64) + own_input
            for chunk in range(0, tl.cdiv(count, chunk_images) * position_chunks):
                row = (base * position_chunks + chunk).to(tl.int64) * taps * num_outputs
                sums += tl.load(partial + row * inputs_per_group + place, k >= 0, 0.0)
    factor = 1.0
    if scale is not None:
        factor = tl.load(scale + output).to(tl.float32)
    tl.store(grad_weight + output * inputs_per_group * taps + e, sums * factor, exists)
    if grad_scale is not None:
        place = output * weight_strides[0] + own_input.to(tl.int64) * weight_strides[1]
        place += tap // taps_w * weight_strides[2] + tap % taps_w * weight_strides[3]
        products = sums * tl.load(weight + place, exists, 0.0).to(tl.float32)
        tl.store(grad_scale + block * output_channels + output, tl.sum(products, axis=0))


# ----- launchers


class Chunk(NamedTuple):
    """What one program of the weight's gradient adds up: images, blocks of positions; and chunks of one image."""

    images: int
    blocks: int
    of_positions: int


@dataclass(frozen=True)
class Side:
    """One side of the layer, inputs or outputs: its channels, and those that are kept."""

    lists: Tensor
    """(sub-networks, kept channels)."""
    channels: int
    per_group: int

    @property
    def kept(self) -> int:
        return self.lists.shape[1]

    @property
    def kept_of_group(self) -> int:
        """At most so many are kept of one group."""
        return min(self.kept, self.per_group)

    @cached_property
    def inverse(self) -> Tensor:
        """(sub-networks, channels) int32: the places of channels in the lists, -1 where there is none."""
        inverse = self.lists.new_empty((len(self.lists), self.channels), dtype=torch.int32)
        blocks = triton.cdiv(self.channels, INVERSE_BLOCK)
        inverse_kernel[(len(self.lists) * blocks,)](self.lists, inverse, self.channels, self.kept, BLOCK=INVERSE_BLOCK)
        return inverse


class Walk(NamedTuple):
    """Where the source of a product lies, by rows and columns: position * step + tap * tap_step + origin."""

    origin: tuple[int, int]
    step: tuple[int, int]
    tap_step: tuple[int, int]

    @classmethod
    def of_convolution(cls, numbers: Sequence[int]) -> Walk:
        """That of the operator's `numbers` (`pyext.ops.masked_conv2d_parts.Geometry`)."""
        return cls((-numbers[2], -numbers[3]), (numbers[0], numbers[1]), (numbers[4], numbers[5]))

    def is_pointwise(self, source: Tensor, weight: Tensor, extents: Sequence[int]) -> bool:
        """Whether positions of a map of `extents` are the source's, evenly spaced: they need not be taken apart."""
        still = self.origin == (0, 0) and self.step == (1, 1) and tuple(weight.shape[2:]) == (1, 1)
        return still and source.shape[2:] == extents and _is_flat(source)


class Epilogue(NamedTuple):
    """What follows a product. In a transposed one `scale` precedes it, and there is nothing else."""

    scale: Tensor | None = None
    shift: Tensor | None = None
    gate: Tensor | None = None
    activation: int = 0


class Phase(NamedTuple):
    """Of x's gradient, along one axis: the places of one remainder under the stride, and the taps that they meet."""

    remainder: int
    first_tap: int
    taps_apart: int
    origin: int
    tap_step: int


def _phases(extent: int, stride: int, padding: int, dilation: int, taps: int) -> Iterator[Phase]:
    """dv's row y meets x's row r by tap k where y * stride = r + padding - k * dilation."""
    apart = stride // math.gcd(stride, dilation)
    for remainder in range(min(stride, extent)):
        meets = (k for k in range(taps) if (remainder + padding - k * dilation) % stride == 0)
        first = next(meets, taps)
        origin = (remainder + padding - first * dilation) // stride
        yield Phase(remainder, first, apart, origin, -(apart * dilation // stride))


def _is_flat(x: Tensor) -> bool:
    """Whether positions are evenly spaced in memory, from one row to the next, too."""
    return x.shape[2] == 1 or x.stride(2) == x.shape[3] * x.stride(3)


def _index_type(maps: Sequence[Tensor], weight: Tensor) -> tl.dtype:
    """What offsets within an image, and within the weight, are counted in."""
    places = [[*zip(x.shape[1:], x.stride()[1:], strict=True)] for x in maps]
    places.append([*zip(weight.shape, weight.stride(), strict=True)])
    largest = max(sum(max(extent - 1, 0) * stride for extent, stride in of_one) for of_one in places)
    return tl.int32 if largest < INT32_OFFSETS else tl.int64


def _part(extent: int, least: int, most: int) -> int:
    return max(least, min(most, triton.next_power_of_2(extent)))


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def precision() -> str:
    """Of float32 products: torch's setting for its own convolutions."""
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def _on_tensor_cores(dtype: torch.dtype) -> bool:
    return dtype != torch.float32 or precision() == "tf32"


class Blocks(NamedTuple):
    """Positions in a tile, at most, and constants and launch options of a kernel: the largest that spill no registers.

    Without tensor cores operands take registers, too. Elements of 16 bits are not copied asynchronously.
    """

    positions: int
    options: dict[str, int | bool]

    @classmethod
    def of_product(cls, rows: int, depths: int, dtype: torch.dtype) -> Blocks:
        options = {"BLOCK_R": _part(rows, 16, 64), "BLOCK_K": _part(depths, 16, 32), "AHEAD": dtype != torch.float32}
        if _on_tensor_cores(dtype):
            return cls(128, options)
        return cls(64, {**options, "BLOCK_R": _part(rows, 16, 32), "BLOCK_K": 16, "num_stages": 1})

    @classmethod
    def of_weight_gradient(cls, rows: int, columns: int, dtype: torch.dtype) -> Blocks:
        options = {"AHEAD": dtype != torch.float32, "num_warps": 8, "num_stages": 2}
        if _on_tensor_cores(dtype):
            if dtype == torch.float32:  # its tile is smaller, and a second block fits
                options["maxnreg"] = 128
            return cls(32, {"BLOCK_R": _part(rows, 16, 128), "BLOCK_C": _part(columns, 16, 64), **options})
        sizes = {"BLOCK_R": _part(rows, 16, 32), "BLOCK_C": _part(columns, 16, 32)}
        return cls(32, {**sizes, **options, "num_warps": 4, "num_stages": 1})

    @classmethod
    def direct(cls, rows: int) -> Blocks:
        return cls(128, {"BLOCK_R": _part(rows, 1, 8)})

    def filling(self, positions: int, programs: int) -> Blocks:
        """The same, or fewer positions in a tile where tiles of `positions` in all, times `programs`, would be few."""
        most = self.positions
        while most > LEAST_POSITIONS and triton.cdiv(positions, most) * programs < FULL_GPU:
            most //= 2
        product, ahead = "BLOCK_K" in self.options, self.options.get("AHEAD", False)
        large = product and (most == 128 or (ahead and most * self.options["BLOCK_R"] >= 64 * 64))
        return Blocks(most, {**self.options, "num_warps": 8 if large else 4})


@dataclass(frozen=True)
class Layer:
    """What is the same in all products of one call."""

    inputs: Side
    outputs: Side
    groups: int
    images: int
    subnets: Tensor | None
    walk: Walk

    @classmethod
    def of(
        cls, x: Tensor, weight: Tensor, inputs: Tensor, outputs: Tensor, subnets: Tensor | None, numbers: Sequence[int]
    ) -> Layer:
        groups = numbers[6]
        return cls(
            Side(inputs.contiguous(), weight.shape[1] * groups, weight.shape[1]),
            Side(outputs.contiguous(), len(weight), len(weight) // groups),
            groups,
            len(x),
            _dense(subnets),
            Walk.of_convolution(numbers),
        )

    @property
    def mixed(self) -> bool:
        return self.subnets is not None

    @property
    def direct(self) -> bool:
        return self.groups > 1 and max(self.inputs.per_group, self.outputs.per_group) <= MAX_DIRECT

    @cached_property
    def order(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Images in the order of their sub-networks, and where each of these begins; nothing where there is but one."""
        if self.subnets is None:
            return None, None
        count = len(self.inputs.lists)
        order = self.subnets.new_empty(self.images, dtype=torch.int32)
        begins = self.subnets.new_empty(count + 2)
        programs = triton.cdiv(max(self.images, count + 2), ORDER_BLOCK)
        order_kernel[(programs,)](
            self.subnets, order, begins, self.images, count, BLOCK=ORDER_BLOCK, BLOCK_M=ORDER_WITH
        )
        return order, begins

    def image_tiles(self, size: int) -> int:
        """Enough tiles of `size` images that are all of one sub-network."""
        return self.images // size + len(self.inputs.lists) + 1 if self.mixed else triton.cdiv(self.images, size)

    def tile_of(self, positions: int, most: int) -> dict[str, int]:
        """Positions in a tile, and of them those of one image: as many as leave few places empty, if there are images
        enough to fill the tile."""
        images = triton.next_power_of_2(max(1, self.images // len(self.inputs.lists)))
        of_image = min(most, triton.next_power_of_2(positions))
        tile = max(MIN_BLOCK, min(most, of_image * images))
        sizes = [of_image >> i for i in range(4)]
        sizes = [q for q in sizes if q == of_image or (q >= MIN_BLOCK and tile // q <= images)]
        padded = [triton.cdiv(positions, q) * q for q in sizes]
        fits = next(q for q, n in zip(sizes, padded, strict=True) if n <= 1.05 * min(padded))
        return {"BLOCK_P": tile, "BLOCK_Q": fits}

    def new_result(self, x: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """In x's dtype or another; a matrix product of groups writes the kept channels alone."""
        zeros = self.groups > 1 and not self.direct
        return x.new_zeros(shape, dtype=dtype) if zeros else x.new_empty(shape, dtype=dtype)

    def product(
        self,
        source: Tensor,
        weight: Tensor,
        target: Tensor,
        walk: Walk,
        epilogue: Epilogue,
        transposed: bool = False,
    ) -> None:
        """Write the product of `source` (N, depths, ...) with the taps in `weight` into `target` (N, rows, ...)."""
        rows, depths = (self.inputs, self.outputs) if transposed else (self.outputs, self.inputs)
        extents = target.shape[2:]
        positions = extents.numel()
        blocks = Blocks.of_product(rows.kept_of_group, depths.kept_of_group, source.dtype)
        if self.direct:
            blocks = Blocks.direct(rows.kept)
        row_blocks = triton.cdiv(rows.kept if self.direct else rows.kept_of_group, blocks.options["BLOCK_R"])
        programs = row_blocks * (1 if self.direct else self.groups)
        blocks = blocks.filling(self.images * positions, programs)
        tile = self.tile_of(positions, blocks.positions)
        of_tile = tile["BLOCK_P"] // tile["BLOCK_Q"]
        position_blocks = triton.cdiv(positions, tile["BLOCK_Q"])
        tiles = position_blocks * (self.images if of_tile == 1 else self.image_tiles(of_tile))
        out_channels, in_channels, *of_taps = weight.stride()
        tensors = source, weight, epilogue.scale, epilogue.shift, epilogue.gate, target, rows.lists
        places = (
            self.subnets, *(self.order if of_tile > 1 else (None, None)),
            source.stride(), (in_channels, out_channels, *of_taps) if transposed else weight.stride(), target.stride(),
            tuple(source.shape[2:]), *walk, *weight.shape[2:], self.images, extents[1], positions, position_blocks,
            len(rows.lists), rows.kept,
        )  # fmt: skip
        options = {
            "ACTIVATION": epilogue.activation,
            "TRANSPOSED": transposed,
            "MIXED": self.mixed,
            "POINTWISE": walk.is_pointwise(source, weight, extents),
            "FLAT": _is_flat(target),
            "INDEX": _index_type((source, target), weight),
            **blocks.options,
            **tile,
        }
        if self.direct:
            direct_kernel[(tiles * programs,)](
                *tensors, depths.inverse, *places, rows.channels, depths.channels, rows.per_group, depths.per_group,
                row_blocks, **options,
            )  # fmt: skip
            return
        product_kernel[(tiles * programs,)](
            *tensors, depths.lists, *places, depths.kept, self.groups, rows.per_group, depths.per_group, row_blocks,
            GROUPED=self.groups > 1, PRECISION=precision(), **options,
        )  # fmt: skip


class Gradients(NamedTuple):
    """What the backward pass returns: x's in its dtype, others in float32. Empty where there is none."""

    x: Tensor
    weight: Tensor
    scale: Tensor
    shift: Tensor
    gate: Tensor


@dataclass(frozen=True)
class BackwardPass:
    """The backward pass of one call with at least one image; `grads` are written."""

    layer: Layer
    x: Tensor
    weight: Tensor
    scale: Tensor | None
    grads: Gradients

    def output_gradient(
        self, grad_out: Tensor, out: Tensor, gate: Tensor | None, activation: int
    ) -> tuple[Tensor, Tensor | None]:
        """dv after the gate, in x's dtype, and its sums (N, O) where the shift's gradient is wanted; writes the gate's.

        Without activation `out` is v, in any dtype.
        """
        images, rows, *extents = grad_out.shape
        outputs, positions = self.layer.outputs, math.prod(extents)
        changed, summed = activation != 0 or gate is not None, self.grads.shift.numel() > 0
        if not changed and not summed:
            return grad_out, None
        dv = self.x.new_empty(grad_out.shape) if changed else None
        row_sums = self.grads.shift.new_empty((images, rows)) if summed else None
        block_p = _part(positions, 16, 256)
        block_r = OUTPUT_TILE // block_p
        output_gradient_kernel[(triton.cdiv(images * rows, block_r),)](
            grad_out, out if changed else None, gate, dv, row_sums, None if gate is None else self.grads.gate,
            outputs.lists, self.layer.subnets, grad_out.stride(), out.stride(), images * rows, rows, extents[1],
            positions, len(outputs.lists), outputs.channels,
            ACTIVATION=activation, MIXED=self.layer.mixed, BLOCK_R=block_r, BLOCK_P=block_p,
        )  # fmt: skip
        return grad_out if dv is None else dv, row_sums

    def write_x_gradient(self, dv: Tensor, numbers: Sequence[int]) -> None:
        """One product for each remainder of rows and of columns under the stride."""
        by_axis = [
            list(_phases(self.x.shape[2 + i], numbers[i], numbers[2 + i], numbers[4 + i], self.weight.shape[2 + i]))
            for i in range(2)
        ]
        for rows, columns in itertools.product(*by_axis):
            target = self.grads.x[:, :, rows.remainder :: numbers[0], columns.remainder :: numbers[1]]
            taps = self.weight[:, :, rows.first_tap :: rows.taps_apart, columns.first_tap :: columns.taps_apart]
            if taps.numel() == 0:
                target.zero_()
                continue
            walk = Walk((rows.origin, columns.origin), (1, 1), (rows.tap_step, columns.tap_step))
            self.layer.product(dv, taps, target, walk, Epilogue(self.scale), transposed=True)

    def write_shift_gradient(self, row_sums: Tensor) -> None:
        outputs = self.layer.outputs
        shift_gradient_kernel[(triton.cdiv(outputs.channels, SHIFT_BLOCK),)](
            row_sums, outputs.inverse, self.layer.subnets, self.grads.shift, *row_sums.shape, len(outputs.lists),
            outputs.channels,
            MIXED=self.layer.mixed, BLOCK_N=SHIFT_WITH, BLOCK_C=SHIFT_BLOCK,
        )  # fmt: skip

    def write_weight_gradient(self, dv: Tensor) -> None:
        """And the scale's, the sum of the weight times its gradient before scaling."""
        layer, grads = self.layer, self.grads
        inputs, outputs = layer.inputs, layer.outputs
        extents = dv.shape[2:]
        positions, taps = extents.numel(), self.weight.shape[2:].numel()
        blocks = Blocks.of_weight_gradient(outputs.kept_of_group, inputs.kept_of_group, self.x.dtype)
        if layer.direct:
            blocks = Blocks.direct(outputs.kept)
        tile = layer.tile_of(positions, blocks.positions)
        rows = outputs.kept if layer.direct else outputs.kept_of_group
        row_blocks = triton.cdiv(rows, blocks.options["BLOCK_R"])
        column_blocks = inputs.per_group  # of one input
        if not layer.direct:
            column_blocks = triton.cdiv(inputs.kept_of_group, blocks.options["BLOCK_C"])
        tiles = row_blocks * column_blocks * taps * (1 if layer.direct else layer.groups)
        chunk = self._chunk(tile, positions, tiles)
        chunks = layer.image_tiles(chunk.images) * chunk.of_positions
        partial = grads.weight.new_empty((chunks, taps, outputs.kept, inputs.per_group))
        tensors = dv, self.x, partial, outputs.lists, inputs.inverse if layer.direct else inputs.lists
        places = (
            *layer.order, dv.stride(), self.x.stride(), tuple(self.x.shape[2:]), *layer.walk, *self.weight.shape[2:],
            layer.images, extents[1], positions, len(outputs.lists), outputs.kept,
        )  # fmt: skip
        options = {
            "MIXED": layer.mixed,
            "POINTWISE": layer.walk.is_pointwise(self.x, self.weight, extents),
            "FLAT": _is_flat(dv),
            "INDEX": _index_type((dv, self.x), self.weight),
            **blocks.options,
            **tile,
        }
        if layer.direct:
            direct_chunk_kernel[(tiles * chunks,)](
                *tensors, *places, outputs.channels, inputs.channels, outputs.per_group, inputs.per_group, row_blocks,
                *chunk, **options,
            )  # fmt: skip
        else:
            chunk_kernel[(tiles * chunks,)](
                *tensors, *places, inputs.kept, layer.groups, outputs.per_group, inputs.per_group, row_blocks,
                column_blocks, *chunk, GROUPED=layer.groups > 1, PRECISION=precision(), **options,
            )  # fmt: skip
        self._add_chunks(partial, chunk)

    def _chunk(self, tile: dict[str, int], positions: int, tiles: int) -> Chunk:
        """Whole images, or parts of one where there are few: enough for a large GPU."""
        layer = self.layer
        of_tile = tile["BLOCK_P"] // tile["BLOCK_Q"]
        blocks = triton.cdiv(positions, tile["BLOCK_Q"])
        steps = max(LEAST_STEPS, triton.cdiv(triton.cdiv(layer.images, of_tile) * blocks * tiles, WANTED_PROGRAMS))
        if steps >= blocks:
            return Chunk(steps // blocks * of_tile, blocks, 1)
        return Chunk(of_tile, steps, triton.cdiv(blocks, steps))

    def _add_chunks(self, partial: Tensor, chunk: Chunk) -> None:
        layer, grads = self.layer, self.grads
        inputs, outputs = layer.inputs, layer.outputs
        blocks = triton.cdiv(inputs.per_group * partial.shape[1], SUM_BLOCK)
        products = partial.new_empty((blocks, outputs.channels)) if self.scale is not None else None
        chunk_sum_kernel[(outputs.channels * blocks,)](
            partial, outputs.inverse, inputs.inverse, layer.order[1], self.weight, self.scale, grads.weight, products,
            self.weight.stride(), *self.weight.shape[2:], layer.images, len(outputs.lists), outputs.kept,
            outputs.channels, inputs.channels, outputs.per_group, inputs.per_group, blocks, chunk.images,
            chunk.of_positions, MIXED=layer.mixed, BLOCK=SUM_BLOCK,
        )  # fmt: skip
        if products is not None:
            torch.sum(products, 0, out=grads.scale)


# ----- the operator's two entry points; schemas in csrc/ops.cpp


@torch.no_grad()
def forward(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, inputs: Tensor, outputs: Tensor,
    subnets: Tensor | None, gate: Tensor | None, numbers: Sequence[int],
) -> Tensor:  # fmt: skip
    """The result (N, O, H', W'), NCHW in x's dtype.

    Arguments as in `pyext.ops.masked_conv2d`, lists with a dimension of sub-networks, weight of any strides; `numbers`
    is `pyext.ops.masked_conv2d_parts.Geometry`. Numbers outside the layer count as absent channels.
    """
    sizes = zip(x.shape[2:], weight.shape[2:], numbers[:2], numbers[2:4], numbers[4:6], strict=True)
    extents = ((n + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for n, k, stride, padding, dilation in sizes)
    with torch.cuda.device_of(x):
        layer = Layer.of(x, weight, inputs, outputs, subnets, numbers)
        out = layer.new_result(x, (len(x), outputs.shape[1], *extents))
        if len(x):
            layer.product(x, weight, out, layer.walk, Epilogue(_dense(scale), _dense(shift), _dense(gate), numbers[7]))
    return out


@torch.no_grad()
def backward(
    grad_out: Tensor, out: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None,
    inputs: Tensor, outputs: Tensor, subnets: Tensor | None, gate: Tensor | None, numbers: Sequence[int],
    for_x: bool, for_parameters: bool,
) -> Gradients:  # fmt: skip
    """Gradients as those of `pyext.ops.masked_conv2d_backward.backward`: x's in its dtype, NCHW, others in float32.

    `grad_out` has any strides, `out` is what `forward` returned.
    """
    activation = numbers[7]
    with torch.cuda.device_of(x):
        layer = Layer.of(x, weight, inputs, outputs, subnets, numbers)
        grads = _new_gradients(layer, x, (weight, scale, shift, gate), for_x, for_parameters)
        if len(x) == 0:
            return grads
        scale, shift, gate = _dense(scale), _dense(shift), _dense(gate)
        if gate is not None and activation == 0:  # a gate of 0 leaves no trace of v in the result
            out = layer.new_result(x, out.shape, torch.float32)
            layer.product(x, weight, out, layer.walk, Epilogue(scale, shift))
        step = BackwardPass(layer, x, weight, scale, grads)
        dv, row_sums = step.output_gradient(grad_out, out, gate, activation)
        if for_x:
            step.write_x_gradient(dv, numbers)
        if for_parameters:
            step.write_weight_gradient(dv)
            if row_sums is not None:
                step.write_shift_gradient(row_sums)
    return grads


def _new_gradients(
    layer: Layer, x: Tensor, parameters: Sequence[Tensor | None], for_x: bool, for_parameters: bool
) -> Gradients:
    """To be written; zeros where there are no images. `parameters`: weight, scale, shift and gate."""
    new = x.new_empty if len(x) else x.new_zeros
    wanted = (*(p if for_parameters else None for p in parameters[:3]), parameters[3])
    grads = (new((0,) if p is None else p.shape, dtype=torch.float32) for p in wanted)
    return Gradients(layer.new_result(x, x.shape if for_x else (0,)), *grads)
