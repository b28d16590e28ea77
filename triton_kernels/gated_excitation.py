"""Triton kernels and launchers of `pyext.ops.gated_excitation`, whose docstring holds the equations.

Two contractions of the three maps of an image (u itself and both depthwise maps, recomputed wherever they are read)
carry the forward and the backward pass:

    over channels    position_kernel   logits; in the backward pass the gradient of the position probabilities
    over positions   pool_kernel       pooled vectors; in the backward pass the gradient of the context weights

The gates are matrix products on N x C vectors, left to torch because BN1d couples the batch in training mode. At
inference nothing couples the images, and `image_kernel` does all of one image in one program as long as its channels
fit in one tile.

The gradient of a depthwise map has rank two, da_k[c, p] = pi_k[p] dc_k[c] + dl_k[p] w_k[c], so it is rebuilt from two
position vectors and two channel vectors wherever it is needed.

Sums over images and over positions run in a fixed order (per-image partial results, then one reduction): results do
not change from run to run. All arithmetic is in float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

if triton.knobs.runtime.interpret:
    from . import interpreter  # noqa: F401  (repairs loop bounds under NumPy 2.4)


class Parameters(NamedTuple):
    """The operator's parameters, in the order of ``pyext.ops.gated_excitation.PARAMETERS``."""

    norm3_weight: Tensor
    norm3_bias: Tensor
    conv3_weight: Tensor
    norm5_weight: Tensor
    norm5_bias: Tensor
    conv5_weight: Tensor
    context3_weight: Tensor
    context3_bias: Tensor
    context5_weight: Tensor
    context5_bias: Tensor
    all_weight: Tensor
    all_bias: Tensor
    attention_norm_weight: Tensor
    attention_norm_bias: Tensor
    select3_weight: Tensor
    select3_bias: Tensor
    select5_weight: Tensor
    select5_bias: Tensor
    forget_context_weight: Tensor
    forget_context_bias: Tensor
    forget_norm_weight: Tensor
    forget_norm_bias: Tensor
    forget1_weight: Tensor
    forget1_bias: Tensor
    forget2_weight: Tensor
    forget2_bias: Tensor


class Running(NamedTuple):
    """The running statistics, in the order of ``pyext.ops.gated_excitation.RUNNING``."""

    norm3_mean: Tensor
    norm3_var: Tensor
    norm5_mean: Tensor
    norm5_var: Tensor
    attention_mean: Tensor
    attention_var: Tensor
    forget_mean: Tensor
    forget_var: Tensor

    def hidden(self) -> Tensor:
        """Mean and variance of both hidden layers side by side, float32 [2, forget + attention]."""
        mean = torch.cat((self.forget_mean, self.attention_mean))
        return torch.stack((mean, torch.cat((self.forget_var, self.attention_var)))).float()


class Branch(NamedTuple):
    """What a kernel reads of one depthwise branch; `context` are the weights of its position softmax."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor
    conv: Tensor
    context: Tensor


class Gate(NamedTuple):
    """What a kernel reads of one gate: a linear layer, its BN1d, and (difference of) the second linear layer."""

    weight: Tensor
    bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    mean: Tensor
    var: Tensor
    out_weight: Tensor
    out_bias: Tensor


# ----- shared device functions


@triton.jit
def _load(pointer, index, mask, other=0.0):
    return tl.load(pointer + index, mask=mask, other=other).to(tl.float32)


@triton.jit
def _tile(channel, position, stride_c, stride_p):
    """64-bit offsets of a [channels, positions] tile inside an image."""
    return channel.to(tl.int64)[:, None] * stride_c + position.to(tl.int64)[None, :] * stride_p


@triton.jit
def _tap(position, height, width, tap, DILATION: tl.constexpr):
    """Distance to the position under tap `tap` of a 3x3 kernel, and whether that lies inside the map.

    A negative dilation gives the transposed convolution.
    """
    down = (tap // 3 - 1) * DILATION
    right = (tap % 3 - 1) * DILATION
    row = position // width + down
    column = position % width + right
    return down * width + right, (row >= 0) & (row < height) & (column >= 0) & (column < width)


@triton.jit
def _taps(height):
    """9, hidden from the compiler: it would unroll the loop, and nine tiles in flight do not fit in the registers."""
    return tl.where(height > 0, 9, 0)


@triton.jit
def _norm(branch, channel, mask, eps):
    """Mean, 1/sigma, gamma/sigma and beta of a branch's BN2d; all that a masked channel gives is 0."""
    rstd = 1.0 / tl.sqrt_rn(_load(branch.var, channel, mask, 1.0) + eps)
    scale = rstd * _load(branch.weight, channel, mask)
    return _load(branch.mean, channel, mask), rstd, scale, _load(branch.bias, channel, mask)


@triton.jit
def _activation(x, mean, scale, bias):
    """BN and ReLU. The comparison keeps NaN, which tl.maximum would drop."""
    y = (x - mean[:, None]) * scale[:, None] + bias[:, None]
    return tl.where(y < 0.0, 0.0, y)


@triton.jit
def _depthwise(u, branch, channel, mask, position, height, width, stride_c, stride_p, eps, DILATION: tl.constexpr):
    """Tile of a depthwise map, from u: zero padding comes after BN and ReLU."""
    mean, _, scale, bias = _norm(branch, channel, mask, eps)
    total = tl.zeros([channel.shape[0], position.shape[0]], tl.float32)
    tile = _tile(channel, position, stride_c, stride_p)
    for tap in range(0, _taps(height)):
        shift, inside = _tap(position, height, width, tap, DILATION)
        x = _load(u + shift.to(tl.int64) * stride_p, tile, mask[:, None] & inside[None, :])
        activation = tl.where(inside[None, :], _activation(x, mean, scale, bias), 0.0)
        total += activation * _load(branch.conv, channel * 9 + tap, mask)[:, None]
    return total


