"""A convolution over kept channels alone, with batch norm, gate and activation, on the whole network's weight.

    v[n, j] = scale[o] sum over i, taps of weight[o, i, tap] x[n, place of i, position + tap] + shift[o]
    out     = activation(gate[n, j] v[n, j])         o = outputs[j], i runs over `inputs`

x holds the channels `inputs` of a map and no others, out the channels `outputs`: both are compact. That is the dense
layer on a map whose other channels are zero, without the others' outputs. Images of one batch may each name a list of
their own (`subnets`), so that one call runs several sub-networks of one set of weights.

Sources: DRNet (arXiv 1911.08691); the gate is that of critical data routing paths, which DRNet builds on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import _C, Tensor

from pyext import _backend, _library
from pyext._operator import (
    DTYPES,
    accumulate_dtype,
    no_cpu,
    no_cuda,
    no_reference,
    no_triton,
    register_differentiable,
    register_triton,
    triton_kernels,
)

_OPS = torch.ops.pyext

ACTIVATIONS = (None, "relu", "relu6")
"""In the order in which kernels number them."""
CHAIN_TENSORS, CHAIN_NUMBERS = 6, 9
"""Of each layer of `masked_conv2d_chain`."""


@dataclass(frozen=True)
class Geometry:
    """What is not a tensor: pairs are (rows, columns)."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    activation: int = 0

    @staticmethod
    def of(numbers: list[int]) -> Geometry:
        """From the numbers that kernels take: the fields, one after the other."""
        pairs = (tuple(numbers[i : i + 2]) for i in (0, 2, 4))
        return Geometry(*pairs, *numbers[6:])  # type: ignore[arg-type]

    def extents(self, height: int, width: int, kernel: tuple[int, ...]) -> tuple[int, int]:
        """Height and width of the result; not positive where the kernel does not fit."""
        sizes = zip((height, width), self.stride, self.padding, self.dilation, kernel[-2:], strict=True)
        rows, columns = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, s, p, d, k in sizes)
        return rows, columns


