"""Gated multi-scale excitation: all of an HCGNet module after its squeeze cell, as one operator.

Source: HCGNet, arXiv 1908.09699, section 3 (forget gate, multi-scale excitation, update gate). The equations, for one
image with ``C`` channels and ``P = H*W`` positions, ``r_k = relu(BN_k(u))``:

    forget gate        c_f = sum_p softmax_p(w_f u) u        f = sigmoid(W2 tanh(BN1d(W1 c_f)))
    excitation, k=3,5  a_k = depthwise3x3(r_k)               c_k = sum_p softmax_p(w_k a_k) a_k     (k=5: dilation 2)
    update gate        t = tanh(BN1d(W [c_3; c_5]))          (alpha, beta) = softmax over {3, 5} of (W_3 t, W_5 t)
    output             f * u + alpha * c_3 + beta * c_5

The maps ``a_3`` and ``a_5`` reach the output only through their pooled vectors, so no kernel stores them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import _C, Tensor

from pyext import _backend, _library
from pyext._operator import (
    DTYPES,
    accumulate_dtype,
    backends,
    move_running,
    register_differentiable,
    register_triton,
    triton_kernels,
)

_OPS = torch.ops.pyext

PARAMETERS = (
    "conv_3x3.norm.weight",
    "conv_3x3.norm.bias",
    "conv_3x3.conv.weight",
    "conv_5x5.norm.weight",
    "conv_5x5.norm.bias",
    "conv_5x5.conv.weight",
    "global_context3x3.weight",
    "global_context3x3.bias",
    "global_context5x5.weight",
    "global_context5x5.bias",
    "fcall.weight",
    "fcall.bias",
    "bn_attention.weight",
    "bn_attention.bias",
    "fc3x3.weight",
    "fc3x3.bias",
    "fc5x5.weight",
    "fc5x5.bias",
    "global_forget_context.weight",
    "global_forget_context.bias",
    "bn_forget.weight",
    "bn_forget.bias",
    "fc1.weight",
    "fc1.bias",
    "fc2.weight",
    "fc2.bias",
)
"""State-dict names of the operator's parameters, in the order in which every layer passes them."""

RUNNING = (
    "conv_3x3.norm.running_mean",
    "conv_3x3.norm.running_var",
    "conv_5x5.norm.running_mean",
    "conv_5x5.norm.running_var",
    "bn_attention.running_mean",
    "bn_attention.running_var",
    "bn_forget.running_mean",
    "bn_forget.running_var",
)
"""State-dict names of the running statistics, in the order in which every layer passes them."""


