"""`bn_relu_conv2d` on the CPU against float64 and plain torch: results, gradients, running statistics."""

from __future__ import annotations

import pytest
import torch
from conv_inputs import Layer, make_layer
from exactness import inexact
from layouts import MAPS, in_layout

from pyext._backend import BackendError, backend
from pyext.ops import bn_relu_conv2d
from pyext.ops.bn_relu_conv2d import batch_statistics, bn_relu_max_pool, bn_relu_pool, images_innermost, reference

LAYERS = {
    "a1, squeeze": Layer(3, 36, 32, 32, 48),
    "a1, third block": Layer(3, 126, 8, 8, 144),
    "a1, grouped": Layer(3, 48, 32, 32, 12, 3, 1, 4),
    "a1, third block, grouped": Layer(9, 72, 8, 8, 36, 3, 1, 4),
    "a1, transition": Layer(2, 30, 32, 32, 20, 3, 2),
    "channels and positions that fill no tile": Layer(3, 13, 7, 9, 11),
    "grouped, rows of no whole vector": Layer(2, 14, 7, 5, 10, 3, 1, 2),
    "strided, odd extents": Layer(2, 7, 9, 13, 5, 3, 2),
    "strided and grouped": Layer(2, 6, 8, 7, 4, 3, 2, 2),
    "a2, third block, grouped": Layer(9, 128, 8, 8, 32, 3, 1, 2),
    "grouped, whole vectors of outputs, odd extents": Layer(3, 12, 7, 9, 48, 3, 1, 2),
    "more inputs than stay in cache": Layer(2, 83, 16, 48, 19, 3),
    "strided, more inputs than stay in cache": Layer(2, 83, 32, 32, 7, 3, 2),
    # By 25 products instead of 36, which few channels are not worth.
    "strided, a1's second block": Layer(3, 72, 16, 16, 48, 3, 2),
    "strided, odd extents and tiles that fill no vector": Layer(5, 40, 23, 19, 36, 3, 2),
    "strided, tiles that end outside": Layer(3, 40, 30, 29, 40, 3, 2),
    "strided, strips that end within an image": Layer(1, 24, 160, 20, 24, 3, 2),
    "strided, rows of more tiles than a strip should have": Layer(1, 24, 4, 300, 24, 3, 2),
    "strided, more tiles than are summed at once": Layer(19, 24, 32, 28, 25, 3, 2),
    "one position": Layer(3, 5, 1, 1, 3, 3, 2),
    "one row": Layer(2, 4, 1, 75, 3, 3),
    "one column": Layer(2, 4, 70, 1, 3, 3, 2),
    "no image": Layer(0, 4, 3, 3, 5),
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def step(layer, inputs, states, function):
    """Output, gradients and moved running statistics of one call of `function` in training."""
    leaves = [x.detach().requires_grad_() for x in inputs.values()]
    running = [x.clone() for x in states.values()]
    out = function(*leaves, *running, training=True, momentum=0.3, stride=layer.stride, groups=layer.groups)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    grads = torch.autograd.grad(out, leaves, weights)
    return dict(zip(("out", *inputs, *states), [out.detach(), *grads, *running], strict=True))


def assert_exact(layer, inputs, states, actual, reference=reference):
    def evaluations():
        generator = torch.Generator().manual_seed(0)
        near = inputs
        for _ in range(8):
            exact = step(layer, *({k: x.double() for k, x in d.items()} for d in (near, states)), reference)
            yield list(step(layer, near, states, reference).values()), list(exact.values())
            x = inputs["x"]
            near = {**inputs, "x": (x * (1 + 0.01 * torch.randn(x.shape, generator=generator))).to(x.dtype)}

    lines = inexact(actual, evaluations(), {})
    assert not lines, lines


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_training(name, dtype):
    layer = LAYERS[name]
    inputs, states = make_layer(layer, dtype)
    assert_exact(layer, inputs, states, step(layer, inputs, states, bn_relu_conv2d))


@pytest.mark.parametrize("layout", MAPS)
@pytest.mark.parametrize("name", ["channels and positions that fill no tile", "strided, odd extents"])
def test_training_in_any_layout(name, layout):
    layer = LAYERS[name]
    inputs, states = make_layer(layer, torch.float64, layout=layout)
    actual = step(layer, inputs, states, bn_relu_conv2d)
    if layout == "images innermost":  # other kernels, which sum in another order
        return assert_exact(layer, inputs, states, actual)
    dense = step(layer, {k: x.contiguous() for k, x in inputs.items()}, states, bn_relu_conv2d)
    for result, value in dense.items():
        assert torch.equal(actual[result], value), result


INNERMOST = {
    "2x2": Layer(16, 70, 2, 2, 32, 3),
    "4x4": Layer(16, 40, 4, 4, 128),
    "odd images": Layer(3, 13, 7, 9, 11),
    "odd images, taps": Layer(5, 13, 3, 1, 7, 3),
    "more positions than are summed at once": Layer(6, 20, 11, 12, 33, 3),
    # By F(2x2, 3x3), which small layers and few images are not worth.
    "more tiles than are summed at once": Layer(16, 24, 12, 13, 20, 3),
    "more channels than are transformed at once": Layer(16, 70, 4, 6, 40, 3),
    "rows of tiles that end within a vector": Layer(11, 48, 9, 10, 40, 3),
    "columns of tiles that end outside": Layer(11, 48, 10, 9, 40, 3),
    "columns of several vectors": Layer(37, 40, 4, 6, 36, 3),
    "columns of less than a vector": Layer(3, 136, 8, 9, 140, 3),
    "strips that end within a vector": Layer(3, 9, 14, 15, 50),
    "one position": Layer(2, 5, 1, 1, 3, 3),
    "one row": Layer(2, 4, 1, 75, 3, 3),
    "one image": Layer(1, 4, 5, 3, 5),
    "strided": Layer(4, 7, 9, 6, 5, 3, 2),
    "grouped": Layer(4, 12, 4, 4, 8, 3, 1, 4),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", INNERMOST)
def test_training_with_images_innermost(name, dtype):
    layer = INNERMOST[name]
    inputs, states = make_layer(layer, dtype, layout="images innermost")
    assert_exact(layer, inputs, states, step(layer, inputs, states, bn_relu_conv2d))


@pytest.mark.parametrize("name", ["2x2", "4x4", "odd images, taps"])
def test_results_have_their_images_where_the_input_has_them(name):
    layer = INNERMOST[name]
    inputs, _ = make_layer(layer, torch.float32, layout="images innermost")
    buffer = in_layout(torch.cat([inputs["x"], inputs["x"]], 1), "images innermost")
    x = buffer[:, : layer.channels].requires_grad_()
    out = bn_relu_conv2d(x, *list(inputs.values())[1:], training=True)
    (grad,) = torch.autograd.grad(out, x, torch.randn(out.shape))
    for made in (out, grad):
        assert made.permute(1, 2, 3, 0).is_contiguous()
    expected = bn_relu_conv2d(x.contiguous(), *list(inputs.values())[1:], training=True)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("name", ["2x2", "4x4"])
def test_evaluation_with_images_innermost(name):
    layer = INNERMOST[name]
    inputs, states = make_layer(layer, torch.float64, layout="images innermost")
    leaves = [x.requires_grad_() for x in inputs.values()]
    results = []
    for function in (bn_relu_conv2d, reference):
        out = function(*leaves, *states.values(), training=False)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["2x2", "odd images, taps", "columns of several vectors"])
def test_weights_that_are_not_finite_meet_the_border(name):
    layer = INNERMOST[name]
    inputs, _ = make_layer(layer, torch.float64, layout="images innermost")
    inputs["conv_weight"][0, 0, 0, 0] = float("inf")
    out = bn_relu_conv2d(*inputs.values(), training=True)
    expected = reference(*inputs.values(), None, None, True)
    assert torch.equal(out.isnan(), expected.isnan())


NOT_FINITE = (float("inf"), float("-inf"), float("nan"))


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(
    "name",
    [
        "2x2",
        "odd images, taps",
        "rows of tiles that end within a vector",
        "columns of tiles that end outside",
    ],
)
def test_what_is_not_finite_reaches_what_it_reaches_in_plain_torch(name, dtype):
    """Of maps and gradients, in evaluation: statistics would bring it to all of a channel."""
    compare_what_is_not_finite(INNERMOST[name], "images innermost", (bn_relu_conv2d, dtype), (reference, torch.float64))


@pytest.mark.parametrize(
    "name", ["strided, odd extents and tiles that fill no vector", "strided, tiles that end outside"]
)
def test_what_is_not_finite_reaches_what_it_reaches_in_the_direct_form(name):
    """Which double precision has."""
    compare_what_is_not_finite(LAYERS[name], "nchw", (bn_relu_conv2d, torch.float32), (bn_relu_conv2d, torch.float64))


def compare_what_is_not_finite(layer, layout, *calls):
    inputs, states = make_layer(layer, calls[0][1], layout=layout)
    for i, value in enumerate(NOT_FINITE):
        inputs["x"][i, 3 * i, i % layer.height, i % layer.width] = value
    results = []
    for function, kind in calls:
        leaves = [x.to(kind).requires_grad_() for x in inputs.values()]
        out = function(*leaves, *(x.to(kind) for x in states.values()), training=False, stride=layer.stride)
        above = torch.ones_like(out)
        for i, value in enumerate(NOT_FINITE):
            above[-1 - i, i, -1, -1] = value
        results.append([out, *torch.autograd.grad(out, leaves, above)])
    for result, found, expected in zip(("out", *inputs), *results, strict=True):
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(found), kind(expected)), (result, kind)
    assert results[1][0].isfinite().any()
    assert not results[1][0].isfinite().all()


