"""What a kernel issues, counted in its disassembly: instructions as they stand, each once however often it runs."""

from __future__ import annotations

import functools
import re
import subprocess
from pathlib import Path

_LOADS = {"LDG": "global loads", "STG": "global stores"}
_BYTES = {"128": "128 bit", "64": "64 bit", "U8": "narrow", "S8": "narrow", "U16": "narrow", "S16": "narrow"}
_KINDS = {
    "LD": "generic loads",
    "ST": "generic stores",
    "LDS": "shared loads",
    "LDSM": "shared loads",
    "STS": "shared stores",
    "STSM": "shared stores",
    "LDL": "local accesses",
    "STL": "local accesses",
    "LDGSTS": "asynchronous copies",
    "UBLKCP": "asynchronous copies",
    "UTMALDG": "asynchronous copies",
    "UTMASTG": "asynchronous copies",
    "FFMA": "FFMA",
    "FFMA2": "FFMA",
    "MUFU": "MUFU",
    "SHFL": "shuffles",
    "BAR": "barriers",
    "SYNCS": "barriers",
    "ATOM": "atomics",
    "ATOMG": "atomics",
    "ATOMS": "atomics",
    "RED": "atomics",
    "REDG": "atomics",
}
_MATRIX = re.compile(r"[HIQOBD]MMA|[HIQB]GMMA|UTC\w*MMA")
_WIDTHS = ("128 bit", "64 bit", "32 bit", "narrow")
KINDS = (
    "instructions",
    *(f"{kind}, {width}" for kind in _LOADS.values() for width in _WIDTHS),
    *dict.fromkeys(_KINDS.values()),
    "mma",
)
"""What is counted; "narrow" loads and stores move 16 or 8 bits per thread."""

_LINE = re.compile(
    r"^arch = (?P<architecture>sm_\d+)|^\s+Function : (?P<function>\S+)"
    r"|^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<opcode>[A-Z][A-Z0-9_.]*)",
    re.MULTILINE,
)


@functools.cache
def kind_of(opcode: str) -> str | None:
    """The one of `KINDS` that an instruction counts as besides "instructions"; None for all that is not told apart."""
    base, *modifiers = opcode.split(".")
    if base in _LOADS:
        return f"{_LOADS[base]}, {next((_BYTES[m] for m in modifiers if m in _BYTES), '32 bit')}"
    return "mma" if _MATRIX.fullmatch(base) else _KINDS.get(base)


def counts(listing: str) -> dict[tuple[str, str], dict[str, int]]:
    """By architecture and (mangled) function, how many there are of each of `KINDS` in ``cuobjdump -sass``'s output."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    architecture, function = "", {}
    for match in _LINE.finditer(listing):
        if match["architecture"]:
            architecture = match["architecture"]
        elif match["function"]:
            function = found.setdefault((architecture, match["function"]), dict.fromkeys(KINDS, 0))
        elif match["opcode"] != "NOP":  # padding
            function["instructions"] += 1
            if (kind := kind_of(match["opcode"])) is not None:
                function[kind] += 1
    return found


def dump(binary: Path, option: str) -> str:
    """``cuobjdump OPTION binary``, by the tool that Triton's package carries: the same on every machine."""
    import triton

    tool = triton.knobs.nvidia.cuobjdump.path
    return subprocess.run([tool, option, str(binary)], capture_output=True, text=True, check=True).stdout
