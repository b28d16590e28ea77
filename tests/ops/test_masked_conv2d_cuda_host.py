"""The CUDA kernels of `masked_conv2d`, run on the CPU by the host shim in tests/cuda_host, against float64."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import pytest
import torch
import torch.nn.functional as F
from cuda_host.device import Device
from cuda_host.library import Library
from exactness import Evaluate, assert_as_exact, doubled
from layouts import NAN, in_layout
from masked_inputs import Masked, make_masked
from memory_device import DTYPE_CODES, pointer, set_up
from torch import Tensor

from pyext.ops.masked_conv2d import reference
from pyext.ops.masked_conv2d_parts import ACTIVATIONS, Geometry

DTYPES = tuple(DTYPE_CODES)
PARAMETERS = ("weight", "scale", "shift", "gate")


class Axis(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("input", "kernel", "stride", "padding", "dilation")]


class Sizes(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "inputs", "outputs", "subnets")),
        ("rows", Axis),
        ("columns", Axis),
        *((name, ctypes.c_int64) for name in ("out_channels", "group_inputs", "groups")),
        ("activation", ctypes.c_int32),
        ("pool", ctypes.c_int64),
    ]


class ImageTensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 4)]

    @staticmethod
    def of(x: Tensor) -> ImageTensor:
        return ImageTensor(x.data_ptr(), (ctypes.c_int64 * 4)(*x.stride()))


class Inputs(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int32),
        ("parameter_dtype", ctypes.c_int32),
        ("sizes", Sizes),
        ("x", ImageTensor),
        ("weight", ImageTensor),
        *((name, ctypes.c_void_p) for name in ("scale", "shift", "gate", "inputs", "outputs", "subnets")),
    ]


class Gradients(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("x", *PARAMETERS)]


@dataclass(frozen=True)
class Call:
    """The operator's arguments, in its order."""

    x: Tensor
    weight: Tensor
    scale: Tensor | None
    shift: Tensor | None
    inputs: Tensor
    outputs: Tensor
    subnets: Tensor | None
    gate: Tensor | None
    geometry: Geometry
    pool: int = 1

    def leaves(self) -> dict[str, Tensor]:
        """What has a gradient: x first."""
        tensors = {name: getattr(self, name) for name in ("x", *PARAMETERS)}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}


LAYERS = {
    "one of everything": Masked(1, 1, 1, 1, 1, (1, 1), padding=0, activation=None, affine=False),
    "linear": Masked(9, 5, 1, 1, 7, (1, 1), padding=0, subnets=3, activation=None),
    "several sub-networks": Masked(5, 8, 5, 6, 9, subnets=3, gated=True),
    "gate without activation": Masked(3, 7, 4, 5, 6, subnets=2, activation=None, gated=True),
    "stride and dilation": Masked(2, 4, 9, 11, 5, (3, 2), (2, 3), (2, 1), (1, 2), keep=0.8, activation="relu6"),
    "stride beyond the kernel": Masked(2, 4, 7, 5, 3, (1, 2), (3, 4), (1, 0), (1, 2), activation=None),
    "stride and dilation with a divisor": Masked(2, 3, 9, 8, 3, (3, 3), (2, 4), (2, 3), 2, activation=None),
    "several tiles": Masked(2, 14, 9, 17, 75, (2, 2), 1, (1, 0), keep=0.93, activation=None),
    "several splits": Masked(2, 40, 3, 4, 40, subnets=2, keep=0.9, activation=None, gated=True),
    "groups": Masked(3, 36, 5, 4, 48, groups=2, subnets=2, keep=0.7, activation=None, gated=True),
    "wide groups": Masked(4, 76, 6, 5, 140, (2, 3), (2, 1), groups=2, subnets=2, keep=0.9, activation=None),
    "small groups": Masked(3, 12, 5, 4, 6, stride=(2, 1), groups=3, subnets=2, gated=True),
    "depthwise": Masked(10, 9, 6, 7, 9, stride=2, groups=9, subnets=3, keep=0.4, activation="relu6", gated=True),
    "no images": Masked(0, 5, 3, 4, 6, subnets=2, gated=True),
    "pooled": Masked(3, 5, 9, 11, 7, stride=(1, 2), padding=(1, 2), subnets=2, gated=True, pool=2),
    "depthwise, pooled": Masked(2, 5, 5, 8, 5, groups=5, keep=1.0, activation=None, pool=2),
}


