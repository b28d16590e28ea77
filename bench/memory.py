"""Peak memory of a contender in its own process: `python -m bench.memory CONTENDER DEVICE THREADS` prints bytes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from bench.test_hcgnet import memory_case

_STEPS = 3


def peaks(device: torch.device) -> dict[str, float]:
    """MiB above the start at the peak of a training step, for every contender."""
    return {
        contender.name: _in_own_process(contender.name, device) / 2**20 for contender in memory_case(device).contenders
    }


def _in_own_process(contender: str, device: torch.device) -> int:
    command = [sys.executable, "-m", "bench.memory", contender, str(device), str(torch.get_num_threads())]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure(contender: str, device: torch.device) -> int:
    """Bytes at the peak of a few training steps above those held before the contender was built."""
    build = memory_case(device).contender(contender).build
    start = _peak(device)
    run = build().run
    for _ in range(_STEPS):
        run()
    return _peak(device) - start


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage: its figure starts from what the parent process had at its peak.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(measure(sys.argv[1], torch.device(sys.argv[2])))
