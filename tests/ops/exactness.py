"""When a result counts as exact: by plain torch's own error against float64 truth, never by a fixed tolerance."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyext.ops.gated_excitation import PARAMETERS, reference

ULPS = 8
DOUBLE = 1e-9
"""What counts as agreement in float64 (shared/parity/README.md)."""
BIASES = {name: name.removesuffix("bias") + "weight" for name in PARAMETERS if name.endswith("bias")}
"""Gradients whose exact value can be 0 (a bias before a normalisation or a softmax), and what they are rounded with."""

Evaluate = Callable[[Tensor, list[Tensor], list[Tensor]], Sequence[Tensor]]


def doubled(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.double() for x in tensors]


def largest_errors(results: Sequence[Tensor], truths: Sequence[Tensor]) -> list[float]:
    return [(x.double() - truth).abs().max().item() for x, truth in zip(results, truths, strict=True)]


def assert_as_exact(
    evaluate: Evaluate, u: Tensor, parameters: list[Tensor], running: list[Tensor], actual: dict[str, Tensor]
) -> None:
    """Each error is at most twice plain torch's in the same dtype, plus a few ulps of the largest value.

    `evaluate` is plain torch. One evaluation's rounding errors can cancel by luck, so torch's error is the worst of
    eight inputs within about 1% of u.
    """
    truth = evaluate(u.double(), doubled(parameters), doubled(running))
    torch_errors = largest_errors(evaluate(u, parameters, running), truth)
    generator = torch.Generator().manual_seed(0)
    for _ in range(7):
        near = (u * (1 + 0.01 * torch.randn(u.shape, generator=generator))).to(u.dtype)
        exact = evaluate(near.double(), doubled(parameters), doubled(running))
        errors = largest_errors(evaluate(near, parameters, running), exact)
        torch_errors = [max(pair) for pair in zip(torch_errors, errors, strict=True)]
    magnitude = {name: x.abs().max().item() for name, x in zip(actual, truth, strict=True)}
    errors = largest_errors([x.view(t.shape) for x, t in zip(actual.values(), truth, strict=True)], truth)
    for (name, x), error, torch_error in zip(actual.items(), errors, torch_errors, strict=True):
        largest = max(magnitude[name], magnitude.get(BIASES.get(name, name), 0.0))
        if x.dtype == torch.float64:  # there is no better truth to measure torch's own error with
            bound = DOUBLE * max(1.0, largest)
        else:
            bound = 2 * torch_error + ULPS * torch.finfo(x.dtype).eps * largest
        assert error <= bound, f"{name}: error {error:.3g}, plain torch {torch_error:.3g}, largest value {largest:.3g}"


def plain_results(training: bool, grad_out: Tensor | None = None, eps: float = 1e-5) -> Evaluate:
    """Plain torch: the output alone, or with `grad_out` the gradients of u and of every parameter as well."""

    def evaluate(u: Tensor, parameters: list[Tensor], running: list[Tensor]) -> Sequence[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (u, *parameters)]
        out = reference(leaves[0], leaves[1:], [r.clone() for r in running], training, 0.0, eps)
        if grad_out is None:
            return [out.detach()]
        return [out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))]

    return evaluate
