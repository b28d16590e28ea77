"""The CUDA kernels of `memory_update`, run on the CPU by the host shim in tests/cuda_host, against float64."""

from __future__ import annotations

import ctypes

import pytest
import torch
from cuda_host.device import Device
from cuda_host.library import Library
from exactness import assert_as_exact, doubled
from memory_device import DTYPE_CODES, DeviceBanks, set_up
from memory_inputs import MemoryInputs, in_larger_rows, make_memory_inputs, plain_update
from torch import Tensor

MOMENTUM = 0.3
SHAPE = (3, 3, 37, 9, 4)


class Inputs(ctypes.Structure):
    _fields_ = [
        ("sizes", ctypes.c_int64 * 4),
        ("dtype", ctypes.c_int32),
        ("banks", ctypes.c_void_p),
        ("pitch", ctypes.c_void_p),
        ("embeddings", ctypes.c_void_p),
        ("index", ctypes.c_void_p),
        ("momentum", ctypes.c_float),
    ]


def update(library: Library, device: Device, case: MemoryInputs, index: Tensor, descending: bool) -> list[Tensor]:
    """Copies of the banks after the update."""
    set_up(library.functions, descending)
    banks = DeviceBanks(device, [in_larger_rows(bank) for bank in case.banks], writable=True)
    embeddings = device.copy("embeddings", case.embeddings.float().contiguous())
    peers, batch, features = embeddings.shape
    inputs = Inputs(
        (ctypes.c_int64 * 4)(peers, batch, features, len(case.banks[0])),
        banks.code,
        banks.addresses,
        banks.pitch,
        embeddings.data_ptr(),
        device.copy("index", index).data_ptr(),
        MOMENTUM,
    )
    library.call("memory_update", ctypes.byref(inputs))
    return banks.tensors


def check(library: Library, device: Device, dtype: torch.dtype, rows: list[int], descending: bool = False) -> None:
    case, index = make_memory_inputs(SHAPE, dtype), torch.tensor(rows)
    library.forget_launches()
    actual = update(library, device, case, index, descending)
    evaluate = plain_update(index, MOMENTUM)
    named = {f"banks[{i}]": bank for i, bank in enumerate(actual)}
    assert_as_exact(evaluate, case.embeddings, [], case.banks, named)
    library.verify_launches(evaluate(case.embeddings.double(), [], doubled(case.banks)))
    untouched = [row for row in range(len(case.banks[0])) if row not in rows]
    assert all(torch.equal(a[untouched], b[untouched]) for a, b in zip(actual, case.banks, strict=True))


def run_covering_checks(library: Library, device: Device) -> None:
    """Runs every instance of the kernel; test_kernel_coverage.py finds this function by its name."""
    for dtype in DTYPE_CODES:
        check(library, device, dtype, [2, 6, 2])
        device.reset()


@pytest.mark.parametrize("descending", [False, True], ids=["ascending", "descending"])
@pytest.mark.parametrize("dtype", DTYPE_CODES, ids=str)
@pytest.mark.parametrize("rows", [[3, 0, 5], [4, 4, 4], [2, 6, 2]], ids=str)
def test_update(library, device, rows, dtype, descending):
    check(library, device, dtype, rows, descending)


def test_what_is_no_row_is_skipped(library, device):
    case = make_memory_inputs(SHAPE, torch.float32)
    actual = update(library, device, case, torch.tensor([-1, 9, 2**40]), False)
    assert all(torch.equal(a, b) for a, b in zip(actual, case.banks, strict=True))
