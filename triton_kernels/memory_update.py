"""Triton kernel and launcher of `pyext.ops.memory_update`, whose docstring holds the equation.

The program of the first image that has a row moves it for all images that have it, in the order of the batch, so no
two programs write the same row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

if triton.knobs.runtime.interpret:
    from . import interpreter  # noqa: F401  (repairs loop bounds under NumPy 2.4)

LEAST_NORM = 1e-12


@triton.jit
def update_kernel(
    bank, embeddings, index, samples, pitch, images, features, momentum, least_norm,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Moves the row of image program_id(0), unless an earlier image has the same row."""
    image = tl.program_id(0)
    row = tl.load(index + image)
    earlier = 0
    for start in range(0, image, BLOCK_B):
        other = start + tl.arange(0, BLOCK_B)
        same = tl.load(index + other, other < image, -1) == row
        earlier += tl.sum((same & (other < image)).to(tl.int32), axis=0)
    if (earlier == 0) & (row >= 0) & (row < samples):
        column = tl.arange(0, BLOCK_D)
        x = tl.load(bank + row * pitch + column, column < features, 0.0).to(tl.float32)
        for other in range(image, images):
            same = tl.load(index + other) == row
            at = embeddings + tl.cast(other, tl.int64) * features + column
            v = tl.load(at, same & (column < features), 0.0).to(tl.float32)
            moved = momentum * x + (1.0 - momentum) * v
            norm = tl.sqrt_rn(tl.sum(moved * moved, axis=0))
            moved = moved / tl.where(norm < least_norm, least_norm, norm)
            x = tl.where(same, moved.to(bank.dtype.element_ty).to(tl.float32), x)
        tl.store(bank + row * pitch + column, x.to(bank.dtype.element_ty), column < features)


@torch.no_grad()
def update(banks: Sequence[Tensor], embeddings: Tensor, index: Tensor, momentum: float) -> None:
    """Moves the banks' rows in place."""
    _, images, features = embeddings.shape
    if images == 0:
        return
    embeddings, index = embeddings.contiguous(), index.contiguous()
    with torch.cuda.device_of(embeddings):
        for bank, embedding in zip(banks, embeddings, strict=True):
            update_kernel[(images,)](
                bank, embedding, index, len(bank), bank.stride(0), images, features, momentum, LEAST_NORM,
                BLOCK_B=256, BLOCK_D=triton.next_power_of_2(features),
            )  # fmt: skip
