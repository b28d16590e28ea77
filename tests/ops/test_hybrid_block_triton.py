"""Numerics of the Triton kernels of `hybrid_block`, by Triton's interpreter on CPU tensors, against float64."""

from __future__ import annotations

import pytest
import torch
from exactness import assert_as_exact
from hybrid_device import BLOCKS, DTYPES, Case, make_case

from pyext._backend import BackendError
from pyext.ops import hybrid_block


def run(case: Case) -> torch.Tensor:
    return hybrid_block(case.x, case.tensors, stride=case.extents.stride, dense=case.extents.dense, backend="triton")


def check(case: Case) -> None:
    actual = run(case)
    assert actual.is_contiguous()
    assert_as_exact(case.evaluate, case.x, case.tensors, [], {"out": actual})


def run_covering_checks(dtype: torch.dtype) -> None:
    """Runs every kernel on inputs of `dtype`; test_kernel_coverage.py finds this function by its name."""
    check(make_case("two modules in groups", dtype))


@pytest.mark.parametrize("name", BLOCKS)
def test_inference(name):
    check(make_case(name, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", ["two modules in groups", "transition"])
def test_inference_in_half_precision(name, dtype):
    check(make_case(name, dtype))


@pytest.mark.parametrize("name", ["two modules in groups", "transition"])
def test_layouts_and_float32_tensors(name):
    case = make_case(name, torch.bfloat16, torch.float32)
    check(case._replace(x=case.x.contiguous(memory_format=torch.channels_last)))


def test_tensors_of_both_dtypes():
    case = make_case("two modules in groups", torch.float16)
    actual = run(case._replace(tensors=[t.float() if i % 2 else t for i, t in enumerate(case.tensors)]))
    assert_as_exact(case.evaluate, case.x, case.tensors, [], {"out": actual})  # plain torch takes one dtype


def test_no_image():
    case = make_case("transition", torch.float32)
    assert run(case._replace(x=case.x[:0])).shape == (0, 4, 4, 3)


def test_gradients_and_float64_are_refused():
    case = make_case("transition", torch.float32)
    with pytest.raises(BackendError, match="gradients are asked for"):
        run(case._replace(x=case.x.requires_grad_()))
    with pytest.raises(BackendError, match="float64"):
        run(make_case("transition", torch.float64))
