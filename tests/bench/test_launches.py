"""Reading torch's trace of the kernels that a call starts, and the table made of it."""

from __future__ import annotations

import sys

import pytest

from bench import launches
from bench.launches import Launch


def event(name, ts, duration, **arguments):
    known = {"grid": [64, 1, 1], "block": [256, 1, 1], "registers per thread": 32, "shared memory": 1024}
    return {"cat": "kernel", "name": name, "ts": ts, "dur": duration, "args": {**known, **arguments}}


FIRST, SECOND = "void pyext::op::(anonymous namespace)::first<float>(pyext::op::Arguments)", "second"
TRACE = {
    "traceEvents": [
        {"cat": "cpu_op", "name": "aten::empty", "ts": 0, "dur": 1},
        {"name": "process_name", "ph": "M"},
        event(SECOND, 2, 5.0, block=[32, 2, 1]),
        event(FIRST, 1, 3.0),
        event(FIRST, 3, 4.0),
        event(SECOND, 4, 6.0, block=[32, 2, 1]),
    ]
}


def test_kernels_of_a_call_in_order_with_medians():
    assert launches.launches(TRACE, "call", calls=2) == [
        Launch("call", "op::first<float>", 3.5, (64, 1, 1), (256, 1, 1), 32, 1024),
        Launch("call", "second", 5.5, (64, 1, 1), (32, 2, 1), 32, 1024),
    ]


def test_unequal_calls_are_refused():
    with pytest.raises(ValueError, match="call: 4 kernels in 3 equal calls"):
        launches.launches(TRACE, "call", calls=3)
    with pytest.raises(ValueError, match="call: the calls start different kernels"):
        launches.launches(TRACE, "call", calls=4)
    with pytest.raises(ValueError, match="call: 0 kernels"):
        launches.launches({"traceEvents": []}, "call")


def test_markdown():
    found = launches.launches(TRACE, "call", calls=2)
    text = launches.markdown(found, ["other: failed"], "sm_90", "a GPU")
    assert "## call: 9.0 µs in 2 kernels" in text
    assert "| `op::first<float>` | 3.5 | 64×1×1 | 256×1×1 | 32 | 1024 | 100% |" in text
    assert "- other: failed" in text
    assert "| unknown |" in launches.markdown(found, [], "sm_75", "a GPU")


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["launches"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch finds no CUDA device here"):
        launches.main()
