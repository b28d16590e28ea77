"""The CUDA kernels of `peer_contrast`, run on the CPU by the host shim in tests/cuda_host, against float64."""

from __future__ import annotations

import ctypes

import pytest
import torch
from cuda_host.device import Device
from cuda_host.library import Library
from exactness import assert_as_exact
from memory_device import DTYPE_CODES, pointer, set_up
from peer_inputs import (
    SHAPES,
    VARIANTS,
    WEIGHTS,
    PeerInputs,
    assert_nan_where_plain_torch_has_it,
    make_peer_inputs,
    make_peer_variants,
    make_peers_with_nan,
    plain_contrast,
)
from torch import Tensor


class Inputs(ctypes.Structure):
    _fields_ = [
        ("sizes", ctypes.c_int64 * 5),
        ("dtype", ctypes.c_int32),
        ("embeddings", ctypes.c_void_p),
        ("strides", ctypes.c_int64 * 3),
        ("labels", ctypes.c_void_p),
        ("temperature", ctypes.c_double),
        ("soft_temperature", ctypes.c_double),
    ]


class Contrast:
    """The launchers on copies of a case's tensors in the shim's global memory."""

    def __init__(self, library: Library, device: Device, case: PeerInputs, descending_threads: bool = False) -> None:
        set_up(library.functions, descending_threads)
        self._library, self._device, self._case = library, device, case
        peers, batch, features = case.embeddings.shape
        self._embeddings = device.copy("embeddings", case.embeddings)
        self._labels = device.copy("labels", case.labels)
        self._inputs = Inputs(
            (ctypes.c_int64 * 5)(peers, batch, features, *case.rows),
            DTYPE_CODES[case.embeddings.dtype],
            self._embeddings.data_ptr(),
            (ctypes.c_int64 * 3)(*self._embeddings.stride()),
            self._labels.data_ptr(),
            case.temperature,
            case.soft_temperature,
        )
        self.normalisers = device.empty("normalisers", 4, peers, peers, batch)

    def forward(self) -> Tensor:
        terms = self._device.empty("terms", 4)
        self._run("forward", terms, self.normalisers)
        self._device.freeze(self.normalisers)
        return terms

    def backward(self) -> Tensor:
        gradient = self._device.empty(
            "grad_embeddings", *self._case.embeddings.shape, dtype=self._case.embeddings.dtype
        )
        grad_terms = self._device.copy("grad_terms", torch.tensor(WEIGHTS))
        self._run("backward", self.normalisers, grad_terms, gradient)
        return gradient

    def _run(self, which: str, *tensors: Tensor) -> None:
        size, inputs = ctypes.c_size_t(), ctypes.byref(self._inputs)
        self._library.call(f"peer_contrast_{which}_workspace_bytes", inputs, ctypes.byref(size))
        workspace = self._device.empty("workspace", size.value, dtype=torch.uint8)
        self._library.call(f"peer_contrast_{which}", inputs, *map(pointer, (*tensors, workspace)))


def run(library: Library, device: Device, case: PeerInputs, descending_threads: bool = False) -> dict[str, Tensor]:
    kernels = Contrast(library, device, case, descending_threads)
    return {"terms": kernels.forward(), "gradient": kernels.backward()}


def check(library: Library, device: Device, case: PeerInputs, descending_threads: bool = False) -> None:
    library.forget_launches()
    actual = run(library, device, case, descending_threads)
    evaluate = plain_contrast(case)
    assert_as_exact(evaluate, case.embeddings, [], [], actual)
    library.verify_launches(evaluate(case.embeddings.double(), [], []))


def run_covering_checks(library: Library, device: Device) -> None:
    """Runs every instance of every kernel; test_kernel_coverage.py finds this function by its name."""
    for dtype in DTYPE_CODES:
        for peers in (1, 2, 4):
            for temperature in (0.1, 0.01):
                check(library, device, make_peer_inputs((peers, 7, 3), dtype, temperature))
                device.reset()


@pytest.mark.parametrize("temperature", [0.1, 0.01], ids=["unshifted", "shifted"])
@pytest.mark.parametrize("dtype", DTYPE_CODES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_contrast(library, device, shape, dtype, temperature):
    check(library, device, make_peer_inputs(shape, dtype, temperature))


@pytest.mark.parametrize("dtype", DTYPE_CODES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(library, device, variant, dtype):
    check(library, device, make_peer_variants(dtype)[variant])


@pytest.mark.parametrize("dtype", DTYPE_CODES, ids=str)
def test_nan_embeddings(library, device, dtype):
    case = make_peers_with_nan(dtype)
    assert_nan_where_plain_torch_has_it(case, run(library, device, case))
