"""What kernels of normalised maps' convolutions share: extents of blocks, and batch norm and ReLU of a tile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MIN_BLOCK = 16
"""The least extent that `tl.dot` takes."""
MAX_BLOCK = 64
MAX_BLOCK_FLOAT32 = 32
"""Without tensor cores operands take registers, which larger blocks have not got."""


@triton.jit
def _load(pointer, index, mask, other=0.0):
    return tl.load(pointer + index, mask=mask, other=other).to(tl.float32)


@triton.jit
def _statistics(norm, channel, mask, eps):
    """Mean and 1 / sqrt(var + eps)."""
    return _load(norm[2], channel, mask), 1.0 / tl.sqrt_rn(_load(norm[3], channel, mask, 1.0) + eps)


@triton.jit
def _normalised(x, norm, channel, mask, eps):
    """BN of a tile [channels, positions]; 0 of zeros outside of the channels."""
    mean, rstd = _statistics(norm, channel, mask, eps)
    scale = _load(norm[0], channel, mask) * rstd
    return (x - mean[:, None]) * scale[:, None] + _load(norm[1], channel, mask)[:, None]


@triton.jit
def _activated(x, norm, channel, mask, eps):
    """BN and ReLU. The comparison keeps NaN, which tl.maximum would drop."""
    y = _normalised(x, norm, channel, mask, eps)
    return tl.where(y < 0.0, 0.0, y)


def _block(extent: int, dtype: torch.dtype) -> int:
    """Rows or columns of the tile that a program adds up."""
    most = MAX_BLOCK_FLOAT32 if dtype == torch.float32 else MAX_BLOCK
    return min(most, max(MIN_BLOCK, triton.next_power_of_2(extent)))
