"""`bn_relu_conv2d` as the tests that enumerate operators see it."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import torch
from conv_inputs import Layer, make_layer
from layouts import in_layout
from torch import Tensor

from described import Case, Description
from pyext.ops import bn_relu_conv2d

_EPS = 1e-5


def _layer(draw: Any) -> Layer:
    batch, (height, width) = draw(st.integers(0, 4)), _extent(draw)
    if draw(st.booleans()):
        return Layer(batch, draw(st.integers(1, 40)), height, width, draw(st.integers(1, 40)))
    groups = draw(st.integers(1, 3))
    channels, outputs = (groups * draw(st.integers(1, 9)) for _ in range(2))
    return Layer(batch, channels, height, width, outputs, 3, draw(st.integers(1, 2)), groups)


def _extent(draw: Any) -> tuple[int, int]:
    """Height and width, one of them often 1 or longer than a strip of the kernels."""
    short = st.integers(1, 20)
    return draw(
        st.one_of(st.tuples(short, short), st.tuples(st.just(1), st.integers(1, 150)), st.tuples(short, st.just(1)))
    )


def _one_value(layer: Layer) -> bool:
    return layer.batch * layer.height * layer.width == 1


def draw_case(draw: Any, dtype: torch.dtype) -> Case:
    layer = _layer(draw)
    training, statistics = draw(st.sampled_from([(False, True), (True, True), (False, False), (True, False)]))
    if _one_value(layer):
        training, statistics = False, True
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs, states = make_layer(layer, dtype, draw(st.sampled_from([dtype, wide])), seed=draw(st.integers(0, 2**31)))
    options = {
        "training": training,
        "momentum": draw(st.sampled_from([0.1, 1.0])),
        "eps": draw(st.sampled_from([_EPS, 1e-2])),
        "stride": layer.stride,
        "groups": layer.groups,
    }
    return Case(inputs, states if statistics else {}, options)


def call(case: Case, backend: str | None = None) -> Tensor:
    return bn_relu_conv2d(*case.inputs.values(), **case.states, **case.options, backend=backend)


def _layer_of(training: bool) -> Layer:
    # Both convolutions' kernels, one in each mode.
    return Layer(3, 4, 3, 5, 6, 3, 2, 2) if training else Layer(3, 4, 3, 5, 6)


def small(dtype: torch.dtype, training: bool) -> Case:
    layer = _layer_of(training)
    inputs, states = make_layer(layer, dtype)
    return Case(
        inputs, {} if training else states, {"training": training, "stride": layer.stride, "groups": layer.groups}
    )


def _arguments(dtype: torch.dtype, training: bool, differentiable: bool) -> tuple:
    layer = _layer_of(training)
    inputs, states = make_layer(layer, dtype)
    tensors = [x.requires_grad_(differentiable) for x in inputs.values()]
    return *tensors, *states.values(), training, _EPS, layer.stride, layer.groups


def _forward_sample(dtype: torch.dtype, training: bool) -> tuple[tuple, dict]:
    return _arguments(dtype, training, True), {}


def _statistics_sample(dtype: torch.dtype, training: bool) -> tuple[tuple, dict]:
    return _arguments(dtype, training, False)[:1], {}


def _moments_sample(dtype: torch.dtype, training: bool) -> tuple[tuple, dict]:
    return _arguments(dtype, training, False), {}


def _backward_sample(dtype: torch.dtype, training: bool) -> tuple[tuple, dict]:
    arguments = _arguments(dtype, training, False)
    return (torch.randn_like(torch.ops.pyext.bn_relu_conv2d(*arguments)), *arguments), {}


def _pool_arguments(dtype: torch.dtype, training: bool, differentiable: bool) -> tuple:
    inputs, states = make_layer(Layer(3, 4, 5, 6, 1), dtype)
    tensors = [x.requires_grad_(differentiable) for x in list(inputs.values())[:3]]
    return *tensors, *states.values(), training, _EPS


def _pool_sample(dtype: torch.dtype, training: bool) -> tuple[tuple, dict]:
    x, *parameters = _pool_arguments(dtype, training, True)
    return (in_layout(x.detach(), "images innermost").requires_grad_() if training else x, *parameters), {}


def _max_pool_sample(dtype: torch.dtype, training: bool) -> tuple[tuple, dict]:
    return _pool_arguments(dtype, training, True), {}


def _pool_backward_sample(dtype: torch.dtype, training: bool) -> tuple[tuple, dict]:
    arguments = _pool_arguments(dtype, training, False)
    return (torch.randn_like(torch.ops.pyext.bn_relu_conv2d_pool(*arguments)), *arguments), {}


def _max_pool_backward_sample(dtype: torch.dtype, training: bool) -> tuple[tuple, dict]:
    arguments = _pool_arguments(dtype, training, False)
    return (torch.randn_like(torch.ops.pyext.bn_relu_conv2d_max_pool(*arguments)), *arguments), {}


def _block_arguments(dtype: torch.dtype, training: bool) -> tuple:
    """x, and the cells of two layers; in training both are bottlenecks."""
    layers, channels, parameters = [2, 2 if training else 1], 3, []
    for count in layers:
        inputs = channels
        for kernel, outputs in ((1, 4), (3, 2))[2 - count :]:
            cell, _ = make_layer(Layer(2, inputs, 3, 5, outputs, kernel), dtype, seed=len(parameters))
            parameters += list(cell.values())[1:]
            inputs = outputs
        channels += inputs
    x = make_layer(Layer(2, 3, 3, 5, 1), dtype)[0]["x"]
    return x, parameters, layers, [_EPS] * sum(layers)


def _block_sample(dtype: torch.dtype, training: bool) -> tuple[tuple, dict]:
    return _block_arguments(dtype, training), {}


def _block_backward_sample(dtype: torch.dtype, training: bool) -> tuple[tuple, dict]:
    x, *cells = _block_arguments(dtype, training)
    buffer, moments, kept = torch.ops.pyext.bn_relu_conv2d_block(x, *cells)
    return (torch.randn_like(buffer), buffer, moments, kept if training else [], *cells), {}


def _running_sample(dtype: torch.dtype, training: bool) -> tuple[tuple, dict]:
    running = [torch.rand(channels, dtype=dtype) for channels in (3, 3, 5, 5)]
    return (running, [torch.rand(2, 5, dtype=dtype) for _ in range(2)], 7, 0.1), {}


def _backward_add_sample(dtype: torch.dtype, training: bool) -> tuple[tuple, dict]:
    (grad_out, *arguments), _ = _backward_sample(dtype, training)
    return (grad_out, *arguments, torch.randn_like(arguments[0]), _corrections(arguments[0])), {}


def _correct_sample(dtype: torch.dtype, training: bool) -> tuple[tuple, dict]:
    x, *_, mean, _ = _arguments(dtype, training, False)[:6]
    return (torch.randn_like(x), x, mean, _corrections(x)), {}


def _corrections(x: Tensor) -> Tensor:
    return torch.randn(x.shape[1], 2, dtype=torch.float64)


DESCRIPTION = Description(
    draw=draw_case,
    call=call,
    small=small,
    samples={
        "bn_relu_conv2d": _forward_sample,
        "bn_relu_conv2d_statistics": _statistics_sample,
        "bn_relu_conv2d_moments": _moments_sample,
        "bn_relu_conv2d_backward": _backward_sample,
        "bn_relu_conv2d_pool": _pool_sample,
        "bn_relu_conv2d_pool_backward": _pool_backward_sample,
        "bn_relu_conv2d_max_pool": _max_pool_sample,
        "bn_relu_conv2d_max_pool_backward": _max_pool_backward_sample,
        "bn_relu_conv2d_running": _running_sample,
        "bn_relu_conv2d_block": _block_sample,
        "bn_relu_conv2d_block_backward": _block_backward_sample,
        "bn_relu_conv2d_backward_add": _backward_add_sample,
        "bn_relu_conv2d_correct": _correct_sample,
    },
    # oneDNN multiplies pairs of bfloat16, so that a NaN also meets the zeros beside the taps of an odd kernel.
    spreads_in=frozenset({torch.bfloat16}),
    free=(0, 2, 3),
    sizing=frozenset({"x", "conv_weight"}),
    wrong_options={"eps": -1.0, "stride": 3, "groups": 0},
)
