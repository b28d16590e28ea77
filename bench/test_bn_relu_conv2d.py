"""bn_relu_conv2d: forward and backward in training mode of the layers of HCGNet-A1, NCHW for ours, both for peers."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.case import Case, Contender, Runner
from bench.peers import FORMATS, Subject, compiled, gradient_runner, module_subject
from bench.roofs import Work
from pyext.nn import BNReLUConv2d

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

    def work(self) -> Work:
        """Three products of the same size; x read twice, its gradient, the result and its gradient moved once."""
        positions, out_positions = self.height**2, (self.height // self.stride) ** 2
        taps = self.channels // self.groups * self.kernel**2
        product = 2 * BATCH * out_positions * self.outputs * taps
        maps = BATCH * (3 * self.channels * positions + 2 * self.outputs * out_positions)
        return Work(4 * maps, 3 * product + _NORM * BATCH * self.channels * positions)

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


class Composition(nn.Module):
    """The layer as plain torch composes it: the peer in eager mode and under torch.compile."""

    def __init__(self, module: BNReLUConv2d) -> None:
        super().__init__()
        self.norm, self.conv = module.norm, module.conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.relu_(self.norm(x)))


def _runner(layer: Layer, subject: Subject, dtype: torch.dtype, layout: torch.memory_format) -> Runner:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, layer.channels, layer.height, layer.height, generator=generator)
    side = layer.height // layer.stride
    grad_out = torch.randn(BATCH, layer.outputs, side, side, generator=generator)
    x, grad_out = (tensor.to(dtype).contiguous(memory_format=layout) for tensor in (x, grad_out))
    return gradient_runner(subject, x, grad_out)


def _build(kind: str, layer: Layer) -> Runner:
    layout = FORMATS[" channels_last" if "channels_last" in kind else ""]
    module = layer.module()
    peer = module if kind.startswith("pyext") else Composition(module).to(memory_format=layout)
    subject = module_subject(peer.train(), _NAMES, _RUNNING)
    if kind.startswith("torch.compile"):
        subject = compiled(subject, training=True)
    return _runner(layer, subject, torch.float32, layout)


def _truth(layer: Layer) -> Runner:
    subject = module_subject(Composition(layer.module()).double().train(), _NAMES, _RUNNING)
    return _runner(layer, subject, torch.float64, torch.contiguous_format)


def _case(layer: Layer) -> Case:
    kinds = ["pyext", *(program + suffix for program in ("eager", "torch.compile") for suffix in FORMATS)]
    return Case(
        f"bn_relu_conv2d forward+backward {layer}",
        [Contender(kind, functools.partial(_build, kind, layer), kind.startswith("pyext")) for kind in kinds],
        functools.partial(_truth, layer),
        layer.work,
        needs_seconds=15,  # most of it torch.compile's
    )


def cases(device: torch.device) -> list[Case]:
    """Training on the CPU; there are no kernels for other devices yet."""
    return [_case(layer) for layer in LAYERS] if device.type == "cpu" else []


def test_bn_relu_conv2d(speed, case, contender):
    speed(case, contender)
