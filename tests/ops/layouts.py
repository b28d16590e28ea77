"""Memory layouts and values that tensors of any operator are given in tests; its description says which."""

from __future__ import annotations

import torch
from torch import Tensor

NAN = float("nan")


def _slice_of(x: Tensor, dim: int) -> Tensor:
    """`x` as a slice along `dim` of a larger tensor whose other elements are NaN."""
    shape = list(x.shape)
    shape[dim] += 5
    larger = x.new_full(shape, NAN).narrow(dim, 2, x.shape[dim])
    return larger.copy_(x)


def _every_other(x: Tensor, dim: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] *= 2
    return x.new_full(shape, NAN).unflatten(dim, (-1, 2)).select(dim + 1, 1).copy_(x)


def _odd_address(x: Tensor) -> Tensor:
    return x.new_full((x.numel() + 1,), NAN)[1:].view(x.shape).copy_(x)


MAPS = {
    "nchw": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "slice": lambda x: _slice_of(x, 1),
    "slice of rows": lambda x: _slice_of(x, 2),
    "slice of columns": lambda x: _slice_of(x, 3),
    "slice of channels_last": lambda x: _slice_of(x.permute(0, 2, 3, 1).contiguous(), 3).permute(0, 3, 1, 2),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "images innermost": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "every other image": lambda x: _every_other(x, 0),
    "every other column": lambda x: _every_other(x, 3),
    "odd address": _odd_address,
    "one image for all": lambda x: x[:1].expand_as(x),
    "one channel for all": lambda x: x[:, :1].expand_as(x),
    "one row for all": lambda x: x[:, :, :1].expand_as(x),
    "one column for all": lambda x: x[..., :1].expand_as(x),
}
"""Layouts of (N, C, H, W). Those "for all" change values: several elements share one place in memory."""
STACKS = {
    "dense": lambda x: x.contiguous(),
    "stack's slice of rows": lambda x: _slice_of(x, 1),
    "stack's slice of columns": lambda x: _slice_of(x, 2),
    "stack transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "rows first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every other matrix": lambda x: _every_other(x, 0),
    "every other column of a stack": lambda x: _every_other(x, 2),
    "stack at an odd address": _odd_address,
    "one matrix for all": lambda x: x[:1].expand_as(x),
    "one row of a matrix for all": lambda x: x[:, :1].expand_as(x),
}
"""Layouts of a stack of matrices (M, B, D)."""
SCALARS = {"scalar": lambda x: x.contiguous(), "scalar in a vector": lambda x: _every_other(x[None], 0)[0]}
LAYOUTS = MAPS | STACKS | SCALARS
WRITABLE = [name for name in LAYOUTS if not name.endswith("for all")]
"""Layouts for a tensor that is written: one place in memory for every element."""


def in_layout(x: Tensor, layout: str) -> Tensor:
    """`x` with the strides that `layout`, a name in `LAYOUTS`, stands for."""
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}, expected one of {', '.join(LAYOUTS)}")
    return LAYOUTS[layout](x)


def _sparse(x: Tensor) -> Tensor:
    return torch.where(x > 1, x, 0)


VALUES = {
    "normal": lambda x: x,
    "large": lambda x: 100 * x,
    "small": lambda x: 1e-3 * x,
    "denormal": lambda x: 1e-40 * x,
    "far from zero": lambda x: 50 + 0.1 * x,
    "constant": lambda x: torch.full_like(x, 1.5),
    "zero": torch.zeros_like,
    "mostly zero": _sparse,
}
"""Finite values, from normal ones in float64."""


def spoil(x: Tensor, value: float, generator: torch.Generator) -> Tensor:
    """A copy of `x`, strides kept, with `value` in one place."""
    spoilt = x.clone()
    if x.numel():
        place = int(torch.randint(x.numel(), (), generator=generator))
        spoilt[tuple(int(i) for i in torch.unravel_index(torch.tensor(place), x.shape))] = value
    return spoilt
