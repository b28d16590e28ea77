"""A convolution over kept channels alone, with batch norm, gate and activation, on the whole network's weight.

    v[n, j] = scale[o] sum over i, taps of weight[o, i, tap] x[n, place of i, position + tap] + shift[o]
    out     = activation(gate[n, j] v[n, j])         o = outputs[j], i runs over `inputs`

x holds the channels `inputs` of a map and no others, out the channels `outputs`: both are compact. That is the dense
layer on a map whose other channels are zero, without the others' outputs. Images of one batch may each name a list of
their own (`subnets`), so that one call runs several sub-networks of one set of weights.

Sources: DRNet (arXiv 1911.08691); the gate is that of critical data routing paths, which DRNet builds on.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import _C, Tensor

from pyext import _backend, _library
from pyext._operator import (
    UNMEASURED_ON_GPUS,
    accumulate_dtype,
    backends,
    register_differentiable,
    register_triton,
    triton_kernels,
)
from pyext.ops.masked_conv2d_backward import backward
from pyext.ops.masked_conv2d_checks import checked_activation, validate, validate_lists
from pyext.ops.masked_conv2d_checks import is_list as is_list  # modules take it from here
from pyext.ops.masked_conv2d_parts import ACTIVATIONS, Geometry, activate, affine, parts

_OPS = torch.ops.pyext

LAYER_TENSORS = ("weight", "scale", "shift", "inputs", "outputs", "packed")
"""Those of each layer of a chain, in their order; an empty scale or shift stands for none."""

LAYER_NUMBERS = 9
"""Those of each layer of a chain: `Geometry`'s eight and pool."""


def reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    inputs: Tensor,
    outputs: Tensor,
    subnets: Tensor | None,
    gate: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    """The operator's definition in plain torch; differentiable any number of times. Shapes as in `masked_conv2d`."""
    out = x.new_zeros(len(x), outputs.shape[1], *geometry.extents(x.shape[2], x.shape[3], tuple(weight.shape)))
    for images, kept in parts(x, weight, inputs, outputs, subnets, geometry):
        outs = kept.outputs
        y = kept.convolve(x[images][:, : len(kept.inputs)], kept.weight(weight).to(x.dtype))
        y = affine(y, scale, shift, outs)
        if gate is not None:
            y = y * gate[images][:, : len(outs), None, None]
        y = activate(y, geometry.activation).to(x.dtype)
        if len(outs) == outputs.shape[1] and isinstance(images, slice):
            return y
        y = F.pad(y, (0, 0, 0, 0, 0, outputs.shape[1] - len(outs)))
        out = out.index_copy(0, torch.arange(len(x), device=x.device)[images], y)
    return out


