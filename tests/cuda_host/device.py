"""Global memory of the CUDA host shim: what is allocated here is all that a kernel can reach besides shared memory."""

from __future__ import annotations

import ctypes

import torch
from cuda_host.library import Library
from torch import Tensor

ALIGNMENT = 16


class Device:
    """Tensors in the shim's global memory. Nothing but their elements is in bounds, not even what lies between them."""

    def __init__(self, library: Library) -> None:
        self._functions = library.functions
        self._functions.device_allocate.restype = ctypes.c_void_p

    def copy(self, name: str, x: Tensor, writable: bool = False) -> Tensor:
        """`x` with its strides and its alignment, which kernels may read, and write only if it is `writable`."""
        result = self.empty_like(name, x)
        if x.numel() > 0:
            _stretch(result).copy_(_stretch(x))
        self._expose(result, written=True, frozen=not writable)
        return result

    def empty_like(self, name: str, x: Tensor) -> Tensor:
        """NaN, with the strides and the alignment of `x`; a kernel that reads an element must have written it."""
        if x.numel() == 0:
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
        lead = x.data_ptr() % ALIGNMENT
        size = lead + _extent(x) * x.element_size()
        address = self._functions.device_allocate(name.encode(), ctypes.c_size_t(size))
        if address is None:
            raise MemoryError("the shim's global memory is full")
        whole = torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)
        result = whole[lead:].view(x.dtype).as_strided(x.shape, x.stride())
        self._expose(result, written=False, frozen=False)
        return result

    def empty(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.empty_like(name, torch.empty(shape, dtype=dtype))

    def freeze(self, x: Tensor) -> Tensor:
        """From here on kernels may read `x` and not write it."""
        self._expose(x, written=True, frozen=True)
        return x

    def reset(self) -> None:
        self._functions.device_reset()

    def _expose(self, x: Tensor, written: bool, frozen: bool) -> None:
        if x.numel() == 0:
            return
        offsets = torch.zeros((), dtype=torch.int64)
        for size, stride in zip(x.shape, x.stride(), strict=True):
            offsets = offsets.unsqueeze(-1) + stride * torch.arange(size)
        elements = torch.zeros(_extent(x), dtype=torch.uint8)
        elements[offsets.flatten()] = 1
        mask = elements.repeat_interleave(x.element_size())
        self._functions.device_expose(
            ctypes.c_void_p(x.data_ptr()),
            ctypes.c_void_p(mask.data_ptr()),
            ctypes.c_size_t(mask.numel()),
            int(written),
            int(frozen),
        )


def _extent(x: Tensor) -> int:
    """Elements from the first to the last in memory."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _stretch(x: Tensor) -> Tensor:
    """All memory from the first element of `x` to the last, as one dimension."""
    return x.as_strided((_extent(x),), (1,))
