"""`python -m bench.resources`: compiles all kernels and writes the report that CI compares with."""

from __future__ import annotations

import sys

from bench.resources import cuda, report, triton_kernels
from bench.resources.report import Toolchain


def main() -> None:
    nvcc = cuda.find_nvcc()
    if nvcc is None:
        sys.exit("python -m bench.resources: nvcc is neither in CUDA_HOME nor on PATH")
    fresh = {
        "cuda": Toolchain(cuda.release(nvcc), cuda.compile_kernels(nvcc, cuda.SOURCES)),
        "triton": Toolchain(*triton_kernels.compile_kernels()),
    }
    for path in report.write(fresh):
        print(path)
    for toolchain in fresh.values():
        for architecture, kernels in toolchain.kernels.items():
            for name in (name for name, resources in kernels.items() if any(resources.spilled())):
                print(f"spills: {name} ({architecture})")


if __name__ == "__main__":
    main()
