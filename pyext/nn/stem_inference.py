"""The first modules of a network for large images, and when they run as the operator `convolution_stem`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyext import _library
from pyext.nn.hooks import has_forward_hooks
from pyext.ops.convolution_stem import OPERATOR, convolution_stem

_LAYER = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU)


class StemSequential(nn.Sequential):
    """`torch.nn.Sequential` whose first modules, where they are a stem, run at inference on the CPU as one operator,
    `convolution_stem`. Names and state dictionary are nn.Sequential's.

    Source: HCGNet, arXiv 1908.09699, section 4.
    """

    def forward(self, x: Any) -> Any:
        return self.run(x, 0, len(self))

    def run(self, x: Any, start: int, stop: int) -> Any:
        """What the modules [start, stop) make of x."""
        modules = list(self._modules.values())[start:stop]
        stem = stem_of(modules)
        if stem and (pooled := infer_stem(stem, x)) is not None:
            x, modules = pooled, modules[len(stem) :]
        for module in modules:
            x = module(x)
        return x


def stem_of(modules: Sequence[Any]) -> Sequence[Any]:
    """The first of `modules`, if they are a stem: 3x3 convolutions, of which only the first may have a stride, each
    with its BatchNorm2d and ReLU, then a max-pool of windows of 3x3 at a stride of two. Else none."""
    count = 0
    while tuple(map(type, modules[count : count + 3])) == _LAYER and _is_layer(modules[count], 1 if count else 2):
        count += len(_LAYER)
    if not count or count == len(modules) or not is_max_pool(modules[count]):
        return ()
    return modules[: count + 1]


def _is_layer(conv: nn.Conv2d, most_stride: int) -> bool:
    geometry = (conv.kernel_size, conv.padding, conv.dilation, conv.groups, conv.padding_mode, conv.bias)
    stride = conv.stride[0]
    return (
        geometry == ((3, 3), (1, 1), (1, 1), 1, "zeros", None)
        and conv.stride == (stride, stride)
        and stride <= most_stride
    )


def is_max_pool(pool: Any) -> bool:
    """Whether `pool` takes maxima of windows of 3x3 at a stride of two, each centred on a position, and no more."""
    if type(pool) is not nn.MaxPool2d or pool.ceil_mode or pool.return_indices:
        return False
    extents = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    return all(extent in (n, (n, n)) for extent, n in zip(extents, (3, 2, 1, 1), strict=True))


def infer_stem(stem: Sequence[Any], x: Any) -> Tensor | None:
    """What `stem`, as `stem_of` gives it, makes of x (N, C, H, W), in NCHW; None where the operator does not compute
    that or is not to run: training, gradients, tracing, autocast, another device, hooks, shapes that torch refuses.
    """
    if not isinstance(x, Tensor) or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return None
    traced = _library.is_traced() or torch.jit.is_tracing()
    if torch.is_grad_enabled() or traced or torch.is_autocast_enabled("cpu"):
        return None
    if any(map(has_forward_hooks, stem)) or not all(_normalises(norm) for norm in stem[1:-1:3]):
        return None
    convolutions, norms = stem[0:-1:3], stem[1:-1:3]
    tensors = [
        tensor
        for conv, norm in zip(convolutions, norms, strict=True)
        for tensor in (conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    ]
    if len({norm.eps for norm in norms}) > 1 or {tensor.dtype for tensor in tensors} != {x.dtype}:
        return None
    if (
        x.dim() != 4
        or x.shape[1] != convolutions[0].in_channels
        or 0 in x.shape
        or not OPERATOR.runs("cpu", x, tensors)
    ):
        return None
    return convolution_stem(x, tensors, stride=convolutions[0].stride[0], eps=norms[0].eps)


def _normalises(norm: Any) -> bool:
    return not norm.training and norm.affine and norm.track_running_stats and norm.running_mean is not None
