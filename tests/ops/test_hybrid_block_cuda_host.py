"""The CUDA kernels of `hybrid_block`, run on the CPU by the host shim in tests/cuda_host, against float64."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
from cuda_host.device import Device
from cuda_host.library import Library
from exactness import assert_as_exact, doubled
from hybrid_device import BLOCKS, DTYPES, Case, make_case
from memory_device import DTYPE_CODES, pointer, set_up
from torch import Tensor


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


def run(library: Library, device: Device, case: Case, descending_threads: bool = False) -> Tensor:
    set_up(library.functions, descending_threads)
    images, channels, height, width = case.x.shape
    *extents, dense = case.extents
    stride, growth = case.extents.stride, case.extents.growth
    out_channels = channels + case.extents.modules * growth if dense else growth
    out = torch.full((images, out_channels, (height - 1) // stride + 1, (width - 1) // stride + 1), torch.nan)
    out = out.to(case.x.dtype)
    if dense:
        out[:, :channels] = case.x
    out = device.copy("out", out, writable=True)
    x = device.copy("x", case.x)
    tensors = [device.copy(f"tensors[{i}]", t) for i, t in enumerate(case.tensors)]
    addresses = (ctypes.c_void_p * len(tensors))(*[t.data_ptr() for t in tensors])
    block = Block(
        DTYPE_CODES[x.dtype],
        DTYPE_CODES[tensors[0].dtype],
        (ctypes.c_int64 * 11)(*case.x.shape, *extents),
        dense,
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


def check(library: Library, device: Device, case: Case, descending_threads: bool = False) -> None:
    library.forget_launches()
    actual = run(library, device, case, descending_threads)
    assert_as_exact(case.evaluate, case.x, case.tensors, [], {"out": actual})
    library.verify_launches(case.evaluate(case.x.double(), doubled(case.tensors), []))


def run_covering_checks(library: Library, device: Device) -> None:
    """Runs every instance of every kernel; test_kernel_coverage.py finds this function by its name."""
    for dtype, tensor_dtype in itertools.product(DTYPES, (None, torch.float32)):
        check(library, device, make_case("transition", dtype, tensor_dtype))
        device.reset()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_inference(library, device, name, dtype):
    check(library, device, make_case(name, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_tensors_and_channels_last(library, device, dtype):
    case = make_case("transition", dtype, torch.float32)
    check(library, device, case._replace(x=case.x.contiguous(memory_format=torch.channels_last)))


# A missing barrier shows when the threads of a block take their turns in another order.
def test_results_are_the_same_bits_in_any_order_of_threads(library, device):
    case = make_case("several slices, several tiles", torch.float32)
    first, second = (run(library, device, case, descending) for descending in (False, True))
    assert torch.equal(first, second)