@pytest.mark.parametrize(
    ("layer", "layout"),
    [
        (INNERMOST["rows of tiles that end within a vector"], "images innermost"),
        (LAYERS["strided, tiles that end outside"], "nchw"),
    ],
)
def test_what_only_the_transforms_cannot_hold_is_computed_without_them(layer, layout):
    inputs, states = make_layer(layer, torch.float32, layout=layout)
    inputs["norm_bias"].fill_(2.5e38)  # the largest float has less than twice as much
    inputs["conv_weight"] *= 1e-3
    tensors, stride = [*inputs.values(), *states.values()], layer.stride
    out = bn_relu_conv2d(*tensors, stride=stride)
    plain, exact = reference(*tensors, stride=stride), reference(*(x.double() for x in tensors), stride=stride)
    assert not inexact({"out": out}, [([plain], [exact])], {})


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "name",
    [
        "2x2",
        "4x4",
        "more positions than are summed at once",
        "more channels than are transformed at once",
        "columns of several vectors",
    ],
)
def test_any_number_of_threads_with_images_innermost(name, threads):
    """No sum is divided among threads."""
    layer = INNERMOST[name]
    inputs, states = make_layer(layer, torch.float32, layout="images innermost")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = step(layer, inputs, states, bn_relu_conv2d)
        torch.set_num_threads(threads)
        actual = step(layer, inputs, states, bn_relu_conv2d)
    finally:
        torch.set_num_threads(before)
    for result, value in expected.items():
        assert torch.equal(actual[result], value), result


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "name",
    ["a1, squeeze", "a1, third block, grouped", "strided, odd extents and tiles that fill no vector"],
)
def test_any_number_of_threads(name, threads):
    """What belongs to an image has the same bits; the weight's sums over images are taken in double precision."""
    layer = LAYERS[name]
    inputs, states = make_layer(layer, torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = step(layer, inputs, states, bn_relu_conv2d)
        torch.set_num_threads(threads)
        actual, again = (step(layer, inputs, states, bn_relu_conv2d) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    for result, value in expected.items():
        assert torch.equal(actual[result], again[result]), result
        assert result == "conv_weight" or torch.equal(actual[result], value), result


def run_backward(layer, inputs, grad_out, training, *into):
    mean, var = batch_statistics(inputs["x"])
    op = torch.ops.pyext.bn_relu_conv2d_backward_add if into else torch.ops.pyext.bn_relu_conv2d_backward
    return op(grad_out, *inputs.values(), mean, var, training, 1e-5, layer.stride, layer.groups, *into)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["a1, squeeze", "a1, grouped", "grouped, rows of no whole vector", "no image"])
def test_gradients_of_several_layers_are_added_and_corrected_once(name, training):
    """By a slice of channels of a larger tensor, whose other channels stay as they are."""
    layer = LAYERS[name]
    inputs, states = make_layer(layer, torch.float64)
    x = inputs["x"]
    buffer = torch.randn(x.shape[0], x.shape[1] + 2, *x.shape[2:], dtype=torch.float64)
    before, corrections = buffer.clone(), torch.zeros(x.shape[1], 2, dtype=torch.float64)
    expected = buffer[:, 1:-1].clone()
    for seed in range(2):
        torch.manual_seed(seed)
        grad_out = torch.randn_like(step(layer, inputs, states, bn_relu_conv2d)["out"])
        added = run_backward(layer, inputs, grad_out, training, buffer[:, 1:-1], corrections)
        grad_x, *alone = run_backward(layer, inputs, grad_out, training)
        assert all(torch.equal(a, b) for a, b in zip(added, alone, strict=True))
        expected += grad_x
    assert training or not corrections.any()
    torch.ops.pyext.bn_relu_conv2d_correct(buffer[:, 1:-1], x, batch_statistics(x)[0], corrections)
    torch.testing.assert_close(buffer[:, 1:-1], expected, rtol=1e-11, atol=1e-11)
    assert torch.equal(buffer[:, [0, -1]], before[:, [0, -1]])


def test_what_is_added_to_must_have_the_shape_of_the_gradient():
    layer = LAYERS["a1, squeeze"]
    inputs, _ = make_layer(layer, torch.float32)
    grad_out = torch.randn(layer.batch, 48, 32, 32)
    corrections = torch.zeros(layer.channels, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="grad_x differs from x"):
        run_backward(layer, inputs, grad_out, True, inputs["x"][:, 1:].clone(), corrections)
    with pytest.raises(RuntimeError, match=r"corrections has shape .36, 1., expected .36, 2."):
        run_backward(layer, inputs, grad_out, True, inputs["x"].clone(), corrections[:, :1])
    with pytest.raises(RuntimeError, match="float64"):
        run_backward(layer, inputs, grad_out, True, inputs["x"].clone(), corrections.float())
    wrong = torch.zeros(layer.channels - 1)
    with pytest.raises(RuntimeError, match="mean has another shape"):
        torch.ops.pyext.bn_relu_conv2d_correct(inputs["x"].clone(), inputs["x"], wrong, corrections)


def test_statistics_that_are_known_are_not_computed_again():
    layer = LAYERS["a1, squeeze"]
    inputs, states = make_layer(layer, torch.float64)
    known = batch_statistics(inputs["x"])
    expected = step(layer, inputs, states, bn_relu_conv2d)
    actual = step(layer, inputs, states, lambda *a, **k: bn_relu_conv2d(*a, statistics=known, **k))
    assert all(torch.equal(actual[name], value) for name, value in expected.items())
    var, mean = torch.var_mean(inputs["x"], (0, 2, 3), correction=0)
    torch.testing.assert_close(known, (mean, var), rtol=1e-12, atol=1e-12)
    other = (known[0] + 1, known[1])
    with torch.no_grad():
        out = bn_relu_conv2d(*inputs.values(), training=True, statistics=other)
        moved = bn_relu_conv2d(inputs["x"] - 1, *list(inputs.values())[1:], training=True, statistics=known)
    torch.testing.assert_close(out, moved, rtol=1e-12, atol=1e-12)


def pooled_reference(x, weight, bias, mean, var, *, momentum, **_):
    z = torch.nn.functional.batch_norm(x, mean, var, weight, bias, True, momentum)
    return torch.nn.functional.avg_pool2d(torch.relu(z), 2)


def pooled(*tensors, momentum, **_):
    return bn_relu_pool(*tensors, momentum=momentum)


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "images innermost"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["channels and positions that fill no tile", "a1, third block", "no image"])
def test_statistics_of_the_result_are_those_of_a_call_of_their_own(name, dtype, layout):
    layer = LAYERS[name]
    inputs, _ = make_layer(layer, dtype, layout=layout)
    arguments = *inputs.values(), *batch_statistics(inputs["x"]), True, 1e-5, layer.stride, layer.groups
    out, mean, var = torch.ops.pyext.bn_relu_conv2d_moments(*arguments)
    expected = torch.ops.pyext.bn_relu_conv2d(*arguments)
    torch.testing.assert_close(out, expected)
    assert out.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip((mean, var), batch_statistics(out), strict=True))


