"""The CUDA kernels of `bn_relu_conv2d`, run on the CPU by the host shim in tests/cuda_host, against float64."""

from __future__ import annotations

import ctypes

import pytest
import torch
from conv_inputs import INPUTS, Layer, make_layer
from cuda_host.device import Device
from cuda_host.library import Library
from exactness import Evaluate, assert_as_exact, doubled
from layouts import in_layout
from memory_device import DTYPE_CODES, pointer, set_up
from torch import Tensor

from pyext.ops.bn_relu_conv2d import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5
LAYERS = {
    "channels and positions that fill no tile": Layer(3, 13, 7, 9, 11),
    "several tiles of channels": Layer(2, 70, 4, 8, 67),
    "pointwise, strided and in groups": Layer(2, 6, 5, 8, 4, 1, 2, 2),
    "taps": Layer(2, 8, 8, 8, 6, 3),
    "in groups": Layer(2, 14, 7, 5, 10, 3, 1, 2),
    "strided, odd extents": Layer(2, 7, 9, 13, 5, 3, 2),
    "strided and in groups": Layer(2, 6, 8, 7, 4, 3, 2, 2),
    "one position": Layer(3, 5, 1, 1, 3, 3, 2),
    "one row": Layer(2, 4, 1, 75, 3, 3),
    "one column": Layer(2, 4, 70, 1, 3, 3, 2),
    "several stretches": Layer(2, 2, 50, 60, 3),
}


class Image(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 4)]

    def __init__(self, x: Tensor) -> None:
        super().__init__(x.data_ptr(), (ctypes.c_int64 * 4)(*x.stride()))


class Call(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int32),
        ("sizes", ctypes.c_int64 * 8),
        ("x", Image),
        ("norm_weight", ctypes.c_void_p),
        ("norm_bias", ctypes.c_void_p),
        ("conv_weight", ctypes.c_void_p),
        ("mean", ctypes.c_void_p),
        ("var", ctypes.c_void_p),
        ("training", ctypes.c_int32),
        ("eps", ctypes.c_float),
    ]


class Gradients(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "norm_weight", "norm_bias", "conv_weight")]


def gradient_for(layer: Layer, dtype: torch.dtype) -> Tensor:
    height, width = ((n - 1) // layer.stride + 1 for n in (layer.height, layer.width))
    generator = torch.Generator().manual_seed(9)
    return torch.randn((layer.batch, layer.outputs, height, width), generator=generator).to(dtype)


class Run:
    """One call on the device: statistics in training, forward and backward; the results are tensors of it."""

    def __init__(
        self, library: Library, device: Device, layer: Layer, inputs: list[Tensor], running: list[Tensor],
        training: bool, grad_out: Tensor, descending: bool = False,
    ) -> None:  # fmt: skip
        self.library, self.device = library, device
        set_up(library.functions, descending)
        x, *parameters = inputs
        x, grad_out = device.copy("x", x), device.copy("grad_out", grad_out)
        tensors = [device.copy(name, t.float()) for name, t in zip(INPUTS[1:3], parameters, strict=False)]
        tensors.append(device.copy("conv_weight", parameters[2].to(x.dtype)))
        if training:
            statistics = [device.empty(name, layer.channels) for name in ("mean", "var")]
        else:
            statistics = [device.copy(name, t.float()) for name, t in zip(("mean", "var"), running, strict=True)]
        sizes = (ctypes.c_int64 * 8)(*x.shape, layer.outputs, layer.groups, layer.kernel, layer.stride)
        addresses = [t.data_ptr() for t in (*tensors, *statistics)]
        self.call = Call(DTYPE_CODES[x.dtype], sizes, Image(x), *addresses, training, EPS)
        self.bytes = (ctypes.c_size_t * 3)()
        library.call("bn_relu_conv2d_workspace_bytes", ctypes.byref(self.call), ctypes.byref(self.bytes))
        if training:
            self._launch("statistics", 0, *(pointer(t) for t in statistics))
        self.out = device.empty("out", *grad_out.shape, dtype=x.dtype)
        self._launch("forward", 1, pointer(self.out))
        self.grads = [device.empty("grad_x", *x.shape, dtype=x.dtype)]
        self.grads += [device.empty(f"grad_{name}", *t.shape) for name, t in zip(INPUTS[1:], tensors, strict=True)]
        gradients = Gradients(*(t.data_ptr() for t in self.grads))
        self._launch("backward", 2, ctypes.byref(Image(grad_out)), ctypes.byref(gradients))

    def _launch(self, function: str, number: int, *arguments) -> None:
        workspace = self.device.empty("workspace", self.bytes[number], dtype=torch.uint8)
        self.library.call(f"bn_relu_conv2d_{function}", ctypes.byref(self.call), *arguments, pointer(workspace))

    def results(self) -> dict[str, Tensor]:
        return dict(zip(("out", *INPUTS), (self.out, *self.grads), strict=True))


def plain(layer: Layer, training: bool, grad_out: Tensor) -> Evaluate:
    """Plain torch: output and gradients."""

    def evaluate(x: Tensor, parameters: list[Tensor], running: list[Tensor]) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, *parameters)]
        states = [r.clone() for r in running]
        out = reference(*leaves, *states, training, 0.0, EPS, layer.stride, layer.groups)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))]

    return evaluate


