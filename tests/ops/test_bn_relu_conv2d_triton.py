"""Numerics of the Triton kernels of `bn_relu_conv2d`, by Triton's interpreter on CPU tensors, against float64."""

from __future__ import annotations

import pytest
import torch
from conv_inputs import INPUTS, RUNNING, Layer, make_layer
from exactness import Evaluate, assert_as_exact
from layouts import MAPS, in_layout
from torch import Tensor

from pyext._backend import BackendError
from pyext.ops import bn_relu_conv2d
from pyext.ops.bn_relu_conv2d import batch_statistics, reference
from pyext.triton_kernels import bn_relu_conv2d as kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYERS = {
    "channels and positions that fill no tile": Layer(3, 13, 7, 9, 11),
    "blocks within an image": Layer(2, 20, 8, 16, 18),
    "several tiles of channels": Layer(3, 70, 4, 8, 67),
    "pointwise, strided and in groups": Layer(2, 6, 5, 8, 4, 1, 2, 2),
    "taps": Layer(2, 5, 8, 8, 6, 3),
    "in groups": Layer(2, 14, 7, 5, 10, 3, 1, 2),
    "strided, odd extents": Layer(2, 7, 9, 13, 5, 3, 2),
    "strided and in groups": Layer(2, 6, 8, 7, 4, 3, 2, 2),
    "depthwise": Layer(2, 3, 5, 6, 3, 3, 1, 3),
    "one position": Layer(3, 5, 1, 1, 3, 3, 2),
    "one row": Layer(2, 4, 1, 75, 3, 3),
    "one column": Layer(2, 4, 70, 1, 3, 3, 2),
}
GEOMETRIES = ["channels and positions that fill no tile", "strided and in groups"]


def gradient_of(out: Tensor) -> Tensor:
    values = torch.linspace(-1, 1, out.numel(), dtype=torch.float64)
    return values[torch.randperm(out.numel(), generator=torch.Generator().manual_seed(0))].view(out.shape)


