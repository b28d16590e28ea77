"""Blocks on which the GPU kernels of `hybrid_block` are compared with float64, small enough for a CPU to run them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyext.ops.hybrid_block import Extents, reference, tensor_shapes


class Case(NamedTuple):
    """A block's input, its tensors and what plain torch is asked for."""

    x: Tensor
    tensors: list[Tensor]
    extents: Extents

    def evaluate(self, x: Tensor, tensors: Sequence[Tensor], _: Sequence[Tensor]) -> list[Tensor]:
        return [reference(x, tensors, self.extents)]


# (N, C, H, W); modules, squeeze, growth, groups, attention, forget, stride, dense
BLOCKS = {
    "two modules in groups": ((2, 5, 7, 9), Extents(2, 8, 4, 4, 3, 2, 1, True)),
    "several slices, several tiles": ((1, 19, 10, 18), Extents(1, 21, 3, 1, 2, 2, 1, True)),
    "more outputs than a block": ((1, 3, 3, 4), Extents(1, 4, 37, 1, 2, 2, 1, True)),
    "one position": ((2, 3, 1, 1), Extents(2, 4, 2, 1, 1, 1, 1, True)),
    "transition": ((2, 6, 8, 6), Extents(1, 6, 4, 2, 2, 3, 2, False)),
    "transition, odd extents, several tiles": ((1, 4, 9, 35), Extents(1, 5, 3, 1, 2, 2, 2, False)),
    "transition without stride": ((1, 5, 4, 5), Extents(1, 7, 6, 1, 2, 2, 1, False)),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_case(name: str, dtype: torch.dtype, tensor_dtype: torch.dtype | None = None, seed: int = 0) -> Case:
    """The block of that name."""
    return draw_case(*BLOCKS[name], dtype, tensor_dtype, seed)


def draw_case(
    shape: tuple[int, ...], extents: Extents, dtype: torch.dtype, tensor_dtype: torch.dtype | None, seed: int
) -> Case:
    """Drawn afresh from `seed`, distributed like a trained block's."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, size: tuple[int, ...]) -> Tensor:
        x = torch.randn(size, generator=generator, dtype=torch.float64)
        if name.endswith("running_var"):
            return (0.3 * x).exp()
        if name.endswith(("bias", "running_mean")):
            return 0.3 * x
        return 1 + 0.2 * x if x.dim() == 1 else x / x[0].numel() ** 0.5

    x = torch.randn(shape, generator=generator, dtype=torch.float64) + 0.2
    tensors = [
        draw(key, size).to(tensor_dtype or dtype)
        for module in range(extents.modules)
        for key, size in tensor_shapes(shape[1] + module * extents.growth, extents).items()
    ]
    return Case(x.to(dtype), tensors, extents)
