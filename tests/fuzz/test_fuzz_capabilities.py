"""The drawn calls under every other instruction set that this machine has; the choice is fixed once per process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyext import _library

OTHERS = [name for name in _library.cpu_capabilities() if name != _library.cpu_capability()]
# A wider vector adds in more and shorter chains, so a kernel is measured against plain torch of its own width.
PLAIN_TORCH = {
    "baseline": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avx512": {},
    "avx512_bf16": {},
}


@pytest.mark.parametrize("capability", OTHERS)
def test_drawn_calls_under(capability):
    command = [sys.executable, "-m", "pytest", "-q", str(Path(__file__).with_name("test_fuzz.py"))]
    environment = {**os.environ, **PLAIN_TORCH[capability], "PYEXT_CPU_CAPABILITY": capability}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:]
