"""`python -m bench`: all cases, contenders in turn in one process, into one table, a JSON file and a plot."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from bench import memory, table
from bench.case import Case, Gate, WrongOutput
from bench.machine import TUNABLES, facts, load
from bench.peers import exact_float32, forget_compiled, missing_engines
from bench.roofs import Roofs
from bench.timer import FULL, GPU, QUICK, Effort, interleaved

RESULTS = Path(__file__).parent / "results"
PARTIAL = Path("runs/bench")
"""Where a run goes that is not whole, so that it cannot pass for the published table."""
_LONG = 60
"""Seconds from which on a case is no part of a quick run."""


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
    if options.device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("python -m bench --device cuda: torch finds no CUDA device here")
    torch.set_num_threads(options.threads)
    exact_float32()
    whole = not (options.quick or options.only)
    run = Run(options, options.output or (RESULTS if whole else PARTIAL))
    run.all_cases()
    for path in run.finish():
        print(path)
    if run.report.failures:
        sys.exit("\n".join(run.report.failures))


def _set_tunables() -> None:
    """Start again under glibc's tunables, which are read once, when a process starts."""
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        sys.stdout.flush()
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "GLIBC_TUNABLES": TUNABLES})


def case_files() -> list[str]:
    """The modules that hold cases: one ``test_*.py`` per operator and per system."""
    return sorted(path.stem for path in Path(__file__).parent.glob("test_*.py"))


def _cases(options: argparse.Namespace) -> Iterator[tuple[str, Case]]:
    """Each with the module that holds it."""
    for file in case_files():
        cases = importlib.import_module(f"bench.{file}").cases(options.device)
        yield from ((file, case) for case in cases if options.only in case.name)


class Run:
    """One run over all cases that were asked for and fit the time; what it has measured is on disk after every case."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder, self.device = options, folder, options.device
        self.effort = QUICK if options.quick else GPU if self.device.type == "cuda" else FULL
        self.start, self.load_before = time.monotonic(), load()
        self.roofs = Roofs(self.device)
        self.report = table.Report(facts(self.device))

    def seconds(self) -> float:
        return time.monotonic() - self.start

    def all_cases(self) -> None:
        cases = list(_cases(self.options))
        if not cases:
            sys.exit(f"python -m bench: no case has {self.options.only!r} in its name")
        for file, case in cases:
            left = 60 * self.options.minutes - self.seconds()
            if case.needs_seconds and case.needs_seconds > (min(left, _LONG) if self.options.quick else left):
                self.report.remarks.append(f"left out for want of time: {case.name}")
            else:
                self._one(file, case)

    def _one(self, file: str, case: Case) -> None:
        began = self.seconds()
        try:
            self.report.rows += measured(case, self.roofs, self.device, self.effort)
            if case.memory:
                self.report.memory_mib |= memory.peaks(file, case, self.device)
        except (WrongOutput, RuntimeError) as error:  # RuntimeError: what torch raises where a device refuses a case
            self.report.failures.append(f"{case.name}: {type(error).__name__}: {error}")
        finally:
            forget_compiled()
        self._note_facts()
        table.write_text(self.report, self.folder, self.device.type)
        print(f"{self.seconds():6.0f} s  {case.name} ({self.seconds() - began:.0f} s)", flush=True)

    def _note_facts(self) -> None:
        dtypes = (torch.float32, torch.bfloat16) if self.device.type == "cuda" else (torch.float32,)
        rates = {str(dtype).removeprefix("torch."): self.roofs.matrix(dtype) for dtype in dtypes}
        self.report.facts |= {
            "copy from memory": f"{self.roofs.memory / 1e9:.0f} GB/s",
            **{f"{dtype} torch.mm": f"{rate / 1e9:.0f} GFLOP/s" for dtype, rate in rates.items()},
            "load average before and after": f"{self.load_before:.2f}, {load():.2f}",
            "took": f"{self.seconds():.0f} s",
        }

    def finish(self) -> list[Path]:
        """Write all that there is, with remarks and plot; returns the paths."""
        if self.device.type == "cpu":
            self.report.remarks += [f"not installed, so no peer: {name}" for name in missing_engines()]
        self._note_facts()
        return table.write(self.report, self.folder, self.device.type)


def measured(case: Case, roofs: Roofs, device: torch.device, effort: Effort) -> list[table.Row]:
    """The case's rows: every contender passes the gate, is timed in turn with the others, and passes it again."""
    gate = Gate(case)
    runners = {contender: contender.build() for contender in case.contenders}
    for contender, runner in runners.items():
        gate.check(contender, runner.results())
    samples = interleaved({contender.name: runner.run for contender, runner in runners.items()}, device, effort)
    for contender, runner in runners.items():
        gate.check(contender, runner.results())
    return table.rows_of(case, samples, roofs.floors(case.work(), case.dtype))


if __name__ == "__main__":
    main()
