"""bn_relu_conv2d: forward and backward in training mode of the layers of HCGNet-A1, NCHW for ours, both for peers.

On the CPU ours is the module, on a GPU the operator by each backend. Parameters are float32.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.case import Case, Contender, Runner
from bench.peers import FORMATS, Subject, compiled, gradient_runner, module_subject, on_backend
from bench.roofs import Work
from pyext.nn import BNReLUConv2d
from pyext.ops import bn_relu_conv2d

BATCH = 64
_NAMES = ("norm.weight", "norm.bias", "conv.weight")
_RUNNING = ("norm.running_mean", "norm.running_var")
_NORM = 3 + 4 + 4 + 8
"""Operations per element of x: sum and sum of squares; normalisation and ReLU, forward and made again; the way back
through both, the two sums of the normalisation's gradient, its correction."""


@dataclass(frozen=True)
class Layer:
    """`channels` by `height` by `height` to `outputs` channels."""

    channels: int
    height: int
    outputs: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1

    def module(self) -> BNReLUConv2d:
        torch.manual_seed(0)
        geometry = {"padding": self.kernel // 2, "stride": self.stride, "groups": self.groups}
        return BNReLUConv2d(self.channels, self.outputs, self.kernel, **geometry)

    def work(self, element_bytes: int = 4) -> Work:
        """Three products of the same size; x read twice, its gradient, the result and its gradient moved once."""
        positions, out_positions = self.height**2, (self.height // self.stride) ** 2
        taps = self.channels // self.groups * self.kernel**2
        product = 2 * BATCH * out_positions * self.outputs * taps
        maps = BATCH * (3 * self.channels * positions + 2 * self.outputs * out_positions)
        return Work(element_bytes * maps, 3 * product + _NORM * BATCH * self.channels * positions)

    def __str__(self) -> str:
        kind = f"{self.kernel}x{self.kernel} stride {self.stride} groups {self.groups}"
        return f"{BATCH}x{self.channels}x{self.height}x{self.height} to {self.outputs}, {kind}"


LAYERS = (
    Layer(24, 32, 48),
    Layer(108, 32, 48),
    Layer(48, 32, 12, 3, 1, 4),
    Layer(90, 32, 60, 3, 2),
    Layer(132, 16, 96),
    Layer(96, 16, 24, 3, 1, 4),
    Layer(189, 16, 126, 3, 2),
    Layer(378, 8, 144),
    Layer(144, 8, 36, 3, 1, 4),
)
"""First and last 1x1 convolutions of the blocks, their 3x3 ones, and the transitions' 3x3 ones."""


GPU_LAYERS = (LAYERS[1], LAYERS[2], LAYERS[6])
"""One of each kind, for torch.compile takes most of a case's time."""


class Composition(nn.Module):
    """The layer as plain torch composes it: the peer in eager mode and under torch.compile."""

    def __init__(self, module: BNReLUConv2d) -> None:
        super().__init__()
        self.norm, self.conv = module.norm, module.conv

    def forward(self, x: Tensor) -> Tensor:
        conv, z = self.conv, torch.relu_(self.norm(x))
        return F.conv2d(z, conv.weight.to(x.dtype), None, conv.stride, conv.padding, conv.dilation, conv.groups)


class Operator(Composition):
    """The layer as one call of the operator, on any device."""

    def forward(self, x: Tensor) -> Tensor:
        norm, conv = self.norm, self.conv
        tensors = norm.weight, norm.bias, conv.weight, norm.running_mean, norm.running_var
        options = {"momentum": norm.momentum, "eps": norm.eps, "stride": conv.stride[0], "groups": conv.groups}
        return bn_relu_conv2d(x, *tensors, training=True, **options)


@dataclass(frozen=True)
class Setup:
    """What one case runs on; x is in `dtype`."""

    layer: Layer
    device: torch.device
    dtype: torch.dtype = torch.float32

    def runner(self, subject: Subject, dtype: torch.dtype, layout: torch.memory_format) -> Runner:
        layer, generator = self.layer, torch.Generator().manual_seed(1)
        x = torch.randn(BATCH, layer.channels, layer.height, layer.height, generator=generator)
        side = layer.height // layer.stride
        grad_out = torch.randn(BATCH, layer.outputs, side, side, generator=generator)
        x, grad_out = (
            tensor.to(self.dtype).to(self.device, dtype).contiguous(memory_format=layout) for tensor in (x, grad_out)
        )
        return gradient_runner(subject, x, grad_out)

    def build(self, kind: str) -> Runner:
        """A contender by the words of its name: the program, then what is special about it."""
        layout = FORMATS[" channels_last" if "channels_last" in kind else ""]
        program, _, backend = kind.partition(" ")
        module = self.layer.module().to(memory_format=layout)
        peer = module if kind == "pyext" else Operator(module) if program == "pyext" else Composition(module)
        subject = module_subject(peer.to(self.device).train(), _NAMES, _RUNNING)
        if program == "torch.compile":
            subject = compiled(subject, training=True)
        if peer is not module and program == "pyext":
            subject = on_backend(subject, backend)
        return self.runner(subject, self.dtype, layout)

    def truth(self) -> Runner:
        module = Composition(self.layer.module()).to(self.device, torch.float64).train()
        return self.runner(module_subject(module, _NAMES, _RUNNING), torch.float64, torch.contiguous_format)


def _case(setup: Setup) -> Case:
    kinds = ["pyext cuda", "pyext triton"] if setup.device.type == "cuda" else ["pyext"]
    kinds += [program + suffix for program in ("eager", "torch.compile") for suffix in FORMATS]
    dtype = "" if setup.dtype == torch.float32 else f", {setup.dtype}".replace("torch.", "")
    return Case(
        f"bn_relu_conv2d forward+backward {setup.layer}{dtype}",
        [Contender(kind, functools.partial(setup.build, kind), kind.startswith("pyext")) for kind in kinds],
        setup.truth,
        functools.partial(setup.layer.work, setup.dtype.itemsize),
        needs_seconds=15,  # most of it torch.compile's
        dtype=setup.dtype,
    )


def cases(device: torch.device) -> list[Case]:
    """Training; on a GPU also in bfloat16."""
    if device.type != "cuda":
        return [_case(Setup(layer, device)) for layer in LAYERS]
    return [_case(Setup(layer, device, dtype)) for dtype in (torch.float32, torch.bfloat16) for layer in GPU_LAYERS]


def test_bn_relu_conv2d(speed, case, contender):
    speed(case, contender)
