"""`convolution_stem` as the tests that enumerate operators see it."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import torch
from stem_inputs import Stem, make_stem
from torch import Tensor

from described import Case, Description
from pyext.ops import convolution_stem
from pyext.ops.convolution_stem import OPERATOR


def named(x: Tensor, tensors: list[Tensor], stride: int, eps: float = 1e-5) -> Case:
    inputs = {"x": x, **{f"tensors[{i}]": tensor for i, tensor in enumerate(tensors)}}
    return Case(inputs, {}, {"stride": stride, "eps": eps})


def draw_case(draw: Any, dtype: torch.dtype) -> Case:
    height, width = draw(
        st.one_of(
            st.tuples(st.integers(1, 24), st.integers(1, 40)),
            st.tuples(st.just(1), st.integers(1, 150)),
        )
    )
    channels = draw(st.lists(st.integers(1, 20), min_size=2, max_size=4))
    stem = Stem(draw(st.integers(0, 4)), height, width, tuple(channels), draw(st.integers(1, 2)))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, tensors = make_stem(stem, dtype, draw(st.sampled_from([dtype, wide])), seed=draw(st.integers(0, 2**31)))
    return named(x, tensors, stem.stride, draw(st.sampled_from([1e-5, 1e-2])))


def call(case: Case, backend: str | None = None) -> Tensor:
    x, *tensors = case.inputs.values()
    return convolution_stem(x, tensors, **case.options, backend=backend)


def _stem(stride: int) -> Stem:
    return Stem(2, 7, 9, (3, 4, 5), stride)


def small(dtype: torch.dtype, training: bool) -> Case:
    return named(*make_stem(_stem(2), dtype), 2)


def _sample(dtype: torch.dtype, training: bool) -> tuple[tuple, dict]:
    # The operator has one mode: the two strides take the places of two.
    stride = 2 if training else 1
    x, tensors = make_stem(_stem(stride), dtype)
    return (x, tensors, stride, 1e-5), {}


DESCRIPTION = Description(
    draw=draw_case,
    call=call,
    small=small,
    samples={"convolution_stem": _sample},
    differentiable=OPERATOR.differentiable,
    # oneDNN multiplies pairs of bfloat16, so that a NaN also meets the zeros beside the taps of an odd kernel.
    spreads_in=frozenset({torch.bfloat16}),
    free=(0, 2, 3),
    sizing=frozenset({"x", "tensors[0]", "tensors[5]"}),
    wrong_options={"eps": -1.0, "stride": 3},
)