def results(function, layer: Layer, training: bool, layout: str, tensors: list[Tensor], running: list[Tensor]):
    """Output, gradients and running statistics, in the order of INPUTS and RUNNING; `layout` is grad_out's."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    moved = [x.clone() for x in running]
    geometry = {"stride": layer.stride, "groups": layer.groups}
    out = function(*leaves, *moved, training=training, momentum=0.3, **geometry)
    grad_out = in_layout(gradient_of(out).to(out.dtype), layout)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out), *moved]


def on_triton(*args, **options) -> Tensor:
    return bn_relu_conv2d(*args, backend="triton", **options)


def plain(layer: Layer, training: bool, layout: str) -> Evaluate:
    return lambda x, parameters, running: results(reference, layer, training, layout, [x, *parameters], running)


def check(
    layer: Layer, dtype: torch.dtype, training: bool = True, x_layout: str = "nchw", layout: str = "nchw"
) -> None:
    inputs, states = make_layer(layer, dtype, layout=x_layout)
    x, *parameters = inputs.values()
    running = list(states.values())
    found = results(on_triton, layer, training, layout, [x, *parameters], running)
    assert found[0].is_contiguous()
    actual = dict(zip(("out", *INPUTS, *RUNNING), found, strict=True))
    assert_as_exact(plain(layer, training, layout), x, parameters, running, actual)


def run_covering_checks(dtype: torch.dtype) -> None:
    """Runs every kernel on inputs of `dtype`; test_kernel_coverage.py finds this function by its name."""
    check(LAYERS["strided and in groups"], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_training(name, dtype):
    check(LAYERS[name], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_evaluation(name, dtype):
    check(LAYERS[name], dtype, training=False)


@pytest.mark.parametrize("layout", MAPS)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_any_layout_of_x(name, layout):
    check(LAYERS[name], torch.float32, x_layout=layout)


@pytest.mark.parametrize("layout", MAPS)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_any_layout_of_the_gradient(name, layout):
    check(LAYERS[name], torch.float32, layout=layout)


@pytest.mark.parametrize("x_layout", ["slice", "slice of columns", "channels_last"])
def test_layouts_whose_rows_are_adjacent_or_not(x_layout):
    check(LAYERS["blocks within an image"], torch.bfloat16, x_layout=x_layout, layout="slice")


@pytest.mark.parametrize("programs", [1, 24, 100])
@pytest.mark.parametrize("name", ["channels and positions that fill no tile", "taps", "one row"])
def test_stretches_of_any_length(monkeypatch, name, programs):
    """The sums over positions do not depend on how many programs they are split among."""
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    check(LAYERS[name], torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_parameters_in_float32(training, dtype):
    """Torch's own mixed mode rounds as it likes: the same numbers in x's dtype are what is compared with."""
    layer = LAYERS["strided and in groups"]
    inputs, states = make_layer(layer, dtype)
    x, *parameters = inputs.values()
    running = list(states.values())
    wide = [t.float() for t in (*parameters, *running)]
    found = results(on_triton, layer, training, "nchw", [x, *wide[:3]], wide[3:])
    actual = {key: t.to(dtype) for key, t in zip(("out", *INPUTS, *RUNNING), found, strict=True)}
    assert_as_exact(plain(layer, training, "nchw"), x, parameters, running, actual)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("programs", [1, 2048])
@pytest.mark.parametrize("shape", [(1, 2, 96, 96), (2, 19, 8, 16), (5, 3, 7, 9)], ids=str)
def test_statistics(monkeypatch, shape, programs, offset):
    """Of more stretches than are merged at a time, too; a mean far larger than the spread costs no digits."""
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + offset
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    actual = batch_statistics(x, backend="triton")
    eps = torch.finfo(torch.float32).eps
    assert (actual[0] - mean).abs().max() <= eps * x.abs().max()
    assert (actual[1] - var).abs().max() <= 4 * eps * var.max()


def test_statistics_of_images_far_apart():
    """The first block tells nothing of the others: what it costs is bounded by the spread between them."""
    x = torch.randn((4, 2, 8, 16), generator=torch.Generator().manual_seed(0)) * 1e-2
    x += torch.tensor([0.0, 1000.0, 1000.0, 1000.0]).view(4, 1, 1, 1)
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    actual = batch_statistics(x, backend="triton")
    torch.testing.assert_close(actual, (mean.float(), var.float()), rtol=1e-6, atol=0)


def test_known_statistics_are_used():
    layer = LAYERS["taps"]
    inputs, _ = make_layer(layer, torch.float32)
    mean, var = batch_statistics(inputs["x"], backend="triton")
    with torch.no_grad():
        out = on_triton(*inputs.values(), training=True, statistics=(mean + 1, var))
        moved = on_triton(inputs["x"] - 1, *list(inputs.values())[1:], training=True, statistics=(mean, var))
    torch.testing.assert_close(out, moved, rtol=1e-5, atol=1e-5)


def test_runs_are_bit_equal():
    layer = LAYERS["strided and in groups"]
    inputs, states = make_layer(layer, torch.bfloat16)
    both = [results(on_triton, layer, True, "nchw", [*inputs.values()], [*states.values()]) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("spoilt", ["x", "grad_out"])
@pytest.mark.parametrize("name", ["in groups", "strided, odd extents"])
def test_not_a_number_reaches_what_depends_on_it_alone(name, spoilt):
    """In evaluation: in training it reaches all of its channel."""
    layer = LAYERS[name]
    inputs, states = make_layer(layer, torch.float32)
    if spoilt == "x":
        inputs["x"][1, 2, 3, 4] = torch.nan
    found = []
    for function in (on_triton, reference):
        leaves = [x.detach().requires_grad_() for x in inputs.values()]
        out = function(*leaves, *states.values(), stride=layer.stride, groups=layer.groups)
        grad_out = gradient_of(out).float()
        if spoilt == "grad_out":
            grad_out[1, 2, 2, 2] = torch.nan
        found.append([out, *torch.autograd.grad(out, leaves, grad_out)])
    for actual, expected in zip(*found, strict=True):
        assert torch.equal(actual.isnan(), expected.isnan())
    assert any(x.isnan().any() for x in found[0])


@pytest.mark.parametrize("training", [False, True])
def test_no_image(training):
    layer = Layer(0, 4, 3, 3, 5, 3)
    inputs, states = make_layer(layer, torch.float32)
    out, grad_x, *grads = results(on_triton, layer, training, "nchw", [*inputs.values()], [*states.values()])
    assert out.shape == (0, 5, 3, 3)
    assert grad_x.shape == (0, 4, 3, 3)
    assert all((grad == 0).all() for grad in grads[:3])


def test_float64_is_refused():
    inputs, states = make_layer(LAYERS["taps"], torch.float64)
    with pytest.raises(BackendError, match="float64"):
        on_triton(*inputs.values(), *states.values())


def test_wrong_arguments_are_named():
    inputs, _ = make_layer(LAYERS["taps"], torch.float32)
    x, *parameters = inputs.values()
    statistics = batch_statistics(x)
    ops = torch.ops.pyext
    with pytest.raises(ValueError, match="conv_weight has shape"):
        ops.bn_relu_conv2d_triton(x, *parameters[:2], parameters[2][:, :4], *statistics, True, 1e-5, 1, 1)
    with pytest.raises(ValueError, match="mean has shape"):
        ops.bn_relu_conv2d_triton(x, *parameters, statistics[0][:4], statistics[1], True, 1e-5, 1, 1)
    with pytest.raises(ValueError, match="x has shape"):
        ops.bn_relu_conv2d_statistics_triton(x[0])
