"""Batch normalisation, ReLU and a convolution of what they give, as one operator in training and evaluation.

    z = relu(norm_weight (x - mean) / sqrt(var + eps) + norm_bias)        out = conv2d(z, conv_weight)

The layers of pre-activated networks (ResNet v2, DenseNet, HCGNet). z is never a tensor: both passes make it from x, in
cache, so that what is kept for the gradient is x alone. In a dense network x is a prefix of the channels of a buffer
that all layers share, and the statistics of a channel are the same in every layer that reads it: `statistics` takes
those that are known.

Sources: arXiv 1603.05027 (pre-activation), 1707.06990 (the normalised maps of dense networks made again), 1509.09308
(the 3x3 convolution and its gradients by F(2x2, 3x3), where images lie innermost, and those of stride 2 by F(2, 2) of
its even rows and columns).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pyext import _backend
from pyext._operator import (
    DTYPES,
    UNMEASURED_ON_GPUS,
    accumulate_dtype,
    backends,
    move_running,
    no_cpu,
    register_differentiable,
    register_triton,
    triton_kernels,
)

_OPS = torch.ops.pyext
_CHANNEL_GAP = 16
"""Elements between the channels of a dense block's maps (csrc/cpu/bn_relu_conv2d_block.cpp)."""


def reference(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    conv_weight: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool = False,
    momentum: float = 0.0,
    eps: float = 1e-5,
    stride: int = 1,
    groups: int = 1,
) -> Tensor:
    """The operator's definition in plain torch; differentiable any number of times. Shapes as in `bn_relu_conv2d`."""
    z = F.batch_norm(x, running_mean, running_var, norm_weight, norm_bias, training, momentum, eps)
    return F.conv2d(F.relu(z), conv_weight.to(x.dtype), None, stride, conv_weight.shape[-1] // 2, 1, groups)


def validate(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    conv_weight: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    stride: int,
    groups: int,
    names: tuple[str, str] = ("running_mean", "running_var"),
) -> None:
    """Raise TypeError (dtype) or ValueError (all else) naming the argument that is wrong and what was expected.

    `names` are those of `mean` and `var`.
    """
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"bn_relu_conv2d: x has shape {tuple(x.shape)}, expected (N, C, H, W), all but N at least 1")
    if x.dtype not in DTYPES:
        raise TypeError(f"bn_relu_conv2d: x has dtype {x.dtype}, expected float32, float64, bfloat16 or float16")
    if stride not in (1, 2):
        raise ValueError(f"bn_relu_conv2d: stride is {stride}, expected 1 or 2")
    if not eps >= 0:
        raise ValueError(f"bn_relu_conv2d: eps is {eps}, expected at least 0")
    _validate_convolution(x, conv_weight, groups)
    parameters = {"norm_weight": norm_weight, "norm_bias": norm_bias, "conv_weight": conv_weight}
    for name, tensor in parameters.items():
        _validate_one(x, name, tensor, norm_weight.dtype, (x.dtype, accumulate_dtype(x.dtype)))
    for name, statistic in zip(names, (mean, var), strict=True):
        if statistic is not None:
            _validate_one(x, name, statistic, statistic.dtype, (x.dtype, accumulate_dtype(x.dtype)))


def _validate_convolution(x: Tensor, conv_weight: Tensor, groups: int) -> None:
    channels = x.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"bn_relu_conv2d: groups is {groups}, expected a divisor of x's {channels} channels")
    shape = tuple(conv_weight.shape)
    kernels = ((1, 1), (3, 3))
    if len(shape) != 4 or shape[1] != channels // groups or shape[2:] not in kernels or not shape[0]:
        raise ValueError(
            f"bn_relu_conv2d: conv_weight has shape {shape}, expected (channels, {channels // groups}, k, k) "
            f"with k 1 or 3, for x's {channels} channels in {groups} groups"
        )
    if shape[0] % groups:
        raise ValueError(f"bn_relu_conv2d: conv_weight has {shape[0]} output channels, expected a multiple of {groups}")


