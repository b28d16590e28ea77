"""Peak memory of a contender: its model counts in the process's peak alone, a step's maps and gradients in both."""

import pytest
import torch

from bench import memory
from bench.case import Contender, Runner

MIB = 2**20
MODEL, MAPS, GRADIENTS = 64, 40, 48
"""MiB, each more than the C library would keep for itself."""
SLACK = 4
"""MiB: what Python needs beside them, and what the kernel's counters lag behind."""


def allocated(mib):
    return torch.ones(mib * MIB, dtype=torch.uint8)


def build():
    model, gradients = allocated(MODEL), []

    def run():
        gradients.clear()
        maps = allocated(MAPS)
        gradients.append(allocated(GRADIENTS))
        return model, maps

    return Runner(run, dict, gradients.clear)


def test_peaks_of_process_and_step():
    process, step = memory.measure(Contender("maps", build), memory.CPU)
    assert process / MIB == pytest.approx(MODEL + MAPS + GRADIENTS, abs=SLACK)
    assert step / MIB == pytest.approx(MAPS + GRADIENTS, abs=SLACK)
