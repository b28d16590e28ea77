"""A run of the benchmarks goes on after a case that fails, and leaves what it measured."""

import argparse
import json

import pytest
import torch

from bench import __main__ as program
from bench.case import Case, Contender, Runner
from bench.roofs import Work
from pyext._backend import OPERATORS

TRUTH = torch.linspace(1, 2, 101, dtype=torch.float64)


def case(name, ours=1.0, needs_seconds=0.0):
    def runner(value):
        return lambda: Runner(lambda: value, lambda: {"out": value})

    contenders = [Contender("pyext", runner((TRUTH * ours).float()), True), Contender("eager", runner(TRUTH.float()))]
    return Case(name, contenders, runner(TRUTH), lambda: Work(800, 101), needs_seconds=needs_seconds)


@pytest.fixture
def run(tmp_path, monkeypatch):
    def start(*cases, quick=True, minutes=1.0):
        monkeypatch.setattr(program, "_cases", lambda options: (("test_none", case) for case in cases))
        monkeypatch.setattr(program, "QUICK", program.Effort(0.01, most_rounds=3))
        # A name that is part of no case, so that no peak memory is measured.
        options = argparse.Namespace(device=torch.device("cpu"), only="nothing", quick=quick, minutes=minutes)
        started = program.Run(options, tmp_path)
        started.roofs.seconds = 0.001
        started.all_cases()
        return started

    return start


def test_a_wrong_output_is_recorded_and_the_rest_is_measured(run, tmp_path):
    started = run(case("good"), case("wrong", ours=1.1), case("better"))
    assert {row.case for row in started.report.rows} == {"good", "better"}
    (failure,) = started.report.failures
    assert failure.startswith("wrong: WrongOutput: wrong, pyext: out is")
    assert failure in (tmp_path / "cpu.md").read_text()
    assert len(json.loads((tmp_path / "cpu.json").read_text())["rows"]) == 4


def test_an_error_of_torch_is_recorded(run):
    def broken():
        raise RuntimeError("out of memory")

    contenders = [Contender("pyext", broken, True), *case("").contenders[1:]]
    started = run(Case("broken", contenders, case("").truth, case("").work))
    assert started.report.failures == ["broken: RuntimeError: out of memory"]


def test_cases_that_no_longer_fit_are_left_out(run):
    started = run(case("short"), case("long", needs_seconds=100), quick=False)
    assert {row.case for row in started.report.rows} == {"short"}
    assert started.report.remarks == ["left out for want of time: long"]


def test_a_quick_run_leaves_out_long_cases(run):
    started = run(case("short", needs_seconds=15), case("long", needs_seconds=90), minutes=60.0)
    assert {row.case for row in started.report.rows} == {"short"}


def test_no_case_is_said(run):
    with pytest.raises(SystemExit, match="no case has 'nothing' in its name"):
        run()


def test_every_operator_has_cases():
    options = argparse.Namespace(device=torch.device("cpu"), only="")
    names = [case.name for _, case in program._cases(options)]
    for operator in OPERATORS:
        assert any(name.startswith(operator) for name in names), operator
