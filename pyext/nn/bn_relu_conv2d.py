"""BatchNorm2d, ReLU and Conv2d as one module: the layer of pre-activated networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyext.nn.cells import normalises
from pyext.nn.dense_inference import forget, infer_folded, infer_transition
from pyext.nn.hooks import has_forward_hooks
from pyext.nn.memory_format import memory_format_of, trains_on_the_cpu
from pyext.nn.row_stages import RowStage, convolve_rows, run_pool, train_stages
from pyext.nn.stem_inference import infer_stem, stem_of
from pyext.ops.bn_relu_conv2d import OPERATOR, bn_relu_conv2d, bn_relu_pool, images_innermost

_LEAST_POSITIONS = 16


class BNReLUConv2d(nn.Module):
    """conv(relu(norm(x))), the convolution without bias; with gradients on the CPU one operator, `bn_relu_conv2d`.

    Args:
        in_channels, out_channels, kernel_size: of the convolution.
        convolution: further arguments of `torch.nn.Conv2d`.

    Submodules (and state-dict names): ``norm``, a BatchNorm2d, and ``conv``, a Conv2d. Where they do not say what the
    operator computes (hooks, replaced submodules, another padding), or it would not be faster, they run one by one.

    Shape: (N, in_channels, H, W) to (N, out_channels, H', W'); the operator keeps the memory format (NCHW is faster).

    Source: arXiv 1603.05027.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **convolution: Any,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = nn.BatchNorm2d(in_channels, **factory)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, bias=False, **convolution, **factory)

    def forward(self, x: Tensor) -> Tensor:
        own: Any = self._modules
        norm, conv = own["norm"], own["conv"]
        if not _runs_operator(norm, conv, x):
            return self.conv(self._activate(x))
        return _run_operator(norm, conv, x)

    def plain(self, x: Tensor) -> Tensor:
        """`forward`, submodule by submodule, as torch.fx can follow it."""
        return self.conv(torch.relu(self.norm(x)))

    def _activate(self, x: Tensor) -> Tensor:
        if self._reads_slice(x):
            return _normalised_slice(x, self.norm).relu_()
        normalised = self.norm(x)
        return torch.relu(x) if normalised is x else torch.relu_(normalised)

    def _reads_slice(self, x: Tensor) -> bool:
        """Whether x is a channel slice that torch's batch normalisation would copy before it reads it."""
        norm = self.norm
        return (
            not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and type(norm) is nn.BatchNorm2d
            and not norm.training
            and norm.affine
            and norm.running_mean is not None
            and x.dtype == norm.weight.dtype
            and x.dtype in (torch.float32, torch.float64)
            and x.stride(1) == 1
            and not x.is_contiguous(memory_format=torch.channels_last)
            and not has_forward_hooks(norm)
        )


class BNReLUConvSequential(RowStage, nn.Sequential):
    """`torch.nn.Sequential` that trains every BatchNorm2d, ReLU, Conv2d among its modules as one operator,
    `bn_relu_conv2d`, where that computes the same and is faster. On the CPU an average pool behind a 1x1 convolution
    comes before it (both are linear, and of each window one product is left); dense blocks, such transitions and the
    normalisation, ReLU and max-pool before the first block hand on maps whose images lie innermost, which no hook sees.
    At inference there, a BatchNorm2d becomes part of the convolution before it, and the stem of a network for large
    images, 3x3 convolutions with BatchNorm2d and ReLU and a max-pool, is one operator, `convolution_stem`. Names and
    state dictionary are nn.Sequential's.

    Source: arXiv 1603.05027.
    """

    def forward(self, x: Any) -> Any:
        modules: list[Any] = list(self._modules.values())
        i = 0
        while i < len(modules):
            if (stem := stem_of(modules[i:])) and (pooled := infer_stem(stem, x)) is not None:
                x = pooled
                i += len(stem)
            elif _pools_first(modules[i : i + 4], x):
                x = self._pass_on(i, modules[i : i + 4], x)
                i += 4
            elif is_cell(modules[i : i + 3]) and _is_nchw(x) and _runs_operator(modules[i], modules[i + 2], x):
                x = _run_operator(modules[i], modules[i + 2], x)
                i += 3
            elif _folds(modules[i : i + 2]) and (folded := infer_folded(self, i, modules[i : i + 2], x)) is not None:
                x = folded
                i += 2
            elif (trained := train_stages(modules[i:], x))[1]:
                x = trained[0]
                i += trained[1]
            else:
                x = modules[i](x)
                i += 1
        return x

    def train_rows(self, x: Tensor) -> Tensor | None:
        modules: list[Any] = list(self._modules.values())
        if len(modules) != 4 or not images_innermost(x) or not _pools_first(modules, x):
            return None
        norm, _, conv, _ = modules
        return convolve_rows(run_pool(bn_relu_pool, norm, x), conv.weight) if torch.is_grad_enabled() else None

    def train(self, mode: bool = True) -> BNReLUConvSequential:
        """`torch.nn.Module.train`, which also drops what is kept for inference."""
        forget(self)
        return super().train(mode)

    def _pass_on(self, place: int, modules: Sequence[Any], x: Tensor) -> Tensor:
        """Norm, activation, convolution and pool, whose places are changed."""
        norm, activation, conv, pool = modules
        if torch.is_grad_enabled():
            return conv(run_pool(bn_relu_pool, norm, x).contiguous(memory_format=memory_format_of(x)))
        if computes_the_operator(norm, conv) and conv.groups == 1 and _halves(pool):
            out = infer_transition(self, place, modules, x)
            if out is not None:
                return out
        return conv(pool(activation(norm(x))))