OPERATOR = _backend.register(_backend.Operator("masked_conv2d", backends("x", UNMEASURED_ON_GPUS)))


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    inputs: Tensor | None = None,
    outputs: Tensor | None = None,
    subnets: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    gate: Tensor | None = None,
    activation: str | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    pool: int = 1,
    packed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A convolution from the channels `inputs` to the channels `outputs` of a layer, on the layer's whole weight.

    Args:
        x: (N, I, H, W), the kept channels of the input, in order; float32, bfloat16, float16, or (CPU and reference)
            float64; any strides.
        weight: (channels, input channels / groups, k, k'), of the whole layer, as `torch.nn.Conv2d` has it.
        bias: (channels,), of the whole layer.
        inputs: int64 (I,), the kept input channels, ascending; None: all. Or (S, I), a list of each of S sub-networks,
            with -1 behind the last channel of a shorter one: x's channels there are not read.
        outputs: int64 (O,) or (S, O), the kept output channels, likewise.
        subnets: int64 (N,), the sub-network of each image, where there are several.
        scale, shift: (channels,), batch norm in evaluation as ``scale * convolution + shift``.
        gate: (N, O), a factor for each channel of each image, before the activation.
        activation: None, ``"relu"`` or ``"relu6"``.
        stride, padding, dilation, groups: as in `torch.nn.Conv2d`; padding is with zeros.
        pool: 2 for the largest element of each 2x2 window of the result (`torch.nn.MaxPool2d(2)`), 1 for the result.
        packed: what `pack_masked_conv2d` gives for the same weight and lists, which saves the CPU kernel the gathering
            of kept weights. It must be made again after weight has changed; gradients do not need it.
        backend: overrides `pyext.backend` and ``PYEXT_BACKEND``.

    weight, bias, scale, shift and gate are of x's dtype or all float32 (float64 for float64 x). Arithmetic accumulates
    in float32 (float64).

    Returns:
        (N, O, H', W') in x's dtype, H' and W' halved by pool; NCHW from a kernel. Behind the last channel of a shorter
        list stand zeros.

    Raises:
        ValueError: wrong shape, device, list or option. On a GPU, where looking at the lists' numbers would mean to
            wait, they are not looked at: a number outside the layer counts as absent.
        TypeError: wrong dtype.
        BackendError: the backend asked for cannot run.
    """
    checked_activation(activation)
    numbers = [*_pair("stride", stride), *_pair("padding", padding), *_pair("dilation", dilation)]
    numbers += groups, ACTIVATIONS.index(activation)
    ins = _list(inputs, weight.shape[1] * groups if weight.dim() > 1 else 0, x)
    outs = _list(outputs, weight.shape[0], x)
    if bias is not None:
        shift = with_bias(weight, bias, scale, shift)
    arguments = x, weight, scale, shift, ins, outs, subnets, gate
    name = OPERATOR.choose(backend, x)
    if name == "reference":
        validate(*arguments, Geometry.of(numbers), pool)
        return _pooled(reference(*arguments, Geometry.of(numbers)), pool)
    below = 1 if _differentiated(x, weight, scale, shift, gate) else pool  # what the operator itself pools
    op = _OPS.masked_conv2d_triton.default if name == "triton" else _OPS.masked_conv2d.default
    try:
        return _pooled(_run(op, *arguments, numbers, packed, below), pool // below)
    except RuntimeError:
        # The kernels check what memory safety needs; the sentence that names the argument is made here.
        validate(*arguments, Geometry.of(numbers), pool)
        raise


def _run(op: Any, x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, *rest: Any) -> Tensor:
    if _library.is_traced() or _differentiated(x, weight, scale, shift, rest[3]):
        return op(x, weight, scale, shift, *rest)
    # Where nothing is differentiated, the gradient's Python layer would be half of a small call's time.
    with _C._AutoDispatchBelowAutograd():
        return op(x, weight, scale, shift, *rest)


@dataclass(frozen=True)
class PreparedConv2d:
    """`masked_conv2d` with all but x and subnets fixed, on the CPU, outside of autograd and of traces.

    For calls of small layers, of which looking at arguments is a large part. Arguments are those of the operator
    (csrc/ops.cpp): lists of two dimensions, the numbers of `Geometry`.
    """

    weight: Tensor
    scale: Tensor | None
    shift: Tensor | None
    inputs: Tensor
    outputs: Tensor
    numbers: list[int]
    packed: Tensor
    pool: int = 1

    def __call__(self, x: Tensor, subnets: Tensor | None = None) -> Tensor:
        """The result for x."""
        with _C._AutoDispatchBelowAutograd():
            return _OPS.masked_conv2d.default(
                x,
                self.weight,
                self.scale,
                self.shift,
                self.inputs,
                self.outputs,
                subnets,
                None,
                self.numbers,
                self.packed,
                self.pool,
            )


@dataclass(frozen=True)
class PreparedChain:
    """Prepared convolutions and means over positions, each reading the result of the one before, as one call."""

    tensors: list[Tensor]
    numbers: list[int]

    @staticmethod
    def of(layers: Sequence[PreparedConv2d | None]) -> PreparedChain:
        """The convolutions in their order; None is the mean over positions, which gives maps of 1x1."""
        none = torch.empty(0)
        found = (getattr(own, name, None) for own in layers for name in LAYER_TENSORS)
        tensors = [none if tensor is None else tensor for tensor in found]
        numbers = ([0] * LAYER_NUMBERS if own is None else [*own.numbers, own.pool] for own in layers)
        return PreparedChain(tensors, list(itertools.chain.from_iterable(numbers)))

    def __call__(self, x: Tensor, subnets: Tensor | None = None) -> Tensor:
        """The last one's result for x (N, C, H, W); `subnets` as in `masked_conv2d`."""
        with _C._AutoDispatchBelowAutograd():
            return _OPS.masked_conv2d_chain.default(x, self.tensors, self.numbers, subnets)


def _differentiated(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _pooled(out: Tensor, pool: int) -> Tensor:
    return out if pool == 1 else F.max_pool2d(out, pool)


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    inputs: Tensor | None = None,
    outputs: Tensor | None = None,
    subnets: Tensor | None = None,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """A linear layer over kept features: `masked_conv2d` with x (N, I), weight (features, inputs), out (N, O)."""
    if x.dim() != 2 or weight.dim() != 2:
        raise ValueError(
            f"masked_linear: x and weight have shapes {tuple(x.shape)}, {tuple(weight.shape)}, expected (N, inputs) "
            "and (features, inputs)"
        )
    out = masked_conv2d(
        x[:, :, None, None],
        weight[:, :, None, None],
        bias,
        inputs=inputs,
        outputs=outputs,
        subnets=subnets,
        activation=activation,
        backend=backend,
    )
    return out[:, :, 0, 0]


def pack_masked_conv2d(
    weight: Tensor, *, inputs: Tensor | None = None, outputs: Tensor | None = None, groups: int = 1
) -> Tensor:
    """Kept weights in the order in which the CPU kernel reads them, for `masked_conv2d`'s `packed`.

    Arguments as there; weight on the CPU. Returns (elements,) in weight's accumulate dtype, not differentiable.
    """
    ins = _list(inputs, weight.shape[1] * groups, weight)
    outs = _list(outputs, weight.shape[0], weight)
    validate_lists(weight, weight, ins, outs, torch.zeros(len(weight), dtype=torch.int64), groups, True)
    with torch.no_grad():
        return _OPS.masked_conv2d_pack(weight.detach(), ins, outs, groups)


def _pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    if isinstance(value, (tuple, list)) and len(value) == 2:
        return value[0], value[1]
    raise ValueError(f"masked_conv2d: {name} is {value!r}, expected a number or two")


def _list(kept: Tensor | None, channels: int, x: Tensor) -> Tensor:
    if kept is None:
        return torch.arange(channels, device=x.device)[None]
    return kept[None] if kept.dim() == 1 else kept


def with_bias(weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """The shift, None for none, with a convolution's bias in it."""
    if tuple(bias.shape) != (len(weight),):
        raise ValueError(f"masked_conv2d: bias has shape {tuple(bias.shape)}, expected ({len(weight)},)")
    own = bias if scale is None else bias * scale
    return own if shift is None else own + shift


# --- registration of shapes and gradients -----------------------------------------------------------------------------


def _fake(x, weight, scale, shift, inputs, outputs, subnets, gate, numbers, packed=None, pool=1):
    geometry = Geometry.of(numbers)
    validate(x, weight, scale, shift, inputs, outputs, subnets, gate, geometry, pool, values=False)
    height, width = geometry.extents(x.shape[2], x.shape[3], tuple(weight.shape))
    return x.new_empty(len(x), outputs.shape[1], height // pool, width // pool)


def _fake_backward(
    grad_out, out, x, weight, scale, shift, inputs, outputs, subnets, gate, numbers, for_x, for_parameters
):
    wide = accumulate_dtype(x.dtype)

    def like(tensor, wanted=for_parameters, dtype=wide):
        return x.new_empty(tensor.shape if wanted and tensor is not None else (0,), dtype=dtype)

    return like(x, for_x, x.dtype), like(weight), like(scale), like(shift), like(gate, True)


def _fake_chain(x, tensors, numbers, subnets=None):
    layers = zip(_rows(tensors, len(LAYER_TENSORS)), _rows(numbers, LAYER_NUMBERS), strict=True)
    for (weight, scale, shift, inputs, outputs, _), (*own, pool) in layers:
        if not weight.numel():
            x = x.new_empty(*x.shape[:2], 1, 1)
            continue
        scale, shift = (tensor if tensor.numel() else None for tensor in (scale, shift))
        x = _fake(x, weight, scale, shift, inputs, outputs, subnets, None, own, None, pool)
    return x


def _rows(items, length):
    return (items[i : i + length] for i in range(0, len(items), length))


def _fake_pack(weight, inputs, outputs, groups):
    size = torch.library.get_ctx().new_dynamic_size()
    return weight.new_empty(size, dtype=accumulate_dtype(weight.dtype))


def _setup_context(ctx, inputs, output):
    if inputs[10] != 1:
        raise RuntimeError("masked_conv2d: the operator has a gradient with pool=1 alone")
    ctx.save_for_backward(output, *inputs[:8])
    ctx.numbers = inputs[8]


def _backward(op, ctx, grad_out):
    out, x, *rest = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grads = op(grad_out, out, x, *rest, ctx.numbers, needs[0], any(needs[1:4]))
    tensors = (x, *rest[:3], rest[6])
    wanted = (*needs[:4], needs[7])
    found = [g.to(t.dtype) if w else None for g, t, w in zip(grads, tensors, wanted, strict=True)]
    return *found[:4], None, None, None, found[4], None, None, None


def _triton_forward(x, weight, scale, shift, inputs, outputs, subnets, gate, numbers, packed=None, pool=1):
    arguments = x, weight, scale, shift, inputs, outputs, subnets, gate
    validate(*arguments, Geometry.of(numbers), pool, values=not x.is_cuda)  # kernels read what shapes promise
    return _pooled(triton_kernels("masked_conv2d").forward(*arguments, numbers), pool)


def _triton_backward(*args):
    return tuple(triton_kernels("masked_conv2d").backward(*args))


torch.library.register_fake("pyext::masked_conv2d_chain")(_fake_chain)
torch.library.register_fake("pyext::masked_conv2d_pack")(_fake_pack)
torch.library.impl("pyext::masked_conv2d_backward", "CPU")(backward)
register_differentiable("masked_conv2d", _fake, _fake_backward, _setup_context, _backward)
register_triton("masked_conv2d_triton", _triton_forward)
register_triton("masked_conv2d_backward_triton", _triton_backward)
