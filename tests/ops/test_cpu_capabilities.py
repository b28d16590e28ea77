"""The CPU kernels under every instruction set that this machine has; the choice is fixed once per process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyext import _library

OTHERS = [name for name in _library.cpu_capabilities() if name != _library.cpu_capability()]


@pytest.mark.parametrize("capability", OTHERS)
def test_kernels_under(capability):
    tests = Path(__file__).with_name("test_gated_excitation.py")
    command = [sys.executable, "-m", "pytest", "-q", "-k", "inference or gradients or statistics", str(tests)]
    environment = {**os.environ, "PYEXT_CPU_CAPABILITY": capability}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]


def test_unknown_capability_is_named():
    command = [sys.executable, "-c", "from pyext import _library; _library.cpu_capability()"]
    environment = {**os.environ, "PYEXT_CPU_CAPABILITY": "avx1024"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert "PYEXT_CPU_CAPABILITY is 'avx1024', expected one of baseline" in result.stderr
