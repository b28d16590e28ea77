"""The parts of the resource report: occupancy, disassembly, what compilers print, and the comparison."""

from __future__ import annotations

import dataclasses

import pytest

from bench.resources import cuda, disassembly, report
from bench.resources.entry import Resources
from bench.resources.occupancy import Occupancy, occupancy
from bench.resources.report import Toolchain

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN5first6kernelEv' for 'sm_90'
ptxas info    : Function properties for _ZN5first6kernelEv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 4096 bytes smem, 864 bytes cmem[0]
ptxas info    : Compile time = 321.725 ms
ptxas info    : Compiling entry function '_ZN6second6kernelEv' for 'sm_100'
ptxas info    : Function properties for _ZN6second6kernelEv
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, 400 bytes cmem[0]
"""

SASS = """\
arch = sm_80
\t\tFunction : first
        /*0000*/                   MOV R1, c[0x0][0x28] ;                       /* 0x00000a0000017a02 */
                                                                                /* 0x000fc40000000f00 */
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, [R2.64] ;             /* 0x0000000402047981 */
        /*0020*/               @P1 LDG.E.U16 R5, [R2.64] ;                      /* 0x0000000402047981 */
        /*0030*/                   STG.E.64 [R2.64], R4 ;                       /* 0x0000000402047981 */
        /*0040*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;        /* 0x0000000402047981 */
        /*0050*/                   HFMA2.MMA R4, -RZ, RZ, 0, 0 ;                /* 0x0000000402047981 */
        /*0060*/              @UP0 BAR.SYNC.DEFER_BLOCKING 0x0 ;                /* 0x0000000402047981 */
        /*0070*/                   NOP ;                                        /* 0x0000000402047981 */
arch = sm_90
\t\tFunction : first
        /*0000*/                   LDL R11, [R1+0x20] ;                         /* 0x0000200001427983 */
