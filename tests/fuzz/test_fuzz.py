"""Drawn calls of every operator, found by enumeration, on every backend that runs here: exact, safe, or refused."""

from __future__ import annotations

import functools
import os
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from calls import dense, draw_call, memory_outside, outputs_of, results, same_bits
from described import description_of
from hypothesis import given, note, settings
from judgement import inexact_results
from layouts import WRITABLE, in_layout, spoil

from pyext._backend import OPERATORS

SHORT = os.environ.get("PYEXT_FUZZ", "short") == "short"
LEFT_OUT = ("reference", "triton") if SHORT else ("reference",)
"""Triton's interpreter takes seconds for a call: long runs alone draw calls for it."""
RUNS = [
    (operator.name, backend, dtype)
    for operator in OPERATORS.values()
    for backend, cannot_run in operator.cannot_run.items()
    for dtype in description_of(operator.name).dtypes
    if backend not in LEFT_OUT and cannot_run(torch.zeros((), dtype=dtype)) is None
]


def examples(backend: str):
    """Triton's interpreter takes a thousand times as long as a compiled kernel."""
    return settings(max_examples=max(1, settings.default.max_examples // (1000 if backend == "triton" else 1)))


def on_every_run(prove, runs=RUNS):
    """A test of `prove(description, backend, dtype, data)` for every operator, backend and dtype in `runs`."""
    ids = ["-".join(map(str, run)).replace("torch.", "") for run in runs]

    @pytest.mark.parametrize(("name", "backend", "dtype"), runs, ids=ids)
    def test(name, backend, dtype):
        @examples(backend)
        @given(st.data())
        def example(data):
            prove(description_of(name), backend, dtype, data)

        example()

    test.__doc__ = prove.__doc__
    return test


@on_every_run
def test_finite_values(description, backend, dtype, data):
    """As exact as plain torch; arguments stay as they are."""
    drawn = draw_call(data.draw, description, dtype)
    before = {name: x.clone() for name, x in drawn.case.inputs.items()}
    note(f"values {drawn.values}, layout {drawn.layout}, {tuple(drawn.case.main.shape)}, {drawn.case.options}")
    _, lines = inexact_results(description, drawn, backend)
    for name, x in drawn.case.inputs.items():
        assert same_bits(x, before[name]), f"{name} was changed"
    assert not lines, "; ".join(lines)


def finite_by_name(found):
    return {name: x.isfinite() for name, x in found.items() if name.startswith(("output", "state"))}


@on_every_run
def test_not_a_number_or_infinite(description, backend, dtype, data):
    """A value that is not finite reaches the same elements as in plain torch; a parameter's NaN is not lost on the way.

    Gradients are computed but not compared, and an infinite parameter may give a limit where plain torch computes
    inf - inf: the kernels use other formulas than plain torch, which agree where all is finite.
    """
    drawn = draw_call(data.draw, description, dtype)
    value = data.draw(st.sampled_from([float("nan"), float("inf"), float("-inf")]))
    name = data.draw(st.sampled_from(list(drawn.case.inputs)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    spoilt = {**drawn.case.inputs, name: spoil(drawn.case.inputs[name], value, generator)}
    case = drawn.case.with_inputs(spoilt.values())
    actual = finite_by_name(results(description, drawn, backend, case))
    plain_dtype = torch.float32 if dtype in description.spreads_in else dtype
    for result, finite in finite_by_name(results(description, drawn, "reference", dense(case, plain_dtype))).items():
        if spoilt[name] is case.main:
            assert torch.equal(actual[result], finite), f"{result}: {value} in {name}"
        elif value != value and name not in description.zero_gradients:
            assert not (actual[result] & ~finite).any(), f"{result}: {value} in {name} is lost"


@functools.partial(on_every_run, runs=[run for run in RUNS if description_of(run[0]).takes_out])
def test_out_and_no_byte_more(description, backend, dtype, data):
    """out= of any strides receives the result, bit for bit, and nothing around it is written."""
    drawn = draw_call(data.draw, description, dtype)
    layout = data.draw(st.sampled_from([name for name in description.gradient_layouts if name in WRITABLE]))
    with torch.no_grad():
        (expected,) = outputs_of(description.call(drawn.case.copied_states(), backend=backend))
        out = in_layout(torch.zeros(expected.shape, dtype=expected.dtype), layout)
        around = memory_outside(out)
        assert description.call(drawn.case.copied_states(), backend=backend, out=out) is out
    assert same_bits(out, expected)
    assert same_bits(memory_outside(out), around)


@on_every_run
def test_same_call_same_bits(description, backend, dtype, data):
    """A gradient does not depend on which others are asked for, nor on a run before."""
    drawn = draw_call(data.draw, description, dtype)
    some = results(description, drawn, backend)
    everything = replace(drawn, differentiated=tuple(drawn.case.inputs)) if drawn.differentiated else drawn
    again = results(description, everything, backend)
    for name, x in some.items():
        assert same_bits(x, again[name]), name