def make_call(
    layer: Masked, dtype: torch.dtype, parameter_dtype: torch.dtype | None = None, layout: str = "nchw"
) -> Call:
    """Arguments in `dtype`, x in `layout`; no value so near to an activation's bend that rounding takes it over."""
    for seed in range(1000):
        call = _draw_call(layer, dtype, parameter_dtype, layout, seed)
        straight = replace(call.geometry, activation=0)
        v = evaluate_plain(replace(call, geometry=straight), torch.float64)
        bends = [(0.0, 0.003), (6.0, 0.05)][: call.geometry.activation]
        if all((v[v != 0] - bend).abs().min() > distance for bend, distance in bends if len(v)):
            return call
    raise ValueError("all draws have values where an activation bends: ask for fewer of them")


def _draw_call(layer: Masked, dtype: torch.dtype, parameter_dtype: torch.dtype | None, layout: str, seed: int) -> Call:
    """x's channels behind a shorter list are NaN: they are not read."""
    tensors, lists = make_masked(layer, dtype, parameter_dtype, seed)
    x, inputs, subnets = tensors["x"], lists["inputs"], lists.get("subnets")
    if subnets is not None:
        x = x.masked_fill((inputs[subnets] < 0)[:, :, None, None], NAN)
    pairs = (n if isinstance(n, tuple) else (n, n) for n in (layer.stride, layer.padding, layer.dilation))
    geometry = Geometry(*pairs, layer.groups, ACTIVATIONS.index(layer.activation))
    others = {name: tensors.get(name) for name in PARAMETERS}
    return Call(x=in_layout(x, layout), **others, **lists | {"subnets": subnets}, geometry=geometry, pool=layer.pool)


def evaluate_plain(call: Call, dtype: torch.dtype | None = None) -> Tensor:
    """The result by plain torch, in `dtype` where it is given."""
    leaves = {} if dtype is None else {name: leaf.to(dtype) for name, leaf in call.leaves().items()}
    *arguments, pool = (getattr(replace(call, **leaves), field.name) for field in fields(call))
    out = reference(*arguments)
    return out if pool == 1 else F.max_pool2d(out, pool)


def plain(call: Call, grad_out: Tensor) -> Evaluate:
    """Plain torch: the result and, without pooling, the gradients of all that has one."""

    def evaluate(x: Tensor, parameters: Sequence[Tensor], _: Sequence[Tensor]) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, *parameters)]
        out = evaluate_plain(replace(call, **dict(zip(call.leaves(), leaves, strict=True))))
        if call.pool != 1:
            return [out.detach()]
        if not len(x):
            return [out.detach(), *map(torch.zeros_like, leaves)]
        return [out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))]

    return evaluate


