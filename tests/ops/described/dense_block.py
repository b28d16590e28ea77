"""`dense_block` as the tests that enumerate operators see it."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import torch
from dense_inputs import Dense, make_dense
from torch import Tensor

from described import Case, Description
from pyext.ops import dense_block
from pyext.ops.dense_block import OPERATOR, Extents


def named(x: Tensor, tensors: list[Tensor], eps: float = 1e-5) -> Case:
    inputs = {"x": x, **{f"tensors[{i}]": tensor for i, tensor in enumerate(tensors)}}
    return Case(inputs, {}, {"eps": eps})


def draw_case(draw: Any, dtype: torch.dtype) -> Case:
    height, width = draw(
        st.one_of(st.tuples(st.integers(1, 12), st.integers(1, 20)), st.tuples(st.just(1), st.integers(1, 150)))
    )
    extents = Extents(
        draw(st.integers(1, 40)), draw(st.integers(1, 4)), draw(st.integers(0, 40)), draw(st.integers(1, 40))
    )
    block = Dense(draw(st.integers(0, 4)), height, width, extents)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, tensors = make_dense(block, dtype, draw(st.sampled_from([dtype, wide])), seed=draw(st.integers(0, 2**31)))
    return named(x, tensors, draw(st.sampled_from([1e-5, 1e-2])))


def call(case: Case, backend: str | None = None) -> Tensor:
    x, *tensors = case.inputs.values()
    return dense_block(x, tensors, **case.options, backend=backend)


def _block(bottleneck: bool) -> Dense:
    return Dense(2, 3, 5, Extents(3, 2, 4 if bottleneck else 0, 2))


def small(dtype: torch.dtype, training: bool) -> Case:
    return named(*make_dense(_block(True), dtype))


def _sample(dtype: torch.dtype, training: bool) -> tuple[tuple, dict]:
    # The operator has one mode: layers with and without a bottleneck take the places of two.
    block = _block(training)
    x, tensors = make_dense(block, dtype)
    return (x, torch.ops.pyext.dense_block_pack(tensors, block.extents, 1e-5), list(block.extents)), {}


def _pack_sample(dtype: torch.dtype, training: bool) -> tuple[tuple, dict]:
    block = _block(training)
    return (make_dense(block, dtype)[1], list(block.extents), 1e-5), {}


DESCRIPTION = Description(
    draw=draw_case,
    call=call,
    small=small,
    samples={"dense_block": _sample, "dense_block_pack": _pack_sample},
    differentiable=OPERATOR.differentiable,
    # oneDNN multiplies pairs of bfloat16, so that a NaN also meets the zeros beside the taps of an odd kernel.
    spreads_in=frozenset({torch.bfloat16}),
    free=(0, 2, 3),
    sizing=frozenset({"x", "tensors[0]", "tensors[4]", "tensors[9]"}),
    wrong_options={"eps": -1.0},
)
