"""`pytest bench/`: every contender of every case on pytest-benchmark, each behind the gate of its case."""

import functools

import pytest
import torch

from bench.case import Gate
from bench.machine import facts
from bench.peers import exact_float32, forget_compiled
from bench.timer import synchronise


def pytest_addoption(parser):
    parser.addoption("--bench-device", default="cpu", help="where the contenders run")
    parser.addoption("--bench-threads", type=int, default=2, help="torch's threads")


def pytest_generate_tests(metafunc):
    if "contender" in metafunc.fixturenames:
        cases = metafunc.module.cases(torch.device(metafunc.config.getoption("bench_device")))
        pairs = [(case, contender) for case in cases for contender in case.contenders]
        ids = [f"{case.name}, {contender.name}" for case, contender in pairs]
        metafunc.parametrize(("case", "contender"), pairs, ids=ids)


def pytest_benchmark_update_machine_info(config, machine_info):
    torch.set_num_threads(config.getoption("bench_threads"))
    machine_info["pyext"] = facts(torch.device(config.getoption("bench_device")))


@functools.lru_cache(maxsize=1)
def gate_of(case):
    return Gate(case)


@pytest.fixture
def speed(benchmark, request):
    """Times one contender of a case, in a group with the others, after and before its output was checked."""
    device = torch.device(request.config.getoption("bench_device"))
    torch.set_num_threads(request.config.getoption("bench_threads"))
    exact_float32()

    def measure(case, contender):
        benchmark.group = case.name
        gate, runner = gate_of(case), contender.build()
        gate.check(contender, runner.results())
        benchmark(lambda: (runner.run(), synchronise(device)))
        gate.check(contender, runner.results())

    yield measure
    forget_compiled()