class Kernels:
    """The launchers on copies of a call's tensors in the shim's global memory."""

    def __init__(self, library: Library, device: Device, call: Call, descending_threads: bool = False) -> None:
        set_up(library.functions, descending_threads)
        self._library, self._device, self._call = library, device, call
        tensors = {f.name: getattr(call, f.name) for f in fields(call)}
        self._own = {name: device.copy(name, tensor) for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
        x, weight, g = self._own["x"], self._own["weight"], call.geometry
        pairs = zip(x.shape[2:], weight.shape[2:], g.stride, g.padding, g.dilation, strict=True)
        rows, columns = (Axis(*numbers) for numbers in pairs)
        counts = len(x), x.shape[1], call.outputs.shape[1], len(call.inputs)
        sizes = Sizes(*counts, rows, columns, *weight.shape[:2], g.groups, g.activation, call.pool)
        codes = DTYPE_CODES[x.dtype], DTYPE_CODES[weight.dtype]
        others = [self._own[f[0]].data_ptr() if f[0] in self._own else None for f in Inputs._fields_[5:]]
        self._inputs = Inputs(*codes, sizes, ImageTensor.of(x), ImageTensor.of(weight), *others)
        extents = [n // call.pool for n in g.extents(x.shape[2], x.shape[3], tuple(weight.shape))]
        self.out = device.empty("out", len(x), call.outputs.shape[1], *extents, dtype=x.dtype)

    def forward(self) -> Tensor:
        workspace = self._workspace("forward")
        self._library.call("masked_conv2d_forward", ctypes.byref(self._inputs), pointer(self.out), pointer(workspace))
        return self._device.freeze(self.out)

    def backward(self, grad_out: Tensor, wanted: Sequence[str] = ("x", *PARAMETERS)) -> dict[str, Tensor]:
        grad_out = self._device.copy("grad_out", grad_out)
        results = {
            name: self._device.empty(f"grad_{name}", *leaf.shape, dtype=leaf.dtype if name == "x" else torch.float32)
            for name, leaf in self._call.leaves().items()
            if name in wanted
        }
        gradients = Gradients(**{name: result.data_ptr() for name, result in results.items()})
        workspace = self._workspace("backward", ctypes.byref(gradients))
        self._library.call(
            "masked_conv2d_backward",
            ctypes.byref(self._inputs),
            pointer(grad_out),
            pointer(self.out),
            ctypes.byref(gradients),
            pointer(workspace),
        )
        return results

    def _workspace(self, which: str, *arguments: object) -> Tensor:
        size = ctypes.c_size_t()
        name = f"masked_conv2d_{which}_workspace_bytes"
        self._library.call(name, ctypes.byref(self._inputs), *arguments, ctypes.byref(size))
        return self._device.empty("workspace", size.value, dtype=torch.uint8)


def grad_out_for(kernels: Kernels) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(kernels.out.shape, generator=generator, dtype=torch.float64).to(kernels.out.dtype)


def run(library: Library, device: Device, call: Call, descending_threads: bool = False) -> dict[str, Tensor]:
    """The result and, without pooling, the gradients, each in the dtype of what it belongs to."""
    kernels = Kernels(library, device, call, descending_threads)
    results = {"out": kernels.forward()}
    if call.pool == 1:
        grads = kernels.backward(grad_out_for(kernels))
        results |= {f"grad_{name}": grads[name].to(leaf.dtype) for name, leaf in call.leaves().items()}
    return results


def check(library: Library, device: Device, call: Call) -> None:
    library.forget_launches()
    actual = run(library, device, call)
    evaluate = plain(call, grad_out_for(Kernels(library, device, call)))
    x, *parameters = call.leaves().values()
    assert_as_exact(evaluate, x, parameters, [], actual)
    library.verify_launches(evaluate(x.double(), doubled(parameters), []))


def run_covering_checks(library: Library, device: Device) -> None:
    """Runs every instance of every kernel; test_kernel_coverage.py finds this function by its name."""
    for dtype in DTYPES:
        for parameter_dtype in {dtype, torch.float32}:
            for name in ("several sub-networks", "several splits", "depthwise"):
                check(library, device, make_call(LAYERS[name], dtype, parameter_dtype))
                device.reset()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layers(library, device, name, dtype):
    check(library, device, make_call(LAYERS[name], dtype))


@pytest.mark.parametrize("layout", ["channels_last", "slice of columns", "every other image", "one row for all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["stride and dilation", "depthwise"])
def test_float32_parameters_and_any_layout(library, device, name, dtype, layout):
    check(library, device, make_call(LAYERS[name], dtype, torch.float32, layout))


@pytest.mark.parametrize("name", ["several sub-networks", "small groups"])
def test_weight_is_read_with_its_strides(library, device, name):
    call = make_call(LAYERS[name], torch.float32)
    check(library, device, replace(call, weight=in_layout(call.weight, "channels_last")))


# A missing barrier shows when the threads of a block take their turns in another order.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["several sub-networks", "several tiles", "several splits", "depthwise", "pooled"])
def test_results_are_the_same_bits_in_any_order_of_threads(library, device, name, dtype):
    call = make_call(LAYERS[name], dtype)
    first, second = (run(library, device, call, descending) for descending in (False, True))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", ["several sub-networks", "groups", "depthwise"])
def test_numbers_outside_the_layer_count_as_absent(library, device, name):
    """In a list, anywhere; and as an image's sub-network, where all channels are absent."""
    call = make_call(LAYERS[name], torch.float32)
    subnet = call.subnets[0]
    lists = {"inputs": call.inputs.clone(), "outputs": call.outputs.clone()}
    strange = {"inputs": call.inputs.clone(), "outputs": call.outputs.clone()}
    for key, number in (("inputs", 2**40), ("outputs", -7)):
        lists[key][subnet, 1] = -1
        strange[key][subnet, 1] = number
    expected = run(library, device, replace(call, **lists))
    actual = run(library, device, replace(call, **strange))
    assert all(torch.equal(expected[key], actual[key]) for key in expected)
    images = call.subnets == subnet
    assert not actual["out"][images, 1].any()
    assert not actual["grad_x"][images, 1].any()
    without = run(library, device, replace(call, subnets=call.subnets.masked_fill(images, 2**33)))
    for key in ("out", "grad_x", "grad_gate"):
        assert not without[key][images].any()
        assert without[key][~images].any()


@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("weight", "scale"), ("gate", "x"), ("gate",), ("shift",)])
@pytest.mark.parametrize("name", ["several sub-networks", "gate without activation", "depthwise"])
def test_gradients_that_are_asked_for_alone(library, device, name, wanted):
    call = make_call(LAYERS[name], torch.float32)
    kernels = Kernels(library, device, call)
    kernels.forward()
    grad_out = grad_out_for(kernels)
    every, some = kernels.backward(grad_out), kernels.backward(grad_out, wanted)
    assert set(some) == set(wanted)
    assert all(torch.equal(every[key], some[key]) for key in wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["several sub-networks", "depthwise", "pooled", "depthwise, pooled"])
def test_not_a_number_reaches_what_depends_on_it(library, device, name, dtype):
    call = make_call(LAYERS[name], dtype)
    call.x[1, 0, 2, 3] = NAN
    expected = evaluate_plain(call, torch.float64)
    assert expected.isnan().any()
    assert torch.equal(run(library, device, call)["out"].isnan(), expected.isnan())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["groups", "wide groups", "depthwise", "stride and dilation"])
def test_not_a_number_in_a_gradient_reaches_what_depends_on_it(library, device, name, dtype):
    """A tap that leads from there out of the map does not: its gradient is what it was without."""
    layer = replace(LAYERS[name], activation=None, gated=False)
    call = make_call(layer, dtype)
    kernels = Kernels(library, device, call)
    ones = torch.ones_like(kernels.forward())
    at_corner = torch.zeros_like(ones)
    at_corner[1, 0, 0, 0] = 1

    exact, grads = plain(call, at_corner), {}
    x, *parameters = call.leaves().values()
    depends = dict(zip(call.leaves(), exact(x.double(), doubled(parameters), [])[1:], strict=True))
    for value in (0, NAN):
        grads[value] = kernels.backward(ones.masked_fill(at_corner != 0, value))
    for key, actual in grads[NAN].items():
        reached = depends[key] != 0
        assert torch.equal(actual.isnan(), reached), key
        assert torch.equal(actual[~reached], grads[0][key][~reached]), key
    assert not depends["weight"][:, :, 0, 0].any()
    assert depends["weight"].any()


def test_a_call_beyond_what_kernels_count_is_refused(library, device):
    call = make_call(LAYERS["one of everything"], torch.float32)
    kernels = Kernels(library, device, replace(call, geometry=Geometry(padding=(2**29, 0), stride=(2**29, 1))))
    with pytest.raises(RuntimeError, match="are too large"):
        kernels.forward()
