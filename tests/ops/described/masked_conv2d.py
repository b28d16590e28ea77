"""`masked_conv2d` as the tests that enumerate operators see it."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import torch
from masked_inputs import Masked, make_masked
from torch import Tensor

from described import Case, Description
from pyext.ops import masked_conv2d


def _layer(draw: Any) -> Masked:
    groups = draw(st.integers(1, 3))
    channels, outputs = (groups * draw(st.integers(1, 9)) for _ in range(2))
    kernel = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    stride, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    padding = (draw(st.integers(0, kernel[0])), draw(st.integers(0, kernel[1])))
    height, width = (
        draw(st.integers(1, 20)) + max(0, dilation * (k - 1) - 2 * p) for k, p in zip(kernel, padding, strict=True)
    )
    return Masked(
        draw(st.integers(0, 9)),
        channels,
        height,
        width,
        outputs,
        kernel,
        stride,
        padding,
        dilation,
        groups,
        draw(st.integers(1, 3)),
        draw(st.sampled_from([0.2, 0.6, 1.0])),
        draw(st.sampled_from([None, "relu", "relu6"])),
        draw(st.booleans()),
        draw(st.booleans()),
    )


def _case(layer: Masked, dtype: torch.dtype, parameter_dtype: torch.dtype | None = None, seed: int = 0) -> Case:
    tensors, lists = make_masked(layer, dtype, parameter_dtype, seed)
    return Case(tensors, {}, {**lists, **layer.options})


def draw_case(draw: Any, dtype: torch.dtype) -> Case:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return _case(_layer(draw), dtype, draw(st.sampled_from([dtype, wide])), draw(st.integers(0, 2**31)))


def call(case: Case, backend: str | None = None) -> Tensor:
    return masked_conv2d(**case.inputs, **case.options, backend=backend)


def _layer_of(training: bool) -> Masked:
    if training:
        return Masked(3, 6, 5, 4, 8, (3, 2), 2, 1, groups=2, gated=True, activation="relu6")
    return Masked(5, 4, 3, 2, 6, subnets=2, affine=False)


def small(dtype: torch.dtype, training: bool) -> Case:
    return _case(_layer_of(training), dtype)


def _arguments(dtype: torch.dtype, training: bool, differentiable: bool) -> tuple:
    layer = _layer_of(training)
    tensors, lists = make_masked(layer, dtype)
    own = {name: tensor.requires_grad_(differentiable) for name, tensor in tensors.items()}
    stride, padding, dilation = ([n, n] for n in (layer.stride, layer.padding, layer.dilation))
    numbers = [*stride, *padding, *dilation, layer.groups, [None, "relu", "relu6"].index(layer.activation)]
    names = ("scale", "shift")
    return (
        own["x"],
        own["weight"],
        *(own.get(name) for name in names),
        lists["inputs"],
        lists["outputs"],
        lists.get("subnets"),
        own.get("gate"),
        numbers,
    )


def _forward_sample(dtype: torch.dtype, training: bool) -> tuple[tuple, dict]:
    return _arguments(dtype, training, True), {}


def _pack_sample(dtype: torch.dtype, training: bool) -> tuple[tuple, dict]:
    _, weight, _, _, inputs, outputs, _, _, numbers = _arguments(dtype, training, False)
    return (weight, inputs, outputs, numbers[6]), {}


def _backward_sample(dtype: torch.dtype, training: bool) -> tuple[tuple, dict]:
    arguments = _arguments(dtype, training, False)
    out = torch.ops.pyext.masked_conv2d(*arguments)
    return (torch.randn_like(out), out, *arguments, True, True), {}


DESCRIPTION = Description(
    draw=draw_case,
    call=call,
    small=small,
    samples={
        "masked_conv2d": _forward_sample,
        "masked_conv2d_pack": _pack_sample,
        "masked_conv2d_backward": _backward_sample,
    },
    # oneDNN multiplies pairs of bfloat16, so that a NaN also meets the zeros beside the taps of an odd kernel.
    spreads_in=frozenset({torch.bfloat16}),
    free=(0, 2, 3),
    free_in={"weight": (0, 1, 2, 3)},  # x holds kept channels alone, which any layer with as many may have
    sizing=frozenset({"x", "weight"}),
    wrong_options={
        "stride": 0,
        "padding": -1,
        "dilation": 0,
        "groups": 0,
        "activation": "tanh",
        "pool": 3,
        "inputs": torch.tensor([1, 0]),
        "outputs": torch.tensor([0, 99]),
    },
)
