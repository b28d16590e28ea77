"""Peak memory of a training step.

On the CPU in a process of its own: `python -m bench.memory FILE CASE CONTENDER THREADS` prints the two peaks in bytes.
On a GPU torch counts what it gives out.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from bench.case import Case, Contender
from bench.table import Peak

_STEPS = 3


class Meter(NamedTuple):
    """How a device's memory is measured."""

    reset: Callable[[], int]
    """Forget earlier peaks; bytes that are held now."""
    peak: Callable[[], int]
    """Bytes that were held at most."""


def peaks(file: str, case: Case, device: torch.device) -> dict[str, Peak]:
    """Peaks by contender; `file`: the module that holds the case."""
    found = {}
    for contender in case.contenders:
        name = contender.name
        on_gpu = device.type == "cuda"
        process, step = measure(contender, GPU) if on_gpu else _in_own_process(file, case.name, name)
        found[f"{case.name}: {name}"] = Peak(process / 2**20, step / 2**20)
    return found


def _in_own_process(*words: str) -> tuple[int, int]:
    command = [sys.executable, "-m", "bench.memory", *words, str(torch.get_num_threads())]
    process, step = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-2:]
    return int(process), int(step)


def measure(contender: Contender, meter: Meter) -> tuple[int, int]:
    """Bytes at the peak of a few training steps above those held before the contender was built, and at the peak of one
    more above those held between steps."""
    start = meter.reset()
    runner = contender.build()
    for _ in range(_STEPS):
        runner.run()
    process = meter.peak() - start
    runner.release()
    start = meter.reset()
    runner.run()
    return process, meter.peak() - start


def _held_on_gpu() -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak_on_gpu() -> int:
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def peak_resident() -> int:
    """Bytes that this process has held in memory at most."""
    # Not getrusage: its figure starts from what the parent process had at its peak.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def reset_peak_resident() -> int:
    """Give back what nothing uses, and forget earlier peaks; bytes that this process holds in memory now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # the C library keeps what was freed, and would fill the next step's maps into it
    Path("/proc/self/clear_refs").write_text("5")
    return peak_resident()


CPU = Meter(reset_peak_resident, peak_resident)
GPU = Meter(_held_on_gpu, _peak_on_gpu)


def _main(file: str, case: str, contender: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    cases: list[Case] = importlib.import_module(f"bench.{file}").cases(torch.device("cpu"))
    print(*measure(next(c for c in cases if c.name == case).contender(contender), CPU))


if __name__ == "__main__":
    _main(*sys.argv[1:])
