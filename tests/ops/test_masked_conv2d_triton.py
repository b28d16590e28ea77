"""Numerics of the Triton kernels of `masked_conv2d`, by Triton's interpreter on CPU tensors, against float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from exactness import Evaluate, assert_as_exact
from layouts import MAPS, in_layout
from masked_inputs import Masked, make_masked
from torch import Tensor

from pyext._backend import BackendError
from pyext.ops import masked_conv2d
from pyext.triton_kernels import masked_conv2d as kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYERS = {
    "one of everything": Masked(1, 1, 1, 1, 1, (1, 1), padding=0),
    "several blocks of rows and depths": Masked(1, 70, 4, 5, 150),
    "several blocks of positions": Masked(1, 6, 9, 19, 5),
    "several images in a tile": Masked(9, 12, 3, 5, 10, gated=True),
    "part of the positions of several images": Masked(20, 3, 6, 11, 4, (1, 1), padding=0),
    "1x1": Masked(3, 14, 5, 4, 10, (1, 1), padding=0, activation=None),
    "strided 1x1": Masked(2, 6, 9, 8, 9, (1, 1), (2, 3), 0),
    "strided, dilated, uneven": Masked(2, 6, 12, 13, 7, (3, 2), (2, 3), (2, 1), (2, 3), activation="relu6"),
    "stride and dilation with a common divisor": Masked(2, 4, 15, 11, 5, (3, 3), (4, 2), (1, 2), (2, 4)),
    "stride beyond the map": Masked(2, 4, 2, 3, 5, (2, 2), 5, 1),
    "padded beyond the kernel": Masked(2, 4, 3, 3, 4, (2, 2), 1, 3, activation=None),
    "gate without activation": Masked(3, 6, 5, 6, 8, gated=True, activation=None),
    "no affine part": Masked(3, 6, 5, 6, 8, affine=False, activation=None),
    "one position": Masked(20, 40, 1, 1, 30, (1, 1), padding=0, subnets=3, gated=True),
    "mixed, one image in a tile": Masked(4, 12, 9, 17, 10, subnets=3, gated=True),
    "mixed, several images in a tile": Masked(17, 12, 4, 4, 20, subnets=3),
    "mixed, as many sub-networks as images": Masked(5, 6, 2, 3, 4, (2, 1), subnets=66, keep=0.2),
    "groups": Masked(2, 30, 3, 4, 24, groups=3, gated=True),
    "groups of many": Masked(1, 70, 3, 4, 140, (1, 2), groups=2, keep=1.0),
    "mixed groups": Masked(4, 30, 4, 5, 24, groups=3, subnets=2, stride=2, activation="relu6"),
    "depthwise": Masked(3, 20, 9, 8, 20, groups=20, gated=True),
    "depthwise with a multiplier": Masked(2, 10, 9, 8, 30, (5, 5), 2, 2, groups=10),
    "small groups": Masked(2, 12, 6, 5, 9, (2, 3), groups=3),
    "mixed depthwise": Masked(9, 12, 4, 3, 12, groups=12, subnets=3, activation=None),
}


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch):
    """Tiles as for many programs: the interpreter takes as long for a small one."""
    monkeypatch.setattr(kernels, "FULL_GPU", 1)


def step(tensors: dict[str, Tensor], lists: dict[str, Tensor], layer: Masked, backend: str) -> dict[str, Tensor]:
    """Output and gradients of one call."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    out = masked_conv2d(**leaves, **lists, **layer.options, backend=backend)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(tensors["x"])
    grads = torch.autograd.grad(out, list(leaves.values()), gradient.to(out.dtype))
    return dict(zip(("out", *leaves), [out.detach(), *grads], strict=True))


def plain(names: Sequence[str], lists: dict[str, Tensor], layer: Masked) -> Evaluate:
    def evaluate(x: Tensor, parameters: list[Tensor], _: list[Tensor]) -> list[Tensor]:
        return list(step(dict(zip(names, [x, *parameters], strict=True)), lists, layer, "reference").values())

    return evaluate


def check(layer: Masked, dtype: torch.dtype, parameter_dtype: torch.dtype | None = None, layout: str = "nchw") -> None:
    tensors, lists = make_masked(layer, dtype, parameter_dtype)
    x, *parameters = tensors.values()
    x = in_layout(x, layout)
    actual = step({**tensors, "x": x}, lists, layer, "triton")
    assert actual["out"].is_contiguous()
    assert_as_exact(plain(list(tensors), lists, layer), x, parameters, [], actual)


def run_covering_checks(dtype: torch.dtype) -> None:
    """Runs every kernel on inputs of `dtype`; test_kernel_coverage.py finds this function by its name."""
    check(LAYERS["mixed, several images in a tile"], dtype)
    check(LAYERS["mixed depthwise"], dtype)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_output_and_gradients(layer):
    check(layer, torch.float32)