def parameter_shapes(channels: int, forget: int, attention: int) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter for `channels` channels, `forget` rows of ``fc1`` and `attention` rows of ``fcall``."""
    c, f, a = channels, forget, attention
    shapes: dict[str, tuple[int, ...]] = {}
    for name in PARAMETERS:
        stem, kind = name.split(".", 1)
        if kind == "conv.weight":
            shapes[name] = (c, 1, 3, 3)
        elif kind.startswith("norm."):
            shapes[name] = (c,)
        elif stem.startswith("global_"):
            shapes[name] = (1, c, 1, 1) if kind == "weight" else (1,)
        elif stem.startswith("bn_"):
            shapes[name] = (a,) if stem == "bn_attention" else (f,)
        else:
            rows, columns = {
                "fcall": (a, 2 * c),
                "fc3x3": (c, a),
                "fc5x5": (c, a),
                "fc1": (f, c),
                "fc2": (c, f),
            }[stem]
            shapes[name] = (rows, columns, 1, 1) if kind == "weight" else (rows,)
    return shapes


def reference(
    u: Tensor,
    parameters: Sequence[Tensor],
    running: Sequence[Tensor | None],
    training: bool = False,
    momentum: float = 0.0,
    eps: float = 1e-5,
) -> Tensor:
    """The operator's definition in plain torch; differentiable any number of times. Shapes as in `gated_excitation`.

    In training mode `running` is updated with `momentum`, as `torch.nn.functional.batch_norm` does.
    """
    p = dict(zip(PARAMETERS, parameters, strict=True))
    r = dict(zip(RUNNING, running, strict=True))
    n, c = u.shape[:2]

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var = r[name + ".running_mean"], r[name + ".running_var"]
        return F.batch_norm(x, mean, var, p[name + ".weight"], p[name + ".bias"], training, momentum, eps)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, p[name + ".weight"].to(x.dtype).flatten(1), p[name + ".bias"].to(x.dtype))

    def pool(x: Tensor, context: str) -> Tensor:
        logits = F.conv2d(x, p[context + ".weight"].to(x.dtype), p[context + ".bias"].to(x.dtype))
        position = logits.flatten(1).softmax(dim=1)
        return (x.flatten(2) * position.unsqueeze(1)).sum(dim=2)

    def branch(name: str, dilation: int) -> Tensor:
        kernel = p[name + ".conv.weight"].to(u.dtype)
        return F.conv2d(F.relu(norm(u, name + ".norm")), kernel, padding=dilation, dilation=dilation, groups=u.shape[1])

    forget = torch.tanh(norm(linear(pool(u, "global_forget_context"), "fc1"), "bn_forget"))
    forget = torch.sigmoid(linear(forget, "fc2"))

    pooled3 = pool(branch("conv_3x3", 1), "global_context3x3")
    pooled5 = pool(branch("conv_5x5", 2), "global_context5x5")
    attention = torch.tanh(norm(linear(torch.cat([pooled3, pooled5], dim=1), "fcall"), "bn_attention"))
    select = torch.stack([linear(attention, "fc3x3"), linear(attention, "fc5x5")]).softmax(dim=0)
    broadcast = select[0] * pooled3 + select[1] * pooled5
    return u * forget.view(n, c, 1, 1) + broadcast.view(n, c, 1, 1)


def _rows(parameters: Sequence[Tensor]) -> tuple[int, int]:
    return parameters[_FORGET_ROWS].shape[0], parameters[_ATTENTION_ROWS].shape[0]


_FORGET_ROWS = PARAMETERS.index("fc1.bias")
_ATTENTION_ROWS = PARAMETERS.index("fcall.bias")
_FORGET_MEAN = RUNNING.index("bn_forget.running_mean")
_ATTENTION_MEAN = RUNNING.index("bn_attention.running_mean")


def validate(u: Tensor, parameters: Sequence[Tensor], running: Sequence[Tensor], training: bool) -> None:
    """Raise TypeError (dtype) or ValueError (shape, device) naming the argument that is wrong and what was expected."""
    if u.dtype not in DTYPES:
        raise TypeError(f"gated_excitation: u has dtype {u.dtype}, expected float32, float64, bfloat16 or float16")
    if u.dim() != 4:
        raise ValueError(f"gated_excitation: u has shape {tuple(u.shape)}, expected (N, C, H, W)")
    if u.shape[2] * u.shape[3] == 0 or u.shape[1] == 0:
        raise ValueError(f"gated_excitation: u has shape {tuple(u.shape)}, expected at least one channel and position")
    if len(parameters) != len(PARAMETERS):
        raise ValueError(f"gated_excitation: {len(parameters)} parameters, expected {len(PARAMETERS)} (see PARAMETERS)")
    forget, attention = _rows(parameters)
    shapes = parameter_shapes(u.shape[1], forget, attention)
    for name, tensor in zip(PARAMETERS, parameters, strict=True):
        _validate_one(name, tensor, shapes[name], u, parameters[0].dtype)
    if not training or running:
        _validate_running(u, running, shapes)


def _validate_running(u: Tensor, running: Sequence[Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    if len(running) != len(RUNNING):
        raise ValueError(f"gated_excitation: {len(running)} running statistics, expected {len(RUNNING)} (see RUNNING)")
    for name, tensor in zip(RUNNING, running, strict=True):
        weight = name.rsplit(".", 1)[0] + ".weight"
        _validate_one(name, tensor, shapes[weight], u, running[0].dtype)


def _validate_one(name: str, tensor: Tensor, shape: tuple[int, ...], u: Tensor, peer: torch.dtype) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"gated_excitation: {name} has shape {tuple(tensor.shape)}, expected {shape} for {u.shape[1]} channels in u"
        )
    if tensor.device != u.device:
        raise ValueError(f"gated_excitation: {name} is on {tensor.device}, expected u's device {u.device}")
    if tensor.dtype not in (u.dtype, accumulate_dtype(u.dtype)) or tensor.dtype != peer:
        raise TypeError(
            f"gated_excitation: {name} has dtype {tensor.dtype}, expected u's dtype {u.dtype} or "
            f"{accumulate_dtype(u.dtype)}, the same for all"
        )


OPERATOR = _backend.register(_backend.Operator("gated_excitation", backends("u")))


def gated_excitation(
    u: Tensor,
    parameters: Sequence[Tensor],
    running: Sequence[Tensor] | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Forget gate, two depthwise branches, three position-softmax poolings, update gate and residual of `u`.

    Args:
        u: (N, C, H, W), float32, bfloat16, float16, or (CPU and reference) float64; any strides.
        parameters: tensors in the order of `PARAMETERS`, shapes `parameter_shapes`, of u's dtype or all float32
            (float64 for float64 u). Arithmetic accumulates in float32 (float64).
        running: running means and variances in the order of `RUNNING`; None stands for batch statistics.
        training: normalise with batch statistics and update `running` in place with `momentum`.
        momentum: weight of the new statistics, as in `torch.nn.BatchNorm2d`.
        eps: added to every variance.
        out: tensor of u's shape and dtype with any strides, such as a channel slice of a larger tensor, that receives
            the result; must not overlap u. Not differentiable.
        backend: overrides `pyext.backend` and ``PYEXT_BACKEND``.

    Returns:
        (N, C, H, W) in u's dtype and memory format, or `out`.

    Raises:
        ValueError: wrong shape or device; training with one value per channel (torch's own message).
        TypeError: wrong dtype.
        BackendError: the backend asked for cannot run.

    Source: HCGNet, arXiv 1908.09699, section 3.
    """
    batch_statistics = training or running is None
    if eps < 0:
        raise ValueError(f"gated_excitation: eps is {eps}, expected at least 0")
    if batch_statistics:
        if u.dim() != 4 or len(parameters) != len(PARAMETERS):
            validate(u, parameters, (), True)
        _check_values_per_channel(u, parameters)
    if training and running is not None:
        _check_updated(u, parameters, running)
    if out is not None:
        _check_out(u, parameters, out)
    name = OPERATOR.choose(backend, u)
    if name == "reference":
        validate(u, parameters, () if running is None else running, running is None)
        result = reference(u, parameters, running or (None,) * len(RUNNING), batch_statistics, momentum, eps)
        return result if out is None else out.copy_(result)
    statistics: Sequence[Tensor] = () if training or running is None else running
    result, *batch = _run(name == "triton", u, parameters, statistics, batch_statistics, eps, out)
    if training and running is not None:
        _update_running(running, batch, u, momentum)
    return result


