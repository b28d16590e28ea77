"""Calls of an operator that is known by its description alone: results, gradients, states, and plain torch's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import hypothesis.strategies as st
import torch
from described import Case, Description
from layouts import VALUES, in_layout
from torch import Tensor

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def outputs_of(result: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


@dataclass(frozen=True)
class Drawn:
    """A call and what is asked of it."""

    case: Case
    differentiated: tuple[str, ...]
    """Inputs that require a gradient; none for a call under no_grad."""
    gradient_seed: int
    gradient_layout: str
    values: str
    layout: str

    def gradients_for(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The same incoming gradients for every backend and dtype."""
        generator = torch.Generator().manual_seed(self.gradient_seed)
        drawn = [
            torch.randn(x.shape, generator=generator, dtype=torch.float64).to(self.case.main.dtype) for x in outputs
        ]
        return [in_layout(g, self.gradient_layout).to(x.dtype) for g, x in zip(drawn, outputs, strict=True)]


def _strided(x: Tensor) -> Tensor:
    """`x` with every other place of its memory NaN."""
    return torch.stack([x, torch.full_like(x, float("nan"))], dim=-1)[..., 0]


def draw_call(draw: Any, description: Description, dtype: torch.dtype) -> Drawn:
    """A call with finite values."""
    case = description.draw(draw, dtype)
    values, layout = draw(st.sampled_from(description.values)), draw(st.sampled_from(description.layouts))
    main = in_layout(VALUES[values](case.main.double()).to(dtype), layout)
    others = list(case.inputs.values())[1:]
    if draw(st.booleans()):
        others = [_strided(x) for x in others]
    names = list(case.inputs)
    some = st.lists(st.sampled_from(names), min_size=1, unique=True)
    chosen = draw(st.one_of(st.just(names), st.just([]), some)) if description.differentiable else []
    return Drawn(
        case.with_inputs([main, *others]),
        tuple(name for name in names if name in chosen),
        draw(st.integers(0, 2**31)),
        draw(st.sampled_from(description.gradient_layouts)),
        values,
        layout,
    )


def results(description: Description, drawn: Drawn, backend: str, case: Case | None = None) -> dict[str, Tensor]:
    """Outputs, gradients by input, and states after the call, of `backend`; `case` replaces the drawn one."""
    case = drawn.case if case is None else case
    leaves = {name: x.detach().requires_grad_(name in drawn.differentiated) for name, x in case.inputs.items()}
    called = replace(case, inputs=leaves).copied_states()
    with torch.set_grad_enabled(bool(drawn.differentiated)):
        outputs = outputs_of(description.call(called, backend=backend))
    found = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    if drawn.differentiated:
        wanted = [leaves[name] for name in drawn.differentiated]
        gradients = torch.autograd.grad(outputs, wanted, drawn.gradients_for(outputs))
        found |= dict(zip(drawn.differentiated, gradients, strict=True))
    return found | {f"state {name}": x for name, x in called.states.items()}


def dense(case: Case, dtype: torch.dtype) -> Case:
    """The same call in `dtype` on contiguous tensors: torch 2.11's own batch normalisation reads a strided weight wrong
    in its backward pass on the CPU."""
    return case.map(lambda x: x.to(dtype).contiguous())


def memory_outside(x: Tensor) -> Tensor:
    """A copy of all elements of x's memory that are not x's, as bits."""
    memory = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    places = torch.arange(memory.numel()).as_strided(x.shape, x.stride(), x.storage_offset())
    outside = torch.ones(memory.numel(), dtype=torch.bool)
    outside[places.flatten()] = False
    return memory.view(BITS[x.dtype.itemsize])[outside]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(BITS[a.dtype.itemsize]), b.contiguous().view(BITS[b.dtype.itemsize]))