"""

ELF = """\
.nv.info._Z5firstv
\t<0x1>
\tAttribute:\tEIATTR_MAXREG_COUNT
\tFormat:\tEIFMT_HVAL
\tValue:\t0xff
\t<0x2>
\tAttribute:\tEIATTR_MAX_THREADS
\tFormat:\tEIFMT_SVAL
\tValue:\t0x80 0x2 0x1
.nv.info._Z6secondv
"""

PLANTED = """\
__global__ void __launch_bounds__(1024, 2) planted(const float* in, float* out) {
  float sums[64] = {};
  for (int i = 0; i < 64; ++i) {
    for (int j = 0; j < 64; ++j) sums[j] = sums[j] * in[i] + in[(i * 64 + j) * 32 + threadIdx.x];
  }
  for (int j = 0; j < 64; ++j) out[j * 1024 + threadIdx.x] = sums[j];
}
"""
ISSUES = dict.fromkeys(disassembly.KINDS, 0)
PLAIN = Resources(256, 40, 1024, 0, 0, 0, ISSUES)


@pytest.mark.parametrize(
    ("architecture", "threads", "registers", "shared", "expected"),
    [
        ("sm_90", 256, 32, 0, Occupancy(8, 1.0, 27 * 1024 + 512)),  # 228 KiB / 8 less 1 KiB
        ("sm_90", 256, 33, 0, Occupancy(6, 0.75, 38 * 1024 - 1024)),  # 40 registers: 51 warps fit, 48 of them in fours
        ("sm_90", 256, 255, 0, Occupancy(1, 0.125, 227 * 1024)),
        ("sm_90", 33, 16, 0, Occupancy(32, 1.0, 6 * 1024 + 128)),  # 228 KiB / 32 less 1 KiB; 33 threads are two warps
        ("sm_90", 32, 16, 0, Occupancy(32, 0.5, 6 * 1024 + 128)),
        ("sm_80", 128, 16, 40 * 1024, Occupancy(4, 0.25, 0)),
        ("sm_80", 128, 16, 40 * 1024 + 1, Occupancy(3, 0.1875, (54 * 1024 + 640) - 1024 - 40 * 1024 - 1)),
        ("sm_100", 1024, 64, 0, Occupancy(1, 0.5, 227 * 1024)),
        ("sm_120", 256, 32, 0, Occupancy(6, 1.0, 16 * 1024 - 384)),
        ("sm_120", 1024, 32, 100 * 1024, Occupancy(0, 0.0, 0)),
    ],
)
def test_occupancy(architecture, threads, registers, shared, expected):
    assert occupancy(architecture, threads, registers, shared) == expected


def test_disassembly_is_counted():
    found = disassembly.counts(SASS)
    assert set(found) == {("sm_80", "first"), ("sm_90", "first")}
    assert {kind: n for kind, n in found["sm_80", "first"].items() if n} == {
        "instructions": 7,
        "global loads, 128 bit": 1,
        "global loads, narrow": 1,
        "global stores, 64 bit": 1,
        "mma": 1,
        "barriers": 1,
    }
    assert found["sm_90", "first"]["local accesses"] == 1


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("LDG.E", "global loads, 32 bit"),
        ("LDG.E.LTC128B.64", "global loads, 64 bit"),
        ("LD.E.128", "generic loads"),
        ("LDSM.16.M88.4", "shared loads"),
        ("HGMMA.64x64x16.F32", "mma"),
        ("UTCHMMA", "mma"),
        ("HFMA2.MMA", None),
        ("IADD3", None),
    ],
)
def test_kind_of_an_instruction(opcode, kind):
    assert disassembly.kind_of(opcode) == kind


def test_ptxas_report_is_read():
    first = cuda.Compiled("_ZN5first6kernelEv", "sm_90", 40, 4096, 0, 0, 0)
    second = cuda.Compiled("_ZN6second6kernelEv", "sm_100", 255, 0, 16, 12, 8)
    assert cuda.parse_report(PTXAS) == [first, second]


def test_kernel_without_figures_is_an_error():
    with pytest.raises(ValueError, match="no resources are reported for _ZN6second6kernelEv"):
        cuda.parse_report(PTXAS[: PTXAS.index("    16 bytes")])


def test_threads_are_those_of_the_launch_bounds():
    assert dict(cuda.threads_per_block(ELF)) == {"_Z5firstv": 256}


def test_names_are_free_of_what_differs_between_machines():
    mangled = "_ZN5pyext2op37_GLOBAL__N__62bd5f62_5_op_cu_18e1c70512gates_kernelI6__halfLb1EEEvPf"
    assert cuda.demangled([mangled]) == ["op::gates_kernel<__half, true>"]


def toolchain(version="1", **kernels):
    return Toolchain(version, {"sm_90": kernels})


def test_equal_kernels_are_no_fault():
    assert report.compare(toolchain(k=PLAIN), toolchain(k=PLAIN)) == report.Comparison()


def test_unrecorded_and_vanished_kernels_are_faults():
    found = report.compare(toolchain(old=PLAIN), toolchain(new=PLAIN))
    assert found.faults == ["new (sm_90) is not recorded", "old (sm_90) is recorded, but there is none"]


@pytest.mark.parametrize("version", ["1", "2"])
@pytest.mark.parametrize(
    "spilling",
    [
        {"stack": 8},
        {"spill_stores": 4},
        {"spill_loads": 4},
        {"issues": {**ISSUES, "local accesses": 1}},
    ],
)
def test_a_spill_is_a_fault_under_any_compiler(version, spilling):
    (fault,) = report.compare(toolchain(k=PLAIN), toolchain(version, k=dataclasses.replace(PLAIN, **spilling))).faults
    assert fault.startswith("k (sm_90) spills: 0 B of stack, 0 B stored, 0 B loaded, 0 local accesses was recorded")


def test_lower_occupancy_is_a_fault_under_the_recorded_compiler():
    worse = dataclasses.replace(PLAIN, registers=41)
    (fault,) = report.compare(toolchain(k=PLAIN), toolchain(k=worse)).faults
    assert fault == (
        "k (sm_90) has a lower occupancy: 75.0% (40 registers, 256 threads, 1024 B shared) was recorded, "
        "now 62.5% (41 registers, 256 threads, 1024 B shared)"
    )
    elsewhere = report.compare(toolchain(k=PLAIN), toolchain("2", k=worse))
    assert elsewhere.faults == []
    assert elsewhere.changes == ["recorded with 1, compiled with 2: spills alone compared"]


def test_improvements_are_changes():
    better = dataclasses.replace(PLAIN, registers=30)
    assert report.compare(toolchain(k=PLAIN), toolchain(k=better)) == report.Comparison([], ["k (sm_90) changed"])


def test_report_survives_its_file(tmp_path):
    written = {"cuda": toolchain(k=dataclasses.replace(PLAIN, issues={**ISSUES, "mma": 3})), "triton": toolchain()}
    json_path, markdown_path = report.write(written, tmp_path)
    assert report.read(tmp_path) == written
    assert "| `k` | 256 | 40 | 1024 | 0 | 0 | 6 | 75% |" in markdown_path.read_text()
    assert json_path.name == "kernel_resources.json"


# Where there is a compiler, it is shown that a planted kernel's faults reach the comparison.
COMPILERS = [nvcc for nvcc in [cuda.find_nvcc()] if nvcc is not None]


@pytest.mark.parametrize("nvcc", COMPILERS)
def test_a_planted_spill_is_found(nvcc, tmp_path):
    source = tmp_path / "planted.cu"
    source.write_text(PLANTED)
    fresh = Toolchain("1", cuda.compile_kernels(nvcc, [source], ["sm_90"]))
    (name,) = fresh.kernels["sm_90"]
    assert cuda.declared_kernels(source) == {"planted"}
    found = report.compare(Toolchain("1", {"sm_90": {name: PLAIN}}), fresh)
    assert any(fault.startswith(f"{name} (sm_90) spills") for fault in found.faults), found


@pytest.mark.parametrize("nvcc", COMPILERS)
def test_a_kernel_without_launch_bounds_is_an_error(nvcc, tmp_path):
    source = tmp_path / "planted.cu"
    source.write_text(PLANTED.replace("__launch_bounds__(1024, 2)", ""))
    with pytest.raises(ValueError, match=r"planted.* in planted\.cu has no __launch_bounds__"):
        cuda.compile_kernels(nvcc, [source], ["sm_90"])
