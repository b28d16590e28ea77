"""Contrast of every peer's embedding with the memory banks of all other peers, as one operator.

Source: MCL-OKD, arXiv 2006.04093, the memory-bank form. For ``M`` peers, ``B`` images, ``K`` negatives each and banks
``M_i`` of ``n`` rows, for every ordered pair of peers i != j, with row 0 of an image's indices its own (the positive):

    x[b, k] = v_j[b] . M_i[indices[b, k]] / T
    s       = exp(x) / Z        Z = n * mean of exp(x) over the batch and all k, detached, new for each pair and call
    loss   += -1/B sum_b ( log(s_0 / (s_0 + c + eps)) + sum_{k>0} log(c / (s_k + c + eps)) )     c = K/n, eps = 1e-7

The gradient flows to the embeddings alone. Both passes read a gathered row once for all pairs that it is in, and
nothing of the size B x K x features exists. Scores become weights in place (d loss / dx is -(c+eps)/(s_0+c+eps) for the
positive and s_k/(s_k+c+eps) for a negative, over B), so the backward pass is one weighted sum of rows.

On the CPU an image's rows are visited as its indices come, or, from B*(K+1) >= n on, sorted by tiles of the bank that
fit in the second-level cache: then the bank is read from memory once per thread, as a matrix product over the whole
bank would read it, with K/n of that product's arithmetic. Both orders are exact; for a given order, results do not
depend on the number of threads. On a GPU, rows are gathered as the indices come; nobody has tuned that yet.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyext import _backend
from pyext._operator import DTYPES, accumulate_dtype, backends, register_differentiable, register_triton, triton_kernels

_OPS = torch.ops.pyext

EPSILON = 1e-7

_LEAST_TEMPERATURE = {torch.float32: 1 / 88, torch.float64: 1 / 709}
"""Below these, exp(1/temperature), the exponential of a perfect match, is infinite."""


def reference(embeddings: Tensor, banks: Sequence[Tensor], indices: Tensor, temperature: float = 0.1) -> Tensor:
    """The operator's definition in plain torch; differentiable any number of times. Shapes as in `memory_contrast`."""
    dtype = accumulate_dtype(embeddings.dtype)
    samples = banks[0].shape[0]
    noise = (indices.shape[1] - 1) / samples
    loss = embeddings.new_zeros((), dtype=dtype)
    for i, bank in enumerate(banks):
        rows = bank.detach()[indices].to(dtype)
        for j, embedding in enumerate(embeddings.to(dtype)):
            if i == j:
                continue
            exponential = torch.exp(torch.einsum("bkd,bd->bk", rows, embedding) / temperature)
            s = exponential / (samples * exponential.detach().mean())
            positive, negatives = s[:, 0], s[:, 1:]
            loss = loss - torch.log(positive / (positive + noise + EPSILON)).sum() / len(indices)
            loss = loss - torch.log(noise / (negatives + noise + EPSILON)).sum() / len(indices)
    return loss


def validate_banks(op: str, embeddings: Tensor, banks: Sequence[Tensor]) -> None:
    """Raise TypeError (dtype) or ValueError (shape, device) naming the argument that is wrong and what was expected."""
    if embeddings.dim() != 3:
        raise ValueError(f"{op}: embeddings has shape {tuple(embeddings.shape)}, expected (peers, batch, features)")
    if embeddings.dtype not in DTYPES:
        raise TypeError(
            f"{op}: embeddings has dtype {embeddings.dtype}, expected float32, float64, bfloat16 or float16"
        )
    if len(banks) != len(embeddings):
        raise ValueError(f"{op}: {len(banks)} banks for {len(embeddings)} peers in embeddings, expected one per peer")
    for i, bank in enumerate(banks):
        if bank.dim() != 2 or bank.shape != banks[0].shape or bank.shape[1] != embeddings.shape[2]:
            raise ValueError(
                f"{op}: banks[{i}] has shape {tuple(bank.shape)}, expected (rows, {embeddings.shape[2]}), the same "
                "for all"
            )
        if bank.device != embeddings.device:
            raise ValueError(f"{op}: banks[{i}] is on {bank.device}, expected embeddings' device {embeddings.device}")
        if bank.dtype not in DTYPES or bank.dtype != banks[0].dtype:
            raise TypeError(f"{op}: banks[{i}] has dtype {bank.dtype}, expected a floating dtype, the same for all")
        if (bank.dtype == torch.float64) != (embeddings.dtype == torch.float64):
            raise TypeError(
                f"{op}: banks[{i}] has dtype {bank.dtype} and embeddings {embeddings.dtype}: float64 goes with float64"
            )
        if bank.stride(1) != 1 and bank.shape[1] > 1:
            raise ValueError(f"{op}: banks[{i}] has rows with gaps, expected a stride of 1 between features")


def validate_range(op: str, name: str, index: Tensor, rows: int) -> None:
    """Raise IndexError where `index` holds a number that is no row; looks at values on the CPU only."""
    if index.device.type != "cpu" or index.numel() == 0:
        return
    least, largest = (int(x) for x in index.aminmax())
    if least < 0 or largest >= rows:
        wrong = least if least < 0 else largest
        raise IndexError(f"{op}: {name} holds {wrong}, expected rows of the banks, 0 to {rows - 1}")


