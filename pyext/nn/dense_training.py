"""Training of DenseNet's blocks as a whole: one buffer, statistics once per channel, one gradient buffer.

As in `pyext.nn.hybrid_training`, with layers of one or two BN-ReLU-convolution cells and no gates. The buffers hold
images innermost: maps of 2x2 then fill vectors as well as large ones (`csrc/cpu/bn_relu_conv2d/rows.h`). Kept for the
gradient are the buffer and of each bottleneck layer the map between its convolutions: nothing that is normalised. With
memory "lean" that map is computed from the buffer again, bit for bit.

Source: arXiv 1707.06990 (memory-efficient implementation of DenseNets).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyext._operator import move_running
from pyext.nn.cells import PARAMETERS, Cell, note_moments
from pyext.nn.memory_format import memory_format_of

_OPS = torch.ops.pyext
_CHANNEL_GAP = 16


class _Plan(NamedTuple):
    """What a block's autograd function knows of its cells besides their parameters."""

    layers: tuple[int, ...]
    """Cells of each layer, one or two."""
    eps: tuple[float, ...]
    """Of each cell's normalisation."""
    lean: bool

    def places(self) -> list[tuple[int, int]]:
        """The first and the last cell of each layer, one where they are the same."""
        ends = list(itertools.accumulate(self.layers))
        return [(end - count, end - 1) for end, count in zip(ends, self.layers, strict=True)]


def train_dense_block(cells: Sequence[Sequence[tuple[Any, Any]]], x: Tensor, memory: str = "fast") -> Tensor:
    """x (N, C, H, W) with the channels behind it that layers of `cells`, pairs (BatchNorm2d, Conv2d), add to it in
    training mode; differentiable once. Running statistics are moved as torch's. The memory format is kept.
    `memory`: see `pyext.nn.set_memory`.
    """
    norms, convolutions = zip(*(cell for layer in cells for cell in layer), strict=True)
    plan = _Plan(tuple(map(len, cells)), tuple(norm.eps for norm in norms), memory == "lean")
    pairs = zip(norms, convolutions, strict=True)
    parameters = [tensor for norm, conv in pairs for tensor in (norm.weight, norm.bias, conv.weight)]
    return _Block.apply(norms, plan, x, *parameters)


def _move_running(norms: Sequence[Any], moments: Sequence[tuple[Tensor, Tensor]], count: int) -> None:
    """Of all normalisations, whose momentum is one, towards mean and variance over `count` values per channel."""
    running = [*(norm.running_mean for norm in norms), *(norm.running_var for norm in norms)]
    unbiased = torch._foreach_mul([var for _, var in moments], count / (count - 1))
    move_running(running, [*(mean for mean, _ in moments), *unbiased], norms[0].momentum)
    steps: list[Any] = [norm.num_batches_tracked for norm in norms]
    torch._foreach_add_(steps, 1)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, norms: Sequence[Any], plan: _Plan, x: Tensor, *parameters: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        cells = _cells(parameters)
        growth = [cells[last].conv_weight.shape[0] for _, last in plan.places()]
        total = channels + sum(growth)
        buffer, moments = _new_buffer(x, total), x.new_empty((2, total))
        buffer[:, :channels] = x
        note_moments(moments, buffer, 0, channels)
        squeezed: list[Tensor] = []
        used: list[tuple[Tensor, Tensor]] = []
        for (first, last), added in zip(plan.places(), growth, strict=True):
            used.append((moments[0, :channels], moments[1, :channels]))
            out = cells[first].run(buffer[:, :channels], *used[-1], plan.eps[first])
            if last > first:
                used.append(_OPS.bn_relu_conv2d_statistics(out))
                squeezed += [] if plan.lean else [out, *used[-1]]
                out = cells[last].run(out, *used[-1], plan.eps[last])
            buffer[:, channels : channels + added] = out
            channels += added
            if channels < total:
                note_moments(moments, buffer, channels - added, channels)
        _move_running(norms, used, n * height * width)
        ctx.plan, ctx.channels = plan, x.shape[1]
        ctx.save_for_backward(buffer, moments, *parameters, *squeezed)
        return buffer.contiguous(memory_format=memory_format_of(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        buffer, moments, *rest = ctx.saved_tensors
        count = len(plan.eps) * PARAMETERS
        cells, squeezed = _cells(rest[:count]), rest[count:]
        grad = _new_buffer(grad_out, buffer.shape[1]).copy_(grad_out)
        grads: list[Tensor] = []
        channels = buffer.shape[1]
        for first, last in reversed(plan.places()):
            end, channels = channels, channels - cells[last].conv_weight.shape[0]
            above, known = grad[:, channels:end], (moments[0, :channels], moments[1, :channels])
            if last > first:
                if plan.lean:
                    x = cells[first].run(buffer[:, :channels], *known, plan.eps[first])
                    mean, var = _OPS.bn_relu_conv2d_statistics(x)
                else:
                    *squeezed, x, mean, var = squeezed
                above, *own = cells[last].gradients(above, x, mean, var, plan.eps[last])
                grads = [*own, *grads]
            below, *own = cells[first].gradients(above, buffer[:, :channels], *known, plan.eps[first])
            grad[:, :channels] += below
            grads = [*own, *grads]
        return None, None, grad[:, : ctx.channels], *grads


def _new_buffer(x: Tensor, channels: int) -> Tensor:
    """Uninitialised maps like those of x (N, C, H, W), with images innermost: kernels of their own have them."""
    n, _, height, width = x.shape
    # Channels that lie a power of two apart would share few places of the caches.
    pitch = height * width * n + _CHANNEL_GAP
    return x.new_empty((channels, pitch)).as_strided((n, channels, height, width), (1, pitch, width * n, n))


def _cells(parameters: Sequence[Tensor]) -> list[Cell]:
    return [Cell(*parameters[i : i + PARAMETERS]) for i in range(0, len(parameters), PARAMETERS)]
