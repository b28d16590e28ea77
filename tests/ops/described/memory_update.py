"""`memory_update` as the tests that enumerate operators see it."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import torch
from layouts import STACKS
from memory_inputs import SHAPES, make_memory_inputs

from described import Case, Description
from described.memory_contrast import draw_inputs, named
from pyext.ops import memory_update
from pyext.ops.memory_update import OPERATOR


def draw_case(draw: Any, dtype: torch.dtype) -> Case:
    inputs = draw_inputs(draw, dtype)
    options = {"index": inputs.indices[:, 0], "momentum": draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))}
    return Case({"embeddings": inputs.embeddings}, named(inputs.banks), options)


def call(case: Case, backend: str | None = None) -> tuple[()]:
    memory_update(list(case.states.values()), case.main, **case.options, backend=backend)
    return ()


def small(dtype: torch.dtype, training: bool) -> Case:
    embeddings, banks, indices = make_memory_inputs(SHAPES["few"], dtype)
    return Case({"embeddings": embeddings}, named(banks), {"index": indices[:, 0]})


def _sample(dtype: torch.dtype, training: bool) -> tuple[tuple, dict]:
    embeddings, banks, indices = make_memory_inputs(SHAPES["few"], dtype)
    return (banks, embeddings, indices[:, 0], 0.3), {}


DESCRIPTION = Description(
    draw=draw_case,
    call=call,
    small=small,
    samples={"memory_update": _sample},
    differentiable=OPERATOR.differentiable,
    layouts=tuple(STACKS),
    sizing=frozenset({"embeddings", "banks[0]"}),
    wrong_options={"momentum": 1.5, "index": torch.zeros((1, 1), dtype=torch.int64)},
)
