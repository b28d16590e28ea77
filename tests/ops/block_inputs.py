"""Inputs of `hybrid_block` for tests: drawn afresh from a seed, distributed like those of a trained block."""

from __future__ import annotations

from typing import NamedTuple

import torch
from inputs import draw_parameter, draw_statistic
from torch import Tensor

from pyext.ops.hybrid_block import Extents, tensor_shapes


class Block(NamedTuple):
    """A map's extents and a block's."""

    batch: int
    channels: int
    height: int
    width: int
    extents: Extents


def dense(modules: int, squeeze: int, growth: int, groups: int, attention: int = 3, forget: int = 2) -> Extents:
    return Extents(modules, squeeze, growth, groups, attention, forget, 1, True)


def transition(squeeze: int, growth: int, stride: int = 2, groups: int = 1) -> Extents:
    return Extents(1, squeeze, growth, groups, 3, 2, stride, False)


def make_block(
    block: Block, dtype: torch.dtype, tensor_dtype: torch.dtype | None = None, seed: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """x in `dtype` and the tensors of all modules."""
    generator = torch.Generator().manual_seed(seed)
    batch, channels, height, width, extents = block
    x = torch.randn((batch, channels, height, width), generator=generator, dtype=torch.float64) + 0.2
    tensors = []
    for module in range(extents.modules):
        for name, shape in tensor_shapes(channels + module * extents.growth, extents).items():
            draw = draw_statistic if "running_" in name else draw_parameter
            tensors.append(draw(name, shape, generator).to(tensor_dtype or dtype))
    return x.to(dtype), tensors
