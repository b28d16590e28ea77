"""BN-ReLU-convolution cells, and the channel prefixes of a dense block's buffer that they read, in training mode."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyext.nn.hooks import has_forward_hooks

_OPS = torch.ops.pyext


class Cell(NamedTuple):
    """A cell's parameters, by the names of the operator `bn_relu_conv2d`."""

    norm_weight: Tensor
    norm_bias: Tensor
    conv_weight: Tensor

    def run(self, x: Tensor, mean: Tensor, var: Tensor, eps: float, groups: int = 1) -> Tensor:
        """conv(relu(BN(x))) with the batch's statistics, stride 1."""
        return _OPS.bn_relu_conv2d(x, *self, mean, var, True, eps, 1, groups)

    def run_noting(self, x: Tensor, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """As `run`, and mean and biased variance of what it gives. NCHW."""
        return _OPS.bn_relu_conv2d_moments(x, *self, mean, var, True, eps, 1, 1)

    def gradients(
        self, grad_out: Tensor, x: Tensor, mean: Tensor, var: Tensor, eps: float, groups: int = 1
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Those by x and by the cell's parameters, the statistics' part included."""
        return _OPS.bn_relu_conv2d_backward(grad_out, x, *self, mean, var, True, eps, 1, groups)

    def add_gradients(
        self, grad_out: Tensor, x: Tensor, mean: Tensor, var: Tensor, eps: float, grad_x: Tensor, corrections: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Those by the cell's parameters; that by x is added to `grad_x`, but for the statistics' part, which is added
        to `corrections` (C, 2), for `bn_relu_conv2d_correct`."""
        return _OPS.bn_relu_conv2d_backward_add(grad_out, x, *self, mean, var, True, eps, 1, 1, grad_x, corrections)


PARAMETERS = len(Cell._fields)


def normalises(norm: Any) -> bool:
    """Whether the module is a BatchNorm2d as the operators compute it."""
    if type(norm) is not nn.BatchNorm2d or has_forward_hooks(norm) or not norm.affine:
        return False
    return norm.track_running_stats and norm.running_mean is not None and norm.momentum is not None


def note_moments(moments: Tensor, buffer: Tensor, begin: int, end: int) -> None:
    """Write mean and biased variance of the buffer's channels [begin, end) into the rows of `moments`."""
    for row, values in zip(moments, _OPS.bn_relu_conv2d_statistics(buffer[:, begin:end]), strict=True):
        row[begin:end] = values
