"""Numerics of the Triton kernels of `memory_contrast`, by Triton's interpreter on CPU tensors, against float64."""

from __future__ import annotations

import functools

import pytest
import torch
from exactness import assert_as_exact
from memory_inputs import SHAPES, MemoryInputs, in_larger_rows, loss_and_gradient, make_memory_inputs, plain_contrast

from pyext.ops import memory_contrast
from pyext.triton_kernels import memory_contrast as kernels

on_triton = functools.partial(memory_contrast, backend="triton")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Several stretches of the backward pass and several blocks of the weights.
LARGE = {"several stretches": (3, 2, 7, 40, kernels.SPLIT + kernels.WEIGHT_BLOCK + 5)}


def check(case: MemoryInputs) -> None:
    actual = dict(zip(("loss", "gradient"), loss_and_gradient(case, on_triton), strict=True))
    assert_as_exact(plain_contrast(case.indices), case.embeddings, [], case.banks, actual)


def run_covering_checks(dtype: torch.dtype) -> None:
    """Runs every kernel on inputs of `dtype`; test_kernel_coverage.py finds this function by its name."""
    check(make_memory_inputs(SHAPES["few"], dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", (SHAPES | LARGE).values(), ids=SHAPES | LARGE)
def test_loss_and_gradient(shape, dtype):
    check(make_memory_inputs(shape, dtype))


def test_banks_of_another_dtype_in_wider_rows():
    case = make_memory_inputs(SHAPES["few"], torch.float32, torch.bfloat16)
    check(case._replace(banks=[in_larger_rows(bank) for bank in case.banks]))


def test_runs_are_bit_equal():
    case = make_memory_inputs(SHAPES["whole vectors"], torch.float32)
    first, second = (loss_and_gradient(case, on_triton) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("index", [-1, 11, 2**32 + 3])
def test_what_is_no_row_gives_nan(index):
    case = make_memory_inputs(SHAPES["few"], torch.float32)
    case.indices[2, 3] = index
    loss, gradient = loss_and_gradient(case, on_triton)
    assert loss.isnan()
    assert gradient.isnan().any()
