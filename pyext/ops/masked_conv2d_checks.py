"""What is wrong with masked_conv2d's arguments, in sentences that name the one that is."""

from __future__ import annotations

import torch
from torch import Tensor

from pyext._operator import DTYPES, accumulate_dtype
from pyext.ops.masked_conv2d_parts import ACTIVATIONS, Geometry


def checked_activation(activation: str | None) -> str | None:
    """`activation`; ValueError for an unknown one."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"masked_conv2d: activation is {activation!r}, expected one of {ACTIVATIONS}")
    return activation


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
    validate_lists(x, weight, inputs, outputs, subnets, geometry.groups, values)
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


def validate_lists(
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
