"""The CUDA host shim names what is wrong with a kernel: each broken one is caught, each of its sound twins passes."""

from __future__ import annotations

import itertools
import re

import pytest
from cuda_host.probes import Probes
from torch import Tensor

SHARED = "dynamic shared memory (256 bytes)"
OUT = "out (256 bytes of global memory)"
NEITHER = "an address that is neither shared nor global memory"

# What the shim says of each broken kernel: block and thread (where y and z are not 0, in full), and the fault.
REPORTS = {
    "exits_before_barrier": (0, 33, "has returned, but other threads wait for it at __sync"),
    "exits_before_shuffle": (0, 5, "has returned, but thread (0, 0, 0) waits for it at a"),
    "shuffles_from_who_exited": (0, 15, "shuffles from a lane that takes no part"),
    "diverges_at_barrier": (
        0,
        40,
        "waits at __syncwarp with mask 0xffffffff for thread (32, 0, 0), which waits at __syncthreads",
    ),
    "diverges_in_kind_of_barrier": (
        0,
        0,
        "waits at __syncthreads_or for thread (32, 0, 0), which waits at __syncthreads_count",
    ),
    "diverges_in_mask": (
        0,
        0,
        "waits at a shuffle with mask 0xffffffff for thread (3, 0, 0), which waits at a shuffle",
    ),
    "shared_one_past_end": (0, 63, f"out of bounds: writes 4 bytes at byte 256 of {SHARED}"),
    "shared_far_past_end": (0, 0, f"out of bounds: writes 4 bytes at {NEITHER}"),
    "static_shared_past_row": (0, 31, "out of bounds: index 32 of an array 'float [32]'"),
    "static_shared_far_past_end": (0, 0, f"out of bounds: writes 4 bytes at {NEITHER}"),
    "static_shared_into_neighbour": (0, 32, "out of bounds: reads 4 bytes at byte NUMBER of static shared memory"),
    "reads_one_past_end": (0, 63, "out of bounds: reads 4 bytes at byte 256 of in (256 bytes of global memory"),
    "reads_one_before": (0, 0, "out of bounds: reads 4 bytes at byte"),
    "reads_far_past_end": (0, 0, f"out of bounds: reads 4 bytes at {NEITHER}"),
    "writes_far_past_end": (0, 0, f"out of bounds: writes 4 bytes at {NEITHER}"),
    "writes_one_past_end": (0, 63, "out of bounds: writes 4 bytes at byte 256 of out"),
    "writes_an_input": (0, 0, "write to what is only to be read: writes 4 bytes at byte 0 of in"),
    "reads_past_local_array": (0, 60, "out of bounds: index 4 of an array 'float [4]'"),
    "misaligned_vector": (0, 40, "misaligned: an access as 'struct float4'"),
    "shared_race": (0, 32, f"data race: writes 4 bytes at byte 128 of {SHARED}, which thread (0, 0, 0) reads"),
    "shared_write_after_read_race": (
        0,
        1,
        f"data race: writes 4 bytes at byte 4 of {SHARED}, which thread (0, 0, 0) reads",
    ),
    "shared_write_write_race": (
        0,
        1,
        f"data race: writes 4 bytes at byte 0 of {SHARED}, which thread (0, 0, 0) writes",
    ),
    "warp_tree_without_syncwarp": (
        0,
        1,
        f"data race: writes 4 bytes at byte 4 of {SHARED}, which thread (0, 0, 0) reads",
    ),
    "shuffle_as_barrier": (0, 31, f"data race: reads 4 bytes at byte 120 of {SHARED}, which thread (30, 0, 0) writes"),
    "half_warp_reads_other_half": (
        0,
        31,
        f"data race: writes 4 bytes at byte 124 of {SHARED}, which thread (15, 0, 0) reads",
    ),
    "global_race_in_a_block": (0, 40, f"data race: writes 4 bytes at byte 0 of {OUT}, which thread (0, 0, 0) writes"),
    "global_race_between_blocks": (
        1,
        7,
        f"data race: writes 4 bytes at byte 28 of {OUT}, which thread (7, 0, 0) of block (0, 0, 0) writes",
    ),
    "global_read_races_with_other_block": (
        1,
        3,
        f"data race: reads 4 bytes at byte 12 of {OUT}, which thread (3, 0, 0) of block (0, 0, 0) writes",
    ),
    "last_block_without_fence_race": (
        2,
        0,
        f"data race: reads 4 bytes at byte 0 of {OUT}, which thread (0, 0, 0) of block (0, 0, 0) writes",
    ),
    "last_block_without_barrier_race": (
        2,
        0,
        f"data race: reads 4 bytes at byte 0 of {OUT}, which thread (0, 0, 0) of block (0, 0, 0) writes",
    ),
    "write_races_with_reading_block": (
        1,
        3,
        f"data race: writes 4 bytes at byte 160 of {OUT}, which thread (0, 0, 0) of block (0, 0, 0) reads",
    ),
    "atomic_races_with_write": (0, 1, "data race: atomically updates 4 bytes at byte 0"),
    "read_races_with_atomics": (
        0,
        1,
        f"data race: atomically updates 4 bytes at byte 0 of {SHARED}, which thread (0, 0, 0) reads",
    ),
    "uninitialised_shared": (0, 9, f"uninitialised: reads 4 bytes at byte 36 of {SHARED}"),
    "uninitialised_static_shared": (0, 63, "uninitialised: reads 4 bytes at byte NUMBER of static shared memory"),
    "uninitialised_in_second_block": (1, 0, f"uninitialised: reads 4 bytes at byte 0 of {SHARED}"),
    "uninitialised_output": (0, 0, "uninitialised: reads 4 bytes at byte 0 of out"),
    "race_in_a_3d_block": (
        0,
        (1, 1, 1),
        f"data race: writes 4 bytes at byte 0 of {OUT}, which thread (1, 0, 1) writes",
    ),
}


