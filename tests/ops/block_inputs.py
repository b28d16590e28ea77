"""Inputs of `hybrid_block` for tests: drawn afresh from a seed, distributed like those of a trained block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from exactness import Evaluate
from inputs import draw_parameter, draw_statistic
from torch import Tensor

from pyext.ops.hybrid_block import Extents, reference, tensor_shapes


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


# Small enough for a CPU to run the GPU's kernels on them.
DEVICE_BLOCKS = {
    "two modules in groups": Block(2, 5, 7, 9, dense(2, 8, 4, 4)),
    "several slices": Block(1, 35, 4, 5, dense(1, 70, 3, 1)),
    "several tiles": Block(2, 3, 10, 18, dense(1, 5, 3, 1)),
    "more outputs than a block": Block(1, 3, 3, 4, dense(1, 4, 37, 1)),
    "groups of several blocks and slices": Block(1, 4, 3, 5, dense(1, 160, 40, 5)),
    "one column": Block(2, 3, 70, 1, dense(1, 6, 3, 3)),
    "one position": Block(2, 3, 1, 1, dense(2, 4, 2, 1)),
    "transition": Block(2, 6, 8, 6, transition(6, 4, groups=2)),
    "transition, odd extents, several tiles": Block(1, 4, 9, 35, transition(5, 3)),
    "transition without stride": Block(1, 5, 4, 5, transition(7, 6, stride=1)),
}
DEVICE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def plain(extents: Extents) -> Evaluate:
    """Plain torch on a block, as `exactness` compares with it."""

    def evaluate(x: Tensor, tensors: Sequence[Tensor], _: Sequence[Tensor]) -> list[Tensor]:
        return [reference(x, tensors, extents)]

    return evaluate


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
