"""The memory-bank operators' arguments in the global memory of the CUDA host shim."""

from __future__ import annotations

import ctypes

import torch
from cuda_host.device import Device
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FULL_SHARED_MEMORY = 227 * 1024


def set_up(functions: ctypes.CDLL, descending_threads: bool) -> None:
    """What tests of other kernels may have left in another state."""
    functions.set_shared_memory_limit(ctypes.c_size_t(FULL_SHARED_MEMORY))
    functions.set_descending_threads(int(descending_threads))


def pointer(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


class DeviceBanks:
    """Banks on the device, and the arrays of the host that tell kernels where they are."""

    def __init__(self, device: Device, banks: list[Tensor], writable: bool = False) -> None:
        self.tensors = [device.copy(f"banks[{i}]", bank, writable) for i, bank in enumerate(banks)]
        self._addresses = (ctypes.c_void_p * len(banks))(*[bank.data_ptr() for bank in self.tensors])
        self._pitch = (ctypes.c_int64 * len(banks))(*[bank.stride(0) for bank in self.tensors])
        self.code = DTYPE_CODES[banks[0].dtype]
        self.addresses, self.pitch = ctypes.addressof(self._addresses), ctypes.addressof(self._pitch)
