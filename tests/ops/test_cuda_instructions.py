"""Instructions that the CUDA host shim replaces: its version against float64, the real one through nvcc."""

from __future__ import annotations

import ctypes
import math
import re
import subprocess
from pathlib import Path

import pytest
import torch
from cuda_host.library import HERE, ROOT

from bench.resources.cuda import find_nvcc


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_matrix_product(library, device, dtype):
    a, b, d = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    truth = a.double() @ b.double() + d.double()
    result = device.copy("d", d, writable=True)
    operands = (device.copy("a", a), device.copy("b", b), result)
    library.call(f"multiply_{str(dtype).removeprefix('torch.')}", *(ctypes.c_void_p(x.data_ptr()) for x in operands))
    # Rounded once: half a unit in the last place of float32.
    assert (result.double() - truth).abs().max() <= torch.finfo(torch.float32).eps / 2 * truth.abs().max()


def test_powers_of_two(library, device):
    exponents = torch.cat([torch.linspace(-149, 127, 28), torch.tensor([-math.inf, -126.0, math.inf, math.nan])])
    powers = device.empty("powers", 32)
    operands = (device.copy("x", exponents), powers)
    library.call("raise_two", *(ctypes.c_void_p(x.data_ptr()) for x in operands))
    truth = exponents.double().exp2()
    truth[truth < torch.finfo(torch.float32).tiny] = 0
    torch.testing.assert_close(powers.double(), truth, rtol=torch.finfo(torch.float32).eps, atol=0, equal_nan=True)


def test_copies_of_some_bytes(library, device):
    x = torch.randint(1, 256, (32, 16), dtype=torch.uint8)
    copies = device.empty("copies", 32, 16, dtype=torch.uint8)
    library.call("copy_bytes", *(ctypes.c_void_p(t.data_ptr()) for t in (device.copy("x", x), copies)))
    taken = torch.arange(16) < (torch.arange(32) // 2)[:, None]
    assert torch.equal(copies, torch.where(taken, x, 0))


def ptx(nvcc: str, source: str, architecture: str, folder: Path) -> str:
    target = folder / "kernels.ptx"
    flags = ["-std=c++17", "-O3", "-ptx", f"-arch=sm_{architecture}", "-I", ROOT / "csrc", "-o", target]
    subprocess.run([nvcc, *flags, HERE / source], check=True)
    return target.read_text()


if (nvcc := find_nvcc()) is not None:

    @pytest.mark.parametrize("architecture", ["80", "90", "100"])
    def test_compiles_to_the_instructions(tmp_path, architecture):
        text = ptx(nvcc, "instruction_kernels.cu", architecture, tmp_path)
        for name in ("bf16", "f16"):
            assert f"mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32" in text
        assert "ex2.approx.ftz.f32" in text
        assert re.search(r"cp\.async\.cg\.shared\.global \[%r\d+\], \[%rd\d+\], 16, %r\d+;", text)

    @pytest.mark.parametrize("source", ["broken_kernels.cu", "language_kernels.cu"])
    def test_kernels_of_the_shims_tests_are_cuda(tmp_path, source):
        assert ".entry" in ptx(nvcc, source, "80", tmp_path)
