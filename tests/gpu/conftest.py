"""Tests on a GPU: of every operator that is registered, by the backends `cuda` and `triton`.

Where there is none they are collected and deselected, and the summary says so. PYEXT_GPU_TESTS_ON=cpu runs those that
make sense there by the backend `cpu`, to try the tests themselves.
"""

from __future__ import annotations

import os
from pathlib import Path

# cuBLAS is reproducible with a fixed workspace alone; read when torch first uses it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

HERE = Path(__file__).parent
DESELECTED = pytest.StashKey[int]()
collect_ignore = ["test_gpu_device.py"] if os.environ.get("PYEXT_GPU_TESTS_ON") == "cpu" else []


def cannot_run() -> str | None:
    """Why no test here can run; None when they can."""
    if os.environ.get("PYEXT_GPU_TESTS_ON") == "cpu":
        return None
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "Triton's interpreter is on: run them alone, TRITON_INTERPRET=0 python -m pytest tests/gpu"
    return None


def pytest_collection_modifyitems(config, items):
    here = [item for item in items if HERE in item.path.parents]
    if cannot_run() is not None and not config.option.collectonly:
        config.stash[DESELECTED] = len(here)
        config.hook.pytest_deselected(items=here)
        items[:] = [item for item in items if item not in here]


def pytest_terminal_summary(terminalreporter, config):
    if config.stash.get(DESELECTED, 0):
        terminalreporter.write_line(f"tests/gpu: {config.stash[DESELECTED]} tests not run: {cannot_run()}")
