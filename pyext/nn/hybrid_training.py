"""Training of HCGNet's dense blocks as a whole: one buffer, statistics once per channel, one gradient buffer.

All modules of a block read prefixes of one buffer (N, C + modules * growth, H, W). The batch statistics of a channel
are computed once, when it is written, and serve every later normalisation; each still moves its own running statistics.
The backward pass adds the modules' gradients up in one buffer of the same shape; what flows through the mean and the
variance of a channel is a sum over the modules too, and is taken from the channel's gradient once, when it is complete.
Kept for it are the buffer, and of each module the map between its two convolutions, the gates' input and what the gates
keep: nothing that is normalised.
With memory "lean" all but the buffer is computed from it again, bit for bit.

Source: HCGNet, arXiv 1908.09699, section 3; memory: arXiv 1707.06990.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pyext._operator import move_running
from pyext.nn.cells import Cell, note_moments
from pyext.nn.hybrid_inference import are_block, tensors_of
from pyext.nn.memory_format import memory_format_of, trains_on_the_cpu
from pyext.ops.bn_relu_conv2d import OPERATOR as CONVOLUTION
from pyext.ops.gated_excitation import OPERATOR as GATES
from pyext.ops.gated_excitation import PARAMETERS, RUNNING
from pyext.ops.hybrid_block import TENSORS, Extents, extents_of

_OPS = torch.ops.pyext
_GATES = slice(len(TENSORS) - len(PARAMETERS) - len(RUNNING), len(TENSORS) - len(RUNNING))
_STATISTICS = frozenset(i for i, name in enumerate(TENSORS) if "running" in name)
_SAVED = 9
"""Tensors that are kept of each module besides its parameters."""


def _cell(tensors: Sequence[Tensor], first: int) -> Cell:
    """What one of a module's two convolutions reads."""
    return Cell(tensors[first], tensors[first + 1], tensors[first + 4])


def train_block(layers: Sequence[Any], x: Tensor, memory: str = "fast") -> Tensor | None:
    """What `layers`, SMG modules, make of x (N, C, H, W) in training, differentiable once; None where they do not say
    what the block computes (hooks, replaced submodules, modules of different widths), where it would not be faster, or
    for another device or dtype. The memory format is kept; NCHW is faster. `memory`: see `pyext.nn.set_memory`.
    """
    if not trains_on_the_cpu(x) or not are_block(layers, 1, training=True):
        return None
    tensors = [tensor for layer in layers for tensor in tensors_of(layer)]
    if any(tensor.dtype != x.dtype or tensor.device != x.device for tensor in tensors):
        return None
    if not CONVOLUTION.runs("cpu", x) or not GATES.has_kernel(x) or 0 in x.shape:
        return None
    gate = layers[0]._modules["bn_forget"]
    result = _Block.apply(extents_of(tensors, 1, True), gate.eps, gate.momentum, memory == "lean", x, *tensors)
    norms = [m for layer in layers for m in layer.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    counts: list[Any] = [norm.num_batches_tracked for norm in norms]
    torch._foreach_add_(counts, 1)
    return result.contiguous(memory_format=memory_format_of(x))


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, extents: Extents, eps: float, momentum: float, lean: bool, x: Tensor, *tensors: Tensor
    ) -> Tensor:
        n, channels, height, width = x.shape
        total = channels + extents.modules * extents.growth
        buffer = x.new_empty((n, total, height, width))
        buffer[:, :channels] = x
        moments = x.new_empty((2, total))
        note_moments(moments, buffer, 0, channels)
        saved: list[Tensor] = []
        for module in range(extents.modules):
            own = tensors[module * len(TENSORS) : (module + 1) * len(TENSORS)]
            end = channels + extents.growth
            kept = _compute_module(buffer, moments, channels, own, extents, eps, buffer[:, channels:end])
            _move_running(own, moments[:, :channels], kept, momentum, extents)
            saved += [] if lean else kept
            if module + 1 < extents.modules:
                note_moments(moments, buffer, channels, end)
            channels = end
        ctx.extents, ctx.eps, ctx.channels = extents, eps, x.shape[1]
        # Not the running statistics: the next forward pass moves them, and may come before this one's backward.
        parameters = [None if i % len(TENSORS) in _STATISTICS else tensor for i, tensor in enumerate(tensors)]
        ctx.save_for_backward(buffer, moments, *parameters, *saved)
        return buffer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        extents: Extents = ctx.extents
        buffer, moments, *rest = ctx.saved_tensors
        count = extents.modules * len(TENSORS)
        tensors, saved = rest[:count], rest[count:]
        grad = grad_out.clone(memory_format=torch.contiguous_format)
        grads: list[Tensor | None] = [None] * count
        corrections = buffer.new_zeros((buffer.shape[1], 2), dtype=torch.float64)

        def whole(begin: int, end: int) -> Tensor:
            """The gradient of the buffer's channels [begin, end), to which no module adds any more."""
            own = grad[:, begin:end]
            if end == buffer.shape[1]:  # no module reads them, and they have no moments
                return own
            _OPS.bn_relu_conv2d_correct(own, buffer[:, begin:end], moments[0, begin:end], corrections[begin:end])
            return own

        for module in reversed(range(extents.modules)):
            channels = ctx.channels + module * extents.growth
            first = module * len(TENSORS)
            own, kept = tensors[first : first + len(TENSORS)], saved[module * _SAVED : (module + 1) * _SAVED]
            if not saved:
                kept = _compute_module(buffer, moments, channels, own, extents, ctx.eps)
            above = whole(channels, channels + extents.growth)
            into = grad[:, :channels], corrections[:channels]
            below = buffer[:, :channels], moments[:, :channels]
            for place, value in _module_backward(above, *below, own, kept, extents, ctx.eps, into).items():
                grads[first + place] = value
        return None, None, None, None, whole(0, ctx.channels), *grads


