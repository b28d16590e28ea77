"""`hybrid_block` as the tests that enumerate operators see it."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import torch
from block_inputs import Block, dense, make_block, transition
from torch import Tensor

from described import Case, Description
from pyext.ops import hybrid_block
from pyext.ops.hybrid_block import OPERATOR, TENSORS, Extents


def named(block: Block, x: Tensor, tensors: list[Tensor], eps: float = 1e-5) -> Case:
    inputs = {"x": x, **{f"tensors[{i}]": tensor for i, tensor in enumerate(tensors)}}
    return Case(inputs, {}, {"stride": block.extents.stride, "dense": block.extents.dense, "eps": eps})


def _extents(draw: Any) -> Extents:
    groups = draw(st.integers(1, 3))
    squeeze, growth = (groups * draw(st.integers(1, 7)) for _ in range(2))
    attention, forget = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    if draw(st.booleans()):
        return Extents(draw(st.integers(1, 3)), squeeze, growth, groups, attention, forget, 1, True)
    return Extents(1, squeeze, growth, groups, attention, forget, draw(st.integers(1, 2)), False)


def draw_case(draw: Any, dtype: torch.dtype) -> Case:
    height, width = draw(
        st.one_of(st.tuples(st.integers(1, 12), st.integers(1, 20)), st.tuples(st.just(1), st.integers(1, 150)))
    )
    block = Block(draw(st.integers(0, 4)), draw(st.integers(1, 20)), height, width, _extents(draw))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, tensors = make_block(block, dtype, draw(st.sampled_from([dtype, wide])), seed=draw(st.integers(0, 2**31)))
    return named(block, x, tensors, draw(st.sampled_from([1e-5, 1e-2])))


def call(case: Case, backend: str | None = None) -> Tensor:
    x, *tensors = case.inputs.values()
    return hybrid_block(x, tensors, **case.options, backend=backend)


def small(dtype: torch.dtype, training: bool) -> Case:
    block = Block(2, 3, 3, 5, dense(2, 4, 2, 2))
    return named(block, *make_block(block, dtype))


def _sample(dtype: torch.dtype, training: bool) -> tuple[tuple, dict]:
    # The operator has one mode: a dense block and a transition take the places of two.
    extents = transition(4, 2) if training else dense(2, 4, 2, 2)
    x, tensors = make_block(Block(2, 3, 3, 5, extents), dtype)
    return (x, tensors, list(extents), 1e-5), {}


DESCRIPTION = Description(
    draw=draw_case,
    call=call,
    small=small,
    samples={"hybrid_block": _sample},
    differentiable=OPERATOR.differentiable,
    # A constant added to every logit leaves a softmax unchanged.
    zero_gradients=frozenset(
        f"tensors[{i + module * len(TENSORS)}]"
        for module in range(3)
        for i, name in enumerate(TENSORS)
        if name.startswith("global_") and name.endswith("bias")
    ),
    free=(0, 2, 3),
    sizing=frozenset({"x"})
    | {
        f"tensors[{TENSORS.index(name)}]"
        for name in ("conv1_1x1.conv.weight", "conv2_3x3.conv.weight", "fcall.bias", "fc1.bias")
    },
    wrong_options={"eps": -1.0, "stride": 3},
)