POOLED = {
    "a transition": Layer(3, 12, 16, 16, 1),
    "odd extents": Layer(2, 5, 7, 9, 1),
    "one window": Layer(4, 3, 2, 3, 1),
}


@pytest.mark.parametrize("layout", ["nchw", "images innermost"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", POOLED)
def test_a_pool_in_place_of_the_convolution(name, dtype, layout):
    layer = POOLED[name]
    inputs, states = make_layer(layer, dtype, layout=layout)
    del inputs["conv_weight"]

    assert_exact(layer, inputs, states, step(layer, inputs, states, pooled), pooled_reference)


def max_pool_reference(x, weight, bias, mean, var, *, momentum, **_):
    z = torch.nn.functional.batch_norm(x, mean, var, weight, bias, True, momentum)
    return torch.nn.functional.max_pool2d(torch.relu(z), 3, 2, 1)


def max_pooled(*tensors, momentum, **_):
    return bn_relu_max_pool(*tensors, momentum=momentum)


MAX_POOLED = {
    **POOLED,
    "a stem": Layer(16, 5, 32, 32, 1),
    "more images than two vectors": Layer(19, 3, 6, 5, 1),
    "one image": Layer(1, 4, 9, 8, 1),
    "one position": Layer(3, 4, 1, 1, 1),
    "one row": Layer(2, 4, 1, 21, 1),
    "one column": Layer(2, 4, 20, 1, 1),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", MAX_POOLED)
def test_a_max_pool_in_place_of_the_convolution(name, dtype):
    layer = MAX_POOLED[name]
    inputs, states = make_layer(layer, dtype)
    del inputs["conv_weight"]
    found = step(layer, inputs, states, max_pooled)
    running = [state.clone() for state in states.values()]
    assert layer.batch == 1 or images_innermost(bn_relu_max_pool(*inputs.values(), *running))
    assert_exact(layer, inputs, states, found, max_pool_reference)


@pytest.mark.parametrize("layout", MAPS)
@pytest.mark.parametrize(("ours", "plain"), [(max_pooled, max_pool_reference), (pooled, pooled_reference)])
def test_pools_of_maps_in_any_layout(layout, ours, plain):
    layer = Layer(3, 5, 7, 8, 1)
    inputs, states = make_layer(layer, torch.float64, layout=layout)
    del inputs["conv_weight"]
    assert_exact(layer, inputs, states, step(layer, inputs, states, ours), plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_of_equal_maxima_the_first_gets_the_gradient_and_nan_is_kept(dtype):
    """In evaluation, where a NaN stays where it is: which of several values a window chooses."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-1, 3, (9, 4, 8, 7), generator=generator).to(dtype)
    x[torch.rand(x.shape, generator=generator) < 0.1] = float("nan")
    vectors = [torch.full((4,), value, dtype=dtype) for value in (1, 0, 0, 1)]
    found, expected = (x.clone().requires_grad_() for _ in range(2))
    out = torch.ops.pyext.bn_relu_conv2d_max_pool(found, *vectors, False, 0.0)
    plain = torch.nn.functional.max_pool2d(torch.relu(expected), 3, 2, 1)
    torch.testing.assert_close(out, plain, rtol=0, atol=0, equal_nan=True)
    grad_out = torch.randn(plain.shape, generator=generator, dtype=dtype)
    out.backward(grad_out), plain.backward(grad_out)
    torch.testing.assert_close(found.grad, expected.grad)


def test_a_max_pool_of_no_image_is_empty():
    inputs, _ = make_layer(Layer(0, 4, 3, 3, 1), torch.float32)
    vectors = [torch.ones(4)] * 4
    x = inputs["x"].requires_grad_()
    out = torch.ops.pyext.bn_relu_conv2d_max_pool(x, *vectors, True, 1e-5)
    assert out.shape == (0, 4, 2, 2)
    out.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, *rest: (x.bfloat16(), *rest), "kernels for float32 and float64"),
        (lambda x, *rest: (x[0], *rest), "x must be a CPU tensor"),
        (lambda x, *rest: (x[:, :, :0], *rest), "no window of 1x1"),
        (lambda x, weight, *rest: (x, weight[1:], *rest), r"norm_weight has shape .3,., expected .4,."),
        (lambda x, weight, *rest: (x, weight.double(), *rest), "norm_weight has another dtype"),
    ],
)
def test_a_max_pool_refuses_what_it_cannot_read(change, message):
    arguments = torch.randn(2, 4, 6, 5), *[torch.ones(4)] * 4
    with pytest.raises(RuntimeError, match=message):
        torch.ops.pyext.bn_relu_conv2d_max_pool(*change(*arguments), True, 1e-5)
    with pytest.raises(RuntimeError, match="grad_out differs from the result"):
        torch.ops.pyext.bn_relu_conv2d_max_pool_backward(arguments[0], *arguments, True, 1e-5)


def test_wrong_statistics_are_named():
    inputs, _ = make_layer(LAYERS["a1, squeeze"], torch.float32)
    mean, var = batch_statistics(inputs["x"])
    with pytest.raises(ValueError, match=r"statistics \(variance\) has shape"):
        bn_relu_conv2d(*inputs.values(), training=True, statistics=(mean, var[:-1]))
    with pytest.raises(TypeError, match=r"statistics \(mean\) has dtype"):
        bn_relu_conv2d(*inputs.values(), training=True, statistics=(mean.double(), var))


def test_what_has_no_kernel_runs_in_plain_torch():
    layer = Layer(2, 6, 5, 5, 4, 1, 2, 2)
    inputs, states = make_layer(layer, torch.float64)
    options = {"stride": 2, "groups": 2}
    with pytest.raises(BackendError, match="1x1 convolution with stride or groups"), backend("cpu"):
        bn_relu_conv2d(*inputs.values(), *states.values(), **options)
    expected = reference(*inputs.values(), *states.values(), **options)
    assert torch.equal(bn_relu_conv2d(*inputs.values(), *states.values(), **options), expected)


def test_one_of_two_running_statistics_is_refused():
    inputs, states = make_layer(LAYERS["a1, squeeze"], torch.float32)
    with pytest.raises(ValueError, match="both or none"):
        bn_relu_conv2d(*inputs.values(), states["running_mean"])


def test_one_value_per_channel_is_refused_in_training():
    inputs, _ = make_layer(Layer(1, 3, 1, 1, 2), torch.float32)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        bn_relu_conv2d(*inputs.values(), training=True)


@pytest.mark.parametrize("training", [False, True])
def test_it_compiles_without_a_graph_break(training):
    layer = LAYERS["strided and grouped"]
    inputs, states = make_layer(layer, torch.float32)
    leaves = [x.requires_grad_() for x in inputs.values()]

    def call(*tensors):
        return bn_relu_conv2d(*tensors, training=training, stride=2, groups=2)

    expected = call(*leaves, *(x.clone() for x in states.values()))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    out = compiled(*leaves, *(x.clone() for x in states.values()))
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    for a, b in zip(torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True):
        assert torch.equal(a, b)