# These run on zeros, the others on what nobody wrote.
ON_ZEROS = (
    "last_block_sums_up",
    "last_block_without_fence_race",
    "last_block_without_barrier_race",
    "write_races_with_reading_block",
)


def run(probes: Probes, name: str, descending: bool = False) -> Tensor:
    return probes.run(name, descending, probes.run("zeros") if name in ON_ZEROS else None)


@pytest.fixture
def probes(library, device) -> Probes:
    return Probes(library, device, "broken")


@pytest.mark.parametrize("name", REPORTS)
def test_fault_is_reported(probes, name):
    block, thread, fault = REPORTS[name]
    where = f"kernel {name}, block ({block}, 0, 0), thread {thread if isinstance(thread, tuple) else (thread, 0, 0)}: "
    pattern = re.escape(where + fault).replace("NUMBER", r"\d+")
    with pytest.raises(RuntimeError, match=pattern):
        run(probes, name)


@pytest.mark.parametrize("name", [name for name in REPORTS if "race" in name])
def test_race_is_reported_in_any_order_of_threads(probes, name):
    with pytest.raises(RuntimeError, match=f"kernel {name}, .*data race"):
        run(probes, name, descending=True)


def test_sound_kernels_pass(probes):
    sound = [name for name in probes.names if name not in REPORTS]
    assert len(sound) >= 10
    for name, descending in itertools.product(sound, (False, True)):
        assert run(probes, name, descending).isfinite().all(), name


def test_kernels_run_on_after_a_fault(probes):
    with pytest.raises(RuntimeError, match="shared_race"):
        probes.run("shared_race")
    assert probes.run("shared_without_race").tolist() == [float((i + 32) % 64) for i in range(64)]


def test_last_block_sees_what_all_wrote(probes):
    assert run(probes, "last_block_sums_up")[0] == 48
