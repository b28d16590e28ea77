"""`masked_conv2d` on the CPU against float64, plain torch and the dense layer with channels zeroed."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from exactness import inexact
from layouts import MAPS, in_layout
from masked_inputs import Masked, drawn_lists, make_masked

from pyext import _backend
from pyext.ops import masked_conv2d, masked_linear, pack_masked_conv2d
from pyext.ops.masked_conv2d import PreparedChain, PreparedConv2d

LAYERS = {
    "vgg16, 32x32": Masked(3, 64, 32, 32, 64, keep=0.25),
    "vgg16, 4x4": Masked(64, 128, 4, 4, 96, keep=0.3),
    "vgg16, 2x2": Masked(9, 64, 2, 2, 96, keep=0.3),
    "pooled": Masked(3, 16, 9, 15, 14, pool=2),
    "pooled, small maps": Masked(17, 16, 3, 5, 14, pool=2, gated=True),
    "1x1": Masked(3, 30, 7, 9, 21, (1, 1), padding=0),
    "strided": Masked(3, 12, 15, 11, 9, stride=2),
    "strided 1x1": Masked(3, 12, 15, 11, 9, (1, 1), (2, 3), 0),
    "7x7, strided": Masked(2, 3, 30, 33, 12, (7, 7), 2, 3, keep=1.0),
    "depthwise": Masked(3, 20, 9, 8, 20, groups=20),
    "depthwise with a multiplier": Masked(2, 10, 9, 8, 30, (5, 5), 2, 2, groups=10),
    "groups of unequal parts": Masked(5, 24, 6, 7, 18, groups=3, gated=True),
    "dilated, uneven kernel": Masked(2, 6, 20, 21, 8, (3, 2), (1, 2), (2, 1), (2, 3), activation="relu6"),
    "padded beyond the kernel": Masked(2, 4, 3, 3, 4, (2, 2), 1, 3, activation=None),
    "one image": Masked(1, 40, 16, 16, 50),
    "one image, one position": Masked(1, 40, 1, 1, 50, (1, 1), padding=0),
    "mixed": Masked(64, 48, 4, 4, 40, subnets=16, keep=0.25),
    "mixed, gated, grouped": Masked(20, 24, 9, 5, 18, groups=3, subnets=3, gated=True, activation="relu6"),
    "mixed, a sub-network without images": Masked(1, 6, 5, 5, 8, subnets=3),
    "no affine part": Masked(3, 9, 8, 8, 7, affine=False, activation=None),
    "no image": Masked(0, 5, 4, 4, 6),
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def step(layer, tensors, lists, backend=None):
    """Output and gradients of one call."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    out = masked_conv2d(**leaves, **lists, **layer.options, backend=backend)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    grads = torch.autograd.grad(out, list(leaves.values()), weights)
    return dict(zip(("out", *leaves), [out.detach(), *grads], strict=True))


def inference(layer, tensors, lists, backend=None):
    with torch.no_grad():
        return {"out": masked_conv2d(**tensors, **lists, **layer.options, backend=backend)}


def assert_exact(layer, tensors, lists, function):
    def evaluations():
        generator = torch.Generator().manual_seed(0)
        near = tensors
        for _ in range(8):
            exact = function(layer, {name: tensor.double() for name, tensor in near.items()}, lists, "reference")
            yield list(function(layer, near, lists, "reference").values()), list(exact.values())
            x = tensors["x"]
            near = {**tensors, "x": (x * (1 + 0.01 * torch.randn(x.shape, generator=generator))).to(x.dtype)}

    lines = inexact(function(layer, tensors, lists), evaluations(), {})
    assert not lines, lines


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_inference(name, dtype):
    assert_exact(LAYERS[name], *make_masked(LAYERS[name], dtype), inference)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_gradients(name, dtype):
    assert_exact(LAYERS[name], *make_masked(LAYERS[name], dtype), step)


