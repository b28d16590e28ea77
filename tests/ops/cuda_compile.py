"""What nvcc says about the kernels: registers, stack and spills per kernel. Run as a program, it prints the table."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90")


@dataclass(frozen=True)
class Kernel:
    """Resources of one compiled kernel; stack and spills in bytes per thread."""

    name: str
    architecture: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int


ENTRY = re.compile(r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<architecture>\w+)'")
MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")


def parse_report(text: str) -> list[Kernel]:
    """Kernels in the output of ``nvcc -Xptxas -v``; one that lacks a figure is an error."""
    entries = list(ENTRY.finditer(text))
    ends = [entry.start() for entry in entries[1:]] + [len(text)]
    kernels = []
    for entry, end in zip(entries, ends, strict=True):
        section = text[entry.end() : end]
        memory, registers = MEMORY.search(section), REGISTERS.search(section)
        if memory is None or registers is None:
            raise ValueError(f"no resources are reported for {entry['name']}")
        kernels.append(Kernel(entry["name"], entry["architecture"], int(registers[1]), *map(int, memory.groups())))
    return kernels


def find_nvcc() -> str | None:
    """The CUDA compiler of ``CUDA_HOME``, or else of ``PATH``."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")


def compile_report(nvcc: str, source: Path, architecture: str) -> str:
    """Compiles `source` for one architecture, to nothing that is kept; returns the resource report."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["-std=c++17", "-O3", "-cubin", f"-arch=sm_{architecture}", "-Xptxas", "-v", "-I", str(ROOT / "csrc")]
        command = [nvcc, *flags, "-o", str(Path(folder, "kernels.cubin")), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return done.stdout + done.stderr


def demangled(names: list[str]) -> list[str]:
    """C++ names without their parameters, or the names as they are where no demangler is installed."""
    tool = shutil.which("c++filt")
    if tool is None:
        return names
    done = subprocess.run([tool, "--no-params"], input="\n".join(names), capture_output=True, text=True, check=True)
    return [re.sub(r"\(anonymous namespace\)::|^void |pyext::\w+::", "", name) for name in done.stdout.splitlines()]


def main() -> None:
    nvcc = find_nvcc()
    if nvcc is None:
        raise SystemExit("nvcc is neither in CUDA_HOME nor on PATH")
    print("| kernel | sm | registers | stack | spill stores | spill loads |\n|---|---|---|---|---|---|")
    for source in SOURCES:
        for architecture in ARCHITECTURES:
            kernels = parse_report(compile_report(nvcc, source, architecture))
            for name, k in sorted(zip(demangled([k.name for k in kernels]), kernels, strict=True), key=lambda x: x[0]):
                print(f"| {name} | {k.architecture} | {k.registers} | {k.stack} | {k.spill_stores} | {k.spill_loads} |")


if __name__ == "__main__":
    main()
