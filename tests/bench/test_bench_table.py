"""The table writer, the roofs' arithmetic and the clock."""

import json

import pytest
import torch

from bench import machine, table, timer
from bench.case import Case, Contender
from bench.roofs import Floors, Roofs, Work, floors

CPU = torch.device("cpu")
WORK = Work(bytes=4_000_000, operations=6_000_000_000)
CASE = Case(
    "operator inference",
    [Contender("pyext", None, ours=True), Contender("eager", None), Contender("compiled", None)],
    None,
    lambda: WORK,
)
SAMPLES = {"pyext": [0.001, 0.002, 0.006], "eager": [0.02, 0.03, 0.04], "compiled": [0.004, 0.004, 0.004]}
FLOORS = Floors(bytes_ms=0.5, memory_ms=0.8, operations_ms=1.0)


@pytest.fixture
def report():
    rows = table.rows_of(CASE, SAMPLES, FLOORS)
    peaks = {"pyext": table.Peak(100.4, 30), "eager": table.Peak(300, 100)}
    return table.Report({"threads": "2"}, rows, peaks, ["left out: nothing"])


def test_floors_are_work_over_speed():
    assert floors(WORK, copy=8e9, memory=4e9, matrix=3e12) == Floors(0.5, 1.0, 2.0)


@pytest.mark.parametrize(("bytes_ms", "operations_ms", "share"), [(0.5, 1.0, 0.25), (2.0, 1.0, 0.5)])
def test_share_of_the_roof_takes_the_higher_floor(bytes_ms, operations_ms, share):
    assert Floors(bytes_ms, 9.0, operations_ms).share(4.0) == share


def test_roofs_are_measured_once_per_size():
    roofs = Roofs(CPU, seconds=0.001)
    assert roofs.copy(1 << 16) == roofs.copy(1 << 16) > 0
    assert roofs.copy(1 << 16) != roofs.copy(1 << 18)


def test_rows_compare_medians_with_the_best_peer():
    ours, eager, compiled = table.rows_of(CASE, SAMPLES, FLOORS)
    assert [row.contender for row in (ours, eager, compiled)] == ["pyext", "eager", "compiled"]
    assert [row.median_ms for row in (ours, eager, compiled)] == pytest.approx([2, 30, 4])
    assert [row.ratio for row in (ours, eager, compiled)] == pytest.approx([2, 4 / 30, 1])
    assert [row.spread_ms for row in (ours, eager, compiled)] == pytest.approx([2.5, 10, 0])
    assert (ours.megabytes, ours.gigaoperations, ours.share, ours.rounds) == (4, 6, 0.5, 3)


def test_our_own_median_is_no_peer():
    samples = {**SAMPLES, "pyext": [0.02] * 3}
    assert table.rows_of(CASE, samples, FLOORS)[0].ratio == pytest.approx(0.2)


def test_markdown(report):
    lines = table.markdown(report).splitlines()
    assert "- threads: 2" in lines
    assert (
        "| operator inference | **pyext** | 2.00 | 2.50 | 2.00 | 4.00 | 6.00 | 0.500 | 0.800 | 1.00 | 50.0% |" in lines
    )
    assert any(line.startswith("| operator inference | compiled | 4.00 | 0 | 1.00 |") for line in lines)
    assert "| eager | 300 | 100 |" in lines
    assert "- left out: nothing" in lines
    widths = {line.count("|") for line in lines if line.startswith("| operator") or line.startswith("| case")}
    assert len(widths) == 1


def test_json_holds_every_row(report, tmp_path, monkeypatch):
    monkeypatch.setattr(table, "plot", lambda report, path: path.touch())
    paths = table.write(report, tmp_path / "new", "cpu")
    assert [path.name for path in paths] == ["cpu.md", "cpu.json", "cpu.png"]
    assert all(path.exists() for path in paths)
    read = json.loads(paths[1].read_text())
    assert read["facts"] == {"threads": "2"}
    assert [row["median_ms"] for row in read["rows"]] == pytest.approx([2, 30, 4])
    assert read["rows"][0]["floors"] == {"bytes_ms": 0.5, "memory_ms": 0.8, "operations_ms": 1.0}
    assert read["memory_mib"]["eager"] == {"process": 300, "step": 100}


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.012345, "0.0123"), (9.876, "9.88"), (1.0, "1.00"), (123.4, "123"), (45678.9, "45679")],
)
def test_digits(value, text):
    assert table.digits(value) == text


def test_interleaved_takes_turns_in_many_orders():
    calls = []
    effort = timer.Effort(seconds=10, most_rounds=30, sample=1e-9)
    runs = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    samples = timer.interleaved(runs, CPU, effort)
    assert {name: len(times) for name, times in samples.items()} == {"a": 30, "b": 30, "c": 30}
    rounds = ["".join(calls[-3 * i : -3 * i + 3 or None]) for i in range(30, 0, -1)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) == 6


def test_interleaved_keeps_to_its_time_but_not_below_the_least_rounds():
    samples = timer.interleaved({"a": lambda: torch.ones(1)}, CPU, timer.Effort(0, most_rounds=50, least_rounds=4))
    assert len(samples["a"]) == 4


def test_a_sample_starts_when_threads_of_the_contender_before_have_come_to_rest(monkeypatch):
    calls = []
    monkeypatch.setattr(timer, "_rest", lambda: calls.append("rest"))
    runs = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    timer.interleaved(runs, CPU, timer.Effort(seconds=10, most_rounds=3, sample=1e-9))
    assert calls[-12::2] == ["rest"] * 6
    assert "rest" not in calls[-11::2]


@pytest.mark.parametrize(("busy", "naps"), [(0, 1), (5, 6), (1000, 250)])
def test_rest_lasts_while_threads_use_the_processor(monkeypatch, busy, naps):
    slept, used = [], []

    def sleep(seconds):
        used.append(seconds if len(slept) < busy else 0.0)
        slept.append(seconds)

    monkeypatch.setattr(timer.time, "sleep", sleep)
    monkeypatch.setattr(timer.time, "process_time", lambda: sum(used))
    monkeypatch.setattr(timer.time, "perf_counter", lambda: sum(slept))
    timer._rest(nap=0.002, patience=0.4999)
    assert len(slept) == naps


def test_facts_name_what_moves_a_measurement(monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    facts = machine.facts(CPU)
    assert facts["torch"] == torch.__version__
    assert facts["GLIBC_TUNABLES"] == "not set"
    assert facts["pyext CPU capability"] in ("baseline", "avx2", "avx512", "avx512_bf16")
    assert facts["threads"] == str(torch.get_num_threads())