@dataclass(frozen=True)
class Kept:
    """A convolution of a sub-network as one of torch's.

    Without groups it is that of the kept rows and columns of the weight. With groups, which keep unequal numbers of
    channels, it is the whole layer's, whose other inputs are zero and whose other outputs are dropped.
    """

    inputs: Tensor
    outputs: Tensor
    channels: tuple[int, int]
    geometry: Geometry

    @property
    def whole(self) -> bool:
        return self.geometry.groups > 1

    def weight(self, weight: Tensor) -> Tensor:
        """The convolution's weight, from the layer's. With groups the rest is zero: what it holds has no effect."""
        if self.whole:
            return torch.where(self._own(weight), weight, 0)
        return weight.index_select(0, self.outputs).index_select(1, self.inputs)

    def add_gradient(self, whole: Tensor, own: Tensor) -> None:
        """Add the gradient of the convolution's weight to that of the layer's."""
        if self.whole:
            whole.add_(torch.where(self._own(own), own, 0))
        else:
            whole.index_put_((self.outputs[:, None], self.inputs[None]), own, accumulate=True)

    def _own(self, weight: Tensor) -> Tensor:
        """Where the layer's weight is of kept channels, bool (channels, input channels / groups, 1, 1)."""
        kept = [
            torch.zeros(n, dtype=torch.bool, device=weight.device).index_fill(0, ids, True)
            for n, ids in zip(self.channels, (self.inputs, self.outputs), strict=True)
        ]
        columns = kept[0].view(self.geometry.groups, -1).repeat_interleave(len(weight) // self.geometry.groups, 0)
        return (columns & kept[1][:, None])[:, :, None, None]

    def of_outputs(self, tensor: Tensor) -> Tensor:
        """What belongs to the convolution's rows, from a tensor (channels,) of the layer."""
        return tensor if self.whole else tensor.index_select(0, self.outputs)

    def wide(self, tensor: Tensor, kind: int) -> Tensor:
        """The convolution's input (kind 0) or output (1) from the compact one (N, C, H, W)."""
        if not self.whole:
            return tensor
        empty = tensor.new_zeros(tensor.shape[0], self.channels[kind], *tensor.shape[2:])
        return empty.index_copy(1, (self.inputs, self.outputs)[kind], tensor)

    def compact(self, tensor: Tensor, kind: int) -> Tensor:
        """The inverse of `wide`."""
        return tensor.index_select(1, (self.inputs, self.outputs)[kind]) if self.whole else tensor

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """Compact x to compact out; `weight` is what the method of that name gives."""
        g = self.geometry
        y = F.conv2d(self.wide(x, 0), weight, None, g.stride, g.padding, g.dilation, g.groups)
        return self.compact(y, 1)


def parts(
    x: Tensor, weight: Tensor, inputs: Tensor, outputs: Tensor, subnets: Tensor | None, geometry: Geometry
) -> Iterator[tuple[Tensor | slice, Kept]]:
    """Of each sub-network that has images: those images, and its convolution; of the first where there is no image."""
    for s in range(len(inputs)):
        images = slice(None) if subnets is None else (subnets == s).nonzero()[:, 0]
        if isinstance(images, slice) or len(images) or (s == 0 and len(x) == 0):
            channels = weight.shape[1] * geometry.groups, len(weight)
            yield images, Kept(inputs[s][inputs[s] >= 0], outputs[s][outputs[s] >= 0], channels, geometry)


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
        y = _affine(y, scale, shift, outs)
        if gate is not None:
            y = y * gate[images][:, : len(outs), None, None]
        y = activate(y, geometry.activation).to(x.dtype)
        if len(outs) == outputs.shape[1] and isinstance(images, slice):
            return y
        y = F.pad(y, (0, 0, 0, 0, 0, outputs.shape[1] - len(outs)))
        out = out.index_copy(0, torch.arange(len(x), device=x.device)[images], y)
    return out


def checked_activation(activation: str | None) -> str | None:
    """`activation`; ValueError for an unknown one."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"masked_conv2d: activation is {activation!r}, expected one of {ACTIVATIONS}")
    return activation


def activate(v: Tensor, activation: int) -> Tensor:
    """The activation with that number."""
    return v if activation == 0 else F.relu(v) if activation == 1 else F.relu6(v)


def validate(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    inputs: Tensor,
    outputs: Tensor,
    subnets: Tensor | None,
    gate: Tensor | None,
    geometry: Geometry,
    pool: int = 1,
    values: bool = True,
) -> None:
    """Raise TypeError (dtype) or ValueError (all else) naming the argument that is wrong and what was expected.

    `values`: look at the numbers of the lists, too.
    """
    if x.dim() != 4 or 0 in x.shape[2:]:
        raise ValueError(f"masked_conv2d: x has shape {tuple(x.shape)}, expected (N, inputs, H, W), H and W at least 1")
    if x.dtype not in DTYPES:
        raise TypeError(f"masked_conv2d: x has dtype {x.dtype}, expected float32, float64, bfloat16 or float16")
    if weight.dim() != 4 or 0 in weight.shape:
        raise ValueError(f"masked_conv2d: weight has shape {tuple(weight.shape)}, expected (channels, inputs, k, k)")
    _validate_geometry(x, weight, geometry, pool)
    _validate_lists(x, weight, inputs, outputs, subnets, geometry.groups, values)
    if x.shape[1] != inputs.shape[1]:
        raise ValueError(f"masked_conv2d: x has {x.shape[1]} channels, expected {inputs.shape[1]}, those of inputs")
    shapes = {"scale": (len(weight),), "shift": (len(weight),), "gate": (len(x), outputs.shape[1])}
    for name, tensor in {"weight": weight, "scale": scale, "shift": shift, "gate": gate}.items():
        if tensor is None:
            continue
        if name in shapes and tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"masked_conv2d: {name} has shape {tuple(tensor.shape)}, expected {shapes[name]}")
        if tensor.device != x.device:
            raise ValueError(f"masked_conv2d: {name} is on {tensor.device}, expected x's device {x.device}")
        if tensor.dtype not in (x.dtype, accumulate_dtype(x.dtype)) or tensor.dtype != weight.dtype:
            raise TypeError(
                f"masked_conv2d: {name} has dtype {tensor.dtype}, expected x's {x.dtype} or "
                f"{accumulate_dtype(x.dtype)}, the same for weight, scale, shift and gate"
            )


def _validate_geometry(x: Tensor, weight: Tensor, geometry: Geometry, pool: int) -> None:
    for name, least in (("stride", 1), ("padding", 0), ("dilation", 1)):
        pair = getattr(geometry, name)
        if len(pair) != 2 or any(not isinstance(n, int) or n < least for n in pair):
            raise ValueError(f"masked_conv2d: {name} is {pair}, expected two numbers of at least {least}")
    if geometry.groups < 1 or weight.shape[0] % geometry.groups:
        raise ValueError(
            f"masked_conv2d: groups is {geometry.groups}, expected a divisor of weight's {weight.shape[0]} channels"
        )
    extents = geometry.extents(x.shape[2], x.shape[3], tuple(weight.shape))
    if pool not in (1, 2) or (pool == 2 and min(extents) == 1):
        raise ValueError(f"masked_conv2d: pool is {pool}, expected 1, or 2 for maps of at least 2x2, not {extents}")
    if min(extents) < 1:
        raise ValueError(
            f"masked_conv2d: x has maps of {tuple(x.shape[2:])}, smaller than the kernel {tuple(weight.shape[2:])} "
            f"with padding {geometry.padding} and dilation {geometry.dilation}"
        )


def _validate_lists(
    x: Tensor, weight: Tensor, inputs: Tensor, outputs: Tensor, subnets: Tensor | None, groups: int, values: bool
) -> None:
    for name, kept, channels in (
        ("inputs", inputs, weight.shape[1] * groups),
        ("outputs", outputs, weight.shape[0]),
    ):
        if kept.dtype != torch.int64:
            raise TypeError(f"masked_conv2d: {name} has dtype {kept.dtype}, expected int64")
        if kept.dim() != 2 or kept.shape[0] != inputs.shape[0] or 0 in kept.shape:
            raise ValueError(
                f"masked_conv2d: {name} has shape {tuple(kept.shape)}, expected (kept channels,) or (sub-networks, "
                "kept channels), at least one, as many sub-networks in both lists"
            )
        if kept.device != x.device:
            raise ValueError(f"masked_conv2d: {name} is on {kept.device}, expected x's device {x.device}")
        if values and not is_list(kept, channels):
            raise ValueError(
                f"masked_conv2d: {name}, expected channels from 0 to {channels - 1}, ascending, with -1 behind "
                "the last one of a shorter list"
            )
    if subnets is None:
        if len(inputs) > 1:
            raise ValueError(f"masked_conv2d: subnets is None, but the lists are of {len(inputs)} sub-networks")
        return
    if subnets.dtype != torch.int64:
        raise TypeError(f"masked_conv2d: subnets has dtype {subnets.dtype}, expected int64")
    if tuple(subnets.shape) != (len(x),) or subnets.device != x.device:
        raise ValueError(
            f"masked_conv2d: subnets has shape {tuple(subnets.shape)} on {subnets.device}, expected ({len(x)},), a "
            f"number for each image, on {x.device}"
        )
    if values and len(subnets) and not 0 <= int(subnets.min()) <= int(subnets.max()) < len(inputs):
        raise ValueError(f"masked_conv2d: subnets, expected numbers from 0 to {len(inputs) - 1}")


def is_list(kept: Tensor, channels: int) -> bool:
    """Whether each row of `kept` is ascending numbers of channels, at least one, then -1 alone."""
    absent = kept == -1
    ordered = (kept[:, 1:] > kept[:, :-1]) | absent[:, 1:]
    tail = ~absent[:, :-1] | absent[:, 1:]
    return bool((ordered & tail).all() and ((kept >= -1) & (kept < channels)).all() and (kept[:, 0] >= 0).all())


OPERATOR = _backend.register(
    _backend.Operator(
        "masked_conv2d",
        {
            "cpu": lambda x, *_: no_cpu("x", x),
            # Before the kernels of GPUs, whose speed was not measured: auto may not be slower than plain torch.
            "reference": no_reference,
            "cuda": lambda x, *_: no_cuda("x", x),
            "triton": lambda x, *_: no_triton("x", x),
        },
    )
)


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
        tensors: list[Tensor] = []
        numbers: list[int] = []
        none = torch.empty(0)
        for own in layers:
            if own is None:
                tensors += [none] * CHAIN_TENSORS
                numbers += [0] * CHAIN_NUMBERS
                continue
            tensors += own.weight, *(none if t is None else t for t in (own.scale, own.shift))
            tensors += own.inputs, own.outputs, own.packed
            numbers += *own.numbers, own.pool
        return PreparedChain(tensors, numbers)

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
    _validate_lists(weight, weight, ins, outs, torch.zeros(len(weight), dtype=torch.int64), groups, True)
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


# --- the gradient -----------------------------------------------------------------------------------------------------


def backward(
    grad_out: Tensor,
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    inputs: Tensor,
    outputs: Tensor,
    subnets: Tensor | None,
    gate: Tensor | None,
    numbers: list[int],
    for_x: bool,
    for_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, scale, shift and gate by torch's own convolutions on the kept weights.

    Those of scale, shift and gate are empty where there is none, all of the parameters' without `for_parameters`, x's
    without `for_x`. With dv the gradient of v: the gate's is sum dv v, which out tells (v = out / gate where it is
    activated), and the scale's is sum weight * (weight's gradient before scaling).
    """
    geometry, wide = Geometry.of(numbers), accumulate_dtype(x.dtype)

    def zeros(tensor: Tensor | None, wanted: bool, dtype: torch.dtype = wide) -> Tensor:
        return x.new_zeros(tensor.shape if wanted and tensor is not None else (0,), dtype=dtype)

    grads = _Gradients(
        zeros(x, for_x, x.dtype),
        zeros(weight, for_parameters),
        zeros(scale, for_parameters),
        zeros(shift, for_parameters),
        zeros(gate, True),
    )
    for images, kept in parts(x, weight, inputs, outputs, subnets, geometry):
        ins, outs = kept.inputs, kept.outputs
        own_x, own_weight = x[images][:, : len(ins)].to(wide), kept.weight(weight).to(wide)
        dv = _before_activation(grad_out[images], out[images], geometry.activation)[:, : len(outs)].to(wide)
        if gate is not None:
            factor = gate[images][:, : len(outs)].to(wide)
            y = out[images][:, : len(outs)].to(wide)
            if geometry.activation == 0:  # a gate of 0 leaves no trace of v in the result
                v = _affine(kept.convolve(own_x, own_weight), scale, shift, outs)
                grads.gate[images, : len(outs)] = (dv * v).sum((2, 3))
            else:
                grads.gate[images, : len(outs)] = torch.where(factor == 0, 0, (dv * y).sum((2, 3)) / factor)
            dv = dv * factor[:, :, None, None]
        _add_products(grads, images, kept, own_x, dv, own_weight, scale)
    return grads.x, grads.weight, grads.scale, grads.shift, grads.gate


@dataclass(frozen=True)
class _Gradients:
    x: Tensor
    weight: Tensor
    scale: Tensor
    shift: Tensor
    gate: Tensor


def _before_activation(grad_out: Tensor, out: Tensor, activation: int) -> Tensor:
    if activation == 0:
        return grad_out
    inactive = out <= 0 if activation == 1 else (out <= 0) | (out >= 6)
    return grad_out.masked_fill(inactive, 0)


def _affine(y: Tensor, scale: Tensor | None, shift: Tensor | None, outs: Tensor) -> Tensor:
    if scale is not None:
        y = y * scale[outs, None, None]
    return y if shift is None else y + shift[outs, None, None]


def _add_products(
    grads: _Gradients,
    images: Tensor | slice,
    kept: Kept,
    x: Tensor,
    dv: Tensor,
    weight: Tensor,
    scale: Tensor | None,
) -> None:
    """Add one sub-network's part to the gradients of x and the parameters."""
    g = kept.geometry
    factor = 1 if scale is None else kept.of_outputs(scale)[:, None, None, None].to(x.dtype)
    wanted = [grads.x.numel() > 0, grads.weight.numel() > 0, False]
    layout = (g.stride, g.padding, g.dilation, False, (0, 0), g.groups)
    dx, dw, _ = torch.ops.aten.convolution_backward(
        kept.wide(dv, 1), kept.wide(x, 0), weight * factor, None, *layout, wanted
    )
    if wanted[0]:
        grads.x[images, : len(kept.inputs)] = kept.compact(dx, 0).to(grads.x.dtype)
    if not wanted[1]:
        return
    rows = torch.arange(len(weight), device=x.device) if kept.whole else kept.outputs
    kept.add_gradient(grads.weight, dw * factor)
    if grads.scale.numel():
        grads.scale.index_add_(0, rows, (dw * weight).sum((1, 2, 3)))
    if grads.shift.numel():
        grads.shift.index_add_(0, kept.outputs, dv.sum((0, 2, 3)))


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
    for layer in range(len(tensors) // CHAIN_TENSORS):
        weight, scale, shift, inputs, outputs, _ = tensors[CHAIN_TENSORS * layer : CHAIN_TENSORS * (layer + 1)]
        *own, pool = numbers[CHAIN_NUMBERS * layer : CHAIN_NUMBERS * (layer + 1)]
        if not weight.numel():
            x = x.new_empty(*x.shape[:2], 1, 1)
            continue
        scale, shift = (tensor if tensor.numel() else None for tensor in (scale, shift))
        x = _fake(x, weight, scale, shift, inputs, outputs, subnets, None, own, None, pool)
    return x


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
