"""What each call starts on a GPU: `python -m bench.launches` writes its kernels' times, extents and occupancy.

Here the dynamic shared memory is known, which the resource report of the compiled kernels leaves open.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.resources.occupancy import LIMITS, occupancy
from bench.samples import SAMPLES, Call, Samples, Shape
from pyext._backend import operators_with

BATCH = 64
BACKENDS = ("cuda", "triton")
MODES = ("inference", "training")
_CALLS = 5


@dataclass(frozen=True)
class Launch:
    """One kernel of a call: its place in time, median microseconds, extents, registers and bytes of shared memory."""

    call: str
    kernel: str
    microseconds: float
    grid: tuple[int, ...]
    block: tuple[int, ...]
    registers: int
    shared: int

    def occupancy(self, architecture: str) -> str:
        """Its share of a multiprocessor's warps, blocks being as many as fit."""
        if architecture not in LIMITS:
            return "unknown"
        threads = self.block[0] * self.block[1] * self.block[2]
        return f"{occupancy(architecture, threads, self.registers, self.shared).share:.0%}"


def launches(trace: dict[str, Any], call: str, calls: int = _CALLS) -> list[Launch]:
    """Kernels of one of `calls` equal calls in the trace that torch's profiler exported, in order."""
    events = [event for event in trace["traceEvents"] if event.get("cat") == "kernel"]
    events.sort(key=lambda event: event["ts"])
    if not events or len(events) % calls:
        raise ValueError(f"{call}: {len(events)} kernels in {calls} equal calls")
    per_call = len(events) // calls
    found = []
    for index in range(per_call):
        same = events[index::per_call]
        if len({event["name"] for event in same}) > 1:
            raise ValueError(f"{call}: the calls start different kernels")
        arguments = same[0]["args"]
        found.append(
            Launch(
                call,
                short(same[0]["name"]),
                statistics.median(event["dur"] for event in same),
                tuple(arguments["grid"]),
                tuple(arguments["block"]),
                arguments["registers per thread"],
                arguments["shared memory"],
            )
        )
    return found


def short(name: str) -> str:
    """A kernel's name without return type, name spaces that all share, and parameters."""
    return re.sub(r"^void |pyext::|\(anonymous namespace\)::|at::native::|\(.*", "", name)[:80]


def profiled(run: Callable[[], object]) -> dict[str, Any]:
    """The trace of some calls of `run`, after two that are not looked at."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(_CALLS):
            run()
        torch.cuda.synchronize()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profile.export_chrome_trace(file.name)
        return json.loads(Path(file.name).read_text())


def _runner(samples: Samples, call: Call, mode: str, backend: str) -> Callable[[], object]:
    if mode == "inference":

        def infer() -> object:
            with torch.no_grad():
                return samples.run(call, False, backend=backend)

        return infer
    leaves = [leaf.requires_grad_() for leaf in call.leaves.values()]

    def train() -> object:
        out = samples.run(call, True, backend=backend)
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    return train


def measure(names: Iterable[str]) -> tuple[list[Launch], list[str]]:
    """Launches of every usual call of the operators `names`, and what failed."""
    found: list[Launch] = []
    failures: list[str] = []
    for name in names:
        for shape, dtype, layout in SAMPLES[name].usual:
            large = Shape((BATCH, *shape.input[1:]), shape.others)
            for mode in MODES if SAMPLES[name].differentiable else MODES[:1]:
                for backend in BACKENDS:
                    label = f"{name} {mode} {large} {dtype} {layout}, {backend}".replace("torch.", "")
                    call = SAMPLES[name].draw(large, dtype, dtype, layout, 0).to(torch.device("cuda"))
                    try:
                        found += launches(profiled(_runner(SAMPLES[name], call, mode, backend)), label)
                    except (RuntimeError, ValueError) as error:
                        failures.append(f"{label}: {error}")
    return found, failures


_COLUMNS = ("kernel", "median µs", "grid", "block", "registers", "shared B", "occupancy")


def markdown(found: list[Launch], failures: list[str], architecture: str, device: str) -> str:
    """One table per call, kernels in the order in which they start."""
    lines = [
        "# Kernels that calls start",
        "",
        f"{device}, {architecture}. Median of {_CALLS} calls, by torch's profiler.",
    ]
    for call in dict.fromkeys(launch.call for launch in found):
        own = [launch for launch in found if launch.call == call]
        lines += ["", f"## {call}: {sum(launch.microseconds for launch in own):.1f} µs in {len(own)} kernels", ""]
        lines += ["| " + " | ".join(_COLUMNS) + " |", "| --- |" + " ---: |" * (len(_COLUMNS) - 1)]
        lines += ["| " + " | ".join(_cells(launch, architecture)) + " |" for launch in own]
    if failures:
        lines += ["", "Failed:", "", *(f"- {failure}" for failure in failures)]
    return "\n".join(lines) + "\n"


def _cells(launch: Launch, architecture: str) -> tuple[str, ...]:
    grid, block = ("×".join(map(str, extents)) for extents in (launch.grid, launch.block))
    figures = (str(launch.registers), str(launch.shared), launch.occupancy(architecture))
    return f"`{launch.kernel}`", f"{launch.microseconds:.1f}", grid, block, *figures


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.launches", description=__doc__)
    parser.add_argument("--only", default="", help="operators whose name contains this")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="where launches.md is written")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("python -m bench.launches: torch finds no CUDA device here")
    names = [name for name in operators_with("cuda") if options.only in name]
    if not names:
        parser.error(f"no operator has {options.only!r} in its name: {', '.join(operators_with('cuda'))}")
    found, failures = measure(names)
    major, minor = torch.cuda.get_device_capability()
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "launches.md"
    path.write_text(markdown(found, failures, f"sm_{major}{minor}", torch.cuda.get_device_name()))
    print(path)
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
