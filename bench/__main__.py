"""`python -m bench`: all cases, contenders in turn in one process, into one table, a JSON file and a plot."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from bench import memory, table, test_gated_excitation, test_hcgnet, test_memory_contrast
from bench.case import Case, Gate
from bench.machine import TUNABLES, facts, load
from bench.peers import forget_compiled, missing_engines
from bench.roofs import Roofs
from bench.timer import FULL, QUICK, Effort, interleaved

RESULTS = Path(__file__).parent / "results"
PARTIAL = Path("runs/bench")
"""Where a run goes that is not whole, so that it cannot pass for the published table."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--only", default="", help="run the cases whose name contains this, such as gated_excitation")
    parser.add_argument("--quick", action="store_true", help="few rounds, no long cases: to see that all works")
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--threads", default=2, type=int, help="threads of torch and of every peer")
    parser.add_argument("--minutes", default=14.0, type=float, help="long cases that would end later are left out")
    parser.add_argument("--output", type=Path, help=f"default: {RESULTS} for a whole run, else {PARTIAL}")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    _set_tunables()
    if importlib.util.find_spec("matplotlib") is None:
        sys.exit("python -m bench draws a plot: pip install matplotlib (the extra pyext-kernels[bench])")
    torch.set_num_threads(options.threads)
    whole = not (options.quick or options.only)
    report = run(options, QUICK if options.quick else FULL)
    folder = options.output or (RESULTS if whole else PARTIAL)
    for path in table.write(report, folder, options.device.type):
        print(path)


def _set_tunables() -> None:
    """Start again under glibc's tunables, which are read once, when a process starts."""
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        sys.stdout.flush()
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "GLIBC_TUNABLES": TUNABLES})


def run(options: argparse.Namespace, effort: Effort) -> table.Report:
    """Measure every case that was asked for and fits the time."""
    start, load_before = time.monotonic(), load()
    roofs = Roofs(options.device)
    report = table.Report(facts(options.device))
    cases = list(_cases(options))
    if not cases:
        sys.exit(f"python -m bench: no case has {options.only!r} in its name")
    for case in cases:
        left = 60 * options.minutes - (time.monotonic() - start)
        if case.needs_seconds and (options.quick or left < case.needs_seconds):
            report.remarks.append(f"left out for want of time: {case.name}")
            continue
        began = time.monotonic()
        report.rows += measured(case, roofs, options.device, effort)
        print(f"{time.monotonic() - start:6.0f} s  {case.name} ({time.monotonic() - began:.0f} s)", flush=True)
    if options.only in test_hcgnet.memory_case(options.device).name:
        report.memory_mib = memory.peaks(options.device)
    report.remarks += [f"not installed, so no peer: {name}" for name in missing_engines()]
    report.facts |= {
        "copy from memory": f"{roofs.memory / 1e9:.0f} GB/s",
        "float32 torch.mm": f"{roofs.matrix / 1e9:.0f} GFLOP/s",
        "load average before and after": f"{load_before:.2f}, {load():.2f}",
        "took": f"{time.monotonic() - start:.0f} s",
    }
    return report


def _cases(options: argparse.Namespace) -> Iterator[Case]:
    for file in (test_gated_excitation, test_memory_contrast, test_hcgnet):
        yield from (case for case in file.cases(options.device) if options.only in case.name)


def measured(case: Case, roofs: Roofs, device: torch.device, effort: Effort) -> list[table.Row]:
    """The case's rows: every contender passes the gate, is timed in turn with the others, and passes it again."""
    gate = Gate(case)
    runners = {contender: contender.build() for contender in case.contenders}
    for contender, runner in runners.items():
        gate.check(contender, runner.results())
    samples = interleaved({contender.name: runner.run for contender, runner in runners.items()}, device, effort)
    for contender, runner in runners.items():
        gate.check(contender, runner.results())
    forget_compiled()
    return table.rows_of(case, samples, roofs.floors(case.work()))


if __name__ == "__main__":
    main()
