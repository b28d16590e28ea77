"""What `pyext doctor` prints: what this installation has, and what it lacks and why."""

from __future__ import annotations

import importlib.util
import platform

import torch

import pyext
from pyext import _library

_OPTIONAL = ("torchvision", "lightning_fabric", "sklearn", "PIL", "rich", "safetensors", "matplotlib")


def report() -> str:
    """A few lines: versions, instruction sets, the state of every backend and of the optional packages."""
    build = _library.build_info()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    capabilities = ", ".join(_library.cpu_capabilities())
    missing = [name for name in _OPTIONAL if importlib.util.find_spec(name) is None]
    lines = [
        f"pyext        {pyext.__version__}, built with torch {build['torch']} by compiler {build['compiler']}",
        f"torch        {torch.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} threads",
        f"backend cpu  yes, instruction set {_library.cpu_capability()} (this machine runs {capabilities})",
        f"backend cuda {_state(_cuda_reason())}",
        f"triton       {_state(_library.triton_error(device))}",
        "extras       "
        + (f"missing {', '.join(missing)}: pip install pyext-kernels[train]" if missing else "all there"),
    ]
    return "\n".join(lines)


def _cuda_reason() -> str | None:
    if _library.cuda_error is not None:
        return _library.cuda_error
    return None if torch.cuda.is_available() else "pyext._cuda is loaded, and torch finds no CUDA device"


def _state(reason: str | None) -> str:
    return "yes" if reason is None else f"no: {reason}"
