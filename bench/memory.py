"""Peak memory of a training step.

On the CPU in a process of its own: `python -m bench.memory FILE CASE CONTENDER THREADS` prints bytes. On a GPU torch
counts what it gives out.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import torch

from bench.case import Case, Contender

_STEPS = 3


def peaks(file: str, case: Case, device: torch.device) -> dict[str, float]:
    """MiB above the start at the peak of a training step, by contender; `file`: the module that holds the case."""
    found = {}
    for contender in case.contenders:
        name = contender.name
        peak = _on_gpu(contender) if device.type == "cuda" else _in_own_process(file, case.name, name)
        found[f"{case.name}: {name}"] = peak / 2**20
    return found


def _on_gpu(contender: Contender) -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    start = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _train(contender)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - start


def _in_own_process(*words: str) -> int:
    command = [sys.executable, "-m", "bench.memory", *words, str(torch.get_num_threads())]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _train(contender: Contender) -> None:
    run = contender.build().run
    for _ in range(_STEPS):
        run()


def measure(file: str, case: str, contender: str) -> int:
    """Bytes at the peak of a few training steps on the CPU above those held before the contender was built."""
    cases: list[Case] = importlib.import_module(f"bench.{file}").cases(torch.device("cpu"))
    chosen = next(c for c in cases if c.name == case).contender(contender)
    start = peak_resident()
    _train(chosen)
    return peak_resident() - start


def peak_resident() -> int:
    """Bytes that this process has held in memory at most."""
    # Not getrusage: its figure starts from what the parent process had at its peak.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def reset_peak_resident() -> int:
    """Forget earlier peaks; bytes that this process holds in memory now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_resident()


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[4]))
    print(measure(*sys.argv[1:4]))
