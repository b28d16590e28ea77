"""The CUDA kernels of `hybrid_block`, run on the CPU by the host shim in tests/cuda_host, against float64."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
from block_inputs import DEVICE_BLOCKS, DEVICE_DTYPES, make_block, plain
from cuda_host.device import Device
from cuda_host.library import Library
from exactness import assert_as_exact, doubled
from layouts import in_layout
from memory_device import DTYPE_CODES, pointer, set_up
from torch import Tensor

from pyext.ops.hybrid_block import Extents


class Block(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int32),
        ("parameter_dtype", ctypes.c_int32),
        ("sizes", ctypes.c_int64 * 11),
        ("dense", ctypes.c_bool),
        ("x", ctypes.c_void_p),
        ("strides", ctypes.c_int64 * 4),
        ("tensors", ctypes.c_void_p),
        ("eps", ctypes.c_float),
    ]


def result_of(x: Tensor, extents: Extents) -> Tensor:
    """What `forward` is given to write: NaN, after the input's channels in a dense block."""
    images, channels, height, width = x.shape
    out_channels = channels + extents.modules * extents.growth if extents.dense else extents.growth
    height, width = ((n - 1) // extents.stride + 1 for n in (height, width))
    out = x.new_full((images, out_channels, height, width), torch.nan)
    if extents.dense:
        out[:, :channels] = x
    return out


def run(
    library: Library, device: Device, x: Tensor, tensors: list[Tensor], extents: Extents, descending: bool = False
) -> Tensor:
    set_up(library.functions, descending)
    out = device.copy("out", result_of(x, extents), writable=True)
    x = device.copy("x", x)
    tensors = [device.copy(f"tensors[{i}]", t) for i, t in enumerate(tensors)]
    addresses = (ctypes.c_void_p * len(tensors))(*[t.data_ptr() for t in tensors])
    block = Block(
        DTYPE_CODES[x.dtype],
        DTYPE_CODES[tensors[0].dtype],
        (ctypes.c_int64 * 11)(*x.shape, *extents[:-1]),
        extents.dense,
        x.data_ptr(),
        (ctypes.c_int64 * 4)(*x.stride()),
        ctypes.addressof(addresses),
        1e-5,
    )
    size = ctypes.c_size_t()
    library.call("hybrid_block_workspace_bytes", ctypes.byref(block), ctypes.byref(size))
    workspace = device.empty("workspace", size.value, dtype=torch.uint8)
    library.call("hybrid_block_forward", ctypes.byref(block), pointer(out), pointer(workspace))
    return out


def check(library: Library, device: Device, name: str, x: Tensor, tensors: list[Tensor]) -> None:
    extents = DEVICE_BLOCKS[name].extents
    evaluate = plain(extents)
    library.forget_launches()
    actual = run(library, device, x, tensors, extents)
    assert_as_exact(evaluate, x, tensors, [], {"out": actual})
    library.verify_launches(evaluate(x.double(), doubled(tensors), []))


def run_covering_checks(library: Library, device: Device) -> None:
    """Runs every instance of every kernel; test_kernel_coverage.py finds this function by its name."""
    for dtype, tensor_dtype in itertools.product(DEVICE_DTYPES, (None, torch.float32)):
        check(library, device, "transition", *make_block(DEVICE_BLOCKS["transition"], dtype, tensor_dtype))
        device.reset()


@pytest.mark.parametrize("dtype", DEVICE_DTYPES, ids=str)
@pytest.mark.parametrize("name", DEVICE_BLOCKS)
def test_inference(library, device, name, dtype):
    check(library, device, name, *make_block(DEVICE_BLOCKS[name], dtype))


@pytest.mark.parametrize("layout", ["channels_last", "slice of columns", "one row for all"])
@pytest.mark.parametrize("dtype", DEVICE_DTYPES, ids=str)
def test_float32_tensors_and_any_layout(library, device, dtype, layout):
    x, tensors = make_block(DEVICE_BLOCKS["transition"], dtype, torch.float32)
    check(library, device, "transition", in_layout(x, layout), tensors)


# A missing barrier shows when the threads of a block take their turns in another order.
@pytest.mark.parametrize("dtype", DEVICE_DTYPES, ids=str)
@pytest.mark.parametrize("name", ["several slices", "several tiles", "two modules in groups", "transition"])
def test_results_are_the_same_bits_in_any_order_of_threads(library, device, name, dtype):
    call = (*make_block(DEVICE_BLOCKS[name], dtype), DEVICE_BLOCKS[name].extents)
    first, second = (run(library, device, *call, descending) for descending in (False, True))
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", DEVICE_DTYPES, ids=str)
def test_not_a_number_reaches_what_depends_on_it(library, device, dtype):
    """The gates carry it to all that a module gives to its image, and nowhere else."""
    block = DEVICE_BLOCKS["two modules in groups"]
    x, tensors = make_block(block, dtype)
    x[1, 2, 3, 4] = torch.nan
    out = run(library, device, x, tensors, block.extents)
    assert out[1, block.channels :].isnan().all()
    assert not out[0].isnan().any()
