"""Every CUDA kernel compiles for the supported architectures, without spills. Needs nvcc for all but the parser."""

from __future__ import annotations

import pytest
from cuda_compile import ARCHITECTURES, SOURCES, Kernel, compile_report, find_nvcc, parse_report

REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN5first6kernelEv' for 'sm_90'
ptxas info    : Function properties for _ZN5first6kernelEv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 864 bytes cmem[0]
ptxas info    : Compile time = 321.725 ms
ptxas info    : Compiling entry function '_ZN6second6kernelEv' for 'sm_90'
ptxas info    : Function properties for _ZN6second6kernelEv
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, 400 bytes cmem[0]
"""
CLEAN_REPORT = REPORT[: REPORT.index("ptxas info    : Compiling entry function '_ZN6second")]


def given(text):
    return lambda: text


def compiled(source, architecture):
    return lambda: compile_report(find_nvcc(), source, architecture)


# The reports to judge: a given one always, and those of every source where there is a compiler.
REPORTS = [pytest.param(given(CLEAN_REPORT), id="given")]
if find_nvcc() is not None:
    REPORTS += [
        pytest.param(compiled(source, architecture), id=f"{source.stem}-sm_{architecture}")
        for source in SOURCES
        for architecture in ARCHITECTURES
    ]


def spilling(kernels: list[Kernel]) -> list[Kernel]:
    return [k for k in kernels if k.stack or k.spill_stores or k.spill_loads]


@pytest.mark.parametrize("report", REPORTS)
def test_kernels_do_not_spill(report):
    kernels = parse_report(report())
    assert kernels
    assert spilling(kernels) == []


def test_report_is_read():
    first = Kernel("_ZN5first6kernelEv", "90", 40, 0, 0, 0)
    second = Kernel("_ZN6second6kernelEv", "90", 255, 16, 12, 8)
    assert parse_report(REPORT) == [first, second]
    assert spilling(parse_report(REPORT)) == [second]


def test_kernel_without_figures_is_an_error():
    with pytest.raises(ValueError, match="no resources are reported for _ZN6second6kernelEv"):
        parse_report(REPORT[: REPORT.index("    16 bytes")])


def test_there_are_kernels_to_compile():
    assert "gated_excitation" in [source.stem for source in SOURCES]
