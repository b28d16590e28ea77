"""Triton kernels and launchers of `pyext.ops.memory_contrast`, whose docstring holds the equations.

One launch per bank. A program of `score_kernel` and of `embedding_gradient_kernel` reads a block of one image's
gathered rows once and meets it with the embeddings of all other peers. Between the two, `weight_kernel` turns
exponentials into weights in place. Partial sums are written and then added in a fixed order, so results do not change
from run to run. All arithmetic is in float32, and sums over many partial results in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

if triton.knobs.runtime.interpret:
    from . import interpreter  # noqa: F401  (repairs loop bounds under NumPy 2.4)

EPSILON = 1e-7
TILE = 8192
"""Elements of a block of rows times the peers that it meets: 64 registers of each of 128 threads."""
WEIGHT_BLOCK = 1024
SPLIT = 1024
"""Entries of one image that one program of the backward pass adds up."""


@triton.jit
def _rows(bank, pitch, row, column, features):
    """A block of gathered rows in float32, zeros where there is no row or column."""
    mask = (row >= 0)[:, None] & (column < features)[None, :]
    return tl.load(bank + row.to(tl.int64)[:, None] * pitch + column[None, :], mask, 0.0).to(tl.float32)


@triton.jit
def _weight_offset(bank_number, other, others, image, images, entries):
    """Where the weights of one image begin, for each pair of `bank_number` with `other` (a block of int32)."""
    return ((bank_number * others + other.to(tl.int64)) * images + image) * entries


@triton.jit
def _log1p(y):
    """log(1 + y) for y >= 0 without the loss of y's digits in 1 + y."""
    u = 1.0 + y
    lost = (u == 1.0) | (y > 1.0)  # where log(u) / (u - 1) is 0/0, or needs no correction
    corrected = tl.log(u) * (y / tl.where(lost, 1.0, u - 1.0))
    return tl.where(u == 1.0, y, tl.where(y > 1.0, tl.log(u), corrected))


