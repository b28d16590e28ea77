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


class TrainedBlock(NamedTuple):
    """The cells of a block as its operators take them."""

    parameters: list[Tensor]
    running: list[Tensor]
    """Mean and variance of each cell's normalisation."""
    steps: list[Tensor]
    """Each normalisation's ``num_batches_tracked``."""
    layers: list[int]
    """Cells of each layer, one or two."""
    eps: list[float]
    """Of each cell's normalisation."""
    momentum: float
    """Of all normalisations."""

    @classmethod
    def of(cls, cells: Sequence[Sequence[tuple[Any, Any]]]) -> TrainedBlock:
        """That of layers of (BatchNorm2d, Conv2d) pairs with one momentum."""
        pairs = [cell for layer in cells for cell in layer]
        parameters = [tensor for norm, conv in pairs for tensor in (norm.weight, norm.bias, conv.weight)]
        norms = [norm for norm, _ in pairs]
        return cls(
            parameters,
            running=[tensor for norm in norms for tensor in (norm.running_mean, norm.running_var)],
            steps=[norm.num_batches_tracked for norm in norms],
            layers=list(map(len, cells)),
            eps=[norm.eps for norm in norms],
            momentum=norms[0].momentum,
        )

    def reads(self, x: Tensor) -> bool:
        """Whether x (N, C, H, W) has the channels and the dtype of the block's tensors, as they are now."""
        alike = all(tensor.dtype is x.dtype for tensor in (*self.parameters, *self.running))
        dense = all(tensor.is_contiguous() for tensor in self.running)
        return alike and dense and self.parameters[0].shape[0] == x.shape[1]


def train_dense_block(block: TrainedBlock, x: Tensor, memory: str = "fast") -> Tensor:
    """x (N, C, H, W) with the channels behind it that the layers of `block` add to it in training mode; differentiable
    once. Running statistics are moved as torch's. Images lie innermost in the result, which is kept for the gradient:
    nothing may write to it.
    `memory`: see `pyext.nn.set_memory`.
    """
    return _Block.apply(block, memory == "lean", x, *block.parameters)


def _move_running(block: TrainedBlock, moments: Sequence[Tensor], count: int) -> None:
    """Towards the moments over `count` values of the channels of each normalisation, the first of those given:
    (2, channels)."""
    _OPS.bn_relu_conv2d_running(block.running, moments, count, block.momentum)
    torch.autograd.graph.increment_version(block.running)
    steps: Any = block.steps
    torch._foreach_add_(steps, 1)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, block: TrainedBlock, lean: bool, x: Tensor, *parameters: Tensor) -> Tensor:
        buffer, moments, kept = _OPS.bn_relu_conv2d_block(x, parameters, block.layers, block.eps)
        own = iter(kept[1::2])
        used = [moments if cell == 0 else next(own) for count in block.layers for cell in range(count)]
        _move_running(block, used, x.shape[0] * x.shape[2] * x.shape[3])
        ctx.layers, ctx.eps, ctx.channels = block.layers, block.eps, x.shape[1]
        ctx.save_for_backward(buffer, moments, *parameters, *([] if lean else kept))
        return buffer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        buffer, moments, *rest = ctx.saved_tensors
        count = len(ctx.eps) * _PARAMETERS
        cells = rest[:count], ctx.layers, ctx.eps
        grad, grads = _OPS.bn_relu_conv2d_block_backward(grad_out, buffer, moments, rest[count:], *cells)
        return None, None, grad[:, : ctx.channels], *grads
