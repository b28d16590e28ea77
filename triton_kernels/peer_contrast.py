"""Triton kernels and launchers of `pyext.ops.peer_contrast`, whose docstring holds the equations.

A program owns a block of rows and one pair of peers i < j, whose four similarity matrices it meets tile by tile: that
is what their softened terms need together. (One peer alone is i = j.) What is one peer's alone, and so met in several
pairs, counts in the first of them. Partial results of stretches of columns are added in a fixed order.
Similarities and sums are in float32, sums over rows in float64; in the backward pass gradients by similarities are in
the dtype of the embeddings, scaled so that they fill its range.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

if triton.knobs.runtime.interpret:
    from . import interpreter  # noqa: F401  (repairs loop bounds under NumPy 2.4)

UNSHIFTED = 40.0
"""Exponents up to this in size need no shift: their exponentials, and sums of 2^31 of them, are finite and normal."""
WANTED_PROGRAMS = 512
"""Enough for a large GPU, the same on each, so that results are."""
LEAST_TILES = 4
"""Tiles of a stretch of columns."""
KINDS = tl.constexpr(5)
"""Partial sums of a row of (i, j): both exponentials, the second times the difference from the student, similarities of
positives; and the softened exponentials of (i, i) times the difference from (j, j)."""
HALF_RANGE = 32768.0


@triton.jit
def _load(v, peer, image, column, images, features):
    """Rows `image` of a peer, columns `column`, zeros where there are none."""
    inside = (image < images)[:, None] & (column < features)[None, :]
    row = peer.to(tl.int64) * images + image
    return tl.load(v + row[:, None] * features + column[None, :], inside, 0.0)


@triton.jit
def _similarities(v, i, j, row, column, images, features, PEERS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Tiles of (i, i), (i, j), (j, i) and (j, j)."""
    ii = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
    ij, ji, jj = ii, ii, ii
    for start in range(0, features, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        row_i, column_i = _load(v, i, row, k, images, features), _load(v, i, column, k, images, features)
        ii = tl.dot(row_i, tl.trans(column_i), ii, input_precision="ieee")
        if PEERS == 2:
            row_j, column_j = _load(v, j, row, k, images, features), _load(v, j, column, k, images, features)
            ij = tl.dot(row_i, tl.trans(column_j), ij, input_precision="ieee")
            ji = tl.dot(row_j, tl.trans(column_i), ji, input_precision="ieee")
            jj = tl.dot(row_j, tl.trans(column_j), jj, input_precision="ieee")
    return ii, ij, ji, jj


@triton.jit
def _exponentials(x, hard_shift, soft_shift, hard_scale, soft_scale, CUBE: tl.constexpr, SHIFTED: tl.constexpr):
    """Both exponentials above their shifts; without any, the first may be the third power of the second."""
    if SHIFTED:
        return tl.exp2((x - hard_shift) * hard_scale), tl.exp2((x - soft_shift) * soft_scale)
    soft = tl.exp2(x * soft_scale)
    if CUBE:
        return soft * soft * soft, soft
    return tl.exp2(x * hard_scale), soft


@triton.jit
def _at(pointer, kind, i, j, row, peers, images):
    """Numbers of rows of (i, j) in a tensor (kinds, peers, peers, images)."""
    return pointer + ((tl.full((), kind, tl.int64) * peers + i) * peers + j) * images + row


@triton.jit
def _largest(largest, of_others, x, valid, other):
    low = float("-inf")
    return (
        tl.maximum(largest, tl.max(tl.where(valid, x, low), axis=1)),
        tl.maximum(of_others, tl.max(tl.where(valid & other, x, low), axis=1)),
    )


@triton.jit
def _store_largest(partial, i, j, row, peers, images, of_others, largest, mask):
    tl.store(_at(partial, 0, i, j, row, peers, images), of_others, mask)
    tl.store(_at(partial, 1, i, j, row, peers, images), largest, mask)


@triton.jit
def largest_kernel(
    v, unshifted, partial, peers, images, features, first_block, tiles_per_stretch,
    PEERS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Largest similarities of a block of rows, of others and of all, where a shift is needed: partial[stretch, 2]."""
    i, j = tl.program_id(2) // peers, tl.program_id(2) % peers
    if tl.load(unshifted) != 0:
        return
    if (PEERS == 2) & (i >= j):
        return
    row = (first_block + tl.program_id(0)) * BLOCK_R + tl.arange(0, BLOCK_R)
    low = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    ii, ij, ji, jj = low, low, low, low
    ii_others, ij_others, ji_others, jj_others = low, low, low, low
    begin = tl.program_id(1) * tiles_per_stretch
    for tile in range(begin, tl.minimum(begin + tiles_per_stretch, tl.cdiv(images, BLOCK_C))):
        column = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        valid, other = (column < images)[None, :], row[:, None] != column[None, :]
        x_ii, x_ij, x_ji, x_jj = _similarities(v, i, j, row, column, images, features, PEERS, BLOCK_K)
        ii, ii_others = _largest(ii, ii_others, x_ii, valid, other)
        if PEERS == 2:
            ij, ij_others = _largest(ij, ij_others, x_ij, valid, other)
            ji, ji_others = _largest(ji, ji_others, x_ji, valid, other)
            jj, jj_others = _largest(jj, jj_others, x_jj, valid, other)
    out = partial + tl.program_id(1).to(tl.int64) * 2 * peers * peers * images
    inside = row < images
    _store_largest(out, i, i, row, peers, images, ii_others, ii, inside & (i == 0) & (j <= 1))
    if PEERS == 2:
        _store_largest(out, i, j, row, peers, images, ij_others, ij, inside)
        _store_largest(out, j, i, row, peers, images, ji_others, ji, inside)
        _store_largest(out, j, j, row, peers, images, jj_others, jj, inside & (i == 0))


@triton.jit
def _add(
    hard_sum, soft_sum, difference, positive_sum, x, student, normalisers, i, j, row, valid, other, positive, peers,
    images, hard_scale, soft_scale, CUBE: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """Sums of rows of (i, j) over one more tile."""
    hard_shift, soft_shift = 0.0, 0.0
    if SHIFTED:
        hard_shift = tl.load(_at(normalisers, 0, i, j, row, peers, images), row < images, 0.0)[:, None]
        soft_shift = tl.load(_at(normalisers, 2, i, j, row, peers, images), row < images, 0.0)[:, None]
    hard, soft = _exponentials(x, hard_shift, soft_shift, hard_scale, soft_scale, CUBE, SHIFTED)
    soft = tl.where(valid, soft, 0.0)
    return (
        hard_sum + tl.sum(tl.where(valid & other, hard, 0.0), axis=1),
        soft_sum + tl.sum(soft, axis=1),
        difference + tl.sum(soft * (x - student), axis=1),
        positive_sum + tl.sum(tl.where(positive, x, 0.0), axis=1),
    )


@triton.jit
def _store_sums(partial, i, j, row, peers, images, hard, soft, positive, mask):
    tl.store(_at(partial, 0, i, j, row, peers, images), hard, mask)
    tl.store(_at(partial, 1, i, j, row, peers, images), soft, mask)
    tl.store(_at(partial, 3, i, j, row, peers, images), positive, mask)


@triton.jit
def sum_kernel(
    v, classes, unshifted, normalisers, partial, peers, images, features, first_block, tiles_per_stretch, hard_scale,
    soft_scale, CUBE: tl.constexpr, SHIFTED: tl.constexpr,
    PEERS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums of a block of rows over a stretch of columns: partial[stretch, KINDS]. Of two launches one does the work."""
    i, j = tl.program_id(2) // peers, tl.program_id(2) % peers
    if (tl.load(unshifted) == 0) != SHIFTED:
        return
    if (PEERS == 2) & (i >= j):
        return
    row = (first_block + tl.program_id(0)) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_class = tl.load(classes + row, row < images, -2)
    zero = tl.zeros((BLOCK_R,), tl.float32)
    h_ii, s_ii, d_ii, p_ii = zero, zero, zero, zero
    h_ij, s_ij, d_ij, p_ij = zero, zero, zero, zero
    h_ji, s_ji, d_ji, p_ji = zero, zero, zero, zero
    h_jj, s_jj, d_jj, p_jj = zero, zero, zero, zero
    begin = tl.program_id(1) * tiles_per_stretch
    for tile in range(begin, tl.minimum(begin + tiles_per_stretch, tl.cdiv(images, BLOCK_C))):
        column = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        valid, other = (column < images)[None, :], row[:, None] != column[None, :]
        column_class = tl.load(classes + column, column < images, -1)
        positive = other & (row_class[:, None] == column_class[None, :])
        ii, ij, ji, jj = _similarities(v, i, j, row, column, images, features, PEERS, BLOCK_K)
        h_ii, s_ii, d_ii, p_ii = _add(
            h_ii, s_ii, d_ii, p_ii, ii, jj, normalisers, i, i, row, valid, other, positive, peers, images,
            hard_scale, soft_scale, CUBE, SHIFTED,
        )  # fmt: skip
        if PEERS == 2:
            h_ij, s_ij, d_ij, p_ij = _add(
                h_ij, s_ij, d_ij, p_ij, ij, ji, normalisers, i, j, row, valid, other, positive, peers, images,
                hard_scale, soft_scale, CUBE, SHIFTED,
            )  # fmt: skip
            h_ji, s_ji, d_ji, p_ji = _add(
                h_ji, s_ji, d_ji, p_ji, ji, ij, normalisers, j, i, row, valid, other, positive, peers, images,
                hard_scale, soft_scale, CUBE, SHIFTED,
            )  # fmt: skip
            h_jj, s_jj, d_jj, p_jj = _add(
                h_jj, s_jj, d_jj, p_jj, jj, ii, normalisers, j, j, row, valid, other, positive, peers, images,
                hard_scale, soft_scale, CUBE, SHIFTED,
            )  # fmt: skip
    out = partial + tl.program_id(1).to(tl.int64) * KINDS * peers * peers * images
    inside = row < images
    _store_sums(out, i, i, row, peers, images, h_ii, s_ii, p_ii, inside & (i == 0) & (j <= 1))
    if PEERS == 2:
        _store_sums(out, i, j, row, peers, images, h_ij, s_ij, p_ij, inside)
        _store_sums(out, j, i, row, peers, images, h_ji, s_ji, p_ji, inside)
        _store_sums(out, j, j, row, peers, images, h_jj, s_jj, p_jj, inside & (i == 0))
        tl.store(_at(out, 2, i, j, row, peers, images), d_ij, inside)
        tl.store(_at(out, 2, j, i, row, peers, images), d_ji, inside)
        tl.store(_at(out, 4, i, j, row, peers, images), d_ii, inside)
        tl.store(_at(out, 4, j, i, row, peers, images), d_jj, inside)


@triton.jit
def _probabilities(
    x, weights, i, j, row, column, peers, images, hard_scale, soft_scale, CUBE: tl.constexpr, SHIFTED: tl.constexpr
):
    """Probabilities of rows of (i, j) and, as x is theirs too, of columns of (j, i), by the weights of both. These
    are (hard, soft, shift of hard, shift of soft)."""
    in_row, in_column = row < images, column < images
    row_hard = tl.load(_at(weights, 0, i, j, row, peers, images), in_row, 0.0)[:, None]
    row_soft = tl.load(_at(weights, 1, i, j, row, peers, images), in_row, 0.0)[:, None]
    column_hard = tl.load(_at(weights, 0, j, i, column, peers, images), in_column, 0.0)[None, :]
    column_soft = tl.load(_at(weights, 1, j, i, column, peers, images), in_column, 0.0)[None, :]
    if not SHIFTED:
        hard, soft = _exponentials(x, 0.0, 0.0, hard_scale, soft_scale, CUBE, SHIFTED)
        return hard * (row_hard + column_hard), soft * (row_soft + column_soft)
    far = float("inf")
    hard_shift = tl.load(_at(weights, 2, i, j, row, peers, images), in_row, far)[:, None]
    soft_shift = tl.load(_at(weights, 3, i, j, row, peers, images), in_row, far)[:, None]
    hard, soft = _exponentials(x, hard_shift, soft_shift, hard_scale, soft_scale, CUBE, SHIFTED)
    hard_shift = tl.load(_at(weights, 2, j, i, column, peers, images), in_column, far)[None, :]
    soft_shift = tl.load(_at(weights, 3, j, i, column, peers, images), in_column, far)[None, :]
    hard_too, soft_too = _exponentials(x, hard_shift, soft_shift, hard_scale, soft_scale, CUBE, SHIFTED)
    return hard * row_hard + hard_too * column_hard, soft * row_soft + soft_too * column_soft


@triton.jit
def _attraction(positives, kind, row, column, images):
    """Of positives: the sum of their row's and their column's weights."""
    of_kind = positives + kind * images
    of_row, of_column = tl.load(of_kind + row, row < images, 0.0), tl.load(of_kind + column, column < images, 0.0)
    return of_row[:, None] + of_column[None, :]


@triton.jit
def _add_product(sums, gradients, valid, columns):
    """`sums` and the product of gradients by similarities, where there are any, with columns."""
    return tl.dot(tl.where(valid, gradients, 0.0).to(columns.dtype), columns, sums, input_precision="ieee")


@triton.jit
def gradient_kernel(
    v, classes, unshifted, weights, positives, partial, peers, images, features, tiles_per_stretch, blocks, hard_scale,
    soft_scale, CUBE: tl.constexpr, SHIFTED: tl.constexpr,
    PEERS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What a stretch of columns gives to the gradient of a block of rows, for one block of features, of both peers of
    a pair: partial[stretch, peer, other]. Of two launches one does the work."""
    i, j = tl.program_id(2) // peers, tl.program_id(2) % peers
    if (tl.load(unshifted) == 0) != SHIFTED:
        return
    if (PEERS == 2) & (i >= j):
        return
    row = tl.program_id(0) // blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    feature = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    row_class = tl.load(classes + row, row < images, -2)
    sum_i, sum_j = tl.zeros((BLOCK_R, BLOCK_D), tl.float32), tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    own_i, own_j = (i == 0) & (j <= 1), i == 0
    begin = tl.program_id(1) * tiles_per_stretch
    for tile in range(begin, tl.minimum(begin + tiles_per_stretch, tl.cdiv(images, BLOCK_C))):
        column = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        # What is no row or column may have any probability, infinity too.
        valid = (row < images)[:, None] & (column < images)[None, :]
        other = row[:, None] != column[None, :]
        ii, ij, ji, jj = _similarities(v, i, j, row, column, images, features, PEERS, BLOCK_K)
        column_class = tl.load(classes + column, column < images, -1)
        positive = other & (row_class[:, None] == column_class[None, :])
        within = tl.where(positive, _attraction(positives, 0, row, column, images), 0.0)
        # First what is one peer's alone, then what is between them, so that fewer tiles are alive at a time.
        h_ii, s_ii = _probabilities(
            ii, weights, i, i, row, column, peers, images, hard_scale, soft_scale, CUBE, SHIFTED
        )
        ii = tl.where(other & own_i, h_ii - within, 0.0)
        if PEERS == 2:
            h_jj, s_jj = _probabilities(
                jj, weights, j, j, row, column, peers, images, hard_scale, soft_scale, CUBE, SHIFTED
            )
            ii += s_ii - s_jj
            jj = tl.where(other & own_j, h_jj - within, 0.0) + (s_jj - s_ii)
        sum_i = _add_product(sum_i, ii, valid, _load(v, i, column, feature, images, features))
        if PEERS == 2:
            sum_j = _add_product(sum_j, jj, valid, _load(v, j, column, feature, images, features))
            h_ij, s_ij = _probabilities(
                ij, weights, i, j, row, column, peers, images, hard_scale, soft_scale, CUBE, SHIFTED
            )
            h_ji, s_ji = _probabilities(
                ji, weights, j, i, row, column, peers, images, hard_scale, soft_scale, CUBE, SHIFTED
            )
            between = tl.where(positive, _attraction(positives, 1, row, column, images), 0.0)
            ij = tl.where(other, h_ij - between, 0.0) + (s_ij - s_ji)
            ji = tl.where(other, h_ji - between, 0.0) + (s_ji - s_ij)
            sum_i = _add_product(sum_i, ij, valid, _load(v, j, column, feature, images, features))
            sum_j = _add_product(sum_j, ji, valid, _load(v, i, column, feature, images, features))
    inside = (row < images)[:, None] & (feature < features)[None, :]
    others = tl.maximum(peers - 1, 1)
    at = row.to(tl.int64)[:, None] * features + feature[None, :]
    first = (tl.program_id(1).to(tl.int64) * peers + i) * others + tl.maximum(j - 1, 0)
    tl.store(partial + first * images * features + at, sum_i, inside)
    if PEERS == 2:
        second = (tl.program_id(1).to(tl.int64) * peers + j) * others + i
        tl.store(partial + second * images * features + at, sum_j, inside)


def _blocks(dtype: torch.dtype, features: int, gradient: bool) -> dict[str, int]:
    """Of rows, columns and features of similarities, which both passes must round alike: shifts and sums of the first
    meet exponentials of the second. The largest that spill no registers."""
    wide = dtype != torch.float32
    return {
        "BLOCK_R": 64 if wide and not gradient else 32,
        "BLOCK_C": 32 if wide else 16,
        "BLOCK_K": _part(features, 32),
        "num_warps": 8,
        "num_stages": 2 if wide else 1,
    }


def _part(features: int, most: int) -> int:
    return max(16, min(most, triton.next_power_of_2(features)))


class Plan(NamedTuple):
    """How rows, columns and features are cut, and where the rows begin that a pass visits."""

    options: dict[str, int]
    """Constants and launch options of a kernel."""
    first_block: int
    row_blocks: int
    tiles_per_stretch: int
    stretches: int

    @classmethod
    def of(cls, v: Tensor, start: int, stop: int, blocks: dict[str, int]) -> Plan:
        peers, images, _ = v.shape
        options = {"PEERS": min(peers, 2), **blocks}
        first = start // options["BLOCK_R"]
        row_blocks = triton.cdiv(stop, options["BLOCK_R"]) - first if stop > start else 0
        tiles = triton.cdiv(images, options["BLOCK_C"])
        programs = max(1, row_blocks * max(1, peers * (peers - 1) // 2))
        stretches = min(triton.cdiv(WANTED_PROGRAMS, programs), triton.cdiv(tiles, LEAST_TILES))
        per_stretch = triton.cdiv(tiles, max(1, stretches))
        return cls(options, first, row_blocks, per_stretch, triton.cdiv(tiles, max(1, per_stretch)))

    def grid(self, peers: int, feature_blocks: int = 1) -> tuple[int, int, int]:
        return self.row_blocks * feature_blocks, self.stretches, peers * peers


class Prepared(NamedTuple):
    """What both passes begin with."""

    v: Tensor
    """Contiguous."""
    classes: Tensor
    """int32, equal where labels are equal, not negative."""
    positives: Tensor
    """Other images of the same label."""
    counted: Tensor
    """How many images have positives, at least 1."""
    unshifted: Tensor
    """int32: exponentials need no shift, by |v w| <= |v| |w|."""
    scales: dict[str, float | bool]

    @classmethod
    def of(cls, embeddings: Tensor, labels: Tensor, temperature: float, soft_temperature: float) -> Prepared:
        ordered = labels.sort().values
        first = torch.searchsorted(ordered, labels)
        positives = torch.searchsorted(ordered, labels, right=True) - first - 1
        largest = embeddings.float().square().sum(-1).amax()
        soft = math.log2(math.e) / (temperature * soft_temperature)
        return cls(
            embeddings.contiguous(),
            first.to(torch.int32),
            positives,
            (positives > 0).sum().clamp(min=1),
            (largest <= UNSHIFTED * temperature * min(1.0, soft_temperature)).to(torch.int32),
            {"hard_scale": math.log2(math.e) / temperature, "soft_scale": soft, "CUBE": soft_temperature == 3},
        )


def _between(x: Tensor) -> Tensor:
    """The entries i != j of a tensor (peers, peers, ...), as (peers - 1, peers, ...)."""
    peers = x.shape[0]
    return x.flatten(0, 1)[1:].unflatten(0, (peers - 1, peers + 1))[:, :-1]


def _within(x: Tensor) -> Tensor:
    """The entries i = i, as (..., peers)."""
    return x.diagonal(dim1=0, dim2=1)


def _launches(ready: Prepared) -> Iterator[dict[str, float | bool]]:
    for shifted in (False, True):
        yield {**ready.scales, "SHIFTED": shifted}


@torch.no_grad()
def forward(
    embeddings: Tensor, labels: Tensor, temperature: float, soft_temperature: float, start: int, stop: int
) -> tuple[Tensor, Tensor]:
    """The four terms, and normalisers (4, M, M, B): of the rows of x_ij the largest similarity (0 where no exponential
    can overflow) and the sum of exponentials above it, without the row's own image, and the same softened, with it."""
    peers, images, features = embeddings.shape
    normalisers = embeddings.new_zeros((4, peers, peers, images), dtype=torch.float32)
    if stop == start:
        return normalisers.new_zeros(4), normalisers
    with torch.cuda.device_of(embeddings):
        ready = Prepared.of(embeddings, labels, temperature, soft_temperature)
        plan = Plan.of(embeddings, start, stop, _blocks(embeddings.dtype, features, gradient=False))
        shape = (plan.stretches, KINDS.value, peers, peers, images)
        extents = (peers, images, features, plan.first_block, plan.tiles_per_stretch)
        largest = normalisers.new_full((plan.stretches, 2, *shape[2:]), float("-inf"))
        largest_kernel[plan.grid(peers)](ready.v, ready.unshifted, largest, *extents, **plan.options)
        largest = largest.amax(0)[..., start:stop]
        normalisers[::2, ..., start:stop] = torch.where(largest.isneginf(), 0.0, largest)
        partial = normalisers.new_zeros(shape)
        for options in _launches(ready):
            sum_kernel[plan.grid(peers)](
                ready.v, ready.classes, ready.unshifted, normalisers, partial, *extents, **options, **plan.options
            )
        sums = partial.sum(0, dtype=torch.float64)[..., start:stop]
        normalisers[1::2, ..., start:stop] = sums[:2]
        shift = normalisers[0, ..., start:stop]
        return _terms(sums, shift, ready, (start, stop), temperature, soft_temperature), normalisers


def _terms(
    sums: Tensor, shift: Tensor, ready: Prepared, rows: tuple[int, int], temperature: float, soft_temperature: float
) -> Tensor:
    hard, soft, between, positive, within = sums
    positives = ready.positives[slice(*rows)]
    contrast = hard.log() + (shift.double() - positive / positives) / temperature
    contrast = torch.where(positives > 0, contrast, 0.0) / ready.counted
    factor = soft_temperature / temperature / len(ready.positives)
    own = within / _within(soft).t()[:, None]
    terms = _within(contrast), _between(contrast), _between(own) * factor, _between(between / soft) * factor
    return torch.stack([term.sum() for term in terms]).float()


class Weights(NamedTuple):
    """Factors in the gradient by similarities."""

    of_rows: Tensor
    """(4, M, M, B): of both exponentials of a row of (i, j), the derivative divided by their sum; their shifts. 0 where
    there is none, with a shift that makes the exponential 0 too: without, it may be infinite."""
    of_positives: Tensor
    """(2, B): within a peer and between peers."""
    scale: Tensor
    """What all are multiplied with."""

    @classmethod
    def of(
        cls,
        grad_terms: Tensor,
        normalisers: Tensor,
        ready: Prepared,
        rows: tuple[int, int],
        temperature: float,
        soft_temperature: float,
    ) -> Weights:
        peers, images = normalisers.shape[1], normalisers.shape[3]
        image = torch.arange(images, device=normalisers.device)
        active = (image >= rows[0]) & (image < rows[1])
        counted = active & (ready.positives > 0)
        hard = grad_terms[:2].double() / (temperature * ready.counted)
        soft = grad_terms[2:].double() * (soft_temperature / (temperature * images))
        # A row's and a column's part are each at most one probability or positive, and `peers` for the divergence.
        bound = 2 * (hard.abs().amax() + peers * soft.abs().amax())
        scale = torch.where((bound > 0) & (ready.v.dtype != torch.float32), HALF_RANGE / bound, 1.0)
        hard, soft = hard * scale, soft * scale
        own = torch.eye(peers, dtype=torch.bool, device=normalisers.device)[..., None]
        of_rows = torch.stack(
            [
                torch.where(counted, torch.where(own, hard[0], hard[1]) / normalisers[1], 0.0),
                torch.where(active, torch.where(own, soft[0], soft[1]) / normalisers[3], 0.0),
                torch.where(counted, normalisers[0].double(), math.inf),
                torch.where(active, normalisers[2].double(), math.inf),
            ]
        )
        of_positives = torch.where(counted, hard[:, None] / ready.positives, 0.0)
        return cls(of_rows.float(), of_positives.float(), scale)


@torch.no_grad()
def backward(
    grad_terms: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    normalisers: Tensor,
    temperature: float,
    soft_temperature: float,
    start: int,
    stop: int,
) -> Tensor:
    """Gradient of the embeddings, in their dtype; `normalisers` is what `forward` returned."""
    peers, images, features = embeddings.shape
    if stop == start:
        return torch.zeros_like(embeddings, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(embeddings):
        ready = Prepared.of(embeddings, labels, temperature, soft_temperature)
        weights = Weights.of(grad_terms, normalisers, ready, (start, stop), temperature, soft_temperature)
        plan = Plan.of(embeddings, 0, images, _blocks(embeddings.dtype, features, gradient=True))
        partial = normalisers.new_empty((plan.stretches, peers, max(1, peers - 1), images, features))
        for options in _launches(ready):
            # Each block of features computes similarities anew. Shifts take registers that the widest would need.
            narrow = options["SHIFTED"] or ready.v.dtype == torch.float32
            block = _part(features, 64 if narrow else 128)
            blocks = triton.cdiv(features, block)
            gradient_kernel[plan.grid(peers, blocks)](
                ready.v, ready.classes, ready.unshifted, weights.of_rows, weights.of_positives, partial, peers, images,
                features, plan.tiles_per_stretch, blocks, **options, **plan.options, BLOCK_D=block,
            )  # fmt: skip
        return (partial.sum((0, 2)) / weights.scale).to(embeddings.dtype)
