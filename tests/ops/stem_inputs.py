"""Inputs of `convolution_stem` for tests: drawn afresh from a seed, distributed like those of a trained network."""

from __future__ import annotations

from typing import NamedTuple

import torch
from inputs import draw_parameter, draw_statistic
from torch import Tensor

from pyext.ops.convolution_stem import TENSORS, tensor_shapes


class Stem(NamedTuple):
    """Images' extents and a stem's."""

    batch: int
    height: int
    width: int
    channels: tuple[int, ...]
    """Of the images and of each layer."""
    stride: int


def make_stem(
    stem: Stem, dtype: torch.dtype, tensor_dtype: torch.dtype | None = None, seed: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """x in `dtype` and the tensors of all layers."""
    generator = torch.Generator().manual_seed(seed)
    shape = (stem.batch, stem.channels[0], stem.height, stem.width)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) + 0.2
    tensors = []
    for index, shape in enumerate(tensor_shapes(stem.channels)):
        name = TENSORS[index % len(TENSORS)]
        draw = draw_statistic if "running_" in name else draw_parameter
        tensors.append(draw(name, shape, generator).to(tensor_dtype or dtype))
    return x.to(dtype), tensors