HALF = [
    "several blocks of rows and depths",
    "mixed, several images in a tile",
    "gate without activation",
    "mixed groups",
]
HALF += ["depthwise"]


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", HALF)
def test_half_precision(name, dtype):
    check(LAYERS[name], dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", ["mixed, one image in a tile", "small groups"])
def test_parameters_in_float32(name, dtype):
    check(LAYERS[name], dtype, torch.float32)


@pytest.mark.parametrize("name", ["several blocks of rows and depths", "mixed, one image in a tile", "mixed depthwise"])
def test_smaller_tiles_where_there_are_few(name, monkeypatch):
    monkeypatch.setattr(kernels, "FULL_GPU", 264)
    check(LAYERS[name], torch.float32)


@pytest.mark.parametrize("layout", MAPS)
def test_any_layout(layout):
    check(Masked(3, 5, 4, 5, 4, (2, 1), padding=0), torch.float32, layout=layout)


@pytest.mark.parametrize("layout", ["channels_last", "slice of rows", "one column for all"])
@pytest.mark.parametrize("name", ["mixed, several images in a tile", "depthwise", "1x1"])
def test_any_layout_by_every_kernel(name, layout):
    check(LAYERS[name], torch.float32, layout=layout)


@pytest.mark.parametrize("name", ["mixed, one image in a tile", "1x1", "depthwise"])
def test_weights_and_gradients_of_any_strides(name):
    layer = LAYERS[name]
    tensors, lists = make_masked(layer, torch.float32)
    expected = step(tensors, lists, layer, "triton")
    moved = {key: torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0] for key, x in tensors.items()}
    moved["weight"] = moved["weight"].contiguous(memory_format=torch.channels_last)
    for key, value in step(moved, lists, layer, "triton").items():
        assert torch.equal(value, expected[key]), key
    leaves = {key: x.detach().requires_grad_() for key, x in tensors.items()}
    out = masked_conv2d(**leaves, **lists, **layer.options, backend="triton")
    same = torch.tensor(0.7).expand(out.shape)
    of_expanded = torch.autograd.grad(out, leaves.values(), same, retain_graph=True)
    of_dense = torch.autograd.grad(out, leaves.values(), same.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(of_expanded, of_dense, strict=True))


@pytest.mark.parametrize("name", ["several blocks of rows and depths", "mixed, one image in a tile", "mixed depthwise"])
def test_offsets_of_64_bits_give_the_same_bits(name, monkeypatch):
    layer = LAYERS[name]
    tensors, lists = make_masked(layer, torch.float32)
    expected = step(tensors, lists, layer, "triton")
    monkeypatch.setattr(kernels, "INT32_OFFSETS", 1)
    for key, value in step(tensors, lists, layer, "triton").items():
        assert torch.equal(value, expected[key]), key


def test_channels_more_than_two_to_the_31_elements_apart():
    """Of memory that is reserved, but used at a few places alone."""
    small = torch.randn(2, 2, 3, 3)
    apart = 2**31 + 8
    memory = torch.empty(0).set_(torch.UntypedStorage(4 * (apart + 64)))
    x = memory.as_strided(small.shape, (16, apart, 3, 1)).copy_(small)
    weight = torch.randn(3, 2, 3, 3)
    arguments = {"weight": weight, "padding": 1, "backend": "triton"}
    assert torch.equal(masked_conv2d(x, **arguments), masked_conv2d(small, **arguments))
    depthwise = {"weight": weight[:2, :1], "groups": 2, "backend": "triton"}
    assert torch.equal(masked_conv2d(x, **depthwise), masked_conv2d(small, **depthwise))


@pytest.mark.parametrize("name", ["groups", "depthwise", "several images in a tile"])
def test_numbers_outside_the_layer_count_as_absent(name):
    """As on a GPU, where nobody looks at the lists before the kernels do. What they name is not read."""
    layer = LAYERS[name]
    tensors, lists = make_masked(layer, torch.float32)
    numbers = [1, 1, 1, 1, 1, 1, layer.groups, 1]
    parameters = [tensors["weight"], tensors["scale"], tensors["shift"]]
    x, gate = tensors["x"], tensors["gate"]
    others = torch.zeros(layer.batch, dtype=torch.int64)
    plain_arguments = (x, *parameters, lists["inputs"], lists["outputs"], others, gate, numbers)
    out = kernels.forward(*plain_arguments)
    grads = kernels.backward(out, out, *plain_arguments, True, True)

    def spread(x: Tensor, dim: int, filling: Sequence[float]) -> Tensor:
        parts = [torch.full_like(x.narrow(dim, 0, 1), value) for value in filling]
        return torch.cat([parts[0], x.narrow(dim, 0, 1), *parts[1:], x.narrow(dim, 1, x.shape[dim] - 1)], dim)

    wrong = (2**40, -7, 10**6)
    wrong_arguments = (
        spread(x, 1, [torch.nan] * 3), *parameters, spread(lists["inputs"], 1, wrong),
        spread(lists["outputs"], 1, wrong), others, spread(gate, 1, [1.0] * 3), numbers,
    )  # fmt: skip
    wrong_out = kernels.forward(*wrong_arguments)
    # Sums over other blocks of depths are rounded otherwise.
    torch.testing.assert_close(wrong_out, spread(out, 1, [0.0] * 3))
    assert not wrong_out[:, [0, 2, 3]].any()
    wrong_grads = kernels.backward(spread(out, 1, [1.0] * 3), wrong_out, *wrong_arguments, True, True)
    expected = {
        "x": spread(grads.x, 1, [0.0] * 3),
        "gate": spread(grads.gate, 1, [0.0] * 3),
        **{key: getattr(grads, key) for key in ("weight", "scale", "shift")},
    }
    for key, value in expected.items():
        torch.testing.assert_close(getattr(wrong_grads, key), value, msg=lambda text, key=key: f"{key}: {text}")
    others[0] = 99
    assert not kernels.forward(*plain_arguments)[0].any()
    grads = kernels.backward(out, out, *plain_arguments, True, True)
    assert not grads.x[0].any()
    assert not grads.gate[0].any()


