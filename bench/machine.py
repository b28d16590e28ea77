"""What a measurement must say about the machine that it was made on."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from pyext import _library

TUNABLES = "glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=2147483648"
"""Freed memory stays in the process: plain torch trains up to 1.4 times as fast, and beating it without is no merit."""


def facts(device: torch.device) -> dict[str, str]:
    """Date, processor, threads, versions, and settings that move a measurement."""
    known = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "CPU": f"{_processor()}, {os.cpu_count()} cores seen",
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyext CPU capability": _library.cpu_capability(),
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "not set"),
    }
    return known | (_gpu(device) if device.type == "cuda" else {})


def _gpu(device: torch.device) -> dict[str, str]:
    found = torch.cuda.get_device_properties(device)
    return {
        "device": f"{found.name}, {found.multi_processor_count} multiprocessors, {found.total_memory / 2**30:.0f} GiB",
        "driver": driver(),
        "CUDA": str(torch.version.cuda),
        "cuDNN": str(torch.backends.cudnn.version()),
        "triton": importlib.metadata.version("triton"),
    }


def driver() -> str:
    """The NVIDIA driver's version, or that it is unknown."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown: there is no nvidia-smi"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0] or "unknown"


def load() -> float:
    """Processes that ran or wanted to, averaged over the last minute."""
    return os.getloadavg()[0]


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    fields = dict([part.strip() for part in line.split(":", 1)] for line in lines if ":" in line)
    # A virtual machine may hide the model's name; family and model number still tell.
    parts = [fields.get("model name", platform.processor() or platform.machine())]
    if "cpu family" in fields:
        parts.append(f"(family {fields['cpu family']}, model {fields['model']})")
    return " ".join(parts)
