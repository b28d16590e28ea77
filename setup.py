"""Builds pyext._C (CPU) always and pyext._cuda where a CUDA toolkit and a CUDA build of torch are found.

torch.utils.cpp_extension is used for where things are, not for building: it compiles every file with the same flags,
and each csrc/cpu/*_kernel.cpp is compiled once per instruction set. The stable ABI of torch 2.11 is targeted, so one
binary serves every later torch.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc"

if importlib.util.find_spec("torch") is None:
    sys.exit(
        "pyext-kernels compiles against the torch that you have: install torch>=2.11 first, then run "
        "`pip install --no-build-isolation pyext-kernels` (or `.` in a checkout)."
    )

import torch  # noqa: E402
from torch.utils import cpp_extension  # noqa: E402

if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11):
    sys.exit(f"pyext-kernels needs torch 2.11 or newer to build, found {torch.__version__}.")

X86_CAPABILITIES = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}
IS_X86 = os.uname().machine in ("x86_64", "AMD64")
CAPABILITIES = X86_CAPABILITIES if IS_X86 else {"baseline": []}
# Of the kernels that multiply pairs of bfloat16.
BFLOAT16_CAPABILITIES = {"avx512_bf16": [*X86_CAPABILITIES["avx512"], "-mavx512bf16"]} if IS_X86 else {}
BFLOAT16_KERNELS = ("hybrid_block_kernel",)
CUDA_ARCHITECTURES = os.environ.get("PYEXT_CUDA_ARCHITECTURES", "80;90;100").split(";")
# -Wno-psabi: vectors wider than the baseline's registers stay inside one file. No LTO: it would merge instruction sets.
CXX_FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-fno-lto", "-Wall", "-Wno-psabi"]
CXX_FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # GCC 12 reports its own AVX-512 headers
SANITIZERS = [name for name in os.environ.get("PYEXT_SANITIZE", "").split(",") if name]
if SANITIZERS:  # a report ends the process, so none is overlooked
    CXX_FLAGS += ["-g1", f"-fsanitize={','.join(SANITIZERS)}", "-fno-sanitize-recover=all"]
    CXX_FLAGS.append("-fno-omit-frame-pointer")
SANITIZE_LINK = [f"-fsanitize={','.join(SANITIZERS)}"] if SANITIZERS else []
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]


@dataclass
class Plan:
    """What becomes one extension module: (source, rule, extra flags) and the flags of its link."""

    objects: list[tuple[Path, str, list[str]]] = field(default_factory=list)
    link: list[str] = field(default_factory=list)


def cuda_toolkit() -> tuple[Path | None, str]:
    """The toolkit to build pyext._cuda with, and why there is none (empty when there is one)."""
    if SANITIZERS:
        return None, "it was built with PYEXT_SANITIZE, which is for the CPU kernels"
    if os.environ.get("PYEXT_WITHOUT_CUDA") == "1":
        return None, "PYEXT_WITHOUT_CUDA=1 was set when it was built"
    if torch.version.cuda is None:
        return None, f"torch {torch.__version__}, which it was built with, is a CPU build"
    home = os.environ.get("CUDA_HOME")
    nvcc = Path(home, "bin", "nvcc") if home else shutil.which("nvcc")
    if nvcc is None or not Path(nvcc).exists():
        return None, "no nvcc was found when it was built (set CUDA_HOME to the toolkit)"
    release = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    if f"release {torch.version.cuda.split('.')[0]}." not in release:
        return None, f"nvcc is of another major version than torch's CUDA {torch.version.cuda}"
    return Path(nvcc), ""


NVCC, WITHOUT_CUDA = cuda_toolkit()
# Where compiled objects are kept, so that a second build of any kind compiles what changed: pip's own folders are
# temporary. One folder per interpreter, torch and instrumentation.
OBJECTS = ROOT / "build" / "-".join(["objects", sys.implementation.cache_tag, torch.__version__, *SANITIZERS])


def toolkit_home(nvcc: Path) -> Path:
    """The folder with the toolkit's include and lib, which nvcc tells: on many machines it is a wrapper script."""
    dry_run = [nvcc, "--dryrun", "-x", "cu", os.devnull]
    plan = subprocess.run(dry_run, capture_output=True, text=True, check=False).stderr
    top = next((line.split("TOP=", 1)[1] for line in plan.splitlines() if "TOP=" in line), nvcc.parent.parent)
    return Path(top).resolve()


def pip_cuda_includes() -> list[str]:
    """CUDA headers that torch's own wheels bring, for toolkits that lack some of them."""
    spec = importlib.util.find_spec("nvidia")
    roots = list(spec.submodule_search_locations or []) if spec else []
    return [str(path) for root in roots for path in sorted(Path(root).glob("cu*/include"))]


def include_flags(paths: list[str]) -> list[str]:
    return [f"-I{path}" for path in [str(SOURCES), *paths]]


def torch_link(*libraries: str) -> list[str]:
    # libgcc first by its archive: GCC 12's half-precision conversions are in no older libgcc_s. Unwinding stays shared.
    return [f"-L{path}" for path in cpp_extension.library_paths()] + [f"-l{name}" for name in (*libraries, "gcc")]