def _validate_one(
    x: Tensor, name: str, tensor: Tensor, peer: torch.dtype, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    if name != "conv_weight" and tuple(tensor.shape) != (x.shape[1],):
        raise ValueError(f"bn_relu_conv2d: {name} has shape {tuple(tensor.shape)}, expected ({x.shape[1]},)")
    if tensor.device != x.device:
        raise ValueError(f"bn_relu_conv2d: {name} is on {tensor.device}, expected x's device {x.device}")
    if tensor.dtype not in dtypes or tensor.dtype != peer:
        raise TypeError(
            f"bn_relu_conv2d: {name} has dtype {tensor.dtype}, expected x's {dtypes[0]} or {dtypes[1]}, the same for "
            "all parameters"
        )


def _no_cpu(x: Tensor, conv_weight: Tensor | None = None, stride: int = 1, groups: int = 1) -> str | None:
    if reason := no_cpu("x", x):
        return reason
    if conv_weight is not None and conv_weight.shape[2:] == (1, 1) and (stride != 1 or groups != 1):
        return "a 1x1 convolution with stride or groups has no kernel"
    return None


OPERATOR = _backend.register(_backend.Operator("bn_relu_conv2d", {**backends("x", UNMEASURED_ON_GPUS), "cpu": _no_cpu}))


def bn_relu_conv2d(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    conv_weight: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    stride: int = 1,
    groups: int = 1,
    statistics: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> Tensor:
    """conv2d(relu(batch_norm(x))) with padding ``k // 2``, k the size of the kernel, dilation 1 and no bias.

    Args:
        x: (N, C, H, W), float32, bfloat16, float16, or (CPU and reference) float64; any strides, such as those of a
            prefix of the channels of a larger tensor.
        norm_weight, norm_bias: (C,).
        conv_weight: (channels, C / groups, k, k), k 1 or 3. The three are of x's dtype or all float32 (float64 for
            float64 x). Arithmetic accumulates in float32 (float64).
        running_mean, running_var: (C,), both or none; None stands for batch statistics.
        training: normalise with batch statistics and update the running ones in place with `momentum`.
        momentum: weight of the new statistics, as in `torch.nn.BatchNorm2d`.
        eps: added to every variance.
        stride: of the convolution, 1 or 2.
        groups: of the convolution.
        statistics: mean and biased variance of x over (N, H, W), (C,) each in float32 (float64), as
            `batch_statistics` gives them, where they are known: they are then not computed again. Gradients flow as
            if they had been. Without effect in evaluation.
        backend: overrides `pyext.backend` and ``PYEXT_BACKEND``.

    Returns:
        (N, channels, ceil(H / stride), ceil(W / stride)) in x's dtype; NCHW from a kernel. Where images lie innermost
        in x, on the CPU, in float32 or float64 and without stride and groups, other kernels run, whose vectors small
        maps fill too, and images lie innermost in the result.

    Raises:
        ValueError: wrong shape, device, stride, groups or eps; training with one value per channel (torch's own
            message).
        TypeError: wrong dtype.
        BackendError: the backend asked for cannot run.
    """
    if (running_mean is None) != (running_var is None):
        raise ValueError("bn_relu_conv2d: running_mean and running_var, expected both or none")
    batch = training or running_mean is None or running_var is None
    if batch and x.dim() == 4 and x.shape[0] * x.shape[2] * x.shape[3] == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
    geometry = eps, stride, groups
    parameters = norm_weight, norm_bias, conv_weight
    name = OPERATOR.choose(backend, x, conv_weight, stride, groups)
    if name == "reference" or batch:
        validate(x, *parameters, running_mean, running_var, *geometry)
    if name == "reference":
        return reference(x, *parameters, running_mean, running_var, batch, momentum, *geometry)
    mean, var = _statistics(x, running_mean, running_var, batch, statistics, name)
    op = _OPS.bn_relu_conv2d_triton if name == "triton" else _OPS.bn_relu_conv2d
    try:
        out = op(x, *parameters, mean, var, batch, *geometry)
    except (RuntimeError, TypeError, ValueError):
        # The kernels check what memory safety needs; the sentence that names the argument is made here.
        validate(x, *parameters, running_mean, running_var, *geometry)
        raise
    if training and running_mean is not None and running_var is not None:
        update_running(x, mean, var, running_mean, running_var, momentum)
    return out


def batch_statistics(x: Tensor, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of x (N, C, H, W) over all but the channels, (C,) each in float32 (float64).

    Merged over images, or stretches of them, in double precision. Not differentiable by themselves: `bn_relu_conv2d`
    has their part of the gradient. `backend` as in `bn_relu_conv2d`.
    """
    name = OPERATOR.choose(backend, x)
    with torch.no_grad():
        if name != "reference":
            op = _OPS.bn_relu_conv2d_statistics_triton if name == "triton" else _OPS.bn_relu_conv2d_statistics
            return op(x.detach())
        var, mean = torch.var_mean(x.detach().to(accumulate_dtype(x.dtype)), (0, 2, 3), correction=0)
        return mean, var


def bn_relu_pool(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """avg_pool2d(relu(batch_norm(x)), 2) in training, on the CPU: what a 1x1 convolution before that pool may read.

    Arguments as of `bn_relu_conv2d`, x (N, C, H, W) with H and W at least 2. Of the maps in between none is kept for
    the gradient. Returns (N, C, H // 2, W // 2) in x's dtype, NCHW; where images lie innermost in x, and so that
    `bn_relu_conv2d` has kernels for that, they do in the result.
    """
    return _run_pool(_OPS.bn_relu_conv2d_pool, x, norm_weight, norm_bias, running_mean, running_var, momentum, eps)


def bn_relu_max_pool(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """max_pool2d(relu(batch_norm(x)), 3, 2, 1) in training, on the CPU: how networks for large images begin.

    Arguments as of `bn_relu_conv2d`, x float32 or float64, read fastest in NCHW. Of the maps in between none is kept
    for the gradient, and no indices. Returns (N, C, ceil(H / 2), ceil(W / 2)), images innermost.
    """
    return _run_pool(_OPS.bn_relu_conv2d_max_pool, x, norm_weight, norm_bias, running_mean, running_var, momentum, eps)


def _run_pool(
    op: Callable[..., Tensor],
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
) -> Tensor:
    mean, var = batch_statistics(x, "cpu")
    out = op(x, norm_weight, norm_bias, mean, var, True, eps)
    update_running(x, mean, var, running_mean, running_var, momentum)
    return out


def _statistics(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batch: bool,
    statistics: tuple[Tensor, Tensor] | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if not batch and running_mean is not None and running_var is not None:
        return running_mean.to(accumulate_dtype(x.dtype)), running_var.to(accumulate_dtype(x.dtype))
    if statistics is None:
        return batch_statistics(x, backend)
    for kind, statistic in zip(("mean", "variance"), statistics, strict=True):
        _validate_one(x, f"statistics ({kind})", statistic, statistic.dtype, (accumulate_dtype(x.dtype),) * 2)
    return statistics


def update_running(
    x: Tensor, mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float
) -> None:
    """Move the running statistics towards the batch's mean and unbiased variance, as torch does."""
    count = x.shape[0] * x.shape[2] * x.shape[3]
    if count == 0:
        return
    move_running((running_mean, running_var), (mean, var * (count / (count - 1))), momentum)


# --- registration of shapes and gradients -----------------------------------------------------------------------------


def images_innermost(x):
    """Whether every channel of x (N, C, H, W), several images, is one dense row of H x W x N elements."""
    n, _, height, width = x.shape
    return (
        n > 1
        and x.stride(0) == 1
        and (width == 1 or x.stride(3) == n)
        and (height == 1 or x.stride(2) == width * n)
        and x.stride(1) >= height * width * n
    )


def _in_rows(x, stride=1, groups=1):
    """Whether the kernels of csrc/cpu/bn_relu_conv2d/rows.h have x: images lie innermost, and so they do in results."""
    fits = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and (stride, groups) == (1, 1)
    return fits and images_innermost(x)


def _new_map(x, channels, height, width, rows):
    if not rows:
        return x.new_empty((x.shape[0], channels, height, width))
    return x.new_empty((channels, height, width, x.shape[0])).permute(3, 0, 1, 2)


def _fake(in_rows, x, norm_weight, norm_bias, conv_weight, mean, var, training, eps, stride, groups):
    validate(x, norm_weight, norm_bias, conv_weight, mean, var, eps, stride, groups, ("mean", "var"))
    height, width = ((n - 1) // stride + 1 for n in x.shape[2:])
    return _new_map(x, conv_weight.shape[0], height, width, in_rows(x, stride, groups))


def _fake_statistics(x):
    vectors = (x.new_empty((x.shape[1],), dtype=accumulate_dtype(x.dtype)) for _ in range(2))
    return tuple(vectors)


def _fake_moments(x, *inputs):
    out = _fake(lambda *_: False, x, *inputs)
    return out, *_fake_statistics(out)


def _fake_backward(in_rows, grad_out, x, norm_weight, norm_bias, conv_weight, *options):
    wide = accumulate_dtype(x.dtype)
    parameters = (norm_weight, norm_bias, conv_weight)
    _, channels, height, width = x.shape
    grad_x = _new_map(x, channels, height, width, in_rows(x, *options[-2:]))
    return grad_x, *(x.new_empty(p.shape, dtype=wide) for p in parameters)


def _fake_pool(x, norm_weight, norm_bias, mean, var, training, eps):
    _, channels, height, width = x.shape
    return _new_map(x, channels, height // 2, width // 2, _in_rows(x))


def _fake_max_pool(x, norm_weight, norm_bias, mean, var, training, eps):
    _, channels, height, width = x.shape
    return _new_map(x, channels, (height + 1) // 2, (width + 1) // 2, True)


def _fake_pool_backward(in_rows, grad_out, x, norm_weight, norm_bias, *options):
    wide = accumulate_dtype(x.dtype)
    _, channels, height, width = x.shape
    grad_x = _new_map(x, channels, height, width, in_rows(x))
    return grad_x, *(x.new_empty((x.shape[1],), dtype=wide) for _ in range(2))


def _setup_pool_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]


def _pool_backward(op, ctx, grad_out):
    grad_x, *grads = op(grad_out, *ctx.saved_tensors, *ctx.options)
    grads = (grad.to(p.dtype) for grad, p in zip(grads, ctx.saved_tensors[1:3], strict=True))
    return grad_x, *grads, *(None,) * 4


def _new_block_map(x, channels):
    """Uninitialised maps like those of x with images innermost, as csrc/cpu/bn_relu_conv2d_block.cpp makes them."""
    n, _, height, width = x.shape
    rows = x.new_empty((channels, height * width * n + _CHANNEL_GAP))[:, :-_CHANNEL_GAP]
    return rows.view(channels, height, width, n).permute(3, 0, 1, 2)


def _fake_block(x, parameters, layers, eps):
    total, cell, kept = x.shape[1], 0, []
    for count in layers:
        read = total
        widths = [parameters[3 * i + 2].shape[0] for i in range(cell, cell + count)]
        kept += [made for c in widths[:-1] for made in (_new_block_map(x, c), x.new_empty((2, c)))]
        total += widths[-1]
        cell += count
    return _new_block_map(x, total), x.new_empty((2, read)), kept


def _fake_block_backward(grad_out, buffer, moments, kept, parameters, layers, eps):
    return _new_block_map(buffer, buffer.shape[1]), [p.new_empty(p.shape) for p in parameters]


def _fake_backward_add(grad_out, x, *inputs):
    return _fake_backward(_in_rows, grad_out, x, *inputs[:-2])[1:]


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6])
    ctx.options = inputs[6:]


def _backward(op, ctx, grad_out):
    grad_x, *grads = op(grad_out, *ctx.saved_tensors, *ctx.options)
    grads = (grad.to(p.dtype) for grad, p in zip(grads, ctx.saved_tensors[1:4], strict=True))
    return grad_x, *grads, *(None,) * 6


def _triton_statistics(x):
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"bn_relu_conv2d: x has shape {tuple(x.shape)}, expected (N, C, H, W), all but N at least 1")
    return triton_kernels("bn_relu_conv2d").statistics(x)


def _triton_forward(x, norm_weight, norm_bias, conv_weight, mean, var, training, eps, stride, groups):
    # A kernel reads past the end of a tensor that is too short.
    validate(x, norm_weight, norm_bias, conv_weight, mean, var, eps, stride, groups, ("mean", "var"))
    kernels = triton_kernels("bn_relu_conv2d")
    return kernels.forward(x, norm_weight, norm_bias, conv_weight, mean, var, training, eps, stride, groups)


def _triton_backward(*args):
    return triton_kernels("bn_relu_conv2d").backward(*args)


for _variant in ("", "_triton"):
    torch.library.register_fake(f"pyext::bn_relu_conv2d_statistics{_variant}")(_fake_statistics)
for _variant, _rows in (("", _in_rows), ("_triton", lambda *_: False)):
    _shapes = functools.partial(_fake, _rows), functools.partial(_fake_backward, _rows)
    register_differentiable("bn_relu_conv2d", *_shapes, _setup_context, _backward, [_variant])
for _pool, _fake_out, _rows in (("pool", _fake_pool, _in_rows), ("max_pool", _fake_max_pool, lambda _: False)):
    _fake_gradients = functools.partial(_fake_pool_backward, _rows)
    _parts = _fake_out, _fake_gradients, _setup_pool_context, _pool_backward
    register_differentiable(f"bn_relu_conv2d_{_pool}", *_parts, [""])
torch.library.register_fake("pyext::bn_relu_conv2d_moments")(_fake_moments)
torch.library.register_fake("pyext::bn_relu_conv2d_running")(lambda *_: None)
torch.library.register_fake("pyext::bn_relu_conv2d_block")(_fake_block)
torch.library.register_fake("pyext::bn_relu_conv2d_block_backward")(_fake_block_backward)
torch.library.register_fake("pyext::bn_relu_conv2d_backward_add")(_fake_backward_add)
torch.library.register_fake("pyext::bn_relu_conv2d_correct")(lambda *_: None)
register_triton("bn_relu_conv2d_statistics_triton", _triton_statistics)
register_triton("bn_relu_conv2d_triton", _triton_forward)
register_triton("bn_relu_conv2d_backward_triton", _triton_backward)
