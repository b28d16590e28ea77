"""Inputs of `peer_contrast` for tests of its GPU kernels, and plain torch's answers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from described import peer_contrast as described
from exactness import Evaluate
from torch import Tensor

from pyext.ops.peer_contrast import reference

WEIGHTS = [0.7, 1.1, 1.3, 0.9]
"""Of the four terms in the loss whose gradient is compared."""


class PeerInputs(NamedTuple):
    """Arguments of `peer_contrast`."""

    embeddings: Tensor
    labels: Tensor
    temperature: float
    soft_temperature: float
    rows: tuple[int, int]


def make_peer_inputs(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    temperature: float = 0.1,
    soft_temperature: float = 3.0,
    rows: tuple[int, int] | None = None,
) -> PeerInputs:
    case = described.make_case(shape, dtype)
    return PeerInputs(case.main, case.options["labels"], temperature, soft_temperature, rows or (0, shape[1]))


def terms_and_gradient(call, embeddings: Tensor, *others) -> tuple[Tensor, Tensor]:
    """`call`'s terms as one tensor, and the gradient of their weighted sum."""
    leaf = embeddings.detach().requires_grad_()
    terms = torch.stack(tuple(call(leaf, *others)))
    (gradient,) = torch.autograd.grad(terms @ torch.tensor(WEIGHTS, dtype=terms.dtype), leaf)
    return terms.detach(), gradient


def plain_contrast(case: PeerInputs) -> Evaluate:
    return lambda embeddings, *_: terms_and_gradient(reference, embeddings, *case[1:])
