"""Tests on a GPU: of every operator that is registered, by the backends `cuda` and `triton`.

Where there is none they are collected and deselected, and the summary says so (tests/conftest.py).
PYEXT_GPU_TESTS_ON=cpu runs those that make sense there by the backend `cpu`, to try the tests themselves.
"""

from __future__ import annotations

import os
from pathlib import Path

# cuBLAS is reproducible with a fixed workspace alone; read when torch first uses it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from not_run import NOT_RUN

# Truth is compared with float32 products, not with TF32's.
torch.backends.cudnn.allow_tf32 = False

HERE = Path(__file__).parent
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
        config.stash[NOT_RUN] = f"tests/gpu: {len(here)} tests not run: {cannot_run()}"
        config.hook.pytest_deselected(items=here)
        items[:] = [item for item in items if item not in here]
