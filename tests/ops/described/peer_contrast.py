"""`peer_contrast` as the tests that enumerate operators see it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from layouts import SCALARS, STACKS
from torch import Tensor

from described import Case, Description
from pyext.ops import peer_contrast


def make_case(
    shape: tuple[int, int, int], dtype: torch.dtype, classes: int = 3, temperature: float = 0.1, seed: int = 0
) -> Case:
    """Normalised embeddings of `shape` (peers, batch, features) and labels below `classes`."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = F.normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1).to(dtype)
    labels = torch.randint(-1, classes - 1, shape[1:2], generator=generator)
    return Case({"embeddings": embeddings}, {}, {"labels": labels, "temperature": temperature})


def draw_case(draw: Any, dtype: torch.dtype) -> Case:
    shape = (draw(st.integers(1, 6)), draw(st.integers(1, 70)), draw(st.integers(1, 80)))
    case = make_case(
        shape, dtype, draw(st.integers(1, 9)), draw(st.sampled_from([0.01, 0.1, 1.0])), draw(st.integers(0, 99))
    )
    start = draw(st.integers(0, shape[1]))
    case.options["rows"] = draw(st.sampled_from([None, (start, draw(st.integers(start, shape[1])))]))
    return case


def call(case: Case, backend: str | None = None) -> tuple[Tensor, ...]:
    return tuple(peer_contrast(case.main, **case.options, backend=backend))


def small(dtype: torch.dtype, training: bool) -> Case:
    """Several blocks of rows; in training, of which some have terms."""
    case = make_case((2, 19, 5), dtype)
    case.options["rows"] = (3, 18) if training else None
    return case


class _ConstantTargets(torch.autograd.Function):
    """Value: the terms, with the targets of the case's embeddings as constants. Gradient: the operator's."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, case: Case) -> tuple[Tensor, ...]:
        ctx.case = case
        ctx.save_for_backward(embeddings)
        vcl, icl, *_ = call(case.with_inputs([embeddings]), "cpu")
        return vcl, icl, *_softened(embeddings, case.main.detach(), case)

    @staticmethod
    def backward(ctx: Any, *grad_terms: Tensor) -> tuple[Tensor, None]:
        leaf = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            terms = call(ctx.case.with_inputs([leaf]), "cpu")
        return torch.autograd.grad(terms, leaf, grad_terms)[0], None


def held_constant(case: Case) -> Callable[[Tensor], tuple[Tensor, ...]]:
    constant = case.with_inputs([case.main.detach().clone()])
    return lambda embeddings: _ConstantTargets.apply(embeddings, constant)


def _softened(students: Tensor, targets: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """soft_vcl and soft_icl with targets from other embeddings, at the default soft temperature of 3."""
    batch = students.shape[1]
    start, stop = case.options["rows"] or (0, batch)

    def logarithms(v: Tensor, i: int, j: int) -> Tensor:
        return torch.log_softmax(v[i, start:stop] @ v[j].t() / case.options["temperature"] / 3, 1)

    def divergence(target: tuple[int, int], student: tuple[int, int]) -> Tensor:
        t = logarithms(targets, *target)
        return 9 * (t.exp() * (t - logarithms(students, *student))).sum() / batch

    pairs = [(i, j) for i in range(len(students)) for j in range(len(students)) if i != j]
    vcl = torch.stack([divergence((j, j), (i, i)) for i, j in pairs]).sum()
    return vcl, torch.stack([divergence((j, i), (i, j)) for i, j in pairs]).sum()


def _forward_sample(dtype: torch.dtype, training: bool) -> tuple[tuple, dict]:
    case = small(dtype, training)
    start, stop = case.options["rows"] or (0, case.main.shape[1])
    return (case.main.requires_grad_(), case.options["labels"], 0.1, 3.0, start, stop), {}


def _backward_sample(dtype: torch.dtype, training: bool) -> tuple[tuple, dict]:
    (embeddings, *others), _ = _forward_sample(dtype, training)
    terms, normalisers = torch.ops.pyext.peer_contrast(embeddings.detach(), *others)
    return (torch.ones_like(terms), embeddings.detach(), others[0], normalisers, *others[1:]), {}


DESCRIPTION = Description(
    draw=draw_case,
    call=call,
    small=small,
    samples={"peer_contrast": _forward_sample, "peer_contrast_backward": _backward_sample},
    held_constant=held_constant,
    layouts=tuple(STACKS),
    gradient_layouts=tuple(SCALARS),
    # Embeddings are normalised: among larger ones a softmax has one entry, and rounding decides which.
    values=("normal", "small", "denormal", "zero"),
    free=(0, 2),
    sizing=frozenset({"embeddings"}),
    wrong_options={
        "temperature": -1.0,
        "soft_temperature": 0.0,
        "rows": (1, 0),
        "labels": torch.zeros((1, 1), dtype=torch.int64),
    },
)
