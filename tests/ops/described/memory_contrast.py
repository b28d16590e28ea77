"""`memory_contrast` as the tests that enumerate operators see it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import torch
from layouts import SCALARS, STACKS
from memory_inputs import (
    SHAPES,
    TEMPERATURE,
    MemoryInputs,
    in_larger_rows,
    make_memory_inputs,
    with_constant_normaliser,
)
from torch import Tensor

from described import Case, Description
from pyext.ops import memory_contrast


def draw_inputs(draw: Any, dtype: torch.dtype) -> MemoryInputs:
    """Few rows and many indices, or the other way round; banks in any dtype that goes with `dtype`."""
    shape = (
        draw(st.integers(2, 6)),
        draw(st.integers(1, 6)),
        draw(st.integers(1, 140)),
        draw(st.integers(1, 80)),
        draw(st.integers(1, 80)),
    )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    bank_dtype = draw(st.sampled_from([dtype, wide]))
    inputs = make_memory_inputs(shape, dtype, bank_dtype, seed=draw(st.integers(0, 2**31)))
    if draw(st.booleans()):
        inputs = inputs._replace(banks=[in_larger_rows(bank) for bank in inputs.banks])
    return inputs


def named(banks: list[Tensor]) -> dict[str, Tensor]:
    """Banks by the names that messages use."""
    return {f"banks[{i}]": bank for i, bank in enumerate(banks)}


def case_of(inputs: MemoryInputs, temperature: float) -> Case:
    options = {"indices": inputs.indices, "temperature": temperature}
    return Case({"embeddings": inputs.embeddings}, named(inputs.banks), options)


def draw_case(draw: Any, dtype: torch.dtype) -> Case:
    return case_of(draw_inputs(draw, dtype), draw(st.sampled_from([0.05, 0.1, 1.0])))


def call(case: Case, backend: str | None = None) -> Tensor:
    return memory_contrast(case.main, list(case.states.values()), **case.options, backend=backend)


def small(dtype: torch.dtype, training: bool) -> Case:
    return case_of(make_memory_inputs(SHAPES["few"], dtype), TEMPERATURE)


def held_constant(case: Case) -> Callable[[Tensor], Tensor]:
    inputs = MemoryInputs(case.main, list(case.states.values()), case.options["indices"])
    return with_constant_normaliser(memory_contrast, inputs)


def _forward_sample(dtype: torch.dtype, training: bool) -> tuple[tuple, dict]:
    embeddings, banks, indices = make_memory_inputs(SHAPES["few"], dtype)
    return (embeddings.requires_grad_(), banks, indices, TEMPERATURE, None), {}


def _backward_sample(dtype: torch.dtype, training: bool) -> tuple[tuple, dict]:
    embeddings, banks, indices = make_memory_inputs(SHAPES["few"], dtype)
    loss, rows, weights = torch.ops.pyext.memory_contrast(embeddings, banks, indices, TEMPERATURE, None)
    return (torch.ones_like(loss), embeddings, banks, rows, weights, TEMPERATURE), {}


DESCRIPTION = Description(
    draw=draw_case,
    call=call,
    small=small,
    samples={"memory_contrast": _forward_sample, "memory_contrast_backward": _backward_sample},
    held_constant=held_constant,
    layouts=tuple(STACKS),
    gradient_layouts=tuple(SCALARS),
    # Embeddings are normalised: larger ones have exponentials that are infinite in float32.
    values=("normal", "small", "denormal", "zero"),
    sizing=frozenset({"embeddings", "banks[0]"}),
    wrong_options={"temperature": -1.0, "indices": torch.zeros((1, 1), dtype=torch.int64)},
)