def check(
    library: Library, device: Device, layer: Layer, dtype: torch.dtype, training: bool = True, x_layout: str = "nchw",
    layout: str = "nchw",
) -> None:  # fmt: skip
    inputs, states = make_layer(layer, dtype, layout=x_layout)
    x, *parameters = inputs.values()
    running = list(states.values())
    grad_out = in_layout(gradient_for(layer, dtype), layout)
    evaluate = plain(layer, training, grad_out)
    library.forget_launches()
    actual = Run(library, device, layer, [x, *parameters], running, training, grad_out).results()
    assert_as_exact(evaluate, x, parameters, running, actual)
    library.verify_launches(evaluate(x.double(), doubled(parameters), doubled(running)))


def run_covering_checks(library: Library, device: Device) -> None:
    """Runs every instance of every kernel; test_kernel_coverage.py finds this function by its name."""
    for dtype in DTYPES:
        for name in ("channels and positions that fill no tile", "strided and in groups"):
            check(library, device, LAYERS[name], dtype)
            device.reset()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_training(library, device, name, dtype):
    check(library, device, LAYERS[name], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["several tiles of channels", "strided and in groups"])
def test_evaluation(library, device, name, dtype):
    check(library, device, LAYERS[name], dtype, training=False)


@pytest.mark.parametrize("layout", ["channels_last", "slice", "slice of columns", "one row for all", "odd address"])
def test_any_layout(library, device, layout):
    layer = LAYERS["strided and in groups"]
    check(library, device, layer, torch.float32, x_layout=layout)
    device.reset()
    check(library, device, layer, torch.bfloat16, layout=layout)


# A missing barrier shows when the threads of a block take their turns in another order.
@pytest.mark.parametrize("name", ["channels and positions that fill no tile", "strided and in groups"])
def test_results_are_the_same_bits_in_any_order_of_threads(library, device, name):
    layer = LAYERS[name]
    inputs, states = make_layer(layer, torch.bfloat16)
    call = (layer, [*inputs.values()], [*states.values()], True, gradient_for(layer, torch.bfloat16))
    first, second = (Run(library, device, *call, descending).results() for descending in (False, True))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_statistics_of_a_large_mean(library, device):
    """A mean far larger than the spread costs no digits."""
    layer = LAYERS["several stretches"]
    inputs, states = make_layer(layer, torch.float32)
    inputs["x"] += 1000
    grad_out = gradient_for(layer, torch.float32)
    run = Run(library, device, layer, [*inputs.values()], [*states.values()], True, grad_out)
    var, mean = torch.var_mean(inputs["x"].double(), (0, 2, 3), correction=0)
    found = [torch.frombuffer((ctypes.c_float * layer.channels).from_address(address), dtype=torch.float32)
             for address in (run.call.mean, run.call.var)]  # fmt: skip
    eps = torch.finfo(torch.float32).eps
    assert (found[0] - mean).abs().max() <= eps * inputs["x"].abs().max()
    assert (found[1] - var).abs().max() <= 4 * eps * var.max()


def test_not_a_number_reaches_what_depends_on_it_alone(library, device):
    """In evaluation: in training it reaches all of its channel."""
    layer = LAYERS["in groups"]
    inputs, states = make_layer(layer, torch.float32)
    inputs["x"][1, 2, 3, 4] = torch.nan
    grad_out = gradient_for(layer, torch.float32)
    x, *parameters = inputs.values()
    running = list(states.values())
    actual = Run(library, device, layer, [x, *parameters], running, False, grad_out).results()
    expected = plain(layer, False, grad_out)(x, parameters, running)
    for found, truth in zip(actual.values(), expected, strict=True):
        assert torch.equal(found.isnan(), truth.isnan())
    assert actual["out"].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["in groups", "strided, odd extents", "pointwise, strided and in groups"])
def test_a_gradient_that_is_no_number_reaches_what_depends_on_it_alone(library, device, name, spoilt, dtype):
    """A tap that leads from there out of the map does not: its gradient is torch's without that place."""
    layer = LAYERS[name]
    inputs, states = make_layer(layer, dtype)
    inputs["norm_bias"] += 20  # no ReLU is at rest
    x, *parameters = inputs.values()
    running = list(states.values())
    grad_out = gradient_for(layer, dtype)
    place, others = torch.zeros_like(grad_out), grad_out.clone()
    place[1, 0, 0, 2], others[1, 0, 0, 2] = 1, 0
    depends = plain(layer, False, place.double())(x.double(), doubled(parameters), doubled(running))[-1] != 0
    assert depends.any()
    assert layer.kernel == 1 or not depends[0, :, 0].any()

    def without(*call) -> list[Tensor]:
        return [plain(layer, False, others)(*call)[-1].masked_fill(depends, 0)]

    grad_out[1, 0, 0, 2] = spoilt
    actual = Run(library, device, layer, [x, *parameters], running, False, grad_out).results()["conv_weight"]
    assert torch.equal(~actual.isfinite(), depends)
    assert_as_exact(without, x, parameters, running, {"conv_weight": actual.masked_fill(depends, 0)})


def test_too_large_an_image_is_refused(library):
    sizes = (ctypes.c_int64 * 8)(1, 2**15, 2**8, 2**7, 1, 1, 1, 1)
    call = Call(0, sizes, Image(torch.empty(1, 1, 1, 1)))
    with pytest.raises(RuntimeError, match="fewer than 2\\^30 elements"):
        library.call("bn_relu_conv2d_workspace_bytes", ctypes.byref(call), ctypes.byref((ctypes.c_size_t * 3)()))
