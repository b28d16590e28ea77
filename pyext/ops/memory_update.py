"""Momentum update of the memory banks, in place.

Source: MCL-OKD, arXiv 2006.04093. For every peer i and image b, in the order of the batch:

    M_i[index[b]] <- normalise(momentum * M_i[index[b]] + (1 - momentum) * v_i[b])

A row that occurs twice in a batch moves twice, the second time from where the first left it (rounded to the bank's
dtype), so the result is the same in every run. Rows are divided by at least 1e-12.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pyext import _backend
from pyext._operator import accumulate_dtype, backends, register_triton, triton_kernels
from pyext.ops.memory_contrast import validate_banks, validate_range

_OPS = torch.ops.pyext


def reference(banks: Sequence[Tensor], embeddings: Tensor, index: Tensor, momentum: float = 0.5) -> None:
    """The operator's definition in plain torch, one round for each time that a row occurs."""
    dtype = accumulate_dtype(embeddings.dtype)
    earlier = (index.unsqueeze(1) == index).tril(-1).sum(1)
    for occurrence in earlier.unique().tolist():
        chosen = earlier == occurrence
        for bank, embedding in zip(banks, embeddings.to(dtype), strict=True):
            moved = momentum * bank[index[chosen]].to(dtype) + (1 - momentum) * embedding[chosen]
            bank[index[chosen]] = F.normalize(moved, dim=1).to(bank.dtype)


def validate(banks: Sequence[Tensor], embeddings: Tensor, index: Tensor, momentum: float) -> None:
    """Raise TypeError, ValueError or (a number in `index`, on the CPU) IndexError naming the argument."""
    validate_banks("memory_update", embeddings, banks)
    if index.dim() != 1 or index.shape[0] != embeddings.shape[1]:
        raise ValueError(
            f"memory_update: index has shape {tuple(index.shape)}, expected ({embeddings.shape[1]},), one row per image"
        )
    if index.dtype != torch.int64:
        raise TypeError(f"memory_update: index has dtype {index.dtype}, expected int64")
    if index.device != embeddings.device:
        raise ValueError(f"memory_update: index is on {index.device}, expected {embeddings.device}")
    _validate_momentum(momentum)


def _validate_momentum(momentum: float) -> None:
    if not 0 <= momentum <= 1:
        raise ValueError(f"memory_update: momentum is {momentum}, expected 0 to 1")


OPERATOR = _backend.register(_backend.Operator("memory_update", backends("embeddings"), differentiable=False))


def memory_update(
    banks: Tensor | Sequence[Tensor],
    embeddings: Tensor,
    index: Tensor,
    *,
    momentum: float = 0.5,
    backend: str | None = None,
) -> None:
    """Move each bank's rows towards the batch's embeddings, in place; nothing is differentiated.

    Args:
        banks: M tensors (n, d), rows without gaps, or one tensor (M, n, d); dtypes as in `memory_contrast`.
        embeddings: (M, B, d), L2-normalised by the caller.
        index: (B,) int64, the row of each image. A number that is no row is an IndexError on the CPU; on a GPU, where a
            check would stall it, it is skipped.
        momentum: weight of the old row, 0 to 1.
        backend: overrides `pyext.backend` and ``PYEXT_BACKEND``.

    Raises:
        ValueError, TypeError, IndexError, BackendError: as `memory_contrast`; momentum outside of 0 to 1.

    Source: MCL-OKD, arXiv 2006.04093.
    """
    bank_list = list(banks.unbind()) if isinstance(banks, Tensor) else list(banks)
    name = OPERATOR.choose(backend, embeddings)
    _validate_momentum(momentum)
    embeddings = embeddings.detach()
    with torch.no_grad():
        if name == "reference":
            validate(bank_list, embeddings, index, momentum)
            validate_range("memory_update", "index", index, bank_list[0].shape[0])
            return reference(bank_list, embeddings, index, momentum)
        op = _OPS.memory_update_triton if name == "triton" else _OPS.memory_update
        try:
            op(bank_list, embeddings, index, momentum)
        except RuntimeError:
            validate(bank_list, embeddings, index, momentum)
            validate_range("memory_update", "index", index, bank_list[0].shape[0])
            raise
        if not torch.compiler.is_compiling():
            # A backward pass that still needs the old rows then says so; the dispatcher does not count for us.
            torch.autograd.graph.increment_version(bank_list)
    return None


def _fake_update(banks, embeddings, index, momentum):
    validate(banks, embeddings, index, momentum)


def _triton_update(*args):
    validate(*args)  # a kernel reads past the end of a tensor that is too short
    triton_kernels("memory_update").update(*args)


for _variant in ("", "_triton"):
    torch.library.register_fake(f"pyext::memory_update{_variant}")(_fake_update)
register_triton("memory_update_triton", _triton_update)
