"""In-batch contrast within and between the embeddings of several peers, hard and softened, as one operator.

Source: mutual contrastive learning, the follow-up of MCL-OKD (arXiv 2006.04093). For ``M`` peers and ``B`` images with
embeddings v_i, let x_ij = v_i v_j^T / temperature, (B, B), and a row's positives be the other rows of its class:

    contrast(x)[b] = -mean over positives p of ( x[b, p] - log sum_{c != b} exp x[b, c] )
    KL(t, s)[b]    = sum_c p_t[b, c] (log p_t[b, c] - log p_s[b, c])    p_x = softmax over all c of x / soft_temperature
    vcl      = sum_i       sum_b contrast(x_ii)[b] / N
    icl      = sum_{i!=j}  sum_b contrast(x_ij)[b] / N
    soft_vcl = sum_{i!=j}  soft_temperature^2 sum_b KL(x_jj detached, x_ii)[b] / B
    soft_icl = sum_{i!=j}  soft_temperature^2 sum_b KL(x_ji detached, x_ij)[b] / B

with N the number of rows that have a positive: a row without positives contributes nothing to vcl and icl and is not
counted; they are 0 where no row has one. In the sum over ordered pairs the log-sum-exps of KL cancel, so that its value
is one sum per row, sum_c p_t (M y_t - sum_s y_s) with y = x / soft_temperature.

The CPU kernel visits tiles of all M x M similarities once per pass, for rows and columns together (x_ij[b, c] is
x_ji[c, b]), and keeps nothing of size B x B: only 4 M^2 B numbers for the backward pass. Its results do not depend
on the number of threads. On GPUs a block owns rows: it visits tiles of their similarities once in the forward pass and
once in the backward pass, after a pass for the largest of them where an exponential could overflow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import _C, Tensor

from pyext import _backend, _library
from pyext._operator import DTYPES, accumulate_dtype, backends, register_differentiable, register_triton, triton_kernels

_OPS = torch.ops.pyext


class PeerContrastTerms(NamedTuple):
    """The four terms, scalars of float32 (float64 for float64 embeddings)."""

    vcl: Tensor
    icl: Tensor
    soft_vcl: Tensor
    soft_icl: Tensor


def _contrast(x: Tensor, positive: Tensor, counts: Tensor, first: int) -> Tensor:
    """Sum over rows with positives; row r of `x` is row first + r of the batch."""
    own = torch.zeros_like(positive).diagonal_scatter(torch.ones(len(x), dtype=torch.bool, device=x.device), first)
    total = torch.logsumexp(x.masked_fill(own, float("-inf")), 1)
    mean = (x * positive).sum(1) / counts.clamp(min=1)
    return torch.where(counts > 0, total - mean, 0.0).sum()


def _divergence(target: Tensor, student: Tensor, soft_temperature: float) -> Tensor:
    target = torch.log_softmax(target.detach() / soft_temperature, 1)
    student = torch.log_softmax(student / soft_temperature, 1)
    return (target.exp() * (target - student)).sum()


def reference(
    embeddings: Tensor,
    labels: Tensor,
    temperature: float = 0.1,
    soft_temperature: float = 3.0,
    rows: tuple[int, int] | None = None,
) -> PeerContrastTerms:
    """The operator's definition in plain torch; differentiable any number of times. Shapes as in `peer_contrast`."""
    v = embeddings.to(accumulate_dtype(embeddings.dtype))
    peers, batch, _ = v.shape
    start, stop = (0, batch) if rows is None else rows
    same = (labels[:, None] == labels).fill_diagonal_(False)
    counted = (same.sum(1) > 0).sum().clamp(min=1)
    positive = same[start:stop]
    counts = positive.sum(1)
    x = {(i, j): v[i, start:stop] @ v[j].t() / temperature for i in range(peers) for j in range(peers)}
    nothing = v[:0].sum()  # 0 with a gradient, whatever v holds
    vcl, icl, soft_vcl, soft_icl = nothing, nothing, nothing, nothing
    for i, j in x if stop > start else ():
        contrast = _contrast(x[i, j], positive, counts, start) / counted
        if i == j:
            vcl = vcl + contrast
        else:
            icl = icl + contrast
            soft_vcl = soft_vcl + _divergence(x[j, j], x[i, i], soft_temperature) * soft_temperature**2 / batch
            soft_icl = soft_icl + _divergence(x[j, i], x[i, j], soft_temperature) * soft_temperature**2 / batch
    return PeerContrastTerms(vcl, icl, soft_vcl, soft_icl)