@pytest.mark.parametrize("name", ["mixed, several images in a tile", "mixed groups", "mixed depthwise"])
def test_what_lies_behind_a_shorter_list_is_not_read(name):
    layer = LAYERS[name]
    tensors, lists = make_masked(layer, torch.float32)
    expected = step(tensors, lists, layer, "triton")
    absent = (lists["inputs"] < 0)[lists["subnets"]]
    x = tensors["x"].masked_fill(absent[:, :, None, None], torch.nan)
    for key, value in step({**tensors, "x": x}, lists, layer, "triton").items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("name", ["groups", "depthwise", "several images in a tile"])
def test_not_a_number_reaches_what_depends_on_it(name):
    layer = LAYERS[name]
    tensors, lists = make_masked(layer, torch.float32)
    tensors["x"][1, 0, 2, 1] = torch.nan
    with torch.no_grad():
        actual, expected = (
            masked_conv2d(**tensors, **lists, **layer.options, backend=b) for b in ("triton", "reference")
        )
    assert torch.equal(actual.isnan(), expected.isnan())
    assert expected.isnan().any()


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("name", ["groups", "depthwise", "several images in a tile", "strided, dilated, uneven"])
def test_not_a_number_in_a_gradient_reaches_what_depends_on_it(name):
    """A tap that leads from there out of the map does not: its gradient is what it was without."""
    layer = replace(LAYERS[name], activation=None, gated=False)
    tensors, lists = make_masked(layer, torch.float32)

    def gradients(backend: str, *values: float) -> dict[str, Tensor]:
        leaves = {key: x.detach().requires_grad_() for key, x in tensors.items()}
        out = masked_conv2d(**leaves, **lists, **layer.options, backend=backend)
        gradient = torch.full_like(out, values[0])
        gradient[1, 0, 0, 2] = values[-1]
        return dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), gradient), strict=True))

    depends, without = gradients("reference", 0, 1), gradients("triton", 1, 0)
    for key, actual in gradients("triton", 1, torch.nan).items():
        assert torch.equal(actual.isnan(), depends[key] != 0), key
        assert torch.equal(actual.nan_to_num(0), without[key].masked_fill(depends[key] != 0, 0)), key
    assert not depends["weight"][0, :, 0].any()


@pytest.mark.parametrize("name", ["mixed, one image in a tile", "mixed groups"])
def test_a_gradient_does_not_depend_on_which_others_are_asked_for(name):
    layer = LAYERS[name]
    tensors, lists = make_masked(layer, torch.bfloat16)
    expected = step(tensors, lists, layer, "triton")
    for key in tensors:
        leaves = {k: x.detach().requires_grad_(k == key) for k, x in tensors.items()}
        out = masked_conv2d(**leaves, **lists, **layer.options, backend="triton")
        gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        (alone,) = torch.autograd.grad(out, leaves[key], gradient.to(out.dtype))
        assert torch.equal(alone, expected[key]), key


@pytest.mark.parametrize("name", ["gate without activation", "groups", "mixed depthwise"])
def test_no_image(name):
    layer = replace(LAYERS[name], batch=0)
    tensors, lists = make_masked(layer, torch.float32)
    for key, value in step(tensors, lists, layer, "triton").items():
        assert value.shape == (
            tensors[key].shape if key in tensors else (0, len(lists["outputs"][0]), *value.shape[2:])
        )
        assert not value.any(), key


def test_pooling():
    layer = Masked(2, 6, 7, 8, 5, pool=2)
    tensors, lists = make_masked(layer, torch.float32)
    whole = masked_conv2d(**tensors, **lists, **replace(layer, pool=1).options, backend="triton")
    out = masked_conv2d(**tensors, **lists, **layer.options, backend="triton")
    assert torch.equal(out, torch.nn.functional.max_pool2d(whole, 2))


def test_precision_of_float32_is_that_of_torchs_convolutions():
    before = torch.backends.cudnn.allow_tf32
    try:
        for allowed, expected in ((True, "tf32"), (False, "ieee")):
            torch.backends.cudnn.allow_tf32 = allowed
            assert kernels.precision() == expected
            check(LAYERS["several images in a tile"], torch.float32)
    finally:
        torch.backends.cudnn.allow_tf32 = before


def test_float64_is_refused():
    tensors, lists = make_masked(LAYERS["1x1"], torch.float64)
    with pytest.raises(BackendError, match="float64"):
        masked_conv2d(**tensors, **lists, backend="triton")
