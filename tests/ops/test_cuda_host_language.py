"""What the CUDA host shim offers of CUDA's language does what CUDA's programming guide says."""

from __future__ import annotations

import pytest
import torch
from cuda_host.probes import FLOATS, Probes
from torch import Tensor

THREAD = torch.arange(FLOATS)
LANE = THREAD % 32
WARP_START = THREAD - LANE


def _votes() -> Tensor:
    first_warp = THREAD < 32
    later_even_lanes = torch.tensor([len(range(lane + lane % 2, 32, 2)) for lane in LANE.tolist()])
    return 1 + 2 * (~first_warp).int() + 4 * first_warp.int() + 8 * later_even_lanes


def _atomics() -> Tensor:
    total = THREAD.sum()
    return torch.cat([torch.tensor([128, 63, 5, 255, 7, 9]), total.expand(58)])


def _halves(dtype: torch.dtype) -> Tensor:
    x = THREAD.to(dtype)
    half = torch.tensor(0.5, dtype=dtype)
    return (x + x * x).float() + (half + half * half).float()


EXPECTED = {
    "threads_in_3d": THREAD,
    "blocks_in_3d": 100 * (THREAD % 2) + 10 * (THREAD // 2 % 4) + THREAD // 8,
    "shuffles": WARP_START + 3,
    "shuffles_in_parts": THREAD // 8 * 8 + 3,
    "shuffles_up": torch.where(THREAD % 16 >= 3, THREAD - 3, THREAD),
    "shuffles_down": torch.where(THREAD % 16 < 13, THREAD + 3, THREAD),
    "shuffles_xor": THREAD ^ 5,
    "shuffles_doubles": THREAD ^ 1,
    "votes": _votes(),
    "votes_of_some": torch.full((FLOATS,), 5),
    "sums_of_a_warp": torch.where(THREAD < 32, sum(range(32)) - 640, sum(range(32, 64)) - 640),
    "barriers_with_predicate": torch.full((FLOATS,), 22 + 100),
    "atomics": _atomics(),
    "vectors": THREAD // 4 * 4 + 3 - THREAD % 4,
    "halves": _halves(torch.float16),
    "bfloats": _halves(torch.bfloat16),
    "block_of_part_of_a_warp": torch.where(THREAD < 48, THREAD ^ 1, 0),
}


@pytest.fixture
def probes(library, device) -> Probes:
    return Probes(library, device, "language")


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("name", EXPECTED)
def test_kernel(probes, name, descending):
    assert torch.equal(probes.run(name, descending), EXPECTED[name].float())


def test_every_kernel_is_tested(probes):
    assert probes.names == list(EXPECTED)
