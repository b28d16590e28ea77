"""Inputs of `peer_contrast` for tests of its GPU kernels, and plain torch's answers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from described import peer_contrast as described
from exactness import Evaluate
from layouts import NAN, STACKS
from torch import Tensor

from pyext.ops.peer_contrast import reference

# One tile and several, of rows, columns and chunks of features; peers that are met together and two by two.
SHAPES = {
    "one of everything": (1, 1, 1),
    "one peer": (1, 70, 5),
    "two": (2, 19, 7),
    "several tiles": (2, 70, 150),
    "three": (3, 21, 3),
    "four": (4, 33, 20),
    "five": (5, 9, 4),
}
LAYOUTS = (
    "stack's slice of rows",
    "stack transposed",
    "every other column of a stack",
    "stack at an odd address",
    "one matrix for all",
)
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


def make_peer_variants(dtype: torch.dtype) -> dict[str, PeerInputs]:
    """What a call can ask for besides its shape and its temperature."""
    shape = (2, 37, 7)
    variants = {
        "rows": make_peer_inputs(shape, dtype, rows=(5, 34)),
        "rows, shifted": make_peer_inputs((3, 21, 3), dtype, temperature=0.01, rows=(20, 21)),
        "no rows": make_peer_inputs(shape, dtype, rows=(4, 4)),
        "soft temperature": make_peer_inputs(shape, dtype, soft_temperature=1.7),
        "soft temperature below one, shifted": make_peer_inputs(shape, dtype, temperature=0.02, soft_temperature=0.6),
    }
    plain = make_peer_inputs((2, 19, 5), dtype)
    return variants | {name: plain._replace(embeddings=STACKS[name](plain.embeddings)) for name in LAYOUTS}


VARIANTS = tuple(make_peer_variants(torch.float32))


def make_peers_with_nan(dtype: torch.dtype) -> PeerInputs:
    """A NaN in one embedding of the second peer."""
    case = make_peer_inputs((2, 37, 7), dtype)
    case.embeddings[1, 3, 2] = NAN
    return case


def assert_nan_where_plain_torch_has_it(case: PeerInputs, actual: dict[str, Tensor]) -> None:
    expected = dict(zip(("terms", "gradient"), plain_contrast(case)(case.embeddings), strict=True))
    assert expected["terms"].isnan().any()
    for name, value in actual.items():
        assert torch.equal(value.isnan(), expected[name].isnan()), name
