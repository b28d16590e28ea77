"""The one table that a run of the benchmarks leaves: Markdown, JSON and a plot."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.case import Case
from bench.roofs import Floors
from bench.timer import spread


@dataclass(frozen=True)
class Row:
    """One contender's time at one case."""

    case: str
    contender: str
    ours: bool
    rounds: int
    median_ms: float
    spread_ms: float
    ratio: float
    """Median of the best peer over this median: above 1 is faster than every peer."""
    megabytes: float
    gigaoperations: float
    floors: Floors
    share: float
    """The part of the measured roof that the time reaches."""


@dataclass(frozen=True)
class Peak:
    """Peak memory of one contender's training step, in MiB."""

    process: float
    """Of a few steps, above what there was before model and optimizer were made: with them, and the libraries' own."""
    step: float
    """Of one step, above what was held between steps (model, momenta, libraries): maps, gradients, scratch."""


@dataclass
class Report:
    """All that one run measured: facts about the machine, rows, peak memory by contender, and remarks."""

    facts: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    memory_mib: dict[str, Peak] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """Cases that have no rows because an output was wrong or a contender failed, each with the reason."""


def rows_of(case: Case, samples: dict[str, list[float]], floors: Floors) -> list[Row]:
    """One row per contender of `case` from its seconds per call."""
    medians = {name: 1e3 * statistics.median(times) for name, times in samples.items()}
    best = min(medians[contender.name] for contender in case.contenders if not contender.ours)
    work = case.work()
    return [
        Row(
            case=case.name,
            contender=contender.name,
            ours=contender.ours,
            rounds=len(samples[contender.name]),
            median_ms=(median := medians[contender.name]),
            spread_ms=1e3 * spread(samples[contender.name]),
            ratio=best / median,
            megabytes=work.bytes / 1e6,
            gigaoperations=work.operations / 1e9,
            floors=floors,
            share=floors.share(median),
        )
        for contender in case.contenders
    ]


def write(report: Report, folder: Path, name: str) -> list[Path]:
    """Write `name`.md, .json and, where matplotlib is installed, .png into `folder`; returns their paths."""
    if importlib.util.find_spec("matplotlib") is None:
        report.remarks.append("no plot: matplotlib is not installed")
        return write_text(report, folder, name)
    paths = [*write_text(report, folder, name), folder / f"{name}.png"]
    if report.rows:
        plot(report, paths[-1])
    return [path for path in paths if path.exists()]


def write_text(report: Report, folder: Path, name: str) -> list[Path]:
    """Write `name`.md and .json into `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{ending}" for ending in ("md", "json")]
    paths[0].write_text(markdown(report))
    paths[1].write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n")
    return paths


_COLUMNS = (
    "case",
    "contender",
    "median ms",
    "spread ms",
    "best peer / this",
    "MB",
    "GFLOP",
    "floor: bytes ms",
    "floor: bytes from memory ms",
    "floor: operations ms",
    "share of roof",
)

_LEGEND = """\
Every output was checked against float64 before and after it was timed. Contenders of a case took turns in one process;
median and interquartile range over the rounds. **Bold**: this library. Best peer / this: the median of the fastest
contender that is not this library, over this one's. gated_excitation leaves out the concatenation that follows it in
the network, for every contender; torch.compile freezes parameters for inference.

MB and GFLOP: what the work must move and compute at least (formulas beside each case in `bench/`). Floors: those bytes
at the speed of a copy of the same size and of one from memory, and those operations at the rate of `torch.mm` in the
case's dtype. Share of roof: the higher of the first and the third floor over the time. Float32 is float32: TF32 is off.
On a GPU a time is that of many calls in a row, synchronised once; "graph" replays a CUDA graph, which leaves out the
time of launching from Python.
"""

_MEMORY_LEGEND = """\
Peak memory of training, MiB. Process: of a few steps, above what there was before model and optimizer were made. Step:
of one step, above what is held between steps (model, momenta, libraries).
"""


def markdown(report: Report) -> str:
    """The report as one Markdown document."""
    lines = ["# Benchmarks", "", *(f"- {name}: {value}" for name, value in report.facts.items()), "", _LEGEND]
    lines += [_line(_COLUMNS), _line(["---"] * 2 + ["---:"] * (len(_COLUMNS) - 2))]
    lines += [_line(_cells(row)) for row in report.rows]
    if report.memory_mib:
        lines += ["", _MEMORY_LEGEND]
        lines += [_line(("contender", "process", "step")), _line(("---", "---:", "---:"))]
        lines += [_line((name, f"{peak.process:.0f}", f"{peak.step:.0f}")) for name, peak in report.memory_mib.items()]
    if report.failures:
        lines += ["", "Failed, so without a time:", "", *(f"- {failure}" for failure in report.failures)]
    if report.remarks:
        lines += ["", *(f"- {remark}" for remark in report.remarks)]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cells(row: Row) -> list[str]:
    floors = (row.floors.bytes_ms, row.floors.memory_ms, row.floors.operations_ms)
    return [
        row.case,
        f"**{row.contender}**" if row.ours else row.contender,
        *(digits(value) for value in (row.median_ms, row.spread_ms)),
        f"{row.ratio:.2f}",
        *(digits(value) for value in (row.megabytes, row.gigaoperations, *floors)),
        f"{row.share:.1%}",
    ]


def digits(value: float, significant: int = 3) -> str:
    """`value` with this many significant digits and no exponent."""
    if value == 0:
        return "0"
    return f"{value:.{max(0, significant - 1 - math.floor(math.log10(abs(value))))}f}"


def plot(report: Report, path: Path) -> None:
    """Bars of the speed relative to the best peer, a group per case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys(row.case for row in report.rows))
    names = list(dict.fromkeys(row.contender for row in report.rows))
    colours = dict(zip(names, pyplot.get_cmap("tab20").colors, strict=False))
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.19 * (len(report.rows) + len(cases))), layout="constrained")
    ticks, y = [], 0.0
    for case in cases:
        rows = [row for row in report.rows if row.case == case]
        ticks.append(y + (len(rows) - 1) / 2)
        for row in rows:
            axes.barh(y, row.ratio, color=colours[row.contender], label=row.contender, alpha=1 if row.ours else 0.55)
            axes.text(row.ratio, y, f" {digits(row.median_ms)} ms", va="center", fontsize=6)
            y += 1
        y += 1
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(yticks=ticks, yticklabels=cases, xlabel="speed relative to the best peer (1 = as fast)")
    axes.invert_yaxis()
    axes.margins(x=0.12, y=0.01)
    unique = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
