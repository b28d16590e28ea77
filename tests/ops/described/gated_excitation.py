"""`gated_excitation` as the tests that enumerate operators see it."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import torch
from inputs import make_inputs
from torch import Tensor

from described import Case, Description
from pyext.ops import gated_excitation
from pyext.ops.gated_excitation import PARAMETERS, RUNNING


def _extent(draw: Any) -> tuple[int, int]:
    """Height and width, one of them often 1 or longer than a strip of the kernels."""
    short = st.integers(1, 20)
    return draw(
        st.one_of(st.tuples(short, short), st.tuples(st.just(1), st.integers(1, 300)), st.tuples(short, st.just(1)))
    )


def draw_case(draw: Any, dtype: torch.dtype) -> Case:
    training, statistics = draw(st.sampled_from([(False, True), (True, True), (False, False), (True, False)]))
    batch = draw(st.integers(0, 5).filter(lambda n: n != 1 or (statistics and not training)))
    channels = draw(st.integers(1, 40))
    height, width = _extent(draw)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    u, parameters, running = make_inputs(
        batch,
        channels,
        height,
        width,
        forget=draw(st.integers(1, 20)),
        attention=draw(st.integers(1, 20)),
        dtype=dtype,
        parameter_dtype=draw(st.sampled_from([dtype, wide])),
        seed=draw(st.integers(0, 2**31)),
    )
    running = [r.to(draw(st.sampled_from([dtype, wide]))) for r in running[:1]] + running[1:]
    running = [r.to(running[0].dtype) for r in running]
    options = {
        "training": training,
        "momentum": draw(st.sampled_from([0.1, 1.0])),
        "eps": draw(st.sampled_from([1e-5, 1e-2])),
    }
    states = dict(zip(RUNNING, running, strict=True)) if statistics else {}
    return Case({"u": u, **dict(zip(PARAMETERS, parameters, strict=True))}, states, options)


def call(case: Case, backend: str | None = None, out: Tensor | None = None) -> Tensor:
    u, *parameters = case.inputs.values()
    return gated_excitation(u, parameters, list(case.states.values()) or None, **case.options, backend=backend, out=out)


def small(dtype: torch.dtype, training: bool) -> Case:
    u, parameters, running = make_inputs(3, 4, 3, 5, forget=2, attention=3, dtype=dtype, seed=4)
    states = {} if training else dict(zip(RUNNING, running, strict=True))
    return Case({"u": u, **dict(zip(PARAMETERS, parameters, strict=True))}, states)


def _forward(dtype: torch.dtype, training: bool, differentiable: bool = True) -> tuple:
    case = small(dtype, training)
    u, *parameters = (x.requires_grad_(differentiable) for x in case.inputs.values())
    return u, parameters, list(case.states.values()), training, 1e-5


def _forward_sample(dtype: torch.dtype, training: bool) -> tuple[tuple, dict]:
    return (*_forward(dtype, training), True), {}


def _out_sample(dtype: torch.dtype, training: bool) -> tuple[tuple, dict]:
    arguments = _forward(dtype, training, differentiable=False)
    return arguments, {"out": torch.zeros_like(arguments[0])}


def _backward_sample(dtype: torch.dtype, training: bool) -> tuple[tuple, dict]:
    u, parameters, running, *rest = _forward(dtype, training, differentiable=False)
    _, *saved = torch.ops.pyext.gated_excitation(u, parameters, running, *rest, True)
    return (torch.randn_like(u), u, parameters, running, *saved, *rest), {}


DESCRIPTION = Description(
    draw=draw_case,
    call=call,
    small=small,
    samples={
        "gated_excitation": _forward_sample,
        "gated_excitation_out": _out_sample,
        "gated_excitation_into": _out_sample,
        "gated_excitation_backward": _backward_sample,
    },
    # A constant added to every logit leaves a softmax unchanged.
    zero_gradients=frozenset(name for name in PARAMETERS if name.startswith("global_") and name.endswith("bias")),
    rounded_with={name: name.removesuffix("bias") + "weight" for name in PARAMETERS if name.endswith("bias")},
    free=(0, 2, 3),
    sizing=frozenset({"u", "fc1.bias", "fcall.bias"}),
    counted=("parameters", "running statistics"),
    wrong_options={"eps": -1.0},
)
