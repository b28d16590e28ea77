"""Numerics of the Triton kernels of `peer_contrast`, by Triton's interpreter on CPU tensors, against float64."""

from __future__ import annotations

import pytest
import torch
from exactness import assert_as_exact
from peer_inputs import (
    SHAPES,
    VARIANTS,
    PeerInputs,
    assert_nan_where_plain_torch_has_it,
    make_peer_inputs,
    make_peer_variants,
    make_peers_with_nan,
    plain_contrast,
    terms_and_gradient,
)
from torch import Tensor

from pyext.ops import peer_contrast

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def on_triton(embeddings, labels, temperature, soft_temperature, rows):
    return peer_contrast(
        embeddings, labels, temperature=temperature, soft_temperature=soft_temperature, rows=rows, backend="triton"
    )


def run(case: PeerInputs) -> dict[str, Tensor]:
    return dict(zip(("terms", "gradient"), terms_and_gradient(on_triton, *case), strict=True))


def check(case: PeerInputs) -> None:
    assert_as_exact(plain_contrast(case), case.embeddings, [], [], run(case))


def run_covering_checks(dtype: torch.dtype) -> None:
    """Runs every kernel on inputs of `dtype`; test_kernel_coverage.py finds this function by its name."""
    check(make_peer_inputs((3, 7, 3), dtype, temperature=0.01))


@pytest.mark.parametrize("temperature", [0.1, 0.01], ids=["unshifted", "shifted"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_contrast(shape, dtype, temperature):
    check(make_peer_inputs(shape, dtype, temperature))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant, dtype):
    check(make_peer_variants(dtype)[variant])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_embeddings(dtype):
    case = make_peers_with_nan(dtype)
    assert_nan_where_plain_torch_has_it(case, run(case))