@pytest.mark.parametrize("name", ["strided", "depthwise", "groups of unequal parts", "dilated, uneven kernel", "1x1"])
def test_is_the_dense_layer_with_channels_zeroed(name):
    layer = LAYERS[name]
    tensors, lists = make_masked(layer, torch.float64)
    kept_in, kept_out = lists["inputs"][0], lists["outputs"][0]
    whole = torch.randn(layer.batch, layer.channels, layer.height, layer.width, dtype=torch.float64)
    mask = torch.zeros(layer.channels, dtype=torch.float64).index_fill_(0, kept_in, 1)
    geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
    dense = F.conv2d(whole * mask[:, None, None], tensors["weight"], None, *geometry)
    v = (dense * tensors["scale"][:, None, None] + tensors["shift"][:, None, None])[:, kept_out]
    if layer.gated:
        v = v * tensors["gate"][:, :, None, None]
    expected = {None: lambda v: v, "relu": F.relu, "relu6": F.relu6}[layer.activation](v)
    actual = masked_conv2d(**{**tensors, "x": whole[:, kept_in]}, **lists, **layer.options)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_packed_weights_give_the_same_bits(name):
    layer = LAYERS[name]
    tensors, lists = make_masked(layer, torch.float32)
    kept = {name: lists[name] for name in ("inputs", "outputs")}
    packed = pack_masked_conv2d(tensors["weight"], **kept, groups=layer.groups)
    expected = inference(layer, tensors, lists)["out"]
    assert torch.equal(masked_conv2d(**tensors, **lists, **layer.options, packed=packed), expected)
    with pytest.raises(RuntimeError, match="packed is not of this weight"):
        masked_conv2d(**tensors, **lists, **layer.options, packed=packed[1:])


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ["vgg16, 32x32", "vgg16, 4x4", "mixed", "one image", "pooled"])
def test_any_number_of_threads_gives_the_same_bits(name, threads):
    layer = LAYERS[name]
    tensors, lists = make_masked(layer, torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = inference(layer, tensors, lists)["out"]
        torch.set_num_threads(threads)
        assert torch.equal(inference(layer, tensors, lists)["out"], expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("layout", MAPS)
@pytest.mark.parametrize("name", ["vgg16, 2x2", "strided", "one image"])
def test_any_layout_gives_the_same_bits(name, layout):
    layer = LAYERS[name]
    tensors, lists = make_masked(layer, torch.float32)
    moved = {**tensors, "x": in_layout(tensors["x"], layout)}
    expected = inference(layer, {**tensors, "x": moved["x"].contiguous()}, lists)["out"]
    assert torch.equal(inference(layer, moved, lists)["out"], expected)


def test_every_sub_network_of_a_mixed_batch_is_its_own_call():
    layer = LAYERS["mixed, gated, grouped"]
    tensors, lists = make_masked(layer, torch.float64)
    out = masked_conv2d(**tensors, **lists, **layer.options)
    for n, s in enumerate(lists["subnets"].tolist()):
        inputs, outputs = (lists[name][s][lists[name][s] >= 0] for name in ("inputs", "outputs"))
        own = {
            **tensors,
            "x": tensors["x"][n : n + 1, : len(inputs)],
            "gate": tensors["gate"][n : n + 1, : len(outputs)],
        }
        alone = masked_conv2d(**own, inputs=inputs, outputs=outputs, **layer.options)
        torch.testing.assert_close(out[n : n + 1, : len(outputs)], alone, rtol=1e-12, atol=1e-12)
        assert not out[n, len(outputs) :].any()


def test_what_lies_behind_a_shorter_list_is_not_read():
    layer = LAYERS["mixed"]
    tensors, lists = make_masked(layer, torch.float32)
    expected = step(layer, tensors, lists)
    absent = (lists["inputs"] < 0)[lists["subnets"]]
    x = tensors["x"].masked_fill(absent[:, :, None, None], float("nan"))
    for name, value in step(layer, {**tensors, "x": x}, lists).items():
        assert torch.equal(value, expected[name]), name


def test_gate_of_zero_has_the_gradient_of_plain_torch():
    for activation in (None, "relu", "relu6"):
        layer = Masked(4, 6, 5, 5, 8, gated=True, activation=activation)
        tensors, lists = make_masked(layer, torch.float64)
        tensors["gate"][::2] = 0
        actual, expected = step(layer, tensors, lists), step(layer, tensors, lists, "reference")
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-12, atol=1e-12)


def test_pooling_keeps_nan():
    layer = Masked(2, 4, 9, 12, 5, pool=2, activation=None)
    for batch in (2, 20):
        tensors, lists = make_masked(Masked(**{**layer.__dict__, "batch": batch}), torch.float32)
        tensors["x"][::2, 1, 3, 4] = float("nan")
        plain = inference(layer, tensors, lists, "reference")["out"]
        assert torch.equal(inference(layer, tensors, lists)["out"].isnan(), plain.isnan())
        assert plain.isnan().any()


def test_linear_is_torchs_over_kept_features():
    x, weight, bias = (torch.randn(shape, dtype=torch.float64) for shape in ((7, 9), (12, 20), (12,)))
    inputs, outputs = torch.randperm(20)[:9].sort().values, torch.randperm(12)[:5].sort().values
    expected = F.relu(F.linear(x, weight[outputs][:, inputs], bias[outputs]))
    for backend in (None, "reference"):
        actual = masked_linear(x, weight, bias, inputs=inputs, outputs=outputs, activation="relu", backend=backend)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="masked_linear: x and weight have shapes"):
        masked_linear(x[None], weight)


