"""Every registered operator, found by enumeration: opcheck and gradcheck, so that a new one cannot be forgotten."""

from __future__ import annotations

import pytest
import torch
from described import description_of, operator_of

from pyext._backend import BACKENDS, OPERATORS

REGISTERED = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("pyext::"))


def _samples(name: str, training: bool):
    """Arguments and keywords of one call of the registered `name`; KeyError for one that nobody wrote samples for."""
    dtype = torch.float32 if "triton" in name else torch.float64
    samples = description_of(operator_of(name)).samples
    return samples[name.removeprefix("pyext::").replace("_triton", "")](dtype, training)


def test_operators_are_found():
    assert "pyext::gated_excitation" in REGISTERED
    assert set(OPERATORS) <= {name.removeprefix("pyext::") for name in REGISTERED}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", REGISTERED)
def test_opcheck(name, training):
    arguments, keywords = _samples(name, training)
    torch.library.opcheck(getattr(torch.ops.pyext, name.removeprefix("pyext::")).default, arguments, keywords)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", sorted(name for name in OPERATORS if description_of(name).differentiable))
def test_gradcheck(name, training):
    description = description_of(name)
    case = description.small(torch.float64, training)
    call = description.function_of_inputs(case)
    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in case.inputs.values()])


def test_every_operator_has_every_backend():
    for operator in OPERATORS.values():
        assert {*operator.cannot_run, *operator.unwritten} == set(BACKENDS) - {"auto"}
        assert not set(operator.cannot_run) & set(operator.unwritten)
