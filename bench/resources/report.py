"""The report of all kernels' resources: written as JSON and Markdown, read back, compared with a fresh compile."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.resources.disassembly import KINDS
from bench.resources.entry import Kernels, Resources

RESULTS = Path(__file__).resolve().parents[1] / "results"
NAME = "kernel_resources"
ASSUMED = (
    "Occupancy follows from registers, threads per block (`__launch_bounds__`; `num_warps` of Triton) and the shared "
    "memory known to the compiler. For Triton that is all. The CUDA kernels' dynamic shared memory is planned at the "
    'launch from the image\'s size and the device: "spare B" is how much of it a block can have at this occupancy.',
    "Instructions are counted as they stand in the machine code, not as often as they run. Narrow loads and stores "
    "move 16 or 8 bits per thread; generic ones serve shared and global memory alike.",
    "Triton does not pass on ptxas's bytes of spills: there stack and local accesses stand for them.",
)


@dataclass(frozen=True)
class Toolchain:
    """The kernels that one compiler made, and which compiler that was."""

    version: str
    kernels: Kernels


Report = dict[str, Toolchain]
"""By the compiler's name: "cuda" (nvcc) and "triton"."""


@dataclass
class Comparison:
    """`faults`: what is worse than recorded or not recorded. `changes`: what else differs, so that a refresh is due."""

    faults: list[str] = dataclasses.field(default_factory=list)
    changes: list[str] = dataclasses.field(default_factory=list)


def compare(recorded: Toolchain, fresh: Toolchain) -> Comparison:
    """Judge a fresh compile by the record.

    Another compiler than the recorded one allots registers as it likes, so then only spills are faults.
    """
    result = Comparison()
    same_compiler = recorded.version == fresh.version
    if not same_compiler:
        result.changes.append(f"recorded with {recorded.version}, compiled with {fresh.version}: spills alone compared")
    for architecture, kernels in fresh.kernels.items():
        known = recorded.kernels.get(architecture, {})
        for name, now in kernels.items():
            if name not in known:
                result.faults.append(f"{name} ({architecture}) is not recorded")
            else:
                _compare_one(f"{name} ({architecture})", architecture, known[name], now, same_compiler, result)
        gone = sorted(set(known) - set(kernels))
        result.faults += [f"{name} ({architecture}) is recorded, but there is none" for name in gone]
    return result


def _compare_one(
    label: str, architecture: str, was: Resources, now: Resources, same_compiler: bool, result: Comparison
) -> None:
    if any(new > old for new, old in zip(now.spilled(), was.spilled(), strict=True)):
        result.faults.append(f"{label} spills: {_spills(was)} was recorded, now {_spills(now)}")
    elif same_compiler and now.occupancy(architecture).share < was.occupancy(architecture).share:
        before, after = (f"{_occupancy(r, architecture)}" for r in (was, now))
        result.faults.append(f"{label} has a lower occupancy: {before} was recorded, now {after}")
    elif same_compiler and now != was:
        result.changes.append(f"{label} changed")


def _spills(resources: Resources) -> str:
    stack, stores, loads, accesses = resources.spilled()
    return f"{stack} B of stack, {stores} B stored, {loads} B loaded, {accesses} local accesses"


def _occupancy(resources: Resources, architecture: str) -> str:
    share = resources.occupancy(architecture).share
    return f"{share:.1%} ({resources.registers} registers, {resources.threads} threads, {resources.shared} B shared)"


