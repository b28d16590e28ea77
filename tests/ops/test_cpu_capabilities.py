"""The CPU kernels under every instruction set that this machine has; the choice is fixed once per process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyext import _library

OTHERS = [name for name in _library.cpu_capabilities() if name != _library.cpu_capability()]


NUMERICS = {
    "test_bn_relu_conv2d.py": "test_training or threads",
    "test_convolution_stem.py": "test_inference",
    "test_dense_block.py": "test_inference",
    "test_hybrid_block.py": "inference",
    "test_gated_excitation.py": "inference or gradients or statistics",
    "test_masked_conv2d.py": "inference or threads or zeroed",
    "test_memory_contrast.py": "loss_and_gradient or orders or run_or_threads",
    "test_memory_update.py": "rows_move",
    "test_peer_contrast.py": "terms_and_gradient or threads",
}


@pytest.mark.parametrize("file", NUMERICS)
@pytest.mark.parametrize("capability", OTHERS)
def test_kernels_under(capability, file):
    tests = Path(__file__).with_name(file)
    command = [sys.executable, "-m", "pytest", "-q", "-k", NUMERICS[file], str(tests)]
    environment = {**os.environ, "PYEXT_CPU_CAPABILITY": capability}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]


def test_every_kernel_has_numerics():
    kernels = Path(__file__).parents[2].glob("csrc/cpu/*_kernel.cpp")
    assert {f"test_{kernel.stem.removesuffix('_kernel')}.py" for kernel in kernels} == set(NUMERICS)


def test_unknown_capability_is_named():
    command = [sys.executable, "-c", "from pyext import _library; _library.cpu_capability()"]
    environment = {**os.environ, "PYEXT_CPU_CAPABILITY": "avx1024"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert "PYEXT_CPU_CAPABILITY is 'avx1024', expected one of baseline" in result.stderr
