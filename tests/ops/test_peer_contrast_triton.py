"""Numerics of the Triton kernels of `peer_contrast`, by Triton's interpreter on CPU tensors, against float64."""

from __future__ import annotations

import pytest
import torch
from exactness import assert_as_exact
from peer_inputs import PeerInputs, make_peer_inputs, plain_contrast, terms_and_gradient

from pyext.ops import peer_contrast

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One tile and several, of rows, columns and chunks of features; one pair of peers and several.
SHAPES = {
    "one of everything": (1, 1, 1),
    "one peer": (1, 70, 5),
    "two": (2, 19, 7),
    "several tiles": (2, 70, 150),
    "three": (3, 21, 3),
    "five": (5, 9, 4),
}


def on_triton(embeddings, labels, temperature, soft_temperature, rows):
    return peer_contrast(
        embeddings, labels, temperature=temperature, soft_temperature=soft_temperature, rows=rows, backend="triton"
    )


def check(case: PeerInputs) -> None:
    actual = dict(zip(("terms", "gradient"), terms_and_gradient(on_triton, *case), strict=True))
    assert_as_exact(plain_contrast(case), case.embeddings, [], [], actual)


def run_covering_checks(dtype: torch.dtype) -> None:
    """Runs every kernel on inputs of `dtype`; test_kernel_coverage.py finds this function by its name."""
    check(make_peer_inputs((3, 7, 3), dtype, temperature=0.01))


@pytest.mark.parametrize("temperature", [0.1, 0.01], ids=["unshifted", "shifted"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_contrast(shape, dtype, temperature):
    check(make_peer_inputs(shape, dtype, temperature))
