"""Settings that must stand before anything is imported, and uninitialised memory that shows itself."""

import os
import sys
from pathlib import Path

# The benchmarks' package; last, so that an installed pyext stays the one that is tested.
sys.path.append(str(Path(__file__).resolve().parents[1]))
# Triton's kernels run on the CPU by its interpreter, unless TRITON_INTERPRET=0 says that there is a GPU (tests/gpu);
# read when triton is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from not_run import NOT_RUN


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan():
    """torch.empty gives NaN: a kernel that leaves an element unwritten fails its test."""
    previous = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = previous


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["not_run"] = session.config.stash.get(NOT_RUN, "")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """A worker of pytest-xdist has ended; all leave out the same tests, and one that crashed says nothing."""
    if hasattr(node, "workeroutput"):
        node.config.stash[NOT_RUN] = node.workeroutput["not_run"]


def pytest_terminal_summary(terminalreporter, config):
    if config.stash.get(NOT_RUN, ""):
        terminalreporter.write_line(config.stash[NOT_RUN])
