"""Every registered operator, found by enumeration: opcheck and gradcheck, so that a new one cannot be forgotten."""

from __future__ import annotations

import pytest
import torch
from inputs import make_inputs

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
    raise KeyError(f"no sample inputs for operator {name}: add them here")


def test_operators_are_found():
    assert "pyext::gated_excitation" in REGISTERED
    assert set(OPERATORS) <= {name.removeprefix("pyext::") for name in REGISTERED}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", REGISTERED)
def test_opcheck(name, training):
    arguments, keywords = _samples(name, training)
    torch.library.opcheck(getattr(torch.ops.pyext, name.removeprefix("pyext::")).default, arguments, keywords)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_gradcheck(name, training):
    u, parameters, running = make_inputs(3, 3, 3, 4, forget=2, attention=2, dtype=torch.float64, seed=4)

    def call(u, *parameters):
        return getattr(pyext.ops, name)(u, parameters, None if training else running, backend="cpu")

    leaves = [x.requires_grad_() for x in (u, *parameters)]
    assert torch.autograd.gradcheck(call, leaves)


def test_every_operator_has_every_backend():
    for operator in OPERATORS.values():
        assert set(operator.cannot_run) == set(BACKENDS) - {"auto"}
