"""Logistic regression on many small sets of features at once, solved to the minimum by Newton's method."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

STEPS, HALVINGS = 100, 40


def fit_linear_probe(features: Tensor, labels: Tensor, num_classes: int) -> Callable[[Tensor], Tensor]:
    """The probe of each of E sets: a linear map from features to logits, fitted to that set alone.

    Multinomial logistic regression: minimises Σ cross-entropy(x·W + b, label) + ½‖W‖² over W and b, as scikit-learn's
    LogisticRegression does at its default C = 1 (for two classes at C = 2: there it penalises their difference). It is
    convex: there is one answer, but for a constant added to all of b, which here has mean 0.
    Computed in float64.

    Args:
        features: (E, n, F), finite.
        labels: (n,) int64, the same for every set, each of 0 to num_classes - 1 among them.
        num_classes: N.

    Returns:
        From queries (E, m, F) to logits (E, m, N), float64.

    Raises:
        RuntimeError: no minimum found, in words.
    """
    x = features.double()
    # W lies in the span of the features, so F directions become min(n, F) with the same products and lengths.
    basis, coordinates = torch.linalg.qr(x.mT)  # x = coordinatesᵀ · basisᵀ
    design = F.pad(coordinates.mT, (0, 1), value=1.0)  # (E, n, D): the last column is b's
    theta = _minimise(design, F.one_hot(labels, num_classes).double())
    return lambda queries: queries.double() @ (basis @ theta[:, :-1]) + theta[:, -1:]


def _minimise(design: Tensor, targets: Tensor) -> Tensor:
    """(E, D, N): where the loss of `design` (E, n, D) and one-hot `targets` (n, N) is least."""
    theta = design.new_zeros(len(design), design.shape[2], targets.shape[1])
    loss = _loss(design, targets, theta)
    near = (1e-13 * design.norm(dim=(1, 2), keepdim=True)).square()
    for _ in range(STEPS):
        p = F.softmax(design @ theta, dim=2)
        gradient = _centred(design.mT @ (p - targets) + _penalised(theta))
        arrived = _dot(gradient, gradient) <= near
        if bool(arrived.all()):
            return theta
        gradient = torch.where(arrived, 0.0, gradient)  # so they stay
        step = _newton_step(design, p, gradient)
        theta, loss = _descend(design, targets, theta, loss, step, _dot(gradient, step).flatten())
    raise RuntimeError("the linear probe found no minimum: are the features of very different sizes?")


def _newton_step(design: Tensor, p: Tensor, gradient: Tensor) -> Tensor:
    """Hessian⁻¹ · gradient by conjugate gradients, the more exactly the smaller the gradient is.

    The Hessian's null direction, a constant added to all of b, has no part in the gradient, so none in any product.
    """
    size = _dot(gradient, gradient)
    enough = size * size.sqrt().clamp(max=1e-2)  # of the squared residual
    step, residual, direction = torch.zeros_like(gradient), gradient, gradient
    for _ in range(gradient[0].numel()):
        change = design @ direction
        change = p * (change - (p * change).sum(dim=2, keepdim=True))
        product = _centred(design.mT @ change + _penalised(direction))
        going = size > enough  # the others have arrived: 0 / 0 there
        length = torch.where(going, size / _dot(direction, product), 0.0)
        step, residual = step + length * direction, residual - length * product
        before, size = size, torch.where(going, _dot(residual, residual), size)
        if not bool((size > enough).any()):
            break
        direction = torch.where(going, residual + size / before * direction, direction)
    return step


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """(E, 1, 1) of two (E, D, N)."""
    return (a * b).sum(dim=(1, 2), keepdim=True)


def _centred(terms: Tensor) -> Tensor:
    """`terms` (E, D, N), whose sums over the classes are 0 but for rounding: nothing holds b in that direction."""
    return terms - terms.mean(dim=2, keepdim=True)


def _penalised(theta: Tensor) -> Tensor:
    """The gradient of ½‖W‖²: `theta` without b."""
    return F.pad(theta[:, :-1], (0, 0, 0, 1))


def _loss(design: Tensor, targets: Tensor, theta: Tensor) -> Tensor:
    """(E,)."""
    terms = -(targets * F.log_softmax(design @ theta, dim=2)).sum(dim=(1, 2))
    return terms + 0.5 * theta[:, :-1].square().sum(dim=(1, 2))


def _descend(
    design: Tensor, targets: Tensor, theta: Tensor, loss: Tensor, step: Tensor, decrement: Tensor
) -> tuple[Tensor, Tensor]:
    """A step of Newton's for each set, halved where the loss would fall by less than a quarter of what was promised."""
    length = torch.ones_like(loss)
    for _ in range(HALVINGS):
        moved = theta - length[:, None, None] * step
        found = _loss(design, targets, moved)
        # What cannot be told from rounding counts as fallen.
        short = found > loss - 0.25 * length * decrement + 1e-13 * (1 + loss)
        if not bool(short.any()):
            break
        length = torch.where(short, length / 2, length)
    return moved, found