def _run(
    triton: bool,
    u: Tensor,
    parameters: Sequence[Tensor],
    running: Sequence[Tensor],
    training: bool,
    eps: float,
    out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Call the operator; returns the result and the batch statistics of the map and of the hidden vectors."""
    try:
        if out is not None:
            into = _OPS.gated_excitation_triton_out if triton else _OPS.gated_excitation_out
            return out, *into(u, parameters, running, training, eps, out=out)
        save = torch.is_grad_enabled() and (u.requires_grad or any(p.requires_grad for p in parameters))
        forward = _OPS.gated_excitation_triton.default if triton else _OPS.gated_excitation.default
        if _library.is_traced():
            result, _, _, _, *batch = forward(u, parameters, running, training, eps, save)
        elif save:
            backward = _OPS.gated_excitation_backward_triton if triton else _OPS.gated_excitation_backward
            result, *batch = _Eager.apply(
                forward, backward.default, training, eps, len(running), u, *parameters, *running
            )
        else:
            # Where nothing is differentiated, the gradient's Python layer would be a third of a small call's time.
            with _C._AutoDispatchBelowAutograd():
                result, _, _, _, *batch = forward(u, parameters, running, training, eps, save)
        return result, *batch
    except RuntimeError:
        # The kernels check what memory safety needs; the sentence that names the argument is made here.
        validate(u, parameters, running or (), training)
        raise


def _check_values_per_channel(u: Tensor, parameters: Sequence[Tensor]) -> None:
    n, c, h, w = u.shape
    forget, attention = _rows(parameters)
    for size, values in (((n, c, h, w), n * h * w), ((n, forget), n), ((n, attention), n)):
        if values == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {torch.Size(size)}")


def _check_updated(u: Tensor, parameters: Sequence[Tensor], running: Sequence[Tensor]) -> None:
    """The kernels do not see what training updates, and a wrong tensor must not leave the others moved."""
    forget, attention = _rows(parameters)
    expected = [u.shape[1]] * 4 + [attention] * 2 + [forget] * 2
    kinds = {(r.dtype, r.device) for r in running}
    if [r.numel() for r in running] != expected or kinds != {(running[0].dtype, u.device)}:
        _validate_running(u, running, parameter_shapes(u.shape[1], forget, attention))


def _check_out(u: Tensor, parameters: Sequence[Tensor], out: Tensor) -> None:
    if out.shape != u.shape or out.dtype != u.dtype or out.device != u.device:
        raise ValueError(
            f"gated_excitation: out is {tuple(out.shape)} {out.dtype} on {out.device}, expected u's "
            f"{tuple(u.shape)} {u.dtype} on {u.device}"
        )
    if torch.is_grad_enabled() and (out.requires_grad or u.requires_grad or any(p.requires_grad for p in parameters)):
        raise RuntimeError("gated_excitation: out= does not support automatic differentiation; use torch.no_grad()")


def _update_running(running: Sequence[Tensor], batch: Sequence[Tensor], u: Tensor, momentum: float) -> None:
    """Move `running` towards the batch's means and unbiased variances, as torch's batch normalisation does."""
    n, _, h, w = u.shape
    if n == 0:
        return
    map_statistics, hidden_statistics = (b.detach() for b in batch)
    mean, var = map_statistics.unbind()
    hidden_mean, hidden_var = hidden_statistics.unbind()
    var = var * (n * h * w / (n * h * w - 1))
    rows = [running[k].shape[0] for k in (_FORGET_MEAN, _ATTENTION_MEAN)]
    forget_mean, attention_mean = hidden_mean.split(rows)
    forget_var, attention_var = (hidden_var * (n / (n - 1))).split(rows)
    new = [mean, var, mean, var, attention_mean, attention_var, forget_mean, forget_var]
    move_running(running, new, momentum)


# --- registration of shapes, gradients and the Triton kernels ---------------------------------------------------------


def _empty_outputs(u: Tensor, parameters: Sequence[Tensor], training: bool, save: bool) -> tuple[Tensor, ...]:
    """Uninitialised position, pooled, hidden, map_statistics and hidden_statistics."""
    n, c, h, w = u.shape
    hidden = sum(_rows(parameters))
    saved = ((n, 3, h * w), (n, 3, c), (n, hidden)) if save else ((0,),) * 3
    statistics = ((2, c), (2, hidden)) if training else ((0,),) * 2
    return tuple(u.new_empty(shape, dtype=accumulate_dtype(u.dtype)) for shape in (*saved, *statistics))


def _fake_forward(u, parameters, running, training, eps, save):
    validate(u, parameters, running, training)
    return torch.empty_like(u), *_empty_outputs(u, parameters, training, save)


def _fake_out(u, parameters, running, training, eps, *, out):
    validate(u, parameters, running, training)
    return _empty_outputs(u, parameters, training, save=False)[3:]


def _fake_into(u, parameters, running, training, eps, *, out):
    validate(u, parameters, running, training)
    return _empty_outputs(u, parameters, training, save=True)


def _fake_backward(grad_out, u, parameters, running, *saved_training_eps):
    numel = sum(p.numel() for p in parameters)
    return torch.empty_like(u), u.new_empty((numel,), dtype=accumulate_dtype(u.dtype))


def _setup_context(ctx, inputs, output):
    u, parameters, running, ctx.training, ctx.eps, ctx.saved = inputs
    ctx.num_running = len(running)
    ctx.save_for_backward(u, *parameters, *running, *output[1:])


def _backward(op, ctx, grad_out, *_):
    if not ctx.saved:
        raise RuntimeError("gated_excitation: called with save=False, so there is nothing to differentiate with")
    grad_u, flat, parameters = _flat_gradients(op, ctx, grad_out)
    parts = flat.split([p.numel() for p in parameters])
    grads = [part.view(p.shape) for part, p in zip(parts, parameters, strict=True)]
    return grad_u, grads, [None] * ctx.num_running, None, None, None


def _flat_gradients(op, ctx, grad_out):
    """Gradient of u, gradients of the parameters as one vector in their dtype, and the parameters."""
    u, *rest = ctx.saved_tensors
    parameters, rest = rest[: len(PARAMETERS)], rest[len(PARAMETERS) :]
    running, saved = rest[: ctx.num_running], rest[ctx.num_running :]
    grad_u, flat = op(grad_out, u, parameters, running, *saved, ctx.training, ctx.eps)
    return grad_u, flat.to(parameters[0].dtype), parameters


class _Eager(torch.autograd.Function):
    """The operator with its gradient outside of torch.compile: `register_autograd` flattens and rebuilds the lists of
    tensors in Python, which takes longer than the kernels do on small maps (0.2 of 0.7 ms on 64x36x8x8)."""

    @staticmethod
    def forward(ctx, forward, backward, training, eps, num_running, u, *tensors):
        ctx.op, ctx.training, ctx.eps, ctx.num_running = backward, training, eps, num_running
        parameters, running = tensors[: len(PARAMETERS)], tensors[len(PARAMETERS) :]
        with _C._AutoDispatchBelowAutograd():
            out, *saved = forward(u, parameters, running, training, eps, True)
        ctx.save_for_backward(u, *tensors, *saved)
        ctx.mark_non_differentiable(*saved[-2:])
        ctx.set_materialize_grads(False)
        return out, *saved[-2:]

    @staticmethod
    def backward(ctx, grad_out, *_):
        nothing = (None,) * ctx.num_running
        if grad_out is None:
            return (*(None,) * (6 + len(PARAMETERS)), *nothing)
        # With create_graph the dispatcher's own gradient of the backward pass is needed: it refuses in words.
        below = contextlib.nullcontext() if torch.is_grad_enabled() else _C._AutoDispatchBelowAutograd()
        with below:
            grad_u, flat, parameters = _flat_gradients(ctx.op, ctx, grad_out)
            grads = torch._utils._unflatten_dense_tensors(flat, parameters)
        return None, None, None, None, None, grad_u, *grads, *nothing


def _triton_forward(u, parameters, running, training, eps, save):
    validate(u, parameters, running, training)  # a kernel reads past the end of a tensor that is too short
    return triton_kernels("gated_excitation").forward(u, parameters, running, training, eps, save)


def _triton_out(u, parameters, running, training, eps, *, out):
    validate(u, parameters, running, training)
    return triton_kernels("gated_excitation").forward_out(u, parameters, running, training, eps, out)


def _triton_backward(*args):
    return triton_kernels("gated_excitation").backward(*args)


register_differentiable("gated_excitation", _fake_forward, _fake_backward, _setup_context, _backward)
register_triton("gated_excitation_triton", _triton_forward)
register_triton("gated_excitation_backward_triton", _triton_backward)
for _variant in ("", "_triton"):
    torch.library.register_fake(f"pyext::gated_excitation{_variant}_out")(_fake_out)
register_triton("gated_excitation_triton_out", _triton_out)
torch.library.register_fake("pyext::gated_excitation_into")(_fake_into)
