"""Drawn calls of every operator with one thing wrong: refused in words that name it, by every backend."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from described import Case, description_of
from hypothesis import given

from pyext._backend import OPERATORS

BACKENDS = ("auto", "cpu", "reference", "triton")


def _other_shapes(x, free):
    """Shapes that do not fit where `x` does: another number of dimensions, of elements in one that is not free, or two
    such dimensions that have changed places, which leaves the number of elements as it is."""
    fixed = [dim for dim in range(x.dim()) if dim not in free]
    longer = [(*x.shape[:dim], x.shape[dim] + 1, *x.shape[dim + 1 :]) for dim in fixed]
    pairs = [pair for pair in itertools.combinations(fixed, 2) if x.shape[pair[0]] != x.shape[pair[1]]]
    return [(*x.shape, 1), (*x.shape, 2), *longer, *(x.transpose(*pair).shape for pair in pairs)]


def wrong_shape(draw, description, case, x):
    free = next((description.free_in.get(name, ()) for name, own in case.inputs.items() if own is x), ())
    return x.new_zeros(draw(st.sampled_from(_other_shapes(x, description.free if x is case.main else free))))


def no_elements(draw, description, case, x):
    return x.new_zeros([*x.shape[:-1], 0])


def wrong_dtype(draw, description, case, x):
    """Of no floating-point number, since a main input in bfloat16 goes with parameters in float32."""
    return x.to(draw(st.sampled_from([torch.int32, torch.int64, torch.bool, torch.complex64, torch.uint8])))


def other_device(draw, description, case, x):
    return x.to("meta")


CHANGES = (wrong_shape, no_elements, wrong_dtype, other_device)


def with_tensor(case: Case, name: str, tensor: torch.Tensor) -> Case:
    if name in case.inputs:
        return replace(case, inputs={**case.inputs, name: tensor})
    return replace(case, states={**case.states, name: tensor})


def refused(description, case: Case, backend: str, words, **options) -> None:
    with pytest.raises((TypeError, ValueError, RuntimeError)) as caught, torch.no_grad():
        description.call(case, backend=backend, **options)
    assert any(word in str(caught.value) for word in words), f"none of {words} in: {caught.value}"


def operators_and_backends(applies=lambda description: True):
    names = sorted(name for name in OPERATORS if applies(description_of(name)))
    return [(name, b) for name in names for b in BACKENDS if b not in OPERATORS[name].unwritten]


def on_every_operator_and_backend(prove, applies=lambda description: True):
    """A test of `prove(description, backend, case, draw)` for every operator and backend, on drawn float32 calls."""

    @pytest.mark.parametrize(("name", "backend"), operators_and_backends(applies))
    def test(name, backend):
        @given(st.data())
        def example(data):
            description = description_of(name)
            case = description.draw(data.draw, torch.float32)
            prove(description, backend, case, data.draw)

        example()

    test.__doc__ = prove.__doc__
    return test


@on_every_operator_and_backend
def test_one_tensor_is_wrong(description, backend, case, draw):
    """The message names the tensor, or, for one that fixes sizes, any argument."""
    tensors = case.inputs | case.states
    name = draw(st.sampled_from(list(tensors)))
    change = draw(st.sampled_from(CHANGES))
    wrong = with_tensor(case, name, change(draw, description, case, tensors[name]))
    refused(description, wrong, backend, [*tensors, *case.options] if name in description.sizing else [name])


@pytest.mark.parametrize(("name", "backend"), operators_and_backends())
def test_another_shape_with_as_many_elements(name, backend):
    """Of every tensor: a kernel would read it without a fault, and be wrong."""
    description = description_of(name)
    case = description.small(torch.float32, False)
    tensors = case.inputs | case.states
    for tensor, x in tensors.items():
        words = [*tensors, *case.options] if tensor in description.sizing else [tensor]
        shapes = _other_shapes(x, description.free if x is case.main else ())
        for shape in (shape for shape in shapes if math.prod(shape) == x.numel()):
            refused(description, with_tensor(case, tensor, x.reshape(shape)), backend, words)


@functools.partial(on_every_operator_and_backend, applies=lambda description: description.counted)
def test_wrong_number_of_tensors(description, backend, case, draw):
    """The message says what there are too few or too many of."""
    names = list(case.inputs)[1:]
    if draw(st.booleans()):
        kept = names[: draw(st.integers(0, len(names) - 1))]
        wrong = replace(case, inputs={name: case.inputs[name] for name in [next(iter(case.inputs)), *kept]})
    else:
        wrong = replace(case, inputs={**case.inputs, "one more": case.main})
    refused(description, wrong, backend, description.counted)


@functools.partial(on_every_operator_and_backend, applies=lambda description: description.takes_out)
def test_out_is_wrong(description, backend, case, draw):
    """Another shape, dtype or device than the result's."""
    change = draw(st.sampled_from(CHANGES))
    out = change(draw, replace(description, free=()), case, case.main)
    refused(description, case, backend, ["out"], out=out)


@on_every_operator_and_backend
def test_option_is_wrong(description, backend, case, draw):
    """The message names the option."""
    name, value = draw(st.sampled_from(sorted(description.wrong_options.items())))
    refused(description, replace(case, options={**case.options, name: value}), backend, [name])
