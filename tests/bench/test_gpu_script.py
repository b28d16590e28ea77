"""bench/gpu.sh as far as a machine without a GPU allows, and its report."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import gpu_report, small_calls
from bench.gpu_report import Part
from bench.samples import SAMPLES
from pyext._backend import OPERATORS, operators_with

ROOT = Path(__file__).resolve().parents[2]
PARTS = ["check", "build", "tests", "launches", "bench", "memcheck", "racecheck"]


def gpu_sh(*options, work, **environment):
    """A run that finds no CUDA device, whatever the machine has; returns the process and the folder of results."""
    settings = {"PYTHON": sys.executable, "OUT": str(work / "out"), "WORK": str(work / "work"), "MAX_JOBS": "1"}
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), *options]
    environment = {**os.environ, **settings, "CUDA_VISIBLE_DEVICES": "", **environment}
    done = subprocess.run(command, env=environment, cwd=work, capture_output=True, text=True, check=False)
    return done, work / "out"


def states(folder):
    return {part["name"]: part["state"] for part in json.loads((folder / "gpu.json").read_text())["parts"]}


@pytest.mark.parametrize("options", [(), ("--only", "gated_excitation", "--quick"), ("--device", "cpu")])
def test_dry_run_names_every_part_and_runs_none(options, tmp_path):
    done, folder = gpu_sh("--dry-run", *options, work=tmp_path)
    assert done.returncode == 0, done.stderr
    planned = re.findall(r"^== (\w+), at most (\d+) s: (.+)$", done.stdout, re.MULTILINE)
    assert [name for name, _, _ in planned] == PARTS
    (total,) = re.findall(r"^gpu.sh: (\d+) s in all", done.stdout)
    assert int(total) < 9 * 60
    assert all(int(limit) <= int(total) for _, limit, _ in planned)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fast"], "unknown option --fast"),
        (["--parts", "build,paint"], "unknown part paint"),
        (["--minutes", "soon"], "--minutes soon is no number"),
        (["--device", "tpu"], "--device is cuda or cpu, not tpu"),
        (["--only"], "--only needs a value"),
    ],
)
def test_wrong_options_are_named(options, message, tmp_path):
    done, _ = gpu_sh(*options, work=tmp_path)
    assert done.returncode == 64
    assert message in done.stderr


def test_what_fails_is_recorded_and_the_next_part_starts(tmp_path):
    done, folder = gpu_sh("--parts", "check,tests,launches,bench", work=tmp_path)
    assert states(folder) == dict.fromkeys(["check", "tests", "launches", "bench"], "failed")
    assert done.returncode == 4
    log = (folder / "log.txt").read_text()
    assert log.count("torch finds no CUDA device") == 4
    assert "| bench | failed |" in (folder / "gpu.md").read_text()


def test_a_part_that_takes_too_long_is_stopped(tmp_path):
    done, folder = gpu_sh("--device", "cpu", "--parts", "tests", "--minutes", "1.94", work=tmp_path)
    assert states(folder) == {"tests": "out of time"}
    assert done.returncode == 1


def test_no_part_starts_without_time(tmp_path):
    done, folder = gpu_sh("--device", "cpu", "--parts", "tests", "--minutes", "0.1", work=tmp_path)
    assert states(folder) == {"tests": "not run"}
    assert done.returncode == 0


def test_tests_and_benchmarks_run_on_the_cpu(tmp_path):
    case = "gated_excitation inference 64x36x8x8"
    # The tests themselves run in full on a GPU; a few show that they can.
    chosen = {"PYTEST_ADDOPTS": "-k 'bit_equal or slice_of or empty or every_operator or whole'"}
    options = ("--device", "cpu", "--quick", "--minutes", "60")
    done, folder = gpu_sh("--parts", "check,tests", *options, work=tmp_path, **chosen)
    assert done.returncode == 0, done.stdout
    done, folder = gpu_sh("--parts", "bench", "--only", case, *options, work=tmp_path)
    assert done.returncode == 0, done.stdout
    assert len(list(folder.iterdir())) <= 8
    table = json.loads((folder / "cpu.json").read_text())
    assert {row["case"] for row in table["rows"]} == {case}
    assert table["failures"] == []


def test_every_operator_with_gpu_kernels_has_samples():
    assert sorted(SAMPLES) == operators_with("cuda") == operators_with("triton")


def test_every_operator_is_tested_on_every_gpu_backend():
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    environment = {key: value for key, value in os.environ.items() if key != "PYEXT_GPU_TESTS_ON"}
    listing = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    tests = [line for line in listing.splitlines() if line.startswith("tests/gpu/")]
    always = ("inference", "odd_shapes", "captured", "current_stream", "bit_equal")
    for operator in operators_with("cuda"):
        for backend in ("cuda", "triton"):
            for test in (*always, *["gradients", "compiles"] * OPERATORS[operator].differentiable):
                found = [line for line in tests if test in line.split("[")[0] and f"{operator}-" in line]
                assert any(f"-{backend}" in line for line in found), (operator, backend, test)


def test_without_a_gpu_the_tests_are_deselected_in_words():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED
    assert re.search(r"tests/gpu: \d+ tests not run: torch finds no CUDA device", done.stdout)


def test_small_calls_refuse_an_unknown_operator(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["small_calls", "--only", "softmax"])
    with pytest.raises(SystemExit):
        small_calls.main()
    assert "no operator has 'softmax' in its name" in capsys.readouterr().err


def test_missing_packages_are_named():
    assert gpu_report.missing({"no_such_package": "the build", "os": "all"}) == [
        "no_such_package is missing, which the build needs"
    ]


def test_summary_says_how_every_part_went(tmp_path):
    notes = tmp_path / "parts.tsv"
    notes.write_text("build\tpassed\t61\t\nbench\tout of time\t300\tstopped after 300 s\n")
    parts = gpu_report.read_parts(notes)
    assert parts == [Part("build", "passed", 61, ""), Part("bench", "out of time", 300, "stopped after 300 s")]
    as_json, as_markdown = gpu_report.summary(parts, {"device": "a GPU"}, tmp_path / "out")
    assert json.loads(as_json.read_text())["parts"][1]["reason"] == "stopped after 300 s"
    text = as_markdown.read_text()
    assert "- device: a GPU" in text
    assert "| bench | out of time | 300 | stopped after 300 s |" in text
