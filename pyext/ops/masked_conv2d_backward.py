"""masked_conv2d's gradient in torch's own operators: that of the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyext._operator import accumulate_dtype
from pyext.ops.masked_conv2d_parts import Geometry, Kept, affine, parts


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
                v = affine(kept.convolve(own_x, own_weight), scale, shift, outs)
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
