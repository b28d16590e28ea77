"""The gate that every benchmarked output passes: what it lets through and what it refuses."""

import pytest
import torch

from bench.case import Case, Contender, Gate, Runner, WrongOutput
from bench.roofs import Work

TRUTH = torch.linspace(1, 2, 101, dtype=torch.float64)
PLAIN = (TRUTH + 1e-6).float()


def runner(value):
    return Runner(lambda: value, lambda: {"out": value})


def gate(truth=TRUTH, plain=PLAIN, distances=None):
    contenders = [Contender("eager", lambda: runner(plain))]
    return Gate(Case("a case", contenders, lambda: runner(truth), lambda: Work(1, 1), distances=distances or {}))


OURS = Contender("pyext", lambda: None, ours=True)
PEER = Contender("peer", lambda: None)


def test_ours_may_be_twice_as_far_as_plain_torch():
    gate().check(OURS, {"out": (TRUTH - 2e-6).float()})


def test_ours_may_not_be_three_times_as_far_as_plain_torch():
    with pytest.raises(WrongOutput, match=r"a case, pyext: out is .* from the float64 truth"):
        gate().check(OURS, {"out": (TRUTH - 4e-6).float()})


def test_a_peer_may_round_otherwise_but_not_compute_something_else():
    gate().check(PEER, {"out": (TRUTH + 1e-4).float()})
    with pytest.raises(WrongOutput, match="a case, peer"):
        gate().check(PEER, {"out": (TRUTH + 1e-2).float()})


def test_a_case_may_widen_the_distance_of_peers_only():
    wide = gate(distances={"out": 0.05})
    wide.check(PEER, {"out": (TRUTH + 1e-2).float()})
    with pytest.raises(WrongOutput):
        wide.check(OURS, {"out": (TRUTH + 1e-2).float()})


@pytest.mark.parametrize("contender", [OURS, PEER])
@pytest.mark.parametrize("position", [0, 50, 100])
def test_one_wrong_value_is_refused(contender, position):
    wrong = TRUTH.float()
    wrong[position] = float("nan")
    with pytest.raises(WrongOutput):
        gate().check(contender, {"out": wrong})
    wrong[position] = 1.5 if position != 50 else 0.0
    with pytest.raises(WrongOutput):
        gate().check(contender, {"out": wrong})


@pytest.mark.parametrize("results", [{}, {"other": PLAIN}, {"out": PLAIN, "more": PLAIN}])
def test_missing_or_unknown_results_are_refused(results):
    with pytest.raises(WrongOutput, match="expected"):
        gate().check(PEER, results)


def test_another_shape_is_refused_even_where_it_would_broadcast():
    with pytest.raises(WrongOutput, match="shape"):
        gate().check(PEER, {"out": PLAIN.expand(3, -1)})


def test_a_broken_yardstick_measures_nothing():
    with pytest.raises(WrongOutput, match="a case, eager"):
        gate(plain=PLAIN + 1)


def test_the_truth_must_be_float64():
    with pytest.raises(TypeError, match="float64"):
        gate(truth=PLAIN)
