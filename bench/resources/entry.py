"""One kernel's resources, as they are recorded and compared."""

from __future__ import annotations

import os
from dataclasses import dataclass

from bench.resources.occupancy import Occupancy, occupancy


@dataclass(frozen=True)
class Resources:
    """One kernel compiled for one architecture.

    `shared`: bytes per block that are known when it is compiled. `stack`, `spill_stores`, `spill_loads`: bytes per
    thread. `issues`: instructions by kind (`disassembly.KINDS`).
    """

    threads: int
    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int
    issues: dict[str, int]

    def occupancy(self, architecture: str) -> Occupancy:
        """What follows for a multiprocessor of `architecture`."""
        return occupancy(architecture, self.threads, self.registers, self.shared)

    def spilled(self) -> tuple[int, ...]:
        """What may not grow: bytes of stack and of spills, and accesses of local memory."""
        return self.stack, self.spill_stores, self.spill_loads, self.issues["local accesses"]


Kernels = dict[str, dict[str, Resources]]
"""Resources by architecture and kernel."""


def jobs() -> int:
    """Compilers to run at a time: ``MAX_JOBS``, as for the build, or one per core."""
    return int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