def is_cell(modules: Sequence[Any]) -> bool:
    """Whether the modules are a BatchNorm2d, a ReLU and a Conv2d, and the ReLU does nothing else."""
    return [type(m) for m in modules] == [nn.BatchNorm2d, nn.ReLU, nn.Conv2d] and not has_forward_hooks(modules[1])


def _pools_first(modules: Sequence[Any], x: Any) -> bool:
    """Whether the modules are a cell and an average pool, which may come before the cell's convolution and is seen by
    nobody there; with gradients, where an operator keeps less for them than the modules."""
    if len(modules) < 4 or not is_cell(modules[:3]) or type(modules[3]) is not nn.AvgPool2d:
        return False
    norm, _, conv, pool = modules
    alone = conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.padding == (0, 0)
    averages = pool.padding in (0, (0, 0)) and not pool.ceil_mode and pool.divisor_override is None
    hooked = has_forward_hooks(conv) or has_forward_hooks(pool)
    if not alone or not averages or hooked or not isinstance(x, Tensor) or x.device.type != "cpu":
        return False
    return not torch.is_grad_enabled() or (_halves(pool) and _trains_pool(norm, conv, x))


def _trains_pool(norm: Any, conv: Any, x: Tensor) -> bool:
    """Whether `bn_relu_pool` computes what `norm`, ReLU and a pool of 2x2 make of x."""
    if not trains_on_the_cpu(x) or not computes_the_operator(norm, conv) or not norm.training:
        return False
    kinds = {norm.weight.dtype, norm.running_mean.dtype}
    return kinds == {x.dtype} and min(x.shape[2:]) > 1 and OPERATOR.runs("cpu", x)


def _folds(modules: Sequence[Any]) -> bool:
    """Whether the modules are a convolution without bias and a normalisation that can become part of its weight."""
    if [type(m) for m in modules] != [nn.Conv2d, nn.BatchNorm2d] or any(map(has_forward_hooks, modules)):
        return False
    conv, norm = modules
    known = norm.affine and norm.track_running_stats and norm.running_mean is not None
    return conv.bias is None and conv.padding_mode == "zeros" and known


def _halves(pool: nn.AvgPool2d) -> bool:
    return pool.kernel_size in (2, (2, 2)) and pool.stride in (2, (2, 2))


def _is_nchw(x: Any) -> bool:
    # One layer in channels_last is oneDNN's: to bring it into NCHW and back would take what is won.
    return isinstance(x, Tensor) and x.is_contiguous()


def _run_operator(norm: Any, conv: Any, x: Tensor) -> Tensor:
    out = bn_relu_conv2d(
        x,
        *(norm.weight, norm.bias, conv.weight, norm.running_mean, norm.running_var),
        training=norm.training,
        momentum=norm.momentum,
        eps=norm.eps,
        stride=conv.stride[0],
        groups=conv.groups,
    )
    if norm.training:
        norm.num_batches_tracked.add_(1)
    return out.contiguous(memory_format=memory_format_of(x))


def computes_the_operator(norm: Any, conv: Any) -> bool:
    """Whether the two modules say what `bn_relu_conv2d` computes."""
    if not normalises(norm) or type(conv) is not nn.Conv2d or has_forward_hooks(conv):
        return False
    if conv.bias is not None or conv.padding_mode != "zeros" or conv.stride not in ((1, 1), (2, 2)):
        return False
    taps = conv.kernel_size[0]
    return taps in (1, 3) and (conv.kernel_size, conv.padding, conv.dilation) == (
        (taps, taps),
        (taps // 2, taps // 2),
        (1, 1),
    )


def trains_faster(x: Tensor) -> bool:
    """Whether the operator trains what reads x (N, C, H, W) faster than torch: maps that fill a vector.

    Measured forward and backward against channels_last, two threads, 16 images: on 8x8 and 4x4 maps 0.4 to 0.9 of its
    time, on 2x2 ones twice as long.
    """
    return trains_on_the_cpu(x) and x.shape[2] * x.shape[3] >= _LEAST_POSITIONS and OPERATOR.runs("cpu", x)


def _runs_operator(norm: Any, conv: Any, x: Tensor) -> bool:
    if not trains_faster(x) or not computes_the_operator(norm, conv):
        return False
    # Few channels a group leave the tiles empty: a depthwise convolution is oneDNN's.
    if conv.groups > 1 and conv.in_channels // conv.groups < 4:
        return False
    return x.dtype == norm.weight.dtype and OPERATOR.has_kernel(x, conv.weight, conv.stride[0], conv.groups)


def _normalised_slice(x: Tensor, norm: Any) -> Tensor:
    # gamma (x - mean) / sqrt(var + eps) + beta = scale x + (beta - mean scale): torch's own form on the CPU.
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    shift = torch.addcmul(norm.bias, norm.running_mean, scale, value=-1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return torch.addcmul(shift.view(1, -1, 1, 1), x, scale.view(1, -1, 1, 1), out=out)