def test_bias_is_part_of_what_is_scaled():
    layer = LAYERS["strided"]
    tensors, lists = make_masked(layer, torch.float64)
    bias = torch.randn(layer.outputs, dtype=torch.float64)
    moved = {**tensors, "shift": tensors["shift"] + tensors["scale"] * bias}
    expected = masked_conv2d(**moved, **lists, **layer.options)
    torch.testing.assert_close(masked_conv2d(bias=bias, **tensors, **lists, **layer.options), expected)
    with pytest.raises(ValueError, match="bias has shape"):
        masked_conv2d(bias=bias[1:], **tensors, **lists, **layer.options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"inputs": torch.tensor([0, 0])}, ValueError, "inputs, expected channels from 0 to 5, ascending"),
        ({"inputs": torch.tensor([0, 6])}, ValueError, "inputs, expected channels from 0 to 5"),
        ({"inputs": torch.tensor([[-1, -1]])}, ValueError, "inputs, expected channels"),
        ({"inputs": torch.tensor([-1, 0])}, ValueError, "inputs, expected channels"),
        (
            {"inputs": torch.tensor([0, 1], dtype=torch.int32)},
            TypeError,
            "inputs has dtype torch.int32, expected int64",
        ),
        ({"inputs": torch.tensor([0, 1, 2])}, ValueError, "x has 2 channels, expected 3"),
        ({"outputs": torch.tensor([], dtype=torch.int64)}, ValueError, r"outputs has shape \(1, 0\)"),
        ({"outputs": torch.tensor([[0], [1]])}, ValueError, r"outputs has shape \(2, 1\)"),
        ({"subnets": torch.tensor([0, 1])}, ValueError, "subnets, expected numbers from 0 to 0"),
        ({"subnets": torch.tensor([0])}, ValueError, r"subnets has shape \(1,\) on cpu, expected \(2,\)"),
        ({"subnets": torch.tensor([0.0, 0.0])}, TypeError, "subnets has dtype"),
        ({"gate": torch.ones(2, 3)}, ValueError, r"gate has shape \(2, 3\), expected \(2, 2\)"),
        ({"scale": torch.ones(3)}, ValueError, r"scale has shape \(3,\), expected \(4,\)"),
        ({"shift": torch.ones(4, dtype=torch.float64)}, TypeError, "shift has dtype torch.float64"),
        ({"stride": (1, 2, 3)}, ValueError, "stride is"),
        ({"padding": -1}, ValueError, "padding is"),
        ({"activation": "gelu"}, ValueError, "activation is 'gelu'"),
        ({"dilation": 5}, ValueError, r"x has maps of \(5, 5\), smaller than the kernel"),
        ({"pool": 2, "stride": 5}, ValueError, "pool is 2, expected 1, or 2 for maps"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    arguments = {
        "x": torch.randn(2, 2, 5, 5),
        "weight": torch.randn(4, 6, 3, 3),
        "inputs": torch.tensor([0, 5]),
        "outputs": torch.tensor([1, 2]),
    }
    for backend in (None, "reference"):
        with pytest.raises(error, match=message):
            masked_conv2d(**{**arguments, **change}, backend=backend)


def test_lists_of_several_sub_networks_need_subnets():
    lists = torch.tensor([[0, 1], [1, 2]])
    with pytest.raises(ValueError, match="subnets is None, but the lists are of 2 sub-networks"):
        masked_conv2d(torch.randn(2, 2, 5, 5), torch.randn(4, 6, 3, 3), inputs=lists, outputs=lists)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("batch", "subnets"), [(1, 1), (1, 3), (2, 1), (9, 1), (70, 1), (40, 5), (3, 5), (0, 3)])
