"""When a result counts as exact: by plain torch's own error against float64 truth, never by a fixed tolerance."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from pyext.ops.gated_excitation import PARAMETERS, reference

ULPS = 8
DOUBLE = 1e-9
"""What counts as agreement in float64 (shared/parity/README.md)."""
UNDERFLOW = 1e-30
"""What the smallest float may have become after a few products with ordinary numbers; an exp may give 0 instead."""
SAMPLES = 8
"""Inputs within about 1% of the given one whose worst error is plain torch's: one's rounding errors can cancel."""
BIASES = {name: name.removesuffix("bias") + "weight" for name in PARAMETERS if name.endswith("bias")}
"""Gradients whose exact value can be 0 (a bias before a normalisation or a softmax), and what they are rounded with."""

Evaluation = tuple[Sequence[Tensor], Sequence[Tensor]]
"""Plain torch's results in the dtype in question, and in float64."""
Evaluate = Callable[[Tensor, list[Tensor], list[Tensor]], Sequence[Tensor]]


def doubled(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.double() for x in tensors]


def largest_error(result: Tensor, truth: Tensor) -> float:
    return (result.double().view(truth.shape) - truth).abs().max().item() if truth.numel() else 0.0


def largest_errors(results: Sequence[Tensor], truths: Sequence[Tensor]) -> list[float]:
    return [largest_error(x, truth) for x, truth in zip(results, truths, strict=True)]


def inexact(
    actual: Mapping[str, Tensor], evaluations: Iterable[Evaluation], rounded_with: Mapping[str, str]
) -> list[str]:
    """A line for each result whose error is above twice plain torch's plus a few ulps of the largest value.

    `evaluations` begins with that of the call itself; plain torch's error is the worst of all. More of them can only
    raise the bound, so none is taken after the bound is met.
    """
    torch_errors = [0.0] * len(actual)
    for number, (plain, exact) in enumerate(evaluations):
        if number == 0:
            truth, errors = exact, largest_errors(list(actual.values()), exact)
        torch_errors = [worse(pair) for pair in zip(torch_errors, largest_errors(plain, exact), strict=True)]
        lines = _over_bound(actual, truth, errors, torch_errors, rounded_with)
        if not lines:
            return []
    return lines


def worse(errors: tuple[float, float]) -> float:
    """The larger one; a NaN, from a result of plain torch that is none, is the largest."""
    return math.inf if any(map(math.isnan, errors)) else max(errors)


def bound_of(
    name: str, dtype: torch.dtype, truth: Mapping[str, Tensor], torch_error: float, rounded_with: Mapping[str, str]
) -> float:
    """The largest error that is allowed to result `name`."""
    related = [truth[name], truth.get(rounded_with.get(name, name), truth[name])]
    largest = max(x.abs().max().item() if x.numel() else 0.0 for x in related)
    if dtype == torch.float64:  # there is no better truth to measure torch's own error with
        return max(DOUBLE * max(1.0, largest), 2 * torch_error)
    return 2 * torch_error + ULPS * torch.finfo(dtype).eps * largest + UNDERFLOW


def _over_bound(
    actual: Mapping[str, Tensor],
    truth: Sequence[Tensor],
    errors: Sequence[float],
    torch_errors: Sequence[float],
    rounded_with: Mapping[str, str],
) -> list[str]:
    lines = []
    truths = dict(zip(actual, truth, strict=True))
    for (name, x), error, torch_error in zip(actual.items(), errors, torch_errors, strict=True):
        bound = bound_of(name, x.dtype, truths, torch_error, rounded_with)
        if not error <= bound:
            lines.append(f"{name}: error {error:.3g}, plain torch {torch_error:.3g}, bound {bound:.3g}")
    return lines


def assert_as_exact(
    evaluate: Evaluate, u: Tensor, parameters: list[Tensor], running: list[Tensor], actual: dict[str, Tensor]
) -> None:
    """An operator's results `actual` are as exact as `inexact` asks; `evaluate` is plain torch."""

    def evaluations() -> Iterator[Evaluation]:
        generator = torch.Generator().manual_seed(0)
        near = u
        for _ in range(SAMPLES):
            exact = evaluate(near.double(), doubled(parameters), doubled(running))
            yield evaluate(near, parameters, running), exact
            near = (u * (1 + 0.01 * torch.randn(u.shape, generator=generator))).to(u.dtype)

    lines = inexact(actual, evaluations(), BIASES)
    assert not lines, "; ".join(lines)


def plain_results(training: bool, grad_out: Tensor | None = None, eps: float = 1e-5) -> Evaluate:
    """Plain torch: the output alone, or with `grad_out` the gradients of u and of every parameter as well."""

    def evaluate(u: Tensor, parameters: list[Tensor], running: list[Tensor]) -> Sequence[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (u, *parameters)]
        out = reference(leaves[0], leaves[1:], [r.clone() for r in running], training, 0.0, eps)
        if grad_out is None:
            return [out.detach()]
        return [out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))]

    return evaluate
