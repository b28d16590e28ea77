"""Inputs of `bn_relu_conv2d` for tests: drawn afresh from a seed, distributed like those of a trained layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from layouts import in_layout
from torch import Tensor

INPUTS = ("x", "norm_weight", "norm_bias", "conv_weight")
RUNNING = ("running_mean", "running_var")


@dataclass(frozen=True)
class Layer:
    """Sizes of a call: x (batch, channels, height, width) to `outputs` channels."""

    batch: int
    channels: int
    height: int
    width: int
    outputs: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1


def make_layer(
    layer: Layer,
    dtype: torch.dtype,
    parameter_dtype: torch.dtype | None = None,
    layout: str = "nchw",
    seed: int = 0,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The differentiable inputs and the running statistics, by the operator's names."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    channels, inputs = layer.channels, layer.channels // layer.groups
    x = normal(layer.batch, channels, layer.height, layer.width) + 0.2
    weight = normal(layer.outputs, inputs, layer.kernel, layer.kernel) / (inputs * layer.kernel**2) ** 0.5
    parameters = [1 + 0.2 * normal(channels), 0.3 * normal(channels), weight]
    running = [0.3 * normal(channels), (0.3 * normal(channels)).exp()]
    kind = parameter_dtype or dtype
    tensors = [in_layout(x.to(dtype), layout), *(p.to(kind) for p in parameters)]
    return dict(zip(INPUTS, tensors, strict=True)), dict(zip(RUNNING, [r.to(kind) for r in running], strict=True))