def validate(embeddings: Tensor, banks: Sequence[Tensor], indices: Tensor, temperature: float) -> None:
    """Raise TypeError, ValueError or (a number in `indices`, on the CPU) IndexError naming the argument."""
    validate_banks("memory_contrast", embeddings, banks)
    peers, batch, features = embeddings.shape
    if peers < 2:
        raise ValueError("memory_contrast: embeddings has one peer, expected at least two to contrast")
    if batch == 0 or features == 0 or banks[0].shape[0] == 0:
        raise ValueError("memory_contrast: expected at least one image in embeddings, one feature and one row in banks")
    if indices.dim() != 2 or indices.shape[0] != batch or indices.shape[1] < 2:
        raise ValueError(
            f"memory_contrast: indices has shape {tuple(indices.shape)}, expected ({batch}, 1 + negatives), the "
            "positive first and at least one negative"
        )
    if indices.dtype != torch.int64:
        raise TypeError(f"memory_contrast: indices has dtype {indices.dtype}, expected int64")
    if indices.device != embeddings.device:
        raise ValueError(f"memory_contrast: indices is on {indices.device}, expected {embeddings.device}")
    _validate_temperature(embeddings.dtype, temperature)


def _validate_temperature(dtype: torch.dtype, temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"memory_contrast: temperature is {temperature}, expected more than 0")
    least = _LEAST_TEMPERATURE[accumulate_dtype(dtype)]
    if temperature < least:
        raise ValueError(
            f"memory_contrast: temperature is {temperature}, but exp(1/temperature) must be finite: expected at least "
            f"{least:.4f} in {accumulate_dtype(dtype)}"
        )


OPERATOR = _backend.register(_backend.Operator("memory_contrast", backends("embeddings")))


def memory_contrast(
    embeddings: Tensor,
    banks: Tensor | Sequence[Tensor],
    indices: Tensor,
    *,
    temperature: float = 0.1,
    backend: str | None = None,
) -> Tensor:
    """Noise-contrastive loss of every peer's embeddings against the banks of all others, summed over ordered pairs.

    Args:
        embeddings: (M, B, d), L2-normalised by the caller; float32, bfloat16, float16, or (CPU and reference) float64.
        banks: M tensors (n, d), rows without gaps, or one tensor (M, n, d); any of these dtypes, float64 only with
            float64 embeddings. Buffers: no gradient flows to them, and backward reads them again, so they must not
            change before it (torch says so if they did).
        indices: (B, 1 + K) int64 rows of the banks, the positive in column 0. A number that is no row is an IndexError
            on the CPU; on a GPU, where a check would stall it, the loss and the gradients are NaN.
        temperature: T > 0; exp(1/T) must be finite in float32 (float64).
        backend: overrides `pyext.backend` and ``PYEXT_BACKEND``.

    Returns:
        The loss, a scalar of float32 (float64 for float64 embeddings). Kept for the gradient: 4 bytes per ordered pair,
        image and index.

    Raises:
        ValueError: wrong shape, device or temperature; fewer than two peers.
        TypeError: wrong dtype.
        IndexError: a number in `indices` that is no row of the banks (CPU).
        BackendError: the backend asked for cannot run.

    Source: MCL-OKD, arXiv 2006.04093, memory-bank form.
    """
    bank_list = list(banks.unbind()) if isinstance(banks, Tensor) else list(banks)
    name = OPERATOR.choose(backend, embeddings)
    if name == "reference":
        validate(embeddings, bank_list, indices, temperature)
        validate_range("memory_contrast", "indices", indices, bank_list[0].shape[0])
        return reference(embeddings, bank_list, indices, temperature)
    _validate_temperature(embeddings.dtype, temperature)
    op = _OPS.memory_contrast_triton if name == "triton" else _OPS.memory_contrast
    try:
        return op(embeddings, bank_list, indices, temperature, None)[0]
    except RuntimeError:
        # The kernels check what memory safety needs; the sentence that names the argument is made here.
        validate(embeddings, bank_list, indices, temperature)
        validate_range("memory_contrast", "indices", indices, bank_list[0].shape[0])
        raise


# --- registration of shapes, gradients and the Triton kernels ---------------------------------------------------------


def _fake_forward(embeddings, banks, indices, temperature, tiled):
    validate(embeddings, banks, indices, temperature)
    dtype = accumulate_dtype(embeddings.dtype)
    peers = len(banks)
    return (
        embeddings.new_empty((), dtype=dtype),
        embeddings.new_empty(indices.shape, dtype=torch.int32),
        embeddings.new_empty((peers, peers - 1, *indices.shape), dtype=dtype),
    )


def _fake_backward(grad_loss, embeddings, banks, rows, weights, temperature):
    return embeddings.new_empty(embeddings.shape)


def _setup_context(ctx, inputs, output):
    embeddings, banks, _, ctx.temperature, *_ = inputs
    ctx.num_banks = len(banks)
    ctx.save_for_backward(embeddings, *banks, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for the gradient of the weights would be as large as they are


def _backward(op, ctx, grad_loss, *_):
    if grad_loss is None:
        return None, [None] * ctx.num_banks, None, None, None
    embeddings, *rest = ctx.saved_tensors
    banks, (rows, weights) = rest[: ctx.num_banks], rest[ctx.num_banks :]
    grad = op(grad_loss, embeddings, banks, rows, weights, ctx.temperature)
    return grad, [None] * ctx.num_banks, None, None, None


def _triton_forward(embeddings, banks, indices, temperature, tiled):
    validate(embeddings, banks, indices, temperature)  # a kernel reads past the end of a tensor that is too short
    return triton_kernels("memory_contrast").forward(embeddings, banks, indices, temperature)


def _triton_backward(*args):
    return triton_kernels("memory_contrast").backward(*args)


register_differentiable("memory_contrast", _fake_forward, _fake_backward, _setup_context, _backward)
register_triton("memory_contrast_triton", _triton_forward)
register_triton("memory_contrast_backward_triton", _triton_backward)