def test_a_chain_is_its_layers_one_after_another(batch, subnets, threads):
    widths, generator = (3, 12, 20, 9), torch.Generator().manual_seed(0)
    kept = [drawn_lists(subnets, n, 0.6, generator) for n in widths]
    x = torch.randn(batch, kept[0].shape[1], 13, 9, dtype=torch.float64, generator=generator)
    ids = torch.randint(subnets, (batch,), generator=generator) if subnets > 1 else None
    layers, expected = [], x
    for (before, after), (inputs, outputs), pool, size in zip(
        itertools.pairwise(widths), itertools.pairwise(kept), (2, 1, 1), (3, 3, 1), strict=True
    ):
        weight, scale, shift = (
            torch.randn(*shape, dtype=torch.float64, generator=generator)
            for shape in ((after, before, size, size), (after,), (after,))
        )
        lists = {"inputs": inputs, "outputs": outputs}
        packed = pack_masked_conv2d(weight, **lists)
        numbers = [1, 1, size // 2, size // 2, 1, 1, 1, 1]
        if size == 1:
            layers.append(None)
            expected = expected.mean((2, 3), keepdim=True)
        layers.append(PreparedConv2d(weight, scale, shift, **lists, numbers=numbers, packed=packed, pool=pool))
        options = {"scale": scale, "shift": shift, "activation": "relu", "padding": size // 2, "pool": pool}
        expected = masked_conv2d(expected, weight, **lists, subnets=ids, **options, backend="reference")
    found = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.testing.assert_close(PreparedChain.of(layers)(x, ids), expected, rtol=1e-12, atol=1e-12)
    finally:
        torch.set_num_threads(found)


def test_a_mean_alone_is_torchs():
    x = torch.randn(3, 5, 7, 6, dtype=torch.float64).transpose(2, 3)
    torch.testing.assert_close(PreparedChain.of([None])(x), x.mean((2, 3), keepdim=True), rtol=1e-13, atol=1e-13)


def test_compiles_whole():
    layer = LAYERS["mixed, gated, grouped"]
    tensors, lists = make_masked(layer, torch.float64)
    compiled = torch.compile(lambda **k: masked_conv2d(**k, **layer.options), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**tensors, **lists), masked_conv2d(**tensors, **lists, **layer.options))


def test_explains_itself():
    assert "masked_conv2d: backend 'cpu'" in _backend.OPERATORS["masked_conv2d"].explain(torch.zeros(1, 1, 1, 1))
