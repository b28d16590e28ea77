"""Every registered operator, found by enumeration: opcheck and gradcheck, so that a new one cannot be forgotten."""

from __future__ import annotations

import pytest
import torch
from inputs import make_inputs
from memory_inputs import SHAPES, TEMPERATURE, make_memory_inputs, with_constant_normaliser

import pyext
from pyext._backend import BACKENDS, OPERATORS

REGISTERED = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("pyext::"))


def _forward_inputs(dtype, training, save=True):
    u, parameters, running = make_inputs(3, 4, 3, 5, forget=2, attention=3, dtype=dtype)
    u.requires_grad_(save)
    return (u, [p.requires_grad_(save) for p in parameters], [] if training else running, training, 1e-5)


def _backward_inputs(dtype, training):
    u, parameters, running, *rest = _forward_inputs(dtype, training, save=False)
    _, *saved = torch.ops.pyext.gated_excitation(u, parameters, running, *rest, True)
    return (torch.randn_like(u), u, parameters, running, *saved, *rest)


def _memory_inputs(kind, dtype):
    embeddings, banks, indices = make_memory_inputs(SHAPES["few"], dtype)
    if kind == "memory_update":
        return banks, embeddings, indices[:, 0], 0.3
    if kind == "memory_contrast":
        return embeddings.requires_grad_(), banks, indices, TEMPERATURE, None
    assert kind == "memory_contrast_backward"
    loss, rows, weights = torch.ops.pyext.memory_contrast(embeddings, banks, indices, TEMPERATURE, None)
    return torch.ones_like(loss), embeddings, banks, rows, weights, TEMPERATURE


def _samples(name: str, training: bool):
    """Arguments and keywords of one call of operator `name`; KeyError for one that nobody wrote samples for."""
    dtype = torch.float32 if "triton" in name else torch.float64
    kind = name.removeprefix("pyext::").replace("_triton", "")
    if kind == "gated_excitation":
        return (*_forward_inputs(dtype, training), True), {}
    if kind == "gated_excitation_out":
        arguments = _forward_inputs(dtype, training, save=False)
        return arguments, {"out": torch.zeros_like(arguments[0])}
    if kind == "gated_excitation_backward":
        return _backward_inputs(dtype, training), {}
    if kind.startswith("memory_"):
        return _memory_inputs(kind, dtype), {}
    raise KeyError(f"no sample inputs for operator {name}: add them here")


def test_operators_are_found():
    assert "pyext::gated_excitation" in REGISTERED
    assert set(OPERATORS) <= {name.removeprefix("pyext::") for name in REGISTERED}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", REGISTERED)
def test_opcheck(name, training):
    arguments, keywords = _samples(name, training)
    torch.library.opcheck(getattr(torch.ops.pyext, name.removeprefix("pyext::")).default, arguments, keywords)


def _differentiable_call(name: str, training: bool):
    """A function of differentiable tensors that calls operator `name`, and the tensors; KeyError as above."""
    operator = getattr(pyext.ops, name)
    if name == "gated_excitation":
        u, parameters, running = make_inputs(3, 3, 3, 4, forget=2, attention=2, dtype=torch.float64, seed=4)
        states = None if training else running
        return lambda u, *parameters: operator(u, parameters, states, backend="cpu"), (u, *parameters)
    if name == "memory_contrast":
        inputs = make_memory_inputs(SHAPES["few"], torch.float64)
        return with_constant_normaliser(operator, inputs), (inputs.embeddings,)
    raise KeyError(f"no differentiable call of operator {name}: add it here")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", sorted(name for name, operator in OPERATORS.items() if operator.differentiable))
def test_gradcheck(name, training):
    call, leaves = _differentiable_call(name, training)
    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in leaves])


def test_every_operator_has_every_backend():
    for operator in OPERATORS.values():
        assert set(operator.cannot_run) == set(BACKENDS) - {"auto"}