@triton.jit
def score_kernel(
    bank, embeddings, rows, weights, partial, bank_number, pitch, images, entries, features, others, per_temperature,
    PEERS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Exponentials of a block of an image's entries for all pairs of a bank; their sums, partial[p, image, block]."""
    blocks = tl.cdiv(entries, BLOCK_K)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    column, other = tl.arange(0, BLOCK_D), tl.arange(0, PEERS)
    row = tl.load(rows + image * entries + k, k < entries, -1)
    x = _rows(bank, pitch, row, column, features)
    peer = tl.where(other < bank_number, other, other + 1).to(tl.int64)
    v_mask = (other < others)[:, None] & (column < features)[None, :]
    v = tl.load(embeddings + (peer * images + image)[:, None] * features + column[None, :], v_mask, 0.0).to(tl.float32)
    score = tl.sum(x[None, :, :] * v[:, None, :], axis=2)
    exponential = tl.where((row >= 0)[None, :], tl.exp(score * per_temperature), float("nan"))
    inside = (other < others)[:, None] & (k < entries)[None, :]
    offset = _weight_offset(bank_number, other, others, image, images, entries)
    tl.store(weights + offset[:, None] + k[None, :], exponential, inside)
    total = tl.sum(tl.where(inside, exponential, 0.0), axis=1)
    tl.store(partial + (other * images + image) * blocks + block, total, other < others)


@triton.jit
def weight_kernel(weights, normaliser, losses, images, entries, noise, epsilon, BLOCK: tl.constexpr):
    """Exponentials of one block of a pair's and image's entries become weights; losses[pair, image, block]."""
    blocks = tl.cdiv(entries, BLOCK)
    vector = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    k = block * BLOCK + tl.arange(0, BLOCK)
    s = tl.load(weights + vector * entries + k, k < entries, 1.0) / tl.load(normaliser + vector // images)
    shifted = noise + epsilon
    positive = k == 0
    loss = _log1p(tl.where(positive, shifted / s, (s + epsilon) / noise))
    weight = tl.where(positive, -shifted, s) / (s + shifted)
    tl.store(weights + vector * entries + k, weight, k < entries)
    tl.store(losses + vector * blocks + block, tl.sum(tl.where(k < entries, loss, 0.0), axis=0))


@triton.jit
def embedding_gradient_kernel(
    bank, rows, weights, partial, bank_number, pitch, images, entries, features, others,
    PEERS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """partial[p, image, split, :] = the weighted sum of a stretch of an image's rows for all pairs of a bank."""
    splits = tl.cdiv(entries, SPLIT)
    image = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    column, other = tl.arange(0, BLOCK_D), tl.arange(0, PEERS)
    offset = _weight_offset(bank_number, other, others, image, images, entries)
    total = tl.zeros((PEERS, BLOCK_D), tl.float32)
    for start in range(0, tl.minimum(entries - split * SPLIT, SPLIT), BLOCK_K):
        k = split * SPLIT + start + tl.arange(0, BLOCK_K)
        row = tl.load(rows + image * entries + k, k < entries, -1)
        inside = (other < others)[:, None] & (k < entries)[None, :]
        weight = tl.load(weights + offset[:, None] + k[None, :], inside, 0.0)
        x = _rows(bank, pitch, row, column, features)
        total += tl.sum(weight[:, :, None] * x[None, :, :], axis=1)
    at = (other * images + image) * splits + split
    inside = (other < others)[:, None] & (column < features)[None, :]
    tl.store(partial + at.to(tl.int64)[:, None] * features + column[None, :], total, inside)


class Blocks(NamedTuple):
    """Block sizes of the kernels that read rows."""

    PEERS: int
    BLOCK_K: int
    BLOCK_D: int


def _blocks(others: int, features: int) -> dict[str, int]:
    peers, columns = triton.next_power_of_2(others), triton.next_power_of_2(features)
    return Blocks(peers, max(1, min(64, TILE // (peers * columns))), columns)._asdict()


@torch.no_grad()
def forward(
    embeddings: Tensor, banks: Sequence[Tensor], indices: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (float32 scalar), rows (B, K+1) int32 with -1 for what is no row, and weights (M, M-1, B, K+1) float32."""
    peers, images, features = embeddings.shape
    entries, samples, others = indices.shape[1], banks[0].shape[0], peers - 1
    embeddings = embeddings.contiguous()
    rows = torch.where((indices >= 0) & (indices < samples), indices, -1).to(torch.int32)
    weights = embeddings.new_empty((peers, others, images, entries), dtype=torch.float32)
    blocks = _blocks(others, features)
    count = triton.cdiv(entries, blocks["BLOCK_K"])
    partial = weights.new_empty((peers, others, images, count))
    weight_blocks = triton.cdiv(entries, WEIGHT_BLOCK)
    losses = weights.new_empty((peers * others * images, weight_blocks))
    with torch.cuda.device_of(embeddings):
        for i, bank in enumerate(banks):
            score_kernel[(images * count,)](
                bank, embeddings, rows, weights, partial[i], i, bank.stride(0), images, entries, features, others,
                1 / temperature, **blocks,
            )  # fmt: skip
        normaliser = partial.double().sum((2, 3)) * (samples / (images * entries))
        weight_kernel[(peers * others * images * weight_blocks,)](
            weights, normaliser.float(), losses, images, entries, (entries - 1) / samples, EPSILON, BLOCK=WEIGHT_BLOCK
        )
        return (losses.double().sum() / images).float(), rows, weights


@torch.no_grad()
def backward(
    grad_loss: Tensor, embeddings: Tensor, banks: Sequence[Tensor], rows: Tensor, weights: Tensor, temperature: float
) -> Tensor:
    """Gradient of the embeddings, in their dtype; `rows` and `weights` are those that `forward` returned."""
    peers, images, features = embeddings.shape
    entries, others = rows.shape[1], peers - 1
    blocks = _blocks(others, features)
    splits = triton.cdiv(entries, SPLIT)
    partial = weights.new_empty((peers, others, images, splits, features))
    with torch.cuda.device_of(embeddings):
        for i, bank in enumerate(banks):
            embedding_gradient_kernel[(images * splits,)](
                bank, rows, weights, partial[i], i, bank.stride(0), images, entries, features, others,
                SPLIT=SPLIT, **blocks,
            )  # fmt: skip
        of_pair = partial.sum(3)
        # Peer j met bank i as its j-th other, or as its (j-1)-th where j comes after i.
        met = [[of_pair[i, j - (j > i)] for i in range(peers) if i != j] for j in range(peers)]
        grad = torch.stack([torch.stack(parts).sum(0) for parts in met])
        return (grad * (grad_loss / (images * temperature))).to(embeddings.dtype)
