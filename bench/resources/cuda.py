"""What nvcc says about the kernels in ``csrc/cuda``, for every architecture."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench.resources import disassembly
from bench.resources.entry import Kernels, Resources, jobs

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")

_ENTRY = re.compile(r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>sm_\d+)'")
_MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_INFO = re.compile(r"^\.nv\.info\.(\S+)$|EIATTR_MAX_THREADS\s+Format:\s+EIFMT_SVAL\s+Value:\s+(.+)", re.MULTILINE)


@dataclass(frozen=True)
class Compiled:
    """What ptxas reports for one kernel: bytes of stack and spills per thread, of static shared memory per block."""

    name: str
    architecture: str
    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int


def parse_report(text: str) -> list[Compiled]:
    """Kernels in the output of ``nvcc -Xptxas -v``; one that lacks a figure is an error."""
    entries = list(_ENTRY.finditer(text))
    ends = [entry.start() for entry in entries[1:]] + [len(text)]
    kernels = []
    for entry, end in zip(entries, ends, strict=True):
        section = text[entry.end() : end]
        memory, registers, shared = (pattern.search(section) for pattern in (_MEMORY, _REGISTERS, _SHARED))
        if memory is None or registers is None:
            raise ValueError(f"no resources are reported for {entry['name']}")
        figures = int(registers[1]), int(shared[1]) if shared else 0, *map(int, memory.groups())
        kernels.append(Compiled(entry["name"], entry["architecture"], *figures))
    return kernels


def threads_per_block(listing: str) -> Iterator[tuple[str, int]]:
    """Kernels of one architecture and the size of their blocks by ``__launch_bounds__``, from ``cuobjdump -elf``."""
    kernel = ""
    for name, extents in _INFO.findall(listing):
        if name:
            kernel = name
        else:
            x, y, z = (int(extent, 16) for extent in extents.split())
            yield kernel, x * y * z


def find_nvcc() -> str | None:
    """The CUDA compiler of ``CUDA_HOME``, or else of ``PATH``."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")


def release(nvcc: str) -> str:
    """nvcc's version, as in 13.0.88; ptxas of the same toolkit has the same."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return text.rsplit(", V", 1)[1].split()[0]


def compile_kernels(nvcc: str, sources: Sequence[Path], architectures: Sequence[str] = ARCHITECTURES) -> Kernels:
    """Resources of every kernel in `sources`: one call of nvcc per source for all architectures."""
    kernels: Kernels = {architecture: {} for architecture in architectures}
    with ThreadPoolExecutor(jobs()) as pool:
        for found in pool.map(lambda source: _compile(nvcc, source, architectures), sources):
            for architecture, name, resources in found:
                if name in kernels[architecture]:
                    raise ValueError(f"two kernels are called {name}")
                kernels[architecture][name] = resources
    return kernels


def _compile(nvcc: str, source: Path, architectures: Sequence[str]) -> list[tuple[str, str, Resources]]:
    targets = [f"-gencode=arch={a.replace('sm', 'compute')},code={a}" for a in architectures]
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernels.fatbin")
        flags = ["-std=c++17", "-O3", "-fatbin", *targets, "-Xptxas", "-v", "-I", str(ROOT / "csrc")]
        done = subprocess.run([nvcc, *flags, "-o", str(binary), str(source)], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(done.stderr)
        issued = disassembly.counts(disassembly.dump(binary, "-sass"))
        threads = dict(threads_per_block(disassembly.dump(binary, "-elf")))
    compiled = parse_report(done.stdout + done.stderr)
    names = demangled([kernel.name for kernel in compiled])
    unbounded = [name for name, kernel in zip(names, compiled, strict=True) if kernel.name not in threads]
    if unbounded:
        raise ValueError(f"{unbounded[0]} in {source.name} has no __launch_bounds__, so its occupancy is unknown")
    return [
        (kernel.architecture, name, _resources(kernel, threads[kernel.name], issued))
        for name, kernel in zip(names, compiled, strict=True)
    ]


def _resources(kernel: Compiled, threads: int, issued: dict[tuple[str, str], dict[str, int]]) -> Resources:
    fields = (kernel.registers, kernel.shared, kernel.stack, kernel.spill_stores, kernel.spill_loads)
    return Resources(threads, *fields, issued[kernel.architecture, kernel.name])


def demangled(names: Sequence[str]) -> list[str]:
    """C++ names with their template arguments, without parameters, ``pyext::`` and what differs between machines."""
    tool = shutil.which("c++filt")
    if tool is None:
        raise FileNotFoundError("c++filt, which names kernels, is not on PATH: it comes with binutils")
    done = subprocess.run([tool, "--no-params"], input="\n".join(names), capture_output=True, text=True, check=True)
    return [re.sub(r"\(anonymous namespace\)::|^void |pyext::", "", name) for name in done.stdout.splitlines()]


def declared_kernels(source: Path) -> set[str]:
    """Names of the ``__global__`` functions that `source` defines."""
    text = re.sub(r"__launch_bounds__\([^)]*\)", "", source.read_text())
    return set(re.findall(r"__global__\s+(?:void\s+)(\w+)\(", text))
