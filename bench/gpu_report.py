"""The steps of ``bench/gpu.sh`` that are not one command: what the machine has, the build, the summary.

Imports nothing that may be missing before it was looked for.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

NEEDED = {
    "torch": "everything",
    "numpy": "everything",
    "setuptools": "the build",
    "pip": "the build",
    "pybind11": "the build",
    "ninja": "the build",
    "pytest": "the tests",
    "triton": "the backend triton",
}
OPTIONAL = {"matplotlib": "the plot", "xdist": "tests in parallel"}


def missing(packages: dict[str, str]) -> list[str]:
    """A line for every package that cannot be imported: its name and what needs it."""
    return [f"{name} is missing, which {use} needs" for name, use in packages.items() if not _found(name)]


def _found(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def check(device: str) -> int:
    """Print what is there and what is missing; fails where something that is needed is."""
    print(f"Python {sys.version.split()[0]} ({sys.executable}), {os.cpu_count()} cores")
    problems = missing(NEEDED)
    if device == "cuda":
        problems += _cuda_problems()
    for line in problems + missing(OPTIONAL):
        print(line)
    if _found("torch"):
        import torch

        print(f"torch {torch.__version__}, CUDA {torch.version.cuda}")
    return 1 if problems else 0


def _cuda_problems() -> list[str]:
    problems = []
    if _nvcc() is None:
        problems.append("nvcc is neither in CUDA_HOME nor on PATH, so pyext._cuda cannot be built")
    if _found("torch"):
        import torch

        if not torch.cuda.is_available():
            problems.append("torch finds no CUDA device")
    return problems


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def build(device: str, site: Path) -> int:
    """Install the package into `site`, without network, for the GPU's own architecture (on the CPU without CUDA)."""
    environment = dict(os.environ)
    if device == "cpu":
        environment["PYEXT_WITHOUT_CUDA"] = "1"
    elif "PYEXT_CUDA_ARCHITECTURES" not in environment:
        import torch

        major, minor = torch.cuda.get_device_capability()
        environment["PYEXT_CUDA_ARCHITECTURES"] = f"{major}{minor}"
    shutil.rmtree(site, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "--target"]
    return subprocess.run([*pip, str(site), "."], env=environment, check=False).returncode


@dataclass(frozen=True)
class Part:
    """One part of the run: "passed", "failed", "out of time" or "not run", the seconds that it took, and why."""

    name: str
    state: str
    seconds: int
    reason: str


def read_parts(path: Path) -> list[Part]:
    """The parts that ``gpu.sh`` has noted, a line each."""
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    return [Part(name, state, int(seconds), reason) for name, state, seconds, reason in rows]


def summary(parts: list[Part], facts: dict[str, str], folder: Path) -> list[Path]:
    """Write gpu.json and gpu.md: the machine and how every part went; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "gpu.json", folder / "gpu.md"]
    paths[0].write_text(json.dumps({"facts": facts, "parts": [asdict(part) for part in parts]}, indent=1) + "\n")
    lines = ["# A run of `bench/gpu.sh`", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    lines += ["| part | state | seconds | |", "| --- | --- | ---: | --- |"]
    lines += [f"| {part.name} | {part.state} | {part.seconds} | {part.reason} |" for part in parts]
    lines += ["", "Times and roofs: the table named after the device. Kernels: `launches.md`. All output: `log.txt`."]
    paths[1].write_text("\n".join(lines) + "\n")
    return paths


def _facts(device: str) -> dict[str, str]:
    """Those of the machine, as far as the package can be imported."""
    import torch

    try:
        from bench.machine import facts

        return facts(torch.device(device))
    except (
        ImportError,
        RuntimeError,
        AssertionError,
    ) as error:  # not built, no device: the summary is due all the same
        return {"torch": torch.__version__, "the rest": f"unknown: {error}"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_report", description=__doc__)
    parser.add_argument("step", choices=["check", "build", "summary"])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--site", type=Path, default=Path("build/gpu/site"), help="where the build is installed")
    parser.add_argument("--parts", type=Path, default=Path("build/gpu/parts.tsv"), help="how the parts went")
    parser.add_argument("--output", type=Path, default=Path("bench/results/gpu"))
    options = parser.parse_args()
    if options.step == "check":
        return check(options.device)
    if options.step == "build":
        return build(options.device, options.site)
    for path in summary(read_parts(options.parts), _facts(options.device), options.output):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
