"""Every kernel compiles for every architecture, and needs no more than the committed report says.

`make resources` writes that report anew. Compilers that are not at hand here (nvcc) leave their part out.
"""

from __future__ import annotations

import functools
import warnings

import pytest

from bench.resources import cuda, report, triton_kernels
from bench.resources.report import Toolchain

NVCC = cuda.find_nvcc()


@functools.cache
def compiled(name: str) -> Toolchain:
    if name == "cuda":
        return Toolchain(cuda.release(NVCC), cuda.compile_kernels(NVCC, cuda.SOURCES))
    return Toolchain(*triton_kernels.compile_kernels())


@pytest.mark.parametrize("name", ["triton", *["cuda"] * (NVCC is not None)])
def test_kernels_need_no_more_than_recorded(name):
    comparison = report.compare(report.read()[name], compiled(name))
    if comparison.changes:
        warnings.warn("`make resources` is due: " + "; ".join(comparison.changes), stacklevel=1)
    assert comparison.faults == []


def test_no_kernel_is_recorded_as_spilling():
    spilling = [
        (architecture, name)
        for toolchain in report.read().values()
        for architecture, kernels in toolchain.kernels.items()
        for name, resources in kernels.items()
        if any(resources.spilled())
    ]
    # Bounded to 128 registers, so that two of its blocks fit.
    assert spilling == [("sm_100", "gated_excitation::excite_backward_kernel<float, float, false>")]


def test_every_architecture_is_recorded():
    recorded = report.read()
    assert set(recorded["cuda"].kernels) >= {"sm_80", "sm_90", "sm_100"}
    assert set(recorded["triton"].kernels) >= {"sm_80", "sm_90", "sm_100", "sm_120"}


def test_every_cuda_kernel_in_the_sources_is_recorded():
    declared = {name for source in cuda.SOURCES for name in cuda.declared_kernels(source)}
    assert "excite_kernel" in declared
    assert "output_kernel" in declared
    for kernels in report.read()["cuda"].kernels.values():
        assert {key.split("<")[0].rsplit("::")[-1] for key in kernels} == declared


def test_every_triton_kernel_in_the_sources_is_recorded():
    declared = {name for module in triton_kernels.modules() for name in triton_kernels.declared_kernels(module)}
    assert "image_kernel" in declared
    assert "pool_kernel" in declared
    for kernels in report.read()["triton"].kernels.values():
        assert {key.split(",")[0] for key in kernels} == declared


def test_the_committed_files_are_what_is_written(tmp_path):
    for path in report.write(report.read(), tmp_path):
        assert path.read_text() == (report.RESULTS / path.name).read_text()
