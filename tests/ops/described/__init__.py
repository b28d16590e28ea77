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
from layouts import MAPS, VALUES
from torch import Tensor

from pyext._backend import OPERATORS

Tensors = dict[str, Tensor]


def _copied(x: Tensor) -> Tensor:
    """A copy of all of x's memory, seen with the same strides."""
    return x.new_empty(0).set_(x.untyped_storage().clone(), x.storage_offset(), x.shape, x.stride())


@dataclass(frozen=True)
class Case:
    """Arguments of one call of an operator's public function, by the names that its error messages use."""

    inputs: Tensors
    """Tensors that are read, differentiable where the operator is. The operator's dtype is that of the first, the main
    one."""
    states: Tensors
    """Tensors that a call may update in place, and others that have no gradient."""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def main(self) -> Tensor:
        return next(iter(self.inputs.values()))

    def with_inputs(self, tensors: Iterable[Tensor]) -> Case:
        """The same call with other differentiable tensors, in the order of `inputs`."""
        return replace(self, inputs=dict(zip(self.inputs, tensors, strict=True)))

    def copied_states(self) -> Case:
        """The same call that updates copies."""
        return replace(self, states={name: _copied(x) for name, x in self.states.items()})

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
    """call(case, backend=None, out=None): the public function; no `out` if `samples` have none. () for no output."""
    small: Callable[[torch.dtype, bool], Case]
    """small(dtype, training): a call of a few hundred elements, for checks by finite differences."""
    samples: Mapping[str, Callable[[torch.dtype, bool], tuple[tuple, dict]]]
    """Registered name without `_triton` -> (dtype, training) -> positional and keyword arguments of one small call."""
    differentiable: bool = True
    held_constant: Callable[[Case], Callable[..., Tensor]] | None = None
    """held_constant(case): what finite differences see instead of `call`, as a function of the inputs; for an operator
    whose gradient takes for constant what moves with them."""
    layouts: tuple[str, ...] = tuple(MAPS)
    """Names in layouts.LAYOUTS that suit the main input."""
    gradient_layouts: tuple[str, ...] = tuple(MAPS)
    """Those that suit the gradient of every output."""
    values: tuple[str, ...] = tuple(VALUES)
    """Names in layouts.VALUES of what the main input may hold."""
    zero_gradients: frozenset[str] = frozenset()
    """Inputs whose gradient is 0 by the mathematics, whatever the values."""
    rounded_with: Mapping[str, str] = field(default_factory=dict)
    """Inputs whose exact gradient can be 0, and the input with whose gradient theirs is rounded."""
    spreads_in: frozenset[torch.dtype] = frozenset()
    """Dtypes in which plain torch's own kernels carry a NaN to elements that it does not belong to; float32 tells."""
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    free: tuple[int, ...] = ()
    """Dimensions of the main input that may have any size."""
    free_in: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Such dimensions of other inputs."""
    sizing: frozenset[str] = frozenset()
    """Inputs that fix sizes: when one is wrong, the message may name another that does not fit it."""
    counted: tuple[str, ...] = ()
    """What messages call the lists of tensors, for a call with too few or too many."""
    wrong_options: Mapping[str, Any] = field(default_factory=dict)
    """Values that options must not have."""

    @property
    def takes_out(self) -> bool:
        return any(name.endswith("_out") for name in self.samples)

    def function_of_inputs(self, case: Case) -> Callable[..., Tensor | tuple[Tensor, ...]]:
        """The kernel on the CPU, for checks of its gradient by finite differences."""
        if self.held_constant is not None:
            return self.held_constant(case)
        return lambda *inputs: self.call(case.with_inputs(inputs), backend="cpu")


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
