"""How many warps of a kernel a multiprocessor holds at a time.

Limits by compute capability: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability". Registers
are given out by 256 per warp, so that warps fit in fours (one per scheduler), shared memory by 128 bytes, 1 KiB of
which every block has for the system (CUDA Occupancy Calculator).
"""

from __future__ import annotations

from dataclasses import dataclass

_WARP = 32
_REGISTERS = 65536
_REGISTER_UNIT = 256
_SCHEDULERS = 4
_SHARED_UNIT = 128
_SYSTEM_SHARED = 1024


@dataclass(frozen=True)
class Limits:
    """What one multiprocessor holds: warps, blocks, bytes of shared memory."""

    warps: int
    blocks: int
    shared: int


LIMITS = {
    "sm_80": Limits(64, 32, 164 * 1024),
    "sm_90": Limits(64, 32, 228 * 1024),
    "sm_100": Limits(64, 32, 228 * 1024),
    "sm_120": Limits(48, 24, 100 * 1024),
}


@dataclass(frozen=True)
class Occupancy:
    """Blocks at a time on one multiprocessor, their part of its warps, and what shared memory does not change that.

    `spare_shared`: bytes that each block can have besides, as dynamic shared memory, without there being fewer blocks.
    """

    blocks: int
    share: float
    spare_shared: int


def occupancy(architecture: str, threads: int, registers: int, shared: int) -> Occupancy:
    """That of blocks of `threads` with `registers` per thread and `shared` bytes per block."""
    limits = LIMITS[architecture]
    warps = -(-threads // _WARP)
    registers_per_warp = _up(max(registers, 1) * _WARP, _REGISTER_UNIT)
    warps_with_registers = _REGISTERS // registers_per_warp // _SCHEDULERS * _SCHEDULERS
    blocks = min(
        limits.blocks,
        limits.warps // warps,
        warps_with_registers // warps,
        limits.shared // _up(shared + _SYSTEM_SHARED, _SHARED_UNIT),
    )
    if blocks == 0:
        return Occupancy(0, 0.0, 0)
    per_block = limits.shared // blocks // _SHARED_UNIT * _SHARED_UNIT
    return Occupancy(blocks, blocks * warps / limits.warps, per_block - _SYSTEM_SHARED - shared)


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
