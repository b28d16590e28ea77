"""Whether a drawn call's results are as exact as plain torch's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from calls import Drawn, dense, results
from described import Case, Description
from exactness import Evaluation, bound_of, inexact, largest_errors
from torch import Tensor

NEIGHBOURS = 64


def _near(x: Tensor, size: float, generator: torch.Generator) -> Tensor:
    """`x` with each element moved by about `size` of its value, and by enough to leave zero."""
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return (x.double() * (1 + size * noise) + 1e-4 * size * noise).to(x.dtype)


def _neighbourhood(drawn: Drawn, size: float) -> Iterator[Case]:
    """The drawn call, then `NEIGHBOURS` calls whose tensors lie within about `size` of its.

    The main input and the others are moved in turn: where the drawn values are alike, such as those of one column for
    all, exact cancellations make plain torch's error zero and only the first shows what rounding does; where they lie
    far from zero, the first also makes the problem an easier one, and only the second is like the drawn one.
    """
    yield drawn.case
    generator = torch.Generator().manual_seed(0)
    for number in range(NEIGHBOURS):
        tensors = list(drawn.case.inputs.values())
        for i in range(1) if number % 2 == 0 else range(1, len(tensors)):
            tensors[i] = _near(tensors[i], size, generator)
        yield drawn.case.with_inputs(tensors)


def _plain_and_exact(description: Description, drawn: Drawn, case: Case) -> Evaluation:
    """Plain torch's results in the main input's dtype throughout, and in float64."""
    plain = results(description, drawn, "reference", dense(case, case.main.dtype))
    exact = results(description, drawn, "reference", dense(case, torch.float64))
    exact |= {name: torch.zeros_like(exact[name]) for name in description.zero_gradients & exact.keys()}
    return list(plain.values()), list(exact.values())


def _float64_evaluations(description: Description, drawn: Drawn) -> Iterator[Evaluation]:
    """What rounding the inputs does to the exact result: no float64 algorithm can be asked for less."""
    first = None
    for case in _neighbourhood(drawn, 4 * torch.finfo(torch.float64).eps):
        _, exact = _plain_and_exact(description, drawn, case)
        first = exact if first is None else first
        yield first, exact


def _root_mean_square(errors: Sequence[float]) -> float:
    return (
        math.sqrt(sum(error * error for error in errors) / len(errors)) if all(map(math.isfinite, errors)) else math.inf
    )


def _typically_inexact(
    description: Description, drawn: Drawn, backend: str, actual: Mapping[str, Tensor]
) -> dict[str, str]:
    """By result, a line where the root mean square of the errors in the neighbourhood is above the bound."""
    kernel_errors, torch_errors, first = [], [], None
    for case in _neighbourhood(drawn, 0.01):
        plain, exact = _plain_and_exact(description, drawn, case)
        first = exact if first is None else first
        torch_errors.append(largest_errors(plain, exact))
        kernel_errors.append(largest_errors(list(results(description, drawn, backend, case).values()), exact))
    lines = {}
    truth = dict(zip(actual, first, strict=True))
    for name, kernel, plain in zip(
        actual, zip(*kernel_errors, strict=True), zip(*torch_errors, strict=True), strict=True
    ):
        error, torch_error = _root_mean_square(kernel), _root_mean_square(plain)
        if not error <= bound_of(name, actual[name].dtype, truth, torch_error, description.rounded_with):
            lines[name] = f"{name}: typical error {error:.3g}, plain torch's {torch_error:.3g}"
    return lines


def inexact_results(description: Description, drawn: Drawn, backend: str) -> tuple[dict[str, Tensor], list[str]]:
    """The results, and a line for each that is less exact than the project asks for (tests/ops/exactness.py).

    A call has dozens of results and a run thousands of calls, so now and then one is more than twice as far off as
    plain torch by chance. Whether it is chance is seen in the neighbourhood: there the kernel's typical error, this
    call's included, must keep to the same rule.
    """
    actual = results(description, drawn, backend)
    if drawn.case.main.dtype == torch.float64:
        return actual, inexact(actual, _float64_evaluations(description, drawn), description.rounded_with)
    evaluations = (_plain_and_exact(description, drawn, case) for case in _neighbourhood(drawn, 0.01))
    lines = inexact(actual, evaluations, description.rounded_with)
    if not lines:
        return actual, []
    typical = _typically_inexact(description, drawn, backend, actual)
    return actual, [f"{line}; {typical[name]}" for line in lines if (name := line.partition(":")[0]) in typical]
