"""Runs the kernels of the shim's own tests, which get 64 floats to write and 64 to read: 0, 1, 2, …"""

from __future__ import annotations

import ctypes
import itertools

import torch
from cuda_host.device import Device
from cuda_host.library import Library
from torch import Tensor

FLOATS = 64


class Probes:
    """The set of probes called `which`: `broken` or `language`."""

    def __init__(self, library: Library, device: Device, which: str) -> None:
        self._library, self._device, self._which = library, device, which
        name_of = getattr(library.functions, f"{which}_name")
        name_of.restype = ctypes.c_char_p
        found = (name_of(ctypes.c_size_t(i)) for i in itertools.count())
        self.names = [name.decode() for name in itertools.takewhile(lambda name: name is not None, found)]

    def run(self, name: str, descending: bool = False, out: Tensor | None = None) -> Tensor:
        """Returns what the kernel wrote, into `out` where that is given: the result of a run before."""
        self._library.functions.set_descending_threads(int(descending))
        out = self._device.empty("out", FLOATS) if out is None else out
        given = self._device.copy("in", torch.arange(float(FLOATS)))
        pointers = (ctypes.c_void_p(x.data_ptr()) for x in (out, given))
        self._library.call(f"run_{self._which}", ctypes.c_size_t(self.names.index(name)), *pointers)
        return out