def validate(
    embeddings: Tensor, labels: Tensor, temperature: float, soft_temperature: float, start: int, stop: int
) -> None:
    """Raise TypeError (dtype) or ValueError (shape, device, number) naming the argument that is wrong."""
    op = "peer_contrast"
    if embeddings.dim() != 3 or embeddings.shape[0] == 0:
        raise ValueError(f"{op}: embeddings has shape {tuple(embeddings.shape)}, expected (peers, batch, features)")
    if embeddings.dtype not in DTYPES:
        raise TypeError(
            f"{op}: embeddings has dtype {embeddings.dtype}, expected float32, float64, bfloat16 or float16"
        )
    _, batch, features = embeddings.shape
    if features == 0:
        raise ValueError(f"{op}: embeddings has shape {tuple(embeddings.shape)}, expected at least one feature")
    if labels.shape != (batch,):
        raise ValueError(f"{op}: labels has shape {tuple(labels.shape)}, expected ({batch},), one per image")
    if labels.dtype != torch.int64:
        raise TypeError(f"{op}: labels has dtype {labels.dtype}, expected int64")
    if labels.device != embeddings.device:
        raise ValueError(f"{op}: labels is on {labels.device}, expected embeddings' device {embeddings.device}")
    for name, value in (("temperature", temperature), ("soft_temperature", soft_temperature)):
        if not 0 < value < float("inf"):
            raise ValueError(f"{op}: {name} is {value}, expected more than 0")
    if not 0 <= start <= stop <= batch:
        raise ValueError(f"{op}: rows is ({start}, {stop}), expected 0 <= start <= stop <= {batch}")


OPERATOR = _backend.register(_backend.Operator("peer_contrast", backends("embeddings")))


def stacked(embeddings: Tensor | Sequence[Tensor]) -> Tensor:
    """The peers' embeddings as one tensor; names the peer that differs from the first."""
    if isinstance(embeddings, Tensor):
        return embeddings
    if len(embeddings) == 0:
        raise ValueError("peer_contrast: embeddings is an empty list, expected one tensor per peer")
    first = embeddings[0]
    for i, x in enumerate(embeddings):
        if x.dim() != 2 or x.shape != first.shape:
            raise ValueError(
                f"peer_contrast: embeddings[{i}] has shape {tuple(x.shape)}, expected (batch, features), the same for "
                f"all peers; embeddings[0] has {tuple(first.shape)}"
            )
        if x.dtype != first.dtype or x.device != first.device:
            raise TypeError(
                f"peer_contrast: embeddings[{i}] is {x.dtype} on {x.device}, expected {first.dtype} on {first.device} "
                "as embeddings[0]"
            )
    return torch.stack(list(embeddings))


def peer_contrast(
    embeddings: Tensor | Sequence[Tensor],
    labels: Tensor,
    *,
    temperature: float = 0.1,
    soft_temperature: float = 3.0,
    rows: tuple[int, int] | None = None,
    backend: str | None = None,
) -> PeerContrastTerms:
    """Contrast within (vcl) and between (icl) peers, and the divergence of their softened similarities.

    Args:
        embeddings: (M, B, d), or M tensors (B, d), L2-normalised by the caller; float32, bfloat16, float16, or float64.
        labels: (B,) int64, any numbers; images of equal labels are each other's positives.
        temperature: divides the similarities, > 0.
        soft_temperature: divides them further in the softened terms, > 0.
        rows: (start, stop), the rows of the batch whose terms are computed, for embeddings gathered over ranks: columns
            are always the whole batch, and the sums over rows are divided by the whole batch's counts, so that the
            terms, and their gradients by all M x B embeddings, add up to those of one call without `rows` when the
            ranges cover the batch. Each rank passes its own range; the gather's backward pass adds up the gradients.
        backend: overrides `pyext.backend` and ``PYEXT_BACKEND``.

    Returns:
        PeerContrastTerms(vcl, icl, soft_vcl, soft_icl), scalars of float32 (float64 for float64 embeddings). With one
        peer vcl is the supervised contrastive loss and the others are 0; all are 0 for an empty batch. NaN embeddings
        give NaN.

    Raises:
        ValueError: wrong shape, device, temperature or rows; peers of different batch sizes.
        TypeError: wrong dtype.
        BackendError: the backend asked for cannot run.

    Source: mutual contrastive learning, follow-up of MCL-OKD, arXiv 2006.04093.
    """
    v = stacked(embeddings)
    name = OPERATOR.choose(backend, v)
    start, stop = (0, v.shape[1] if v.dim() == 3 else 0) if rows is None else rows
    numbers = (temperature, soft_temperature, start, stop)
    if name == "reference":
        validate(v, labels, *numbers)
        return reference(v, labels, temperature, soft_temperature, (start, stop))
    try:
        return PeerContrastTerms(*_run("_triton" if name == "triton" else "", v, labels, *numbers))
    except RuntimeError:
        # The kernels check what memory safety needs; the sentence that names the argument is made here.
        validate(v, labels, *numbers)
        raise