def capabilities_of(kernel: Path) -> dict[str, list[str]]:
    """The instruction sets that a kernel file is compiled for, with the flags of each."""
    return CAPABILITIES | (BFLOAT16_CAPABILITIES if kernel.stem in BFLOAT16_KERNELS else {})


def cpu_plan() -> Plan:
    import pybind11

    torch_flags = STABLE_ABI + include_flags(cpp_extension.include_paths())
    pybind_flags = include_flags([pybind11.get_include(), sysconfig.get_path("include")])
    facts = [
        f'-DPYEXT_BUILD_TORCH=\\"{torch.__version__}\\"',
        f'-DPYEXT_BUILD_CUDA=\\"{WITHOUT_CUDA or torch.version.cuda}\\"',
    ]
    plan = Plan(link=[*torch_link("c10", "torch_cpu"), *SANITIZE_LINK])
    plan.objects.append((SOURCES / "ops.cpp", "cxx", torch_flags))
    plan.objects.append((SOURCES / "module.cpp", "cxx", pybind_flags + facts))
    for source in sorted((SOURCES / "cpu").glob("*.cpp")):
        if source.stem.endswith("_kernel"):
            for name, flags in capabilities_of(source).items():
                plan.objects.append((source, "cxx", [*include_flags([]), *flags, f"-DPYEXT_CAPABILITY={name}"]))
        else:
            plan.objects.append((source, "cxx", torch_flags))
    return plan


def cuda_plan() -> Plan:
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHITECTURES]
    newest = CUDA_ARCHITECTURES[-1]
    device = ["-std=c++17", "-O3", *targets, f"-gencode=arch=compute_{newest},code=compute_{newest}"]
    device += ["-Xcompiler", "-fPIC,-fvisibility=hidden", *include_flags([])]
    host = ["-DUSE_CUDA", *STABLE_ABI]
    home = toolkit_home(NVCC)
    host += include_flags([*cpp_extension.include_paths(), str(home / "include"), *pip_cuda_includes()])
    host.append(f"-I{sysconfig.get_path('include')}")
    plan = Plan(link=torch_link("c10", "torch_cpu", "torch_cuda", "c10_cuda"))
    plan.link += [f"-L{home / name}" for name in ("lib64", "lib", "targets/x86_64-linux/lib")]
    plan.link += ["-lcudart_static", "-lpthread", "-ldl", "-lrt"]
    plan.objects += [(source, "nvcc", device) for source in sorted((SOURCES / "cuda").glob("*.cu"))]
    plan.objects += [(source, "cxx", host) for source in sorted((SOURCES / "cuda").glob("*.cpp"))]
    return plan


def escape(words: list[str]) -> str:
    return " ".join(word.replace("$", "$$").replace(" ", "\\ ") for word in words)


def ninja_file(plan: Plan, target: Path, folder: Path) -> str:
    """A build.ninja that compiles the plan's objects into `folder` and links `target`."""
    compiler = os.environ.get("CXX", "c++")
    lines = [
        "ninja_required_version = 1.5",
        f"rule cxx\n  command = {compiler} {escape(CXX_FLAGS)} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc",
        f"rule nvcc\n  command = {NVCC} $flags -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {compiler} -shared $in $flags -o $out",
    ]
    objects: list[str] = []
    times: Counter[Path] = Counter()  # that a source is compiled: another source moves no object to another name
    for source, rule, flags in plan.objects:
        times[source] += 1
        output = folder / f"{source.name}-{times[source]}.o"
        objects.append(str(output))
        lines.append(f"build {output}: {rule} {source}\n  flags = {escape(flags)}")
    lines.append(f"build {target}: link {' '.join(objects)}\n  flags = {escape(plan.link)}")
    return "\n".join([*lines, f"default {target}", ""])


class NinjaBuild(build_ext):
    """Compiles the plans with ninja; a second build compiles what changed."""

    def build_extension(self, extension: Extension) -> None:
        plan = cuda_plan() if extension.name == "pyext._cuda" else cpu_plan()
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        folder = OBJECTS / extension.name
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(plan, target, folder))
        jobs = os.environ.get("MAX_JOBS", str(min(os.cpu_count() or 1, 16)))
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder), "-j", jobs], check=True)


extensions = [Extension("pyext._C", sources=[])]
if NVCC is not None and any((SOURCES / "cuda").glob("*.cu")):
    extensions.append(Extension("pyext._cuda", sources=[]))

if __name__ == "__main__":  # the sanitizer tests read the flags above
    # A wheel for others says in its version what it holds, as torch's do: 0.1.0+cpu, 0.1.0+cu130.
    variant = "+cpu" if NVCC is None else f"+cu{torch.version.cuda.replace('.', '')}"
    options = {"egg_info": {"tag_build": variant}} if os.environ.get("PYEXT_LOCAL_VERSION") == "1" else {}
    setup(ext_modules=extensions, cmdclass={"build_ext": NinjaBuild}, options=options)
