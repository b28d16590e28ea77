"""Triton kernels compiled to cubins for GPUs that this machine lacks: `python -m bench.resources.triton_kernels sm_90`.

Every operator's samples are run on CPU tensors with a driver that only names its GPU, so that each kernel is compiled
as a launch would: same blocks, same specialisation of strides and alignment. That needs Triton without its interpreter,
hence a process of its own per architecture, which prints JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.resources import disassembly
from bench.resources.entry import Kernels, Resources, jobs

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
MODES = ("inference", "gradients", "training")


def modules() -> list[str]:
    """The files of ``triton_kernels`` that hold kernels."""
    return sorted(path.stem for path in (ROOT / "triton_kernels").glob("*.py") if "@triton.jit" in path.read_text())


def declared_kernels(module: str) -> set[str]:
    """Kernels of one file: ``@triton.jit`` functions whose name is public, helpers being private."""
    text = (ROOT / "triton_kernels" / f"{module}.py").read_text()
    return set(re.findall(r"@triton\.jit(?:\([^)]*\))?\s+def ([a-z]\w*)\(", text))


def kernel_of(key: str) -> str:
    """The kernel's name in a key that `compile_kernels` gives."""
    return key.split(",")[0]


def compile_kernels() -> tuple[str, Kernels]:
    """Versions of Triton and its assemblers, and the resources of every kernel by architecture and specialisation.

    A specialisation's key is what it was compiled for: ``kernel, shape dtype layout, mode`` (and a number where one
    call launches several), each where it first occurs for its shape.
    """
    with ThreadPoolExecutor(jobs()) as pool:
        results = dict(zip(ARCHITECTURES, pool.map(_in_own_process, ARCHITECTURES), strict=True))
    (version,) = {result["version"] for result in results.values()}
    rows = {architecture: result["kernels"] for architecture, result in results.items()}
    return version, {a: {key: Resources(**row) for key, row in found.items()} for a, found in rows.items()}


def _in_own_process(architecture: str) -> dict[str, Any]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as cache:
        # An empty cache: a kernel compiled by an earlier version of Triton or of ptxas must not stand in.
        environment["TRITON_CACHE_DIR"] = cache
        command = [sys.executable, "-m", __name__, architecture]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def _record(capability: int) -> list[tuple[str, Any]]:
    """Make every launch compile for `capability` instead; returns the list that the launches fill."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    class Named:
        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

    launched: list[tuple[str, Any]] = []
    run = JITFunction.run

    def compile_only(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launched.append((function.__name__, run(function, *args, grid=grid, warmup=True, **kwargs)))

    triton.runtime.driver.set_active(Named())
    JITFunction.run = compile_only
    return launched


def _resources(kernel: Any) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = disassembly.dump(Path(file.name), "--dump-resource-usage")
        listing = disassembly.dump(Path(file.name), "-sass")
    fields = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    (issued,) = disassembly.counts(listing).values()
    # Bytes of spills are told by ptxas alone, which Triton does not pass on: stack and local accesses stand for them.
    stack = fields["STACK"] + fields["LOCAL"]
    return Resources(32 * kernel.metadata.num_warps, fields["REG"], kernel.metadata.shared, stack, 0, 0, issued)


def _run(samples: Any, call: Any, mode: str) -> None:
    import torch

    for leaf in call.leaves.values():
        leaf.requires_grad_(mode != "inference")
    out = samples.run(call, mode == "training", backend="triton")
    if mode != "inference":
        torch.autograd.grad(out, list(call.leaves.values()), torch.zeros_like(out))


def _compile_all(launched: list[tuple[str, Any]]) -> dict[str, Resources]:
    from bench.samples import SAMPLES

    rows: dict[str, Resources] = {}
    for samples in SAMPLES.values():
        for shape, dtype, layout in samples.usual:
            label, seen = f"{shape} {dtype} {layout}".replace("torch.", ""), set()
            for mode in MODES if samples.differentiable else MODES[:1]:
                launched.clear()
                _run(samples, samples.draw(shape, dtype, dtype, layout, 0), mode)
                for name, kernel in launched:
                    if kernel.hash not in seen:
                        seen.add(kernel.hash)
                        rows[_unused(f"{name}, {label}, {mode}", rows)] = _resources(kernel)
    return rows


def _unused(key: str, rows: dict[str, Resources]) -> str:
    numbered = (key if index == 1 else f"{key}, {index}" for index in range(1, len(rows) + 2))
    return next(name for name in numbered if name not in rows)


def main(architecture: str) -> None:
    import triton

    from pyext import _library

    _library.triton_error = lambda device: None  # nothing is run, so the CPU will do
    rows = _compile_all(_record(int(architecture.removeprefix("sm_"))))
    knobs = triton.knobs.nvidia
    version = f"{triton.__version__}, ptxas {knobs.ptxas.version} and {knobs.ptxas_blackwell.version}"
    print(json.dumps({"version": version, "kernels": {key: dataclasses.asdict(row) for key, row in rows.items()}}))


if __name__ == "__main__":
    main(sys.argv[1])
