"""The CUDA kernels of `memory_contrast` and `memory_update`, run on the CPU by the host shim, against float64."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from memory_inputs import (
    SHAPES,
    TEMPERATURE,
    MemoryInputs,
    assert_banks_are_exact,
    assert_contrast_is_exact,
    in_float64,
    make_memory_inputs,
)
from torch import Tensor

from pyext.ops.memory_update import reference as update_reference

ROOT = Path(__file__).resolve().parents[2]
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Several blocks of rows in both passes, and more columns than one block of the backward pass has.
LARGE = {"several blocks": (3, 2, 150, 40, 600)}


class Inputs(ctypes.Structure):
    _fields_ = [
        ("sizes", ctypes.c_int64 * 5),
        ("dtype", ctypes.c_int32),
        ("banks", ctypes.c_void_p),
        ("pitch", ctypes.c_void_p),
        ("embeddings", ctypes.c_void_p),
        ("temperature", ctypes.c_float),
    ]


class UpdateInputs(ctypes.Structure):
    _fields_ = [
        ("sizes", ctypes.c_int64 * 4),
        ("dtype", ctypes.c_int32),
        ("banks", ctypes.c_void_p),
        ("pitch", ctypes.c_void_p),
        ("embeddings", ctypes.c_void_p),
        ("index", ctypes.c_void_p),
        ("momentum", ctypes.c_float),
    ]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels compiled by the host compiler, loaded."""
    target = tmp_path_factory.mktemp("cuda_host") / "memory_contrast.so"
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    sources = [ROOT / "tests/cuda_host/memory_contrast_entry.cpp", "-x", "c++"]
    sources += sorted((ROOT / "csrc/cuda").glob("memory_*.cu"))
    flags = ["-std=c++17", "-O2", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    flags += ["-shared", "-fPIC"]
    include = ["-I", ROOT / "tests/cuda_host", "-I", ROOT / "csrc"]
    done = subprocess.run([compiler, *flags, *include, "-o", target, *sources], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(target))
    for name in ("forward", "backward", "update"):
        getattr(loaded, name).restype = ctypes.c_char_p
    for name in ("forward_workspace_bytes", "backward_workspace_bytes"):
        getattr(loaded, name).restype = ctypes.c_size_t
    return loaded


@pytest.fixture(params=[False, True], ids=["ascending", "descending"])
def kernels(library, request) -> ctypes.CDLL:
    """The library, its threads taking turns in either order: a kernel that minds lacks a barrier."""
    library.set_descending_threads(int(request.param))
    return library


def run(function, *arguments) -> None:
    message = function(*arguments)
    if message is not None:
        raise RuntimeError(message.decode())


def pointer(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def bank_arrays(banks: list[Tensor]) -> tuple[ctypes.Array, ctypes.Array]:
    addresses = (ctypes.c_void_p * len(banks))(*[bank.data_ptr() for bank in banks])
    return addresses, (ctypes.c_int64 * len(banks))(*[bank.stride(0) for bank in banks])


def in_larger_rows(bank: Tensor) -> Tensor:
    """`bank` as columns of a wider tensor of NaN: rows are not adjacent, nor aligned."""
    wide = torch.full((bank.shape[0], bank.shape[1] + 3), float("nan"), dtype=bank.dtype)
    return wide[:, 1:-2].copy_(bank)


def workspace(measure, inputs: Inputs) -> Tensor:
    return torch.full((measure(ctypes.byref(inputs)) // 8 + 2,), float("nan"), dtype=torch.float64)


def contrast(library: ctypes.CDLL, case: MemoryInputs, scale: float = 1.7) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradient times `scale`, and the rows that forward found valid."""
    peers, batch, features = case.embeddings.shape
    entries, floats = case.indices.shape[1], case.embeddings.float().contiguous()
    addresses, pitch = bank_arrays(case.banks)
    inputs = Inputs(
        (ctypes.c_int64 * 5)(peers, batch, entries, features, len(case.banks[0])),
        DTYPE_CODES[case.banks[0].dtype],
        ctypes.addressof(addresses),
        ctypes.addressof(pitch),
        floats.data_ptr(),
        TEMPERATURE,
    )
    rows = torch.full((batch, entries), -7, dtype=torch.int32)
    weights = torch.full((peers, peers - 1, batch, entries), float("nan"))
    loss, gradient = torch.full((), float("nan")), torch.full_like(floats, float("nan"))
    space = workspace(library.forward_workspace_bytes, inputs)
    run(library.forward, ctypes.byref(inputs), *map(pointer, (case.indices, rows, weights, loss, space)))
    space = workspace(library.backward_workspace_bytes, inputs)
    grad_loss = torch.tensor(scale)
    run(library.backward, ctypes.byref(inputs), *map(pointer, (rows, weights, grad_loss, gradient, space)))
    return loss * scale, gradient.to(case.embeddings.dtype), rows


def update(library: ctypes.CDLL, banks: list[Tensor], embeddings: Tensor, index: Tensor, momentum: float) -> None:
    floats = embeddings.float().contiguous()
    peers, batch, features = floats.shape
    addresses, pitch = bank_arrays(banks)
    inputs = UpdateInputs(
        (ctypes.c_int64 * 4)(peers, batch, features, len(banks[0])),
        DTYPE_CODES[banks[0].dtype],
        ctypes.addressof(addresses),
        ctypes.addressof(pitch),
        floats.data_ptr(),
        index.data_ptr(),
        momentum,
    )
    run(library.update, ctypes.byref(inputs))


@pytest.mark.parametrize("dtype", DTYPE_CODES, ids=str)
@pytest.mark.parametrize("shape", (SHAPES | LARGE).values(), ids=SHAPES | LARGE)
def test_contrast(kernels, shape, dtype):
    case = make_memory_inputs(shape, dtype)
    case = case._replace(banks=[in_larger_rows(bank) for bank in case.banks])
    loss, gradient, rows = contrast(kernels, case)
    assert torch.equal(rows.long(), case.indices)
    assert_contrast_is_exact(case, (loss, gradient))


@pytest.mark.parametrize("index", [-1, 11, 2**40, 2**32 + 3])
def test_what_is_no_row_gives_nan(kernels, index):
    case = make_memory_inputs(SHAPES["few"], torch.float32)
    case.indices[2, 3] = index
    loss, gradient, rows = contrast(kernels, case)
    assert loss.isnan()
    assert gradient.isnan().any()
    assert rows[2, 3] == -1


@pytest.mark.parametrize("dtype", DTYPE_CODES, ids=str)
@pytest.mark.parametrize("index", [[3, 0, 5], [4, 4, 4], [2, 6, 2]], ids=str)
def test_update(kernels, index, dtype):
    case = make_memory_inputs((3, 3, 37, 9, 4), dtype)
    rows = torch.tensor(index)
    actual = [in_larger_rows(bank) for bank in case.banks]
    update(kernels, actual, case.embeddings, rows, 0.3)
    expected, truth = [b.clone() for b in case.banks], in_float64(case).banks
    update_reference(expected, case.embeddings, rows, 0.3)
    update_reference(truth, case.embeddings.double(), rows, 0.3)
    assert_banks_are_exact(actual, expected, truth)
    untouched = [r for r in range(9) if r not in index]
    assert all(torch.equal(a[untouched], b[untouched]) for a, b in zip(actual, case.banks, strict=True))


def test_update_skips_what_is_no_row(kernels):
    case = make_memory_inputs((2, 3, 5, 9, 4), torch.float32)
    actual = [bank.clone() for bank in case.banks]
    update(kernels, actual, case.embeddings, torch.tensor([-1, 9, 2**40]), 0.3)
    assert all(torch.equal(a, b) for a, b in zip(actual, case.banks, strict=True))
