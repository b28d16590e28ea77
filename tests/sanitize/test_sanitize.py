"""Every CPU kernel file under ThreadSanitizer and under AddressSanitizer with UndefinedBehaviorSanitizer.

A kernel file is run by the driver of its operator's name beside this file, which calls the kernels through a Host of
its own: no torch, no Python and no OpenMP runtime are in the process, so nothing is suppressed. A kernel file without a
driver fails.
"""

from __future__ import annotations

import functools
import os
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

from pyext import _library

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SANITIZERS = ("thread", "address,undefined")
FAULTS = {
    "race": ("thread", "ThreadSanitizer: data race"),
    "past_the_end_of_shared_memory": ("address,undefined", "heap-buffer-overflow"),
    "past_the_end_of_scratch": ("address,undefined", "heap-buffer-overflow"),
    "scratch_of_an_earlier_call": ("address,undefined", "heap-use-after-free"),
    "shift_by_too_much": ("address,undefined", "shift exponent"),
}


@functools.cache
def build_flags() -> dict:
    """setup.py's own constants."""
    return runpy.run_path(str(ROOT / "setup.py"), run_name="setup")


# Every kernel file with every instruction set that it is compiled for and that this machine can run.
KERNELS = [
    (path.stem.removesuffix("_kernel"), capability)
    for path in sorted((ROOT / "csrc/cpu").glob("*_kernel.cpp"))
    for capability in _library.cpu_capabilities()
    if capability in build_flags()["capabilities_of"](path)
]


def compile_driver(source: Path, kernels: list[Path], capability: str, sanitizer: str, folder: Path) -> Path:
    """The driver with the kernels of one instruction set, by the flags that the library is built with."""
    flags = build_flags()
    target = folder / source.stem
    own = flags["capabilities_of"](kernels[0] if kernels else source)[capability]
    command = [os.environ.get("CXX", "c++"), *flags["CXX_FLAGS"], *own, "-O1", "-g1"]
    command += [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-pthread"]
    command += [f"-I{ROOT / 'csrc'}", f"-I{HERE}", f"-DPYEXT_CAPABILITY={capability}"]
    result = subprocess.run([*command, source, *kernels, "-o", target], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return target


@functools.cache
def without_randomisation() -> list[str]:
    """How to start a process whose address layout is not randomised, which GCC 12's ThreadSanitizer needs on kernels
    that randomise 32 bits; nothing in a container that forbids it."""
    setarch = ["setarch", "-R"]
    allowed = shutil.which("setarch") and subprocess.run([*setarch, "true"], capture_output=True).returncode == 0
    return setarch if allowed else []


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([*without_randomisation(), program, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize(("operator", "capability"), KERNELS)
def test_kernel(operator, capability, sanitizer, tmp_path):
    kernel = ROOT / "csrc/cpu" / f"{operator}_kernel.cpp"
    result = run(compile_driver(HERE / f"{operator}.cpp", [kernel], capability, sanitizer, tmp_path))
    assert result.returncode == 0, (result.stdout + result.stderr)[:5000]
    assert re.match(r"[1-9]\d* .*calls\n", result.stdout)
    assert not result.stderr


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_team(sanitizer, tmp_path):
    result = run(compile_driver(HERE / "team.cpp", [], "baseline", sanitizer, tmp_path))
    assert result.returncode == 0, (result.stdout + result.stderr)[:5000]
    assert not result.stderr


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_reported(fault, tmp_path):
    sanitizer, words = FAULTS[fault]
    result = run(compile_driver(HERE / "planted_faults.cpp", [], "baseline", sanitizer, tmp_path), fault)
    assert result.returncode not in (0, 2), result.stdout
    assert words in result.stderr
