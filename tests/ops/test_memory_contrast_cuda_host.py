"""The CUDA kernels of `memory_contrast`, run on the CPU by the host shim in tests/cuda_host, against float64."""

from __future__ import annotations

import ctypes

import pytest
import torch
from cuda_host.device import Device
from cuda_host.library import Library
from exactness import assert_as_exact, doubled
from memory_device import DTYPE_CODES, DeviceBanks, pointer, set_up
from memory_inputs import SCALE, SHAPES, TEMPERATURE, MemoryInputs, in_larger_rows, make_memory_inputs, plain_contrast
from torch import Tensor

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


def make_wide(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> MemoryInputs:
    case = make_memory_inputs(shape, dtype)
    return case._replace(banks=[in_larger_rows(bank) for bank in case.banks])


class Contrast:
    """The launchers on copies of a case's tensors in the shim's global memory."""

    def __init__(self, library: Library, device: Device, case: MemoryInputs, descending_threads: bool = False) -> None:
        set_up(library.functions, descending_threads)
        self._library, self._device, self._case = library, device, case
        peers, batch, features = case.embeddings.shape
        self._banks = DeviceBanks(device, case.banks)
        self._embeddings = device.copy("embeddings", case.embeddings.float().contiguous())
        self._inputs = Inputs(
            (ctypes.c_int64 * 5)(peers, batch, case.indices.shape[1], features, len(case.banks[0])),
            self._banks.code,
            self._banks.addresses,
            self._banks.pitch,
            self._embeddings.data_ptr(),
            TEMPERATURE,
        )
        self.rows = device.empty("rows", *case.indices.shape, dtype=torch.int32)
        self.weights = device.empty("weights", peers, peers - 1, *case.indices.shape)

    def forward(self) -> Tensor:
        loss = self._device.empty("loss", 1)
        indices = self._device.copy("indices", self._case.indices)
        self._run("forward", indices, self.rows, self.weights, loss)
        for saved in (self.rows, self.weights):
            self._device.freeze(saved)
        return SCALE * loss[0]

    def backward(self) -> Tensor:
        gradient = self._device.empty_like("grad_embeddings", self._embeddings)
        grad_loss = self._device.copy("grad_loss", torch.tensor([SCALE]))
        self._run("backward", self.rows, self.weights, grad_loss, gradient)
        return gradient.to(self._case.embeddings.dtype)

    def _run(self, which: str, *tensors: Tensor) -> None:
        size, inputs = ctypes.c_size_t(), ctypes.byref(self._inputs)
        self._library.call(f"memory_contrast_{which}_workspace_bytes", inputs, ctypes.byref(size))
        workspace = self._device.empty("workspace", size.value, dtype=torch.uint8)
        self._library.call(f"memory_contrast_{which}", inputs, *map(pointer, (*tensors, workspace)))


def check(library: Library, device: Device, case: MemoryInputs, descending_threads: bool = False) -> None:
    library.forget_launches()
    kernels = Contrast(library, device, case, descending_threads)
    actual = {"loss": kernels.forward(), "gradient": kernels.backward()}
    assert torch.equal(kernels.rows.long(), case.indices)
    evaluate = plain_contrast(case.indices)
    assert_as_exact(evaluate, case.embeddings, [], case.banks, actual)
    library.verify_launches(evaluate(case.embeddings.double(), [], doubled(case.banks)))


def run_covering_checks(library: Library, device: Device) -> None:
    """Runs every instance of every kernel; test_kernel_coverage.py finds this function by its name."""
    for dtype in DTYPE_CODES:
        check(library, device, make_wide(SHAPES["few"], dtype))
        device.reset()


@pytest.mark.parametrize("descending", [False, True], ids=["ascending", "descending"])
@pytest.mark.parametrize("dtype", DTYPE_CODES, ids=str)
@pytest.mark.parametrize("shape", (SHAPES | LARGE).values(), ids=SHAPES | LARGE)
def test_contrast(library, device, shape, dtype, descending):
    check(library, device, make_wide(shape, dtype), descending)


@pytest.mark.parametrize("index", [-1, 11, 2**40, 2**32 + 3])
def test_what_is_no_row_gives_nan(library, device, index):
    case = make_memory_inputs(SHAPES["few"], torch.float32)
    case.indices[2, 3] = index
    kernels = Contrast(library, device, case)
    assert kernels.forward().isnan()
    assert kernels.backward().isnan().any()
    assert kernels.rows[2, 3] == -1


# A missing barrier shows when the threads of a block take their turns in another order.
def test_results_are_the_same_bits_in_any_order_of_threads(library, device):
    results = []
    for descending in (False, True):
        kernels = Contrast(library, device, make_wide(LARGE["several blocks"], torch.float32), descending)
        results.append([kernels.forward(), kernels.weights, kernels.backward()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
