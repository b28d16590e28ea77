"""Training of the stages of a dense network one after the other, images innermost in the maps between them.

Small maps then fill vectors as large ones do (`csrc/cpu/bn_relu_conv2d/rows.h`). Nobody sees these maps: a stage whose
result or input a hook may see runs as a module, in the caller's memory format.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyext.nn.cells import normalises
from pyext.nn.hooks import has_forward_hooks
from pyext.nn.memory_format import memory_format_of, trains_on_the_cpu
from pyext.nn.stem_inference import is_max_pool
from pyext.ops.bn_relu_conv2d import OPERATOR, bn_relu_max_pool

_STEM = (nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d)
_LEAST_IMAGES = 3
"""For `bn_relu_max_pool`, whose vectors hold images: forward and backward on 64 maps of 32x32, two threads, of AVX2, it
takes 1.2 of torch's time on 2 images, 0.8 on 3 and 4, 0.3 on 16."""


class RowStage:
    """A module that can train with images innermost in its input and its result."""

    def train_rows(self, x: Tensor) -> Tensor | None:
        """`forward` in training, images innermost in the result; None where no operator computes that, or not from x.
        Nothing may write to the result."""
        raise NotImplementedError


def train_stages(modules: Sequence[Any], x: Any) -> tuple[Any, int]:
    """What the first of `modules`, as many as train with images innermost, make of x; and how many those are."""
    out, done = x, 0
    if not isinstance(x, Tensor):  # torch.fx traces the modules
        return out, done
    if _begins(modules, x):
        out, done = run_pool(bn_relu_max_pool, modules[0], x), len(_STEM)
    while done < len(modules) and _is_stage(modules[done]) and (rows := modules[done].train_rows(out)) is not None:
        out = rows
        done += 1
    return (out.contiguous(memory_format=memory_format_of(x)) if done else x), done


def run_pool(pool: Callable[..., Tensor], norm: Any, x: Tensor) -> Tensor:
    """What `pool`, `bn_relu_pool` or `bn_relu_max_pool`, makes of x with a BatchNorm2d in training."""
    statistics = norm.running_mean, norm.running_var
    out = pool(x, norm.weight, norm.bias, *statistics, momentum=norm.momentum, eps=norm.eps)
    norm.num_batches_tracked.add_(1)
    return out


def _is_stage(module: Any) -> bool:
    # A class derived from a stage may have a forward of its own.
    return type(module) in RowStage.__subclasses__() and module.training and not has_forward_hooks(module)


def _begins(modules: Sequence[Any], x: Tensor) -> bool:
    """Whether the modules are BatchNorm2d, ReLU and max-pool before a stage, and `bn_relu_max_pool` trains them on x
    faster than torch."""
    if len(modules) <= len(_STEM) or tuple(map(type, modules[: len(_STEM)])) != _STEM:
        return False
    norm, activation, pool = modules[: len(_STEM)]
    seen = any(map(has_forward_hooks, (norm, activation, pool))) or not _is_stage(modules[len(_STEM)])
    if seen or not is_max_pool(pool) or not normalises(norm) or not norm.training:
        return False
    if not trains_on_the_cpu(x) or 0 in x.shape or x.shape[1] != norm.num_features:
        return False
    if x.shape[0] < _LEAST_IMAGES:
        return False
    alike = {norm.weight.dtype, norm.running_mean.dtype} == {x.dtype}
    return alike and x.is_contiguous() and OPERATOR.runs("cpu", x)


def convolve_rows(x: Tensor, weight: Tensor) -> Tensor:
    """The 1x1 convolution of x (N, C, H, W) with weight (channels, C, 1, 1), images innermost in x and in the result:
    one matrix product."""
    n, channels, height, width = x.shape
    rows = torch.mm(weight.flatten(1), x.permute(1, 2, 3, 0).reshape(channels, -1))
    return rows.view(-1, height, width, n).permute(3, 0, 1, 2)