def write(report: Report, folder: Path = RESULTS) -> list[Path]:
    """Write the report's JSON and Markdown into `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{NAME}.json", folder / f"{NAME}.md"]
    paths[0].write_text(_to_json(report))
    paths[1].write_text(markdown(report))
    return paths


def read(folder: Path = RESULTS) -> Report:
    """The report that `write` left in `folder`."""
    data = json.loads((folder / f"{NAME}.json").read_text())
    return {
        name: Toolchain(
            part["version"],
            {a: {key: _from_row(row) for key, row in rows.items()} for a, rows in part["kernels"].items()},
        )
        for name, part in data.items()
    }


def _to_json(report: Report) -> str:
    """One kernel per line, in order of name: a change shows as the lines of the kernels that changed."""
    parts = []
    for name, toolchain in report.items():
        architectures = []
        for architecture, kernels in toolchain.kernels.items():
            rows = (f"{json.dumps(key)}: {json.dumps(_to_row(kernels[key], architecture))}" for key in sorted(kernels))
            architectures.append(f"{json.dumps(architecture)}: {{\n" + ",\n".join(rows) + "\n}")
        head = f"{json.dumps(name)}: {{\n" + f'"version": {json.dumps(toolchain.version)},\n"kernels": {{\n'
        parts.append(head + ",\n".join(architectures) + "\n}\n}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _to_row(resources: Resources, architecture: str) -> dict[str, Any]:
    row = dataclasses.asdict(resources)
    row["issues"] = {kind: count for kind, count in resources.issues.items() if count}
    found = resources.occupancy(architecture)
    follows = {"blocks": found.blocks, "occupancy": round(found.share, 4), "spare_shared": found.spare_shared}
    return {**row, "follows": follows}


def _from_row(row: dict[str, Any]) -> Resources:
    fields = {field.name: row[field.name] for field in dataclasses.fields(Resources)}
    return Resources(**{**fields, "issues": dict.fromkeys(KINDS, 0) | row["issues"]})


_COLUMNS = ("kernel", "threads", "registers", "shared B", "stack B", "spilled B", "blocks", "occupancy", "spare B")
_ISSUES = {
    "instructions": "instructions",
    "LDG 128/64/32/narrow": tuple(kind for kind in KINDS if kind.startswith("global loads")),
    "STG 128/64/32/narrow": tuple(kind for kind in KINDS if kind.startswith("global stores")),
    "generic LD/ST": ("generic loads", "generic stores"),
    "LDS/STS": ("shared loads", "shared stores"),
    "local": "local accesses",
    "copies": "asynchronous copies",
    "FFMA": "FFMA",
    "MUFU": "MUFU",
    "mma": "mma",
    "SHFL": "shuffles",
    "BAR": "barriers",
    "atomics": "atomics",
}


def markdown(report: Report) -> str:
    """The report as one Markdown document."""
    lines = ["# Resources of the compiled kernels", "", "Written by `make resources`, compared in CI.", ""]
    lines += [f"- {assumed}" for assumed in ASSUMED]
    for name, toolchain in report.items():
        for architecture, kernels in toolchain.kernels.items():
            compiler = "nvcc" if name == "cuda" else "Triton"
            lines += ["", f"## {name}, {architecture} ({compiler} {toolchain.version})", ""]
            lines += _table(kernels, architecture)
    return "\n".join(lines) + "\n"


def _table(kernels: dict[str, Resources], architecture: str) -> Iterator[str]:
    columns = (*_COLUMNS, *_ISSUES)
    yield "| " + " | ".join(columns) + " |"
    yield "| --- |" + " ---: |" * (len(columns) - 1)
    for name in sorted(kernels):
        yield "| " + " | ".join(_cells(name, kernels[name], architecture)) + " |"


def _cells(name: str, resources: Resources, architecture: str) -> Iterator[str]:
    found = resources.occupancy(architecture)
    yield f"`{name}`"
    yield from map(str, (resources.threads, resources.registers, resources.shared, resources.stack))
    yield str(resources.spill_stores + resources.spill_loads)
    yield from (str(found.blocks), f"{found.share:.0%}", str(found.spare_shared))
    for kinds in _ISSUES.values():
        chosen = (kinds,) if isinstance(kinds, str) else kinds
        counts = [str(resources.issues[kind]) for kind in chosen]
        yield "0" if set(counts) == {"0"} else "/".join(counts)
