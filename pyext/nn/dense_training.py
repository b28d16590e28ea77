"""Training of DenseNet's blocks as a whole: one buffer, statistics once per channel, one gradient buffer.

As in `pyext.nn.hybrid_training`, with layers of one or two BN-ReLU-convolution cells and no gates. The buffers hold
images innermost: maps of 2x2 then fill vectors as well as large ones (`csrc/cpu/bn_relu_conv2d/rows.h`). Kept for the
gradient are the buffer and of each bottleneck layer the map between its convolutions: nothing that is normalised. With
memory "lean" that map is computed from the buffer again, bit for bit.

Source: arXiv 1707.06990 (memory-efficient implementation of DenseNets).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_OPS = torch.ops.pyext
_PARAMETERS = 3
"""Of a cell: weight and bias of the normalisation, weight of the convolution."""


class _Plan(NamedTuple):
    """What a block's autograd function knows of its cells besides their parameters."""

    layers: list[int]
    """Cells of each layer, one or two."""
    eps: list[float]
    """Of each cell's normalisation."""
    lean: bool


def train_dense_block(cells: Sequence[Sequence[tuple[Any, Any]]], x: Tensor, memory: str = "fast") -> Tensor:
    """x (N, C, H, W) with the channels behind it that layers of `cells`, pairs (BatchNorm2d, Conv2d), add to it in
    training mode; differentiable once. Running statistics are moved as torch's. Images lie innermost in the result,
    which is kept for the gradient: nothing may write to it.
    `memory`: see `pyext.nn.set_memory`.
    """
    norms, convolutions = zip(*(cell for layer in cells for cell in layer), strict=True)
    plan = _Plan(list(map(len, cells)), [norm.eps for norm in norms], memory == "lean")
    pairs = zip(norms, convolutions, strict=True)
    parameters = [tensor for norm, conv in pairs for tensor in (norm.weight, norm.bias, conv.weight)]
    return _Block.apply(norms, plan, x, *parameters)


def _move_running(norms: Sequence[Any], moments: Sequence[Tensor], count: int) -> None:
    """Of all normalisations, whose momentum is one, towards the moments over `count` values of their channels, each
    the first of those given: (2, channels)."""
    running = [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var)]
    _OPS.bn_relu_conv2d_running(running, moments, count, norms[0].momentum)
    torch.autograd.graph.increment_version(running)
    steps: list[Any] = [norm.num_batches_tracked for norm in norms]
    torch._foreach_add_(steps, 1)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, norms: Sequence[Any], plan: _Plan, x: Tensor, *parameters: Tensor) -> Tensor:
        buffer, moments, kept = _OPS.bn_relu_conv2d_block(x, parameters, plan.layers, plan.eps)
        own = iter(kept[1::2])
        used = [moments if cell == 0 else next(own) for count in plan.layers for cell in range(count)]
        _move_running(norms, used, x.shape[0] * x.shape[2] * x.shape[3])
        ctx.plan, ctx.channels = plan, x.shape[1]
        ctx.save_for_backward(buffer, moments, *parameters, *([] if plan.lean else kept))
        return buffer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        buffer, moments, *rest = ctx.saved_tensors
        count = len(plan.eps) * _PARAMETERS
        cells = rest[:count], plan.layers, plan.eps
        grad, grads = _OPS.bn_relu_conv2d_block_backward(grad_out, buffer, moments, rest[count:], *cells)
        return None, None, grad[:, : ctx.channels], *grads
