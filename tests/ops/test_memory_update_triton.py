"""Numerics of the Triton kernel of `memory_update`, by Triton's interpreter on CPU tensors, against float64."""

from __future__ import annotations

import pytest
import torch
from exactness import assert_as_exact
from memory_inputs import in_larger_rows, make_memory_inputs, plain_update

from pyext.ops import memory_update

MOMENTUM = 0.3
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(dtype: torch.dtype, rows: list[int], features: int = 37) -> None:
    case, index = make_memory_inputs((3, len(rows), features, 9, 4), dtype), torch.tensor(rows)
    moved = [in_larger_rows(bank) for bank in case.banks]
    memory_update(moved, case.embeddings, index, momentum=MOMENTUM, backend="triton")
    named = {f"banks[{i}]": bank for i, bank in enumerate(moved)}
    assert_as_exact(plain_update(index, MOMENTUM), case.embeddings, [], case.banks, named)
    untouched = [row for row in range(9) if row not in rows]
    assert all(torch.equal(a[untouched], b[untouched]) for a, b in zip(moved, case.banks, strict=True))


def run_covering_checks(dtype: torch.dtype) -> None:
    """Runs the kernel on inputs of `dtype`; test_kernel_coverage.py finds this function by its name."""
    check(dtype, [2, 6, 2])


@pytest.mark.parametrize("features", [1, 37, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [[3, 0, 5], [4, 4, 4], [2, 6, 2]], ids=str)
def test_rows_move(rows, dtype, features):
    check(dtype, rows, features)


def test_what_is_no_row_is_skipped():
    case = make_memory_inputs((2, 3, 5, 9, 4), torch.float32)
    moved = [bank.clone() for bank in case.banks]
    memory_update(moved, case.embeddings, torch.tensor([-1, 9, 2**40]), backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(moved, case.banks, strict=True))
