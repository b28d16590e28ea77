"""What the tests know about each operator: one file per operator here, under the operator's name.

The registry test, the fuzz tests and their long runs find operators by enumeration and ask here for arguments, so an
operator without a file here fails them all.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pyext._backend import OPERATORS

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """Arguments of one call of an operator's public function, by the names that its error messages use."""

    inputs: Tensors
    """Differentiable tensors; the first is the main one, whose dtype is the operator's."""
    states: Tensors
    """Tensors that a call may update in place."""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def main(self) -> Tensor:
        return next(iter(self.inputs.values()))

    def with_inputs(self, tensors: Iterable[Tensor]) -> Case:
        """The same call with other differentiable tensors, in the order of `inputs`."""
        return replace(self, inputs=dict(zip(self.inputs, tensors, strict=True)))

    def copied_states(self) -> Case:
        """The same call that updates copies."""
        return replace(self, states={name: x.clone() for name, x in self.states.items()})

    def map(self, change: Callable[[Tensor], Tensor]) -> Case:
        """The same call with every tensor changed."""
        inputs = {name: change(x) for name, x in self.inputs.items()}
        return replace(self, inputs=inputs, states={name: change(x) for name, x in self.states.items()})


@dataclass(frozen=True)
class Description:
    """How to draw an operator's arguments, call it, and judge its results."""

    draw: Callable[..., Case]
    """draw(hypothesis' draw, dtype) -> Case: sizes, layouts, modes; values normal."""
    call: Callable[..., Tensor | tuple[Tensor, ...]]
    """call(case, backend=None, out=None): the public function."""
    small: Callable[[torch.dtype, bool], Case]
    """small(dtype, training): a call of a few hundred elements, for checks by finite differences."""
    samples: Mapping[str, Callable[[torch.dtype, bool], tuple[tuple, dict]]]
    """Registered name without `_triton` -> (dtype, training) -> positional and keyword arguments of one small call."""
    zero_gradients: frozenset[str] = frozenset()
    """Inputs whose gradient is 0 by the mathematics, whatever the values."""
    rounded_with: Mapping[str, str] = field(default_factory=dict)
    """Inputs whose exact gradient can be 0, and the input with whose gradient theirs is rounded."""
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    free: tuple[int, ...] = ()
    """Dimensions of the main input that may have any size."""
    sizing: frozenset[str] = frozenset()
    """Inputs that fix sizes: when one is wrong, the message may name another that does not fit it."""
    counted: tuple[str, ...] = ()
    """What messages call the lists of tensors, for a call with too few or too many."""
    wrong_options: Mapping[str, Any] = field(default_factory=dict)
    """Values that options must not have."""


def description_of(operator: str) -> Description:
    """The description in the file of the operator's name; ModuleNotFoundError for an operator that has none."""
    return importlib.import_module(f"described.{operator}").DESCRIPTION


def operator_of(registered: str) -> str:
    """The operator that a registered name belongs to: pyext::x_backward_triton belongs to x."""
    name = registered.removeprefix("pyext::")
    owners = [operator for operator in OPERATORS if name == operator or name.startswith(f"{operator}_")]
    if not owners:
        raise KeyError(f"{registered} belongs to no operator of pyext._backend.OPERATORS")
    return max(owners, key=len)
