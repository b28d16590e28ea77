"""Compiles the CUDA sources for the host, with every access to memory checked, and loads them.

The sources are compiled by g++ as ``-fsanitize=thread`` has it, which calls a function before every load and store,
and ``-fsanitize=bounds-strict,alignment``. Those functions are the shim's own: neither sanitizer's runtime is linked.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CUDA_SOURCES = sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))
# Kernels may stand in any of these.
CUDA_FILES = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cu", ".cuh", ".h"))
# _FORTIFY_SOURCE, which some compilers set by themselves, takes a fibre's switch of stacks for a mistake. Kernels may
# copy bits into a __half with memcpy.
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-U_FORTIFY_SOURCE"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-class-memaccess"]
# A store that the compiler found dead would not be seen.
CHECKS = ["-fsanitize=thread,bounds-strict,alignment", "--param", "tsan-instrument-func-entry-exit=0", "-fno-tree-dse"]
# Calls to these are not instrumented, so they go to functions that check.
CHECKED_CALLS = ("memcpy", "memmove", "memset")


def _command(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]}: {done.stderr}")
    return done.stdout


def _header_folders() -> list[Path]:
    """The shim, our sources, and CUDA's own headers (vector types, half, bfloat16) from Triton's package."""
    import triton

    return [HERE, ROOT / "csrc", Path(triton.__file__).parent / "backends" / "nvidia" / "include"]


def build(folder: Path) -> Path:
    """Compiles and links the library in `folder`."""
    named = os.environ.get("CXX", "")
    compiler = named if Path(named).name.startswith("g++") else "g++"  # clang has other sanitizer options
    shim, ours, toolkit = _header_folders()
    include = ["-I", shim, "-I", ours, "-isystem", toolkit]
    checked = [*CUDA_SOURCES, *sorted(HERE.glob("*.cu")), *sorted(HERE.glob("*_entry.cpp"))]
    runtime = [path for path in sorted(HERE.glob("*.cpp")) if path not in checked]
    objects = []
    for source in [*checked, *runtime]:
        objects.append(folder / f"{len(objects)}-{source.stem}.o")
        extra = CHECKS if source in checked else []
        _command(compiler, *FLAGS, *extra, *include, "-x", "c++", "-c", source, "-o", objects[-1])
        if source in checked:
            renamed = [f"--redefine-sym={name}=checked_{name}" for name in CHECKED_CALLS]
            _command("objcopy", *renamed, objects[-1])
    target = folder / "cuda_host.so"
    _command(compiler, "-shared", "-Wl,-Bsymbolic,--no-undefined", "-o", target, *objects, "-ldl")
    return target


def _without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.DOTALL)


BOUNDS = r"(?:__launch_bounds__\s*\((?:[^()]|\([^()]*\))*\)\s*)?"
KERNEL = re.compile(rf"__global__\s+{BOUNDS}(?:(?:static|inline)\s+)*void\s+{BOUNDS}(\w+)\s*\(")


def kernels_in(text: str) -> list[str]:
    """Names of the ``__global__`` functions in a source; one that is written in another way is an error."""
    text = _without_comments(text)
    names = KERNEL.findall(text)
    if len(names) != len(re.findall(r"\b__global__\b", text)):
        raise ValueError("a __global__ function whose name cannot be read: write `__global__ void name(`")
    return names


def _demangled(names: list[str]) -> list[str]:
    command = ["c++filt", "--no-params"]
    return subprocess.run(
        command, input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout.splitlines()


class Library:
    """The kernels, loaded, and which of them ran and were compared with float64 truth."""

    def __init__(self, path: Path) -> None:
        self.functions = ctypes.CDLL(str(path))
        self.verified: set[str] = set()
        rows = [line.split() for line in _command("nm", "--defined-only", path).splitlines()]
        self._names = self._functions([(int(row[0], 16), row[2]) for row in rows if row[1] in "tTwW"])
        for row in rows:
            if "cuda_host_gap_" in row[2]:
                self.functions.add_static_gap(ctypes.c_size_t(int(row[0], 16)), ctypes.c_size_t(64))

    @staticmethod
    def _functions(code: list[tuple[int, str]]) -> dict[int, str]:
        """Functions by where they lie in the library; names with template arguments, without parameters."""
        names = _demangled([name for _, name in code])
        readable = (re.sub(r"^void |\(anonymous namespace\)::", "", name) for name in names)
        return {address: name for (address, _), name in zip(code, readable, strict=True)}

    def call(self, name: str, *arguments) -> None:
        """Calls a function that returns a message, or nothing where all went well."""
        function = getattr(self.functions, name)
        function.restype = ctypes.c_char_p
        message = function(*arguments)
        if message is not None:
            raise RuntimeError(message.decode())

    def compiled(self, kernels: Iterable[str]) -> set[str]:
        """Every instance that the library holds of the kernels named."""
        wanted = set(kernels)
        return {name for name in self._names.values() if _base(name) in wanted}

    def _take_launched(self) -> set[str]:
        offsets = (ctypes.c_size_t * 4096)()
        self.functions.take_launched.restype = ctypes.c_size_t
        count = self.functions.take_launched(offsets, ctypes.c_size_t(len(offsets)))
        if count > len(offsets):
            raise RuntimeError(f"{count} kernels ran, more than are counted")
        return {self._names[offset] for offset in offsets[:count]}

    def forget_launches(self) -> None:
        self._take_launched()

    def verify_launches(self, truths: Iterable[Tensor]) -> None:
        """Counts the kernels that ran since `forget_launches` as compared with `truths`, which are float64."""
        truths = list(truths)
        if not truths or any(truth.dtype.itemsize != 8 or not truth.is_floating_point() for truth in truths):
            raise ValueError("kernels count as verified by a comparison with float64 alone")
        self.verified |= self._take_launched()


def _base(name: str) -> str:
    """``excite_kernel`` for ``pyext::gated_excitation::excite_kernel<float, true>``."""
    return name.split("<", 1)[0].rsplit("::", 1)[-1]


def unverified(library: Library, kernels: Iterable[str]) -> list[str]:
    """What is missing: instances of `kernels` that did not run under check, or kernels without any instance."""
    kernels = set(kernels)
    compiled = library.compiled(kernels)
    never_compiled = kernels - {_base(name) for name in compiled}
    return sorted(compiled - library.verified) + sorted(f"{name}: no instance" for name in never_compiled)
