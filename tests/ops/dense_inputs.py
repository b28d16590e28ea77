"""Inputs of `dense_block` for tests: drawn afresh from a seed, distributed like those of a trained block."""

from __future__ import annotations

from typing import NamedTuple

import torch
from inputs import draw_parameter, draw_statistic
from torch import Tensor

from pyext.ops.dense_block import Extents, tensor_shapes


class Dense(NamedTuple):
    """A map's extents and a block's."""

    batch: int
    height: int
    width: int
    extents: Extents


def make_dense(
    block: Dense, dtype: torch.dtype, tensor_dtype: torch.dtype | None = None, seed: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """x in `dtype` and the tensors of all layers."""
    generator = torch.Generator().manual_seed(seed)
    shape = (block.batch, block.extents.channels, block.height, block.width)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) + 0.2
    tensors = []
    for described, shape in tensor_shapes(block.extents):
        name = described.split()[0].replace("norm1", "norm").replace("norm2", "norm")
        draw = draw_statistic if "running_" in name else draw_parameter
        tensors.append(draw(name, shape, generator).to(tensor_dtype or dtype))
    return x.to(dtype), tensors
