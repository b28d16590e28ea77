"""Numerics of the Triton kernels of `hybrid_block`, by Triton's interpreter on CPU tensors, against float64."""

from __future__ import annotations

import pytest
import torch
from block_inputs import DEVICE_BLOCKS, DEVICE_DTYPES, make_block, plain
from exactness import assert_as_exact
from layouts import in_layout
from torch import Tensor

from pyext._backend import BackendError
from pyext.ops import hybrid_block


def run(name: str, x: Tensor, tensors: list[Tensor]) -> Tensor:
    extents = DEVICE_BLOCKS[name].extents
    return hybrid_block(x, tensors, stride=extents.stride, dense=extents.dense, backend="triton")


def check(name: str, x: Tensor, tensors: list[Tensor]) -> None:
    actual = run(name, x, tensors)
    assert actual.is_contiguous()
    assert_as_exact(plain(DEVICE_BLOCKS[name].extents), x, tensors, [], {"out": actual})


def run_covering_checks(dtype: torch.dtype) -> None:
    """Runs every kernel on inputs of `dtype`; test_kernel_coverage.py finds this function by its name."""
    check("transition", *make_block(DEVICE_BLOCKS["transition"], dtype))


@pytest.mark.parametrize("name", DEVICE_BLOCKS)
def test_inference(name):
    check(name, *make_block(DEVICE_BLOCKS[name], torch.float32))


@pytest.mark.parametrize("dtype", DEVICE_DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", ["two modules in groups", "several slices"])
def test_inference_in_half_precision(name, dtype):
    check(name, *make_block(DEVICE_BLOCKS[name], dtype))


@pytest.mark.parametrize("layout", ["channels_last", "slice of columns", "one row for all"])
def test_float32_tensors_and_any_layout(layout):
    x, tensors = make_block(DEVICE_BLOCKS["transition"], torch.bfloat16, torch.float32)
    check("transition", in_layout(x, layout), tensors)


def test_tensors_of_both_dtypes():
    x, tensors = make_block(DEVICE_BLOCKS["transition"], torch.float16)
    check("transition", x, [t.float() if i % 2 else t for i, t in enumerate(tensors)])


@pytest.mark.filterwarnings("ignore:All-NaN slice", "ignore:invalid value")
def test_not_a_number_reaches_what_depends_on_it():
    """The gates carry it to all that a module gives to its image, and nowhere else."""
    block = DEVICE_BLOCKS["two modules in groups"]
    x, tensors = make_block(block, torch.float32)
    x[1, 2, 3, 4] = torch.nan
    out = run("two modules in groups", x, tensors)
    assert out[1, block.channels :].isnan().all()
    assert not out[0].isnan().any()


def test_no_image():
    x, tensors = make_block(DEVICE_BLOCKS["transition"], torch.float32)
    assert run("transition", x[:0], tensors).shape == (0, 4, 4, 3)


def test_gradients_and_float64_are_refused():
    x, tensors = make_block(DEVICE_BLOCKS["transition"], torch.float32)
    with pytest.raises(BackendError, match="gradients are asked for"):
        run("transition", x.requires_grad_(), tensors)
    with pytest.raises(BackendError, match="float64"):
        run("transition", *make_block(DEVICE_BLOCKS["transition"], torch.float64))
