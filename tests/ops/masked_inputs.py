"""Inputs of `masked_conv2d` for tests: drawn afresh from a seed, distributed like those of a trained layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Masked:
    """Sizes and options of a call: x (batch, kept, height, width) of `channels` to `outputs` channels, in all."""

    batch: int
    channels: int
    height: int
    width: int
    outputs: int
    kernel: tuple[int, int] = (3, 3)
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] = 1
    dilation: int | tuple[int, int] = 1
    groups: int = 1
    subnets: int = 1
    keep: float = 0.5
    activation: str | None = "relu"
    affine: bool = True
    gated: bool = False
    pool: int = 1

    @property
    def options(self) -> dict[str, Any]:
        """Keywords that are no tensors."""
        names = ("stride", "padding", "dilation", "groups", "activation", "pool")
        return {name: getattr(self, name) for name in names}


def make_masked(
    layer: Masked, dtype: torch.dtype, parameter_dtype: torch.dtype | None = None, seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The differentiable tensors and the lists, by the operator's names."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    kept_in, kept_out = (drawn_lists(layer.subnets, n, layer.keep, generator) for n in (layer.channels, layer.outputs))
    lists = {"inputs": kept_in, "outputs": kept_out}
    if layer.subnets > 1:
        lists["subnets"] = torch.randint(layer.subnets, (layer.batch,), generator=generator)
    fan_in = layer.channels // layer.groups
    kind = parameter_dtype or dtype
    weight = normal(layer.outputs, fan_in, *layer.kernel) / (fan_in * layer.kernel[0] * layer.kernel[1]) ** 0.5
    tensors = {
        "x": normal(layer.batch, kept_in.shape[1], layer.height, layer.width).to(dtype),
        "weight": weight.to(kind),
    }
    if layer.affine:
        tensors["scale"] = (1 + 0.2 * normal(layer.outputs)).to(kind)
        tensors["shift"] = (0.3 * normal(layer.outputs)).to(kind)
    if layer.gated:
        tensors["gate"] = (1 + 0.3 * normal(layer.batch, kept_out.shape[1])).to(kind)
    return tensors, lists


def drawn_lists(subnets: int, channels: int, keep: float, generator: torch.Generator) -> Tensor:
    """Kept channels of each sub-network, (subnets, the most that one keeps), each of another length."""
    rows = []
    for s in range(subnets):
        count = max(1, min(channels, round(channels * keep) + s))
        rows.append(torch.randperm(channels, generator=generator)[:count].sort().values)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