def _run(variant: str, embeddings: Tensor, labels: Tensor, *numbers: float) -> tuple[Tensor, ...]:
    """Call a variant of the operator; `numbers` are its other arguments."""
    names = (f"peer_contrast{variant}", f"peer_contrast_backward{variant}")
    forward, backward = (getattr(_OPS, name).default for name in names)
    if _library.is_traced():
        return forward(embeddings, labels, *numbers)[0].unbind()
    if embeddings.requires_grad and torch.is_grad_enabled():
        return _Eager.apply(forward, backward, embeddings, labels, *numbers).unbind()
    with _C._AutoDispatchBelowAutograd():
        return forward(embeddings, labels, *numbers)[0].unbind()


# --- registration of shapes and gradients -----------------------------------------------------------------------------


def _fake_forward(embeddings, labels, temperature, soft_temperature, start, stop):
    validate(embeddings, labels, temperature, soft_temperature, start, stop)
    dtype = accumulate_dtype(embeddings.dtype)
    peers, batch, _ = embeddings.shape
    return embeddings.new_empty(4, dtype=dtype), embeddings.new_empty((4, peers, peers, batch), dtype=dtype)


def _fake_backward(grad_terms, embeddings, labels, normalisers, temperature, soft_temperature, start, stop):
    return embeddings.new_empty(embeddings.shape)


def _setup_context(ctx, inputs, output):
    embeddings, labels, *ctx.numbers = inputs
    ctx.save_for_backward(embeddings, labels, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(op, ctx, grad_terms, _):
    if grad_terms is None:
        return (None,) * 6
    return op(grad_terms, *ctx.saved_tensors, *ctx.numbers), *(None,) * 5


class _Eager(torch.autograd.Function):
    """The operator with its gradient outside of torch.compile: what `register_autograd` adds in Python takes as long as
    the kernels do on a batch of 128 images."""

    @staticmethod
    def forward(ctx, forward, backward, embeddings, labels, *numbers):
        ctx.op, ctx.numbers = backward, numbers
        with _C._AutoDispatchBelowAutograd():
            terms, normalisers = forward(embeddings, labels, *numbers)
        ctx.save_for_backward(embeddings, labels, normalisers)
        ctx.set_materialize_grads(False)
        return terms

    @staticmethod
    def backward(ctx, grad_terms):
        embeddings, labels, normalisers = ctx.saved_tensors
        # With create_graph the dispatcher's own gradient of the backward pass is needed: it refuses in words.
        below = contextlib.nullcontext() if torch.is_grad_enabled() else _C._AutoDispatchBelowAutograd()
        with below:
            grad = ctx.op(grad_terms, embeddings, labels, normalisers, *ctx.numbers)
        return None, None, grad, *(None,) * 5


def _triton_forward(embeddings, labels, temperature, soft_temperature, start, stop):
    validate(embeddings, labels, temperature, soft_temperature, start, stop)  # kernels read what shapes promise
    return triton_kernels("peer_contrast").forward(embeddings, labels, temperature, soft_temperature, start, stop)


def _triton_backward(*args):
    return triton_kernels("peer_contrast").backward(*args)


register_differentiable("peer_contrast", _fake_forward, _fake_backward, _setup_context, _backward)
register_triton("peer_contrast_triton", _triton_forward)
register_triton("peer_contrast_backward_triton", _triton_backward)