@triton.jit
def _maps(u, branch3, branch5, channel, mask, position, height, width, stride_c, stride_p, eps):
    """Tiles of the three pooled maps, in the order of the position softmaxes: u, a_3, a_5."""
    inside = mask[:, None] & (position < height * width)[None, :]
    x = _load(u, _tile(channel, position, stride_c, stride_p), inside)
    a3 = _depthwise(u, branch3, channel, mask, position, height, width, stride_c, stride_p, eps, 1)
    a5 = _depthwise(u, branch5, channel, mask, position, height, width, stride_c, stride_p, eps, 2)
    return x, a3, a5


@triton.jit
def _split(program, blocks):
    """(image, block) of a flat grid, which unlike a second grid axis has no limit of 65535."""
    return (program // blocks).to(tl.int64), program % blocks


@triton.jit
def _online(peak, mass, total, logit, x):
    """One step of the online softmax, separately in every lane (column) of the tile."""
    higher = tl.maximum(peak, logit)
    origin = tl.where(higher == float("-inf"), 0.0, higher)
    decay = tl.exp(peak - origin)
    weight = tl.exp(logit - origin)
    return higher, mass * decay + weight, total * decay[None, :] + x * weight[None, :]


@triton.jit
def _merge(peak, mass, total):
    """Pooled vector from the lanes of `_online`."""
    weight = tl.exp(peak - tl.max(peak, axis=0))
    return tl.sum(total * weight[None, :], axis=1) / tl.sum(mass * weight, axis=0)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _tanh(x):
    return 2.0 * _sigmoid(2.0 * x) - 1.0


@triton.jit
def _rows(gate, row, mask, eps, hidden):
    """tanh(BN1d(hidden)) for some rows of a gate's first linear layer, bias still to be added."""
    rstd = 1.0 / tl.sqrt_rn(_load(gate.var, row, mask, 1.0) + eps)
    centred = hidden + _load(gate.bias, row, mask) - _load(gate.mean, row, mask)
    return _tanh(centred * rstd * _load(gate.norm_weight, row, mask) + _load(gate.norm_bias, row, mask))


@triton.jit
def _forget_gate(gate, rows, pooled, channel, mask, channels, eps, BLOCK_R: tl.constexpr):
    total = _load(gate.out_bias, channel, mask)
    for start in range(0, rows, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        valid = (row < rows)[:, None] & mask[None, :]
        hidden = tl.sum(_load(gate.weight, row[:, None] * channels + channel[None, :], valid) * pooled[None, :], axis=1)
        hidden = _rows(gate, row, row < rows, eps, hidden)
        weight = _load(gate.out_weight, channel[None, :] * rows + row[:, None], valid)
        total += tl.sum(weight * hidden[:, None], axis=0)
    return _sigmoid(total)


@triton.jit
def _update_gate(gate, other_weight, other_bias, rows, c3, c5, channel, mask, channels, eps, BLOCK_R: tl.constexpr):
    """alpha: the softmax over two branches is the sigmoid of the difference of their logits."""
    total = _load(gate.out_bias, channel, mask) - _load(other_bias, channel, mask)
    for start in range(0, rows, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        valid = (row < rows)[:, None] & mask[None, :]
        index = row[:, None] * (2 * channels) + channel[None, :]
        product = _load(gate.weight, index, valid) * c3[None, :] + _load(gate.weight, index + channels, valid) * c5
        hidden = _rows(gate, row, row < rows, eps, tl.sum(product, axis=1))
        index = channel[None, :] * rows + row[:, None]
        weight = _load(gate.out_weight, index, valid) - _load(other_weight, index, valid)
        total += tl.sum(weight * hidden[:, None], axis=0)
    return _sigmoid(total)


# ----- kernels


@triton.jit
def image_kernel(
    u, out, branch3, branch5, forget_context, forget_gate, update_gate, select5_weight, select5_bias,
    u_stride_n, u_stride_c, u_stride_p, out_stride_n, out_stride_c, out_stride_p,
    channels, height, width, forget, attention, eps,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The whole operator with given statistics, one program per image, all channels in one tile."""
    image = tl.program_id(0).to(tl.int64)
    u += image * u_stride_n
    out += image * out_stride_n
    channel = tl.arange(0, BLOCK_C)
    mask = channel < channels
    positions = height * width
    context_f = _load(forget_context, channel, mask)
    context3 = _load(branch3.context, channel, mask)
    context5 = _load(branch5.context, channel, mask)

    peak_f = tl.full([BLOCK_P], float("-inf"), tl.float32)
    mass_f = tl.zeros([BLOCK_P], tl.float32)
    total_f = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    peak3, mass3, total3 = peak_f, mass_f, total_f
    peak5, mass5, total5 = peak_f, mass_f, total_f
    for start in range(0, positions, BLOCK_P):
        position = start + tl.arange(0, BLOCK_P)
        x, a3, a5 = _maps(
            u, branch3, branch5, channel, mask, position, height, width, u_stride_c, u_stride_p, eps
        )  # fmt: skip
        outside = tl.where(position < positions, 0.0, float("-inf"))
        peak_f, mass_f, total_f = _online(
            peak_f, mass_f, total_f, tl.sum(x * context_f[:, None], axis=0) + outside, x
        )  # fmt: skip
        peak3, mass3, total3 = _online(peak3, mass3, total3, tl.sum(a3 * context3[:, None], axis=0) + outside, a3)
        peak5, mass5, total5 = _online(peak5, mass5, total5, tl.sum(a5 * context5[:, None], axis=0) + outside, a5)

    c3 = _merge(peak3, mass3, total3)
    c5 = _merge(peak5, mass5, total5)
    alpha = _update_gate(
        update_gate, select5_weight, select5_bias, attention, c3, c5, channel, mask, channels, eps, BLOCK_R
    )  # fmt: skip
    pooled = _merge(peak_f, mass_f, total_f)
    keep = _forget_gate(forget_gate, forget, pooled, channel, mask, channels, eps, BLOCK_R)
    news = alpha * c3 + (1.0 - alpha) * c5
    for start in range(0, positions, BLOCK_P):
        position = start + tl.arange(0, BLOCK_P)
        inside = mask[:, None] & (position < positions)[None, :]
        x = _load(u, _tile(channel, position, u_stride_c, u_stride_p), inside)
        y = keep[:, None] * x + news[:, None]
        tl.store(out + _tile(channel, position, out_stride_c, out_stride_p), y.to(out.dtype.element_ty), inside)


@triton.jit
def statistics_kernel(
    u, partial, stride_n, stride_c, stride_p, channels, positions, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr
):
    """partial[image, 2, channels]: mean of u - origin and sum of squared distances from it, over one image.

    The origin is the channel's very first value, so a mean far larger than the spread costs no digits; chunks are
    centred on their own mean and merged by Chan's rule, so neither does an origin far from the mean.
    """
    image, block = _split(tl.program_id(0), tl.cdiv(channels, BLOCK_C))
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = channel < channels
    origin = _load(u, channel.to(tl.int64) * stride_c, mask)
    u += image * stride_n
    mean = tl.zeros([BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, positions, BLOCK_P):
        position = start + tl.arange(0, BLOCK_P)
        inside = mask[:, None] & (position < positions)[None, :]
        x = _load(u, _tile(channel, position, stride_c, stride_p), inside)
        x = tl.where(inside, x - origin[:, None], 0.0)
        count = tl.minimum(positions - start, BLOCK_P).to(tl.float32)
        chunk_mean = tl.sum(x, axis=1) / count
        centred = tl.where(inside, x - chunk_mean[:, None], 0.0)
        share = count / (start + count)
        step = chunk_mean - mean
        mean += step * share
        squares += tl.sum(centred * centred, axis=1) + step * step * (share * start)
    partial += image * 2 * channels
    tl.store(partial + channel, mean, mask)
    tl.store(partial + channels + channel, squares, mask)


@triton.jit
def position_kernel(
    u, branch3, branch5, coefficient, result, stride_n, stride_c, stride_p, coefficient_stride_n,
    channels, height, width, eps, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """result[image, k, p] = sum_c coefficient[image, k, c] map_k[image, c, p] for the maps u, a_3, a_5."""
    positions = height * width
    image, block = _split(tl.program_id(0), tl.cdiv(positions, BLOCK_P))
    u += image * stride_n
    coefficient += image * coefficient_stride_n
    position = block * BLOCK_P + tl.arange(0, BLOCK_P)
    total_f = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    total3 = total_f
    total5 = total_f
    for start in range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        mask = channel < channels
        x, a3, a5 = _maps(u, branch3, branch5, channel, mask, position, height, width, stride_c, stride_p, eps)
        total_f += x * _load(coefficient, channel, mask)[:, None]
        total3 += a3 * _load(coefficient, channels + channel, mask)[:, None]
        total5 += a5 * _load(coefficient, 2 * channels + channel, mask)[:, None]
    result += image * 3 * positions
    valid = position < positions
    tl.store(result + position, tl.sum(total_f, axis=0), valid)
    tl.store(result + positions + position, tl.sum(total3, axis=0), valid)
    tl.store(result + 2 * positions + position, tl.sum(total5, axis=0), valid)


@triton.jit
def pool_kernel(
    u, branch3, branch5, coefficient, result, stride_n, stride_c, stride_p,
    channels, height, width, eps, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """result[image, k, c] = sum_p coefficient[image, k, p] map_k[image, c, p] for the maps u, a_3, a_5."""
    positions = height * width
    image, block = _split(tl.program_id(0), tl.cdiv(channels, BLOCK_C))
    u += image * stride_n
    coefficient += image * 3 * positions
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = channel < channels
    total_f = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    total3 = total_f
    total5 = total_f
    for start in range(0, positions, BLOCK_P):
        position = start + tl.arange(0, BLOCK_P)
        valid = position < positions
        x, a3, a5 = _maps(u, branch3, branch5, channel, mask, position, height, width, stride_c, stride_p, eps)
        total_f += x * _load(coefficient, position, valid)[None, :]
        total3 += a3 * _load(coefficient, positions + position, valid)[None, :]
        total5 += a5 * _load(coefficient, 2 * positions + position, valid)[None, :]
    result += image * 3 * channels
    tl.store(result + channel, tl.sum(total_f, axis=1), mask)
    tl.store(result + channels + channel, tl.sum(total3, axis=1), mask)
    tl.store(result + 2 * channels + channel, tl.sum(total5, axis=1), mask)


@triton.jit
def output_kernel(
    u, out, keep, news, u_stride_n, u_stride_c, u_stride_p, out_stride_n, out_stride_c, out_stride_p,
    channels, positions, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """out = keep * u + news, with keep and news of shape [images, channels]."""
    rest, block_p = _split(tl.program_id(0), tl.cdiv(positions, BLOCK_P))
    image, block_c = _split(rest, tl.cdiv(channels, BLOCK_C))
    channel = (block_c * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int32)
    mask = channel < channels
    position = block_p * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = mask[:, None] & (position < positions)[None, :]
    x = _load(u + image * u_stride_n, _tile(channel, position, u_stride_c, u_stride_p), inside)
    scale = _load(keep + image * channels, channel, mask)
    y = scale[:, None] * x + _load(news + image * channels, channel, mask)[:, None]
    target = out + image * out_stride_n + _tile(channel, position, out_stride_c, out_stride_p)
    tl.store(target, y.to(out.dtype.element_ty), inside)


@triton.jit
def gate_sums_kernel(
    grad_out, u, result, grad_stride_n, grad_stride_c, grad_stride_p, u_stride_n, u_stride_c, u_stride_p,
    channels, positions, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Gradients of the two vectors that reach the output: result[image] = (sum_p G, sum_p G u), each [channels]."""
    image, block = _split(tl.program_id(0), tl.cdiv(channels, BLOCK_C))
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = channel < channels
    total = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    moment = total
    for start in range(0, positions, BLOCK_P):
        position = start + tl.arange(0, BLOCK_P)
        inside = mask[:, None] & (position < positions)[None, :]
        x = _load(u + image * u_stride_n, _tile(channel, position, u_stride_c, u_stride_p), inside)
        g = _load(grad_out + image * grad_stride_n, _tile(channel, position, grad_stride_c, grad_stride_p), inside)
        total += g
        moment += g * x
    result += image * 2 * channels
    tl.store(result + channel, tl.sum(total, axis=1), mask)
    tl.store(result + channels + channel, tl.sum(moment, axis=1), mask)


@triton.jit
def _map_gradient(
    branch, grad_pooled, probability, slope, channel, mask, position, height, width, tap, DILATION: tl.constexpr
):
    """da_k at the positions that read `position` through tap `tap`; 0 outside the map and in masked channels."""
    shift, inside = _tap(position, height, width, tap, -DILATION)
    through_pool = _load(grad_pooled, channel, mask)[:, None] * _load(probability + shift, position, inside)[None, :]
    return (
        through_pool + _load(branch.context, channel, mask)[:, None] * _load(slope + shift, position, inside)[None, :]
    )


@triton.jit
def _activation_gradient(
    x, branch, grad_pooled, probability, slope, channel, mask, position, height, width, eps, DILATION: tl.constexpr
):
    """Tiles of g_k, the gradient of a branch's BN2d output, and of that BN's normalised input."""
    mean, rstd, scale, bias = _norm(branch, channel, mask, eps)
    total = tl.zeros([channel.shape[0], position.shape[0]], tl.float32)
    for tap in range(0, _taps(height)):
        gradient = _map_gradient(
            branch, grad_pooled, probability, slope, channel, mask, position, height, width, tap, DILATION
        )  # fmt: skip
        total += gradient * _load(branch.conv, channel * 9 + tap, mask)[:, None]
    active = (_activation(x, mean, scale, bias) > 0.0) & (position < height * width)[None, :]
    return tl.where(active, total, 0.0), (x - mean[:, None]) * rstd[:, None]


@triton.jit
def conv_gradient_kernel(
    u, branch3, branch5, grad_pooled, probability, slope, result, stride_n, stride_c, stride_p,
    channels, height, width, eps, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Gradient of one tap (grid axis 1) of both depthwise kernels over one image: result[image, 2, tap, channels]."""
    positions = height * width
    image, block = _split(tl.program_id(0), tl.cdiv(channels, BLOCK_C))
    tap = tl.program_id(1)
    u += image * stride_n
    grad_pooled += image * 3 * channels
    probability += image * 3 * positions
    slope += image * 3 * positions
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = channel < channels
    mean3, _, scale3, bias3 = _norm(branch3, channel, mask, eps)
    mean5, _, scale5, bias5 = _norm(branch5, channel, mask, eps)
    total3 = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    total5 = total3
    for start in range(0, positions, BLOCK_P):
        position = start + tl.arange(0, BLOCK_P)
        inside = mask[:, None] & (position < positions)[None, :]
        x = _load(u, _tile(channel, position, stride_c, stride_p), inside)
        gradient3 = _map_gradient(
            branch3, grad_pooled + channels, probability + positions, slope + positions,
            channel, mask, position, height, width, tap, 1,
        )  # fmt: skip
        gradient5 = _map_gradient(
            branch5, grad_pooled + 2 * channels, probability + 2 * positions, slope + 2 * positions,
            channel, mask, position, height, width, tap, 2,
        )  # fmt: skip
        total3 += tl.where(inside, gradient3 * _activation(x, mean3, scale3, bias3), 0.0)
        total5 += tl.where(inside, gradient5 * _activation(x, mean5, scale5, bias5), 0.0)
    result += (image * 18 + tap) * channels
    tl.store(result + channel, tl.sum(total3, axis=1), mask)
    tl.store(result + 9 * channels + channel, tl.sum(total5, axis=1), mask)


@triton.jit
def _norm_sums(
    u, branch, grad_pooled, probability, slope, result, channel, mask, channels, height, width, stride_c, stride_p, eps,
    BLOCK_P: tl.constexpr, DILATION: tl.constexpr,
):  # fmt: skip
    """Gradients of one BN2d over one image: result = (sum_p g x, sum_p g), with x the normalised input."""
    weight = tl.zeros([channel.shape[0], BLOCK_P], tl.float32)
    bias = weight
    for start in range(0, height * width, BLOCK_P):
        position = start + tl.arange(0, BLOCK_P)
        inside = mask[:, None] & (position < height * width)[None, :]
        x = _load(u, _tile(channel, position, stride_c, stride_p), inside)
        g, normalised = _activation_gradient(
            x, branch, grad_pooled, probability, slope, channel, mask, position, height, width, eps, DILATION
        )
        weight += g * normalised
        bias += g
    tl.store(result + channel, tl.sum(weight, axis=1), mask)
    tl.store(result + channels + channel, tl.sum(bias, axis=1), mask)


@triton.jit
def norm_sums_kernel(
    u, branch3, branch5, grad_pooled, probability, slope, result, stride_n, stride_c, stride_p,
    channels, height, width, eps, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """`_norm_sums` of both branches (grid axis 1) over every image: result[image, branch, 2, channels]."""
    image, block = _split(tl.program_id(0), tl.cdiv(channels, BLOCK_C))
    branch = tl.program_id(1)
    map_index = image * 3 + branch + 1
    u += image * stride_n
    grad_pooled += map_index * channels
    probability += map_index * height * width
    slope += map_index * height * width
    result += (image * 2 + branch) * 2 * channels
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = channel < channels
    if branch == 0:
        _norm_sums(
            u, branch3, grad_pooled, probability, slope, result, channel, mask, channels, height, width,
            stride_c, stride_p, eps, BLOCK_P, 1,
        )  # fmt: skip
    else:
        _norm_sums(
            u, branch5, grad_pooled, probability, slope, result, channel, mask, channels, height, width,
            stride_c, stride_p, eps, BLOCK_P, 2,
        )  # fmt: skip


@triton.jit
def input_gradient_kernel(
    grad_out, u, grad_u, branch3, branch5, forget_context, keep, grad_pooled, probability, slope, correction,
    grad_stride_n, grad_stride_c, grad_stride_p, u_stride_n, u_stride_c, u_stride_p,
    result_stride_n, result_stride_c, result_stride_p,
    channels, height, width, eps, TRAINING: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Gradient of u: through the output, the forget gate's pooling, and both BN2d.

    correction[2, channels] holds the means of g and of g times the normalised input (gamma within, summed over the
    branches), through which the batch statistics of the training mode depend on u.
    """
    positions = height * width
    rest, block_p = _split(tl.program_id(0), tl.cdiv(positions, BLOCK_P))
    image, block_c = _split(rest, tl.cdiv(channels, BLOCK_C))
    grad_pooled += image * 3 * channels
    probability += image * 3 * positions
    slope += image * 3 * positions
    channel = (block_c * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int32)
    mask = channel < channels
    position = block_p * BLOCK_P + tl.arange(0, BLOCK_P)
    valid = position < positions
    inside = mask[:, None] & valid[None, :]
    x = _load(u + image * u_stride_n, _tile(channel, position, u_stride_c, u_stride_p), inside)
    g3, normalised = _activation_gradient(
        x, branch3, grad_pooled + channels, probability + positions, slope + positions,
        channel, mask, position, height, width, eps, 1,
    )  # fmt: skip
    g5, _ = _activation_gradient(
        x, branch5, grad_pooled + 2 * channels, probability + 2 * positions, slope + 2 * positions,
        channel, mask, position, height, width, eps, 2,
    )  # fmt: skip
    _, rstd, scale3, _ = _norm(branch3, channel, mask, eps)
    _, _, scale5, _ = _norm(branch5, channel, mask, eps)
    result = g3 * scale3[:, None] + g5 * scale5[:, None]
    if TRAINING:
        mean = _load(correction, channel, mask)
        slope_mean = _load(correction, channels + channel, mask)
        result -= rstd[:, None] * (mean[:, None] + normalised * slope_mean[:, None])
    result += _load(grad_pooled, channel, mask)[:, None] * _load(probability, position, valid)[None, :]
    result += _load(forget_context, channel, mask)[:, None] * _load(slope, position, valid)[None, :]
    g = _load(grad_out + image * grad_stride_n, _tile(channel, position, grad_stride_c, grad_stride_p), inside)
    result += _load(keep + image * channels, channel, mask)[:, None] * g
    target = grad_u + image * result_stride_n + _tile(channel, position, result_stride_c, result_stride_p)
    tl.store(target, result.to(grad_u.dtype.element_ty), inside)


# ----- launchers

MAX_BLOCK_C = 128
"""Channels that `image_kernel` can hold in one tile; more go through the kernels that loop over channel blocks."""


def _blocks(channels: int, positions: int, per_thread: int, max_block_c: int) -> dict[str, int]:
    """Tile and launch options: 8 warps whose threads hold `per_thread` elements of a tile each, less for small maps.

    BLOCK_C covers all channels up to `max_block_c`, so that u is read once; the positions get the rest, at least 16 so
    that rows of NCHW maps are read in whole sectors. `per_thread` is bounded by registers: a kernel keeps several
    tiles and their 64-bit offsets. Allowing all 255 registers keeps ptxas from aiming at an occupancy of its own
    choice, which it reaches by spilling.
    """
    block_c = min(triton.next_power_of_2(channels), max_block_c)
    block_p = max(16, min(triton.next_power_of_2(positions), 256 * per_thread // block_c))
    return {
        "BLOCK_C": block_c,
        "BLOCK_P": block_p,
        "num_warps": max(1, min(8, block_c * block_p // (32 * per_thread))),
        "maxnreg": 255,
    }


def _position_stride(x: Tensor) -> int | None:
    """Distance between neighbouring positions; None when rows do not follow each other at that distance."""
    height, width = x.shape[2:]
    if width == 1:
        return x.stride(2)
    if height == 1 or x.stride(2) == width * x.stride(3):
        return x.stride(3)
    return None


def _flat_rows(x: Tensor) -> Tensor:
    """`x` itself unless its rows are cut out of wider ones, which the kernels do not address."""
    return x.contiguous() if _position_stride(x) is None else x


def _flat_target(x: Tensor) -> Tensor:
    """`x` itself, or a contiguous tensor to be copied into it where its rows do not follow each other."""
    return torch.empty_like(x, memory_format=torch.contiguous_format) if _position_stride(x) is None else x


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Strides over images, channels and positions."""
    stride_p = _position_stride(x)
    assert stride_p is not None, "rows of the map must follow each other"
    return x.stride(0), x.stride(1), stride_p


class _Problem:
    """What every launch of one call shares: sizes, strides, parameters, branches, and the tile rule."""

    def __init__(self, u: Tensor, parameters: Sequence[Tensor], running: Sequence[Tensor], eps: float) -> None:
        self.u = _flat_rows(u)
        self.images, self.channels, self.height, self.width = u.shape
        self.positions = self.height * self.width
        self.eps = eps
        self.strides = _strides(self.u)
        self.parameters = Parameters(*(p.contiguous() for p in parameters))
        self.running = Running(*(r.contiguous() for r in running)) if running else None
        self.forget, self.attention = self.parameters.forget1_bias.numel(), self.parameters.all_bias.numel()

    def matrices(self) -> Parameters:
        """The parameters in float32, convolutions as matrices."""
        return Parameters(*((p.flatten(1) if p.dim() > 1 else p).float() for p in self.parameters))

    def contexts(self) -> Tensor:
        """Weights of the position softmaxes, [3, channels]; their biases cancel."""
        p = self.parameters
        weights = (p.forget_context_weight, p.context3_weight, p.context5_weight)
        return torch.cat([w.flatten(1) for w in weights]).float()

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.u.device)

    def blocks(self, per_thread: int = 4, max_block_c: int = 64) -> dict[str, int]:
        return _blocks(self.channels, self.positions, per_thread, max_block_c)

    def tiles(self, blocks: dict[str, int], channels: bool = False, positions: bool = False) -> int:
        """Programs of a grid over the images and, where asked for, channel blocks and position blocks."""
        count = self.images
        if channels:
            count *= triton.cdiv(self.channels, blocks["BLOCK_C"])
        if positions:
            count *= triton.cdiv(self.positions, blocks["BLOCK_P"])
        return count

    def use_statistics(self, map_statistics: Tensor) -> None:
        """Fix the means and variances of both BN2d: the batch's where given, else the running ones."""
        p, r = self.parameters, self.running
        if r is None:
            mean3, var3 = mean5, var5 = map_statistics[0], map_statistics[1]
        else:
            mean3, var3, mean5, var5 = r.norm3_mean, r.norm3_var, r.norm5_mean, r.norm5_var
        self.branches = (
            Branch(p.norm3_weight, p.norm3_bias, mean3, var3, p.conv3_weight, p.context3_weight),
            Branch(p.norm5_weight, p.norm5_bias, mean5, var5, p.conv5_weight, p.context5_weight),
        )

    def map_statistics(self) -> Tensor:
        """Mean and biased variance of u, [2, channels], by Chan's rule over images with equal counts."""
        partial, blocks = self.empty(self.images, 2, self.channels), self.blocks()
        statistics_kernel[(self.tiles(blocks, channels=True),)](
            self.u, partial, *self.strides, self.channels, self.positions, **blocks
        )
        partial = partial.double()
        between, mean = torch.var_mean(partial[:, 0], dim=0, correction=0)
        mean += self.u[0, :, 0, 0]
        return torch.stack((mean, partial[:, 1].mean(0) / self.positions + between)).float()

    def over_channels(self, coefficient: Tensor, stride_n: int) -> Tensor:
        """`position_kernel`: [images, 3, positions] from [images or 1, 3, channels]."""
        result, blocks = self.empty(self.images, 3, self.positions), self.blocks()
        position_kernel[(self.tiles(blocks, positions=True),)](
            self.u, *self.branches, coefficient, result, *self.strides, stride_n,
            self.channels, self.height, self.width, self.eps, **blocks,
        )  # fmt: skip
        return result

    def over_positions(self, coefficient: Tensor) -> Tensor:
        """`pool_kernel`: [images, 3, channels] from [images, 3, positions]."""
        result, blocks = self.empty(self.images, 3, self.channels), self.blocks()
        pool_kernel[(self.tiles(blocks, channels=True),)](
            self.u, *self.branches, coefficient, result, *self.strides,
            self.channels, self.height, self.width, self.eps, **blocks,
        )  # fmt: skip
        return result

    def write_output(self, keep: Tensor, news: Tensor, out: Tensor) -> None:
        blocks = self.blocks()
        output_kernel[(self.tiles(blocks, channels=True, positions=True),)](
            self.u, out, keep, news, *self.strides, *_strides(out), self.channels, self.positions, **blocks
        )

    def gate_sums(self, grad_out: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of `news` and `keep` of `write_output`, each [images, channels]."""
        result, blocks = self.empty(self.images, 2, self.channels), self.blocks()
        gate_sums_kernel[(self.tiles(blocks, channels=True),)](
            grad_out, self.u, result, *_strides(grad_out), *self.strides, self.channels, self.positions, **blocks
        )
        return result[:, 0], result[:, 1]

    def saved_of_nothing(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What an empty batch saves; its statistics are 0, so that nothing that reads them turns NaN."""
        hidden, training = self.forget + self.attention, self.running is None
        return (
            self.empty(0, 3, self.positions),
            self.empty(0, 3, self.channels),
            self.empty(0, hidden),
            self.empty(2, self.channels).zero_() if training else self.empty(0),
            self.empty(2, hidden).zero_() if training else self.empty(0),
        )

    def infer(self, out: Tensor) -> None:
        """All of the operator by `image_kernel`."""
        p, r = self.parameters, self.running
        assert r is not None, "image_kernel needs the statistics beforehand"
        blocks = self.blocks(8, MAX_BLOCK_C)
        rows = triton.next_power_of_2(max(self.forget, self.attention))
        forget_gate = Gate(
            p.forget1_weight, p.forget1_bias, p.forget_norm_weight, p.forget_norm_bias,
            r.forget_mean, r.forget_var, p.forget2_weight, p.forget2_bias,
        )  # fmt: skip
        update_gate = Gate(
            p.all_weight, p.all_bias, p.attention_norm_weight, p.attention_norm_bias,
            r.attention_mean, r.attention_var, p.select3_weight, p.select3_bias,
        )  # fmt: skip
        image_kernel[(self.images,)](
            self.u, out, *self.branches, p.forget_context_weight, forget_gate, update_gate,
            p.select5_weight, p.select5_bias, *self.strides, *_strides(out),
            self.channels, self.height, self.width, self.forget, self.attention, self.eps,
            BLOCK_R=min(rows, 2048 // blocks["BLOCK_C"]), **blocks,
        )  # fmt: skip


class _Gates:
    """Both gates over the batch in plain torch, float32: what they give, and their gradients.

    Their hidden layers lie side by side (forget first), so that one BN1d and one tanh serve both.
    """

    def __init__(self, problem: _Problem, pooled: Tensor, hidden: Tensor, statistics: Tensor) -> None:
        self.parameters = p = problem.matrices()
        self.forget, self.training = problem.forget, problem.running is None
        self.pooled, self.hidden = pooled, hidden if hidden.numel() else self._first_layer(pooled)
        if problem.running is not None:
            self.statistics = problem.running.hidden()
        elif statistics.numel():
            self.statistics = statistics
        else:
            variance, mean = torch.var_mean(self.hidden, dim=0, correction=0)
            self.statistics = torch.stack((mean, variance))
        gamma = torch.cat((p.forget_norm_weight, p.attention_norm_weight))
        beta = torch.cat((p.forget_norm_bias, p.attention_norm_bias))
        rstd = (self.statistics[1] + problem.eps).rsqrt()
        self.scale = gamma * rstd
        self.normalised = (self.hidden - self.statistics[0]) * rstd
        self.active = torch.tanh(self.normalised * gamma + beta)
        self._second_layer()

    def _first_layer(self, pooled: Tensor) -> Tensor:
        p = self.parameters
        forget = torch.addmm(p.forget1_bias, pooled[:, 0], p.forget1_weight.t())
        return torch.cat((forget, torch.addmm(p.all_bias, pooled[:, 1:].flatten(1), p.all_weight.t())), dim=1)

    def _second_layer(self) -> None:
        p = self.parameters
        self.select_weight = p.select3_weight - p.select5_weight
        self.keep = torch.addmm(p.forget2_bias, self.active[:, : self.forget], p.forget2_weight.t()).sigmoid()
        self.alpha = torch.addmm(
            p.select3_bias - p.select5_bias, self.active[:, self.forget :], self.select_weight.t()
        ).sigmoid()
        self.news = self.alpha * self.pooled[:, 1] + (1 - self.alpha) * self.pooled[:, 2]

    def backward(self, grad_news: Tensor, grad_keep: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradients of the pooled vectors, [images, 3, channels], and by name of the gates' parameters."""
        p, forget = self.parameters, self.forget
        grad_logit = grad_keep * self.keep * (1 - self.keep)
        grad_select = grad_news * (self.pooled[:, 1] - self.pooled[:, 2]) * self.alpha * (1 - self.alpha)
        grad_active = torch.cat((grad_logit @ p.forget2_weight, grad_select @ self.select_weight), dim=1)
        grad_norm = grad_active * (1 - self.active * self.active)
        gradients = self._norm_gradients(grad_norm) | self._second_layer_gradients(grad_logit, grad_select)
        if self.training:
            grad_norm = grad_norm - grad_norm.mean(0) - self.normalised * (grad_norm * self.normalised).mean(0)
        grad_hidden = grad_norm * self.scale
        grad_pooled = torch.cat((grad_hidden[:, :forget] @ p.forget1_weight, grad_hidden[:, forget:] @ p.all_weight), 1)
        grad_pooled = grad_pooled.view_as(self.pooled)
        grad_pooled[:, 1] += self.alpha * grad_news
        grad_pooled[:, 2] += (1 - self.alpha) * grad_news
        return grad_pooled, gradients | self._first_layer_gradients(grad_hidden)

    def _norm_gradients(self, grad_norm: Tensor) -> dict[str, Tensor]:
        weight, bias = (grad_norm * self.normalised).sum(0), grad_norm.sum(0)
        return {
            "forget_norm_weight": weight[: self.forget],
            "forget_norm_bias": bias[: self.forget],
            "attention_norm_weight": weight[self.forget :],
            "attention_norm_bias": bias[self.forget :],
        }

    def _first_layer_gradients(self, grad_hidden: Tensor) -> dict[str, Tensor]:
        bias = grad_hidden.sum(0)
        return {
            "forget1_weight": grad_hidden[:, : self.forget].t() @ self.pooled[:, 0],
            "forget1_bias": bias[: self.forget],
            "all_weight": grad_hidden[:, self.forget :].t() @ self.pooled[:, 1:].flatten(1),
            "all_bias": bias[self.forget :],
        }

    def _second_layer_gradients(self, grad_logit: Tensor, grad_select: Tensor) -> dict[str, Tensor]:
        select_weight, select_bias = grad_select.t() @ self.active[:, self.forget :], grad_select.sum(0)
        return {
            "forget2_weight": grad_logit.t() @ self.active[:, : self.forget],
            "forget2_bias": grad_logit.sum(0),
            "select3_weight": select_weight,
            "select3_bias": select_bias,
            "select5_weight": -select_weight,
            "select5_bias": -select_bias,
        }


class _MapGradient:
    """The backward pass over the maps, once the gradients of the pooled vectors are known."""

    def __init__(self, problem: _Problem, grad_pooled: Tensor, position: Tensor, pooled: Tensor) -> None:
        self.problem, self.grad_pooled, self.position = problem, grad_pooled, position
        grad_position = problem.over_channels(grad_pooled, grad_pooled.stride(0))
        self.slope = position * (grad_position - (grad_pooled * pooled).sum(2, keepdim=True))
        self.inputs = (*problem.branches, grad_pooled, position, self.slope)
        self.sizes = (problem.channels, problem.height, problem.width, problem.eps)

    def _context_gradients(self) -> dict[str, Tensor]:
        forget, three, five = self.problem.over_positions(self.slope).sum(0)
        zero = self.slope.new_zeros(1)
        return {
            "forget_context_weight": forget,
            "forget_context_bias": zero,
            "context3_weight": three,
            "context3_bias": zero,
            "context5_weight": five,
            "context5_bias": zero,
        }

    def _conv_gradients(self) -> dict[str, Tensor]:
        problem = self.problem
        result, blocks = problem.empty(problem.images, 2, 9, problem.channels), problem.blocks()
        conv_gradient_kernel[(problem.tiles(blocks, channels=True), 9)](
            problem.u, *self.inputs, result, *problem.strides, *self.sizes, **blocks
        )
        three, five = result.sum(0).transpose(1, 2)
        return {"conv3_weight": three, "conv5_weight": five}

    def _norm_gradients(self) -> dict[str, Tensor]:
        problem = self.problem
        result, blocks = problem.empty(problem.images, 2, 2, problem.channels), problem.blocks()
        norm_sums_kernel[(problem.tiles(blocks, channels=True), 2)](
            problem.u, *self.inputs, result, *problem.strides, *self.sizes, **blocks
        )
        return dict(
            zip(("norm3_weight", "norm3_bias", "norm5_weight", "norm5_bias"), result.sum(0).flatten(0, 1), strict=True)
        )

    def parameters(self) -> dict[str, Tensor]:
        """Gradients by name of the parameters that act on maps."""
        return self._context_gradients() | self._conv_gradients() | self._norm_gradients()

    def write_input_gradient(
        self, grad_out: Tensor, keep: Tensor, gradients: dict[str, Tensor], grad_u: Tensor
    ) -> None:
        """`gradients` holds those of both BN2d, whose sums the correction for batch statistics reuses."""
        problem, p, blocks = self.problem, self.problem.parameters, self.problem.blocks()
        mean, slope_mean = (
            (p.norm3_weight * gradients[f"norm3_{kind}"] + p.norm5_weight * gradients[f"norm5_{kind}"])
            for kind in ("bias", "weight")
        )
        correction = torch.stack((mean, slope_mean)) / (problem.images * problem.positions)
        input_gradient_kernel[(problem.tiles(blocks, channels=True, positions=True),)](
            grad_out, problem.u, grad_u, *problem.branches, p.forget_context_weight, keep, *self.inputs[2:], correction,
            *_strides(grad_out), *problem.strides, *_strides(grad_u), *self.sizes,
            TRAINING=problem.running is None, **blocks,
        )  # fmt: skip


# ----- the operator's three entry points; schemas in csrc/ops.cpp


@contextlib.contextmanager
def _exactly_on(u: Tensor) -> Iterator[None]:
    """u's device is the current one, and autocast leaves the gates' matrix products in float32."""
    with torch.cuda.device_of(u), torch.autocast(u.device.type, enabled=False):
        yield


def _nothing(u: Tensor) -> Tensor:
    """A new empty tensor each time: an operator's results may not alias each other."""
    return torch.empty(0, dtype=torch.float32, device=u.device)


def _stream(problem: _Problem, out: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Forward pass by the kernels that loop over channel blocks; returns all that the backward pass needs."""
    training = problem.running is None
    map_statistics = problem.map_statistics() if training else _nothing(out)
    problem.use_statistics(map_statistics)
    logits = problem.over_channels(problem.contexts(), 0)
    position = torch.softmax(logits, dim=2)
    pooled = problem.over_positions(position)
    gates = _Gates(problem, pooled, _nothing(out), _nothing(out))
    problem.write_output(gates.keep, gates.news, out)
    return position, pooled, gates.hidden, map_statistics, gates.statistics if training else _nothing(out)


def _forward_into(
    out: Tensor, u: Tensor, parameters: Sequence[Tensor], running: Sequence[Tensor], eps: float, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Writes the output into `out` and returns (position, pooled, hidden, map_statistics, hidden_statistics)."""
    problem = _Problem(u, parameters, running, eps)
    if problem.images == 0:
        return problem.saved_of_nothing()
    target = _flat_target(out)
    with _exactly_on(u):
        if running and not save and problem.channels <= MAX_BLOCK_C:
            problem.use_statistics(_nothing(u))
            problem.infer(target)
            saved = tuple(_nothing(u) for _ in range(5))
        else:
            saved = _stream(problem, target)
    if target is not out:
        out.copy_(target)
    return saved


@torch.no_grad()
def forward(
    u: Tensor, parameters: Sequence[Tensor], running: Sequence[Tensor], training: bool, eps: float, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output and what the backward pass needs.

    Args:
        u: (N, C, H, W), float32, bfloat16 or float16, any strides.
        parameters: tensors in the order of `Parameters`, in u's dtype or float32.
        running: tensors in the order of `Running`, or nothing in training mode.
        training: whether the batch's statistics are used.
        eps: added to every variance.
        save: whether the backward pass will follow.

    Returns:
        out in u's dtype and memory format; then float32 position (N, 3, H*W), pooled (N, 3, C) and hidden (N, F + R),
        empty unless `save`; then map_statistics (2, C) and hidden_statistics (2, F + R), empty unless `training`.
    """
    out = torch.empty_like(u)
    position, pooled, hidden, *statistics = _forward_into(out, u, parameters, () if training else running, eps, save)
    if not save:
        position, pooled, hidden = (_nothing(u) for _ in range(3))
    return out, position, pooled, hidden, *statistics


@torch.no_grad()
def forward_out(
    u: Tensor, parameters: Sequence[Tensor], running: Sequence[Tensor], training: bool, eps: float, out: Tensor
) -> tuple[Tensor, Tensor]:
    """`forward` without saving, into `out` of any strides; returns (map_statistics, hidden_statistics)."""
    return _forward_into(out, u, parameters, () if training else running, eps, False)[3:]


@torch.no_grad()
def backward(
    grad_out: Tensor, u: Tensor, parameters: Sequence[Tensor], running: Sequence[Tensor], position: Tensor,
    pooled: Tensor, hidden: Tensor, map_statistics: Tensor, hidden_statistics: Tensor, training: bool, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of u (its dtype and memory format) and of the parameters (float32, flat, in the order of `Parameters`).

    `grad_out` has u's shape and any strides; the other tensors are those that `forward` took and returned.
    """
    problem = _Problem(u, parameters, () if training else running, eps)
    if problem.images == 0:
        return torch.empty_like(u), problem.empty(sum(p.numel() for p in parameters)).zero_()
    with _exactly_on(u):
        problem.use_statistics(map_statistics)
        grad_out = _flat_rows(grad_out)
        gates = _Gates(problem, pooled, hidden, hidden_statistics)
        grad_pooled, gradients = gates.backward(*problem.gate_sums(grad_out))
        maps = _MapGradient(problem, grad_pooled, position, pooled)
        gradients |= maps.parameters()
        grad_u = torch.empty_like(u)
        target = _flat_target(grad_u)
        maps.write_input_gradient(grad_out, gates.keep, gradients, target)
        if target is not grad_u:
            grad_u.copy_(target)
    return grad_u, torch.cat([gradients[name].flatten() for name in Parameters._fields])