def _compute_module(
    buffer: Tensor,
    moments: Tensor,
    channels: int,
    tensors: Sequence[Tensor],
    extents: Extents,
    eps: float,
    out: Tensor | None = None,
) -> list[Tensor]:
    """What the gradient of a module needs that reads the first `channels` of the buffer (`_SAVED` tensors). What the
    module makes of them is written into `out`."""
    mean, var = moments[0, :channels], moments[1, :channels]
    noted = _cell(tensors, 0).run_noting(buffer[:, :channels], mean, var, eps)
    u = _cell(tensors, 5).run(*noted, eps, extents.groups)
    out = torch.empty_like(u) if out is None else out
    gates = _OPS.gated_excitation_into(u, list(tensors[_GATES]), [], True, eps, out=out)
    return [*noted, u, *gates]


def _move_running(
    tensors: Sequence[Tensor], moments: Tensor, kept: Sequence[Tensor], momentum: float, extents: Extents
) -> None:
    """Move all running statistics of a module as torch's batch normalisation does."""
    _, squeezed_mean, squeezed_var, u, *gates = kept
    n, positions = u.shape[0], u.shape[0] * u.shape[2] * u.shape[3]
    spatial, vectors = positions / (positions - 1), n / (n - 1)
    (mean, var), (hidden_mean, hidden_var) = gates[-2:]
    split = (extents.forget, extents.attention)
    forget_mean, attention_mean = hidden_mean.split(split)
    forget_var, attention_var = (hidden_var * vectors).split(split)
    old = [*tensors[2:4], *tensors[7:9], *tensors[_GATES.stop :]]
    new = [moments[0], moments[1] * spatial, squeezed_mean, squeezed_var * spatial]
    new += [mean, var * spatial] * 2 + [attention_mean, attention_var, forget_mean, forget_var]
    move_running(old, new, momentum)


def _module_backward(
    grad_out: Tensor,
    x: Tensor,
    moments: Tensor,
    tensors: Sequence[Tensor],
    kept: Sequence[Tensor],
    extents: Extents,
    eps: float,
    into: tuple[Tensor, Tensor],
) -> dict[int, Tensor]:
    """Add the gradient of x, which the module reads, and its corrections to the tensors of `into`; returns those of the
    module's parameters by their places in `TENSORS`."""
    squeezed, mean, var, u, *gates = kept
    parameters = list(tensors[_GATES])
    grad_u, flat = _OPS.gated_excitation_backward(grad_out, u, parameters, [], *gates, True, eps)
    grad_squeezed, *second = _cell(tensors, 5).gradients(grad_u, squeezed, mean, var, eps, extents.groups)
    first = _cell(tensors, 0).add_gradients(grad_squeezed, x, moments[0], moments[1], eps, *into)
    grads = dict(zip((0, 1, 4, 5, 6, 9), (*first, *second), strict=True))
    parts = flat.split([p.numel() for p in parameters])
    views = (part.view(p.shape) for part, p in zip(parts, parameters, strict=True))
    return grads | dict(enumerate(views, _GATES.start))
