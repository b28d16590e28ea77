"""Inputs of the memory-bank operators for tests, and plain torch's answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from exactness import Evaluate
from torch import Tensor

from pyext.ops.memory_contrast import EPSILON, reference
from pyext.ops.memory_update import reference as update_reference

TEMPERATURE = 0.1
SCALE = 1.7
"""What losses are multiplied with, so that the loss's own gradient is not 1."""
# peers, batch, features, rows of a bank, negatives
SHAPES = {
    "one of everything": (2, 1, 1, 1, 1),
    "few": (3, 4, 7, 11, 5),
    "more indices than rows": (4, 3, 130, 20, 90),
    "whole vectors": (4, 5, 128, 60, 33),
    "more peers than one pass takes": (6, 2, 20, 30, 17),
}


class MemoryInputs(NamedTuple):
    """Arguments of `memory_contrast`; indices hold duplicates wherever there are more of them than rows."""

    embeddings: Tensor
    banks: list[Tensor]
    indices: Tensor


def make_memory_inputs(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, bank_dtype: torch.dtype | None = None, seed: int = 0
) -> MemoryInputs:
    peers, batch, features, rows, negatives = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return F.normalize(torch.randn(size, generator=generator, dtype=torch.float64), dim=-1)

    banks = [normal(rows, features).to(bank_dtype or dtype) for _ in range(peers)]
    # Embeddings near their own rows, as in training: the positive stands out.
    indices = torch.randint(0, rows, (batch, negatives + 1), generator=generator)
    own = torch.stack([bank.double()[indices[:, 0]] for bank in banks])
    return MemoryInputs(F.normalize(own + normal(peers, batch, features), dim=-1).to(dtype), banks, indices)


def loss_and_gradient(inputs: MemoryInputs, call: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """`call`'s loss of the inputs, times SCALE, and the gradient."""
    leaf = inputs.embeddings.detach().requires_grad_()
    loss = SCALE * call(leaf, inputs.banks, inputs.indices, temperature=TEMPERATURE)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def in_float64(inputs: MemoryInputs) -> MemoryInputs:
    return MemoryInputs(inputs.embeddings.double(), [bank.double() for bank in inputs.banks], inputs.indices)


def in_larger_rows(bank: Tensor) -> Tensor:
    """`bank` as columns of a wider tensor of NaN: rows are not adjacent, nor aligned."""
    wide = bank.new_full((bank.shape[0], bank.shape[1] + 3), float("nan"))
    return wide[:, 1:-2].copy_(bank)


def plain_contrast(indices: Tensor) -> Evaluate:
    """Plain torch's loss and gradient, as `loss_and_gradient` has them."""

    def evaluate(embeddings: Tensor, _: list[Tensor], banks: list[Tensor]) -> tuple[Tensor, Tensor]:
        return loss_and_gradient(MemoryInputs(embeddings, banks, indices), reference)

    return evaluate


def plain_update(index: Tensor, momentum: float) -> Evaluate:
    """The banks after plain torch's update."""

    def evaluate(embeddings: Tensor, _: list[Tensor], banks: list[Tensor]) -> list[Tensor]:
        moved = [bank.clone() for bank in banks]
        update_reference(moved, embeddings, index, momentum)
        return moved

    return evaluate


def _exponentials(embeddings: Tensor, inputs: MemoryInputs) -> Tensor:
    """exp(score / T), (pairs, batch, entries), in the order of the reference."""
    pairs = [(i, j) for i in range(len(inputs.banks)) for j in range(len(inputs.banks)) if i != j]
    scores = [torch.einsum("bkd,bd->bk", inputs.banks[i][inputs.indices], embeddings[j]) for i, j in pairs]
    return torch.exp(torch.stack(scores) / TEMPERATURE)


class _ConstantNormaliser(torch.autograd.Function):
    """Value: the definition, with the normalisers of the inputs as constants. Gradient: the operator's."""

    @staticmethod
    def forward(ctx, embeddings, operator, inputs):
        ctx.operator, ctx.inputs = operator, inputs
        ctx.save_for_backward(embeddings)
        samples, negatives = len(inputs.banks[0]), inputs.indices.shape[1] - 1
        normalisers = samples * _exponentials(inputs.embeddings, inputs).mean((1, 2), keepdim=True)
        s, noise = _exponentials(embeddings, inputs) / normalisers, negatives / samples
        terms = torch.cat([s[..., :1] / (s[..., :1] + noise + EPSILON), noise / (s[..., 1:] + noise + EPSILON)], dim=2)
        return -terms.log().sum() / len(inputs.indices)

    @staticmethod
    def backward(ctx, grad_loss):
        leaf = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            loss = ctx.operator(leaf, ctx.inputs.banks, ctx.inputs.indices, temperature=TEMPERATURE, backend="cpu")
        return torch.autograd.grad(loss, leaf, grad_loss)[0], None, None


def with_constant_normaliser(operator: Callable[..., Tensor], inputs: MemoryInputs) -> Callable[[Tensor], Tensor]:
    """What gradcheck can check: differences of the operator itself would see its normaliser move, which is detached."""
    constant = inputs._replace(embeddings=inputs.embeddings.detach().clone())
    return lambda embeddings: _ConstantNormaliser.apply(embeddings, operator, constant)
