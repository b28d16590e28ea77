"""What a machine can do at best, measured; what a case must do at least; and the time that follows from both."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from bench.timer import quiet_median

MEMORY_BYTES = 2**30
"""Bytes moved by the copy that stands for memory speed: beyond any cache."""
_MATRIX = {"cpu": 1536, "cuda": 8192}
"""Rows and columns of the product that stands for the matrix rate: enough to fill the device."""


@dataclass(frozen=True)
class Work:
    """Bytes to read and write and floating-point operations that no implementation can avoid."""

    bytes: int
    operations: int


@dataclass(frozen=True)
class Floors:
    """The least milliseconds for a case's bytes, at its own size and at memory speed, and for its operations."""

    bytes_ms: float
    memory_ms: float
    operations_ms: float

    def share(self, milliseconds: float) -> float:
        """The part of the roof that a time reaches: the higher of the two floors over the time."""
        return max(self.bytes_ms, self.operations_ms) / milliseconds


class Roofs:
    """Measures a device's copy bandwidth (at any size) and its matrix rate by dtype, each once."""

    def __init__(self, device: torch.device, seconds: float = 0.3) -> None:
        self.device = device
        self.seconds = seconds
        self.copy = functools.lru_cache(maxsize=None)(self._copy)
        self.matrix = functools.lru_cache(maxsize=None)(self._matrix)

    def _copy(self, moved: int) -> float:
        """Bytes per second of a copy that reads `moved`/2 bytes and writes as many."""
        source = torch.ones(max(1, moved // 8), dtype=torch.float32, device=self.device)
        target = torch.zeros_like(source)
        return 8 * source.numel() / quiet_median(lambda: target.copy_(source), self.device, self.seconds)

    @functools.cached_property
    def memory(self) -> float:
        """Bytes per second of a copy from and to memory."""
        return self.copy(MEMORY_BYTES)

    def _matrix(self, dtype: torch.dtype) -> float:
        """Operations per second of `torch.mm` in `dtype`, on random values: equal ones let a GPU clock higher."""
        size = _MATRIX[self.device.type]
        a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        return 2 * size**3 / quiet_median(lambda: torch.mm(a, b, out=out), self.device, self.seconds)

    def floors(self, work: Work, dtype: torch.dtype) -> Floors:
        """The least times for `work` whose matrix products are in `dtype`."""
        return floors(work, self.copy(work.bytes), self.memory, self.matrix(dtype))


def floors(work: Work, copy: float, memory: float, matrix: float) -> Floors:
    """The least times for `work` on a machine with these bytes and operations per second."""
    return Floors(1e3 * work.bytes / copy, 1e3 * work.bytes / memory, 1e3 * work.operations / matrix)
