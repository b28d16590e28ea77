"""`convolution_stem` on the CPU against float64 and plain torch; the modules that run it."""

from __future__ import annotations

import copy

import pytest
import torch
from exactness import inexact
from layouts import MAPS, in_layout
from stem_inputs import Stem, make_stem
from torch import nn

from pyext import accelerate, backend, models
from pyext._backend import BackendError
from pyext.nn import BNReLUConvSequential
from pyext.nn.stem_inference import infer_stem, stem_of
from pyext.ops import convolution_stem
from pyext.ops.convolution_stem import TENSORS, reference

STEMS = {
    "hcgnet b": Stem(2, 64, 64, (3, 32, 32, 64), 2),
    "hcgnet b, one image": Stem(1, 96, 80, (3, 32, 32, 64), 2),
    "one layer": Stem(3, 20, 28, (5, 9), 2),
    "stride one": Stem(2, 14, 14, (3, 8, 6), 1),
    "odd extents": Stem(2, 13, 19, (3, 7, 13, 5), 2),
    "odd maps of even images": Stem(2, 14, 18, (2, 5, 7), 2),
    "one position": Stem(2, 1, 1, (3, 2, 4), 2),
    "one row": Stem(2, 1, 150, (3, 6, 7), 2),
    "one column": Stem(1, 75, 1, (3, 6, 7), 1),
    "more rows than a band": Stem(3, 90, 6, (1, 4, 3, 2, 5), 1),
    "no image": Stem(0, 8, 8, (3, 4, 5), 2),
    "one of everything": Stem(1, 1, 1, (1, 1), 1),
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def run(x, tensors, stride, name="cpu"):
    with torch.no_grad():
        return convolution_stem(x, tensors, stride=stride, backend=name)


def assert_exact(x, tensors, stride, actual):
    def evaluations():
        generator = torch.Generator().manual_seed(0)
        near = x
        for _ in range(8):
            exact = reference(near.double(), [t.double() for t in tensors], stride)
            yield [run(near, [t.to(x.dtype) for t in tensors], stride, "reference")], [exact]
            near = (x * (1 + 0.01 * torch.randn(x.shape, generator=generator))).to(x.dtype)

    lines = inexact({"out": actual}, evaluations(), {})
    assert not lines, lines


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", STEMS)
def test_inference(name, dtype):
    x, tensors = make_stem(STEMS[name], dtype)
    assert_exact(x, tensors, STEMS[name].stride, run(x, tensors, STEMS[name].stride))


@pytest.mark.parametrize("name", STEMS)
def test_inference_in_float64_is_the_plain_network_s(name):
    stride = STEMS[name].stride
    x, tensors = make_stem(STEMS[name], torch.float64)
    torch.testing.assert_close(run(x, tensors, stride), reference(x, tensors, stride), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", MAPS)
@pytest.mark.parametrize("name", ["odd extents", "one column", "stride one"])
def test_inference_of_any_layout(name, layout):
    stride = STEMS[name].stride
    x, tensors = make_stem(STEMS[name], torch.float64)
    x = in_layout(x, layout)
    assert torch.equal(run(x, tensors, stride), run(x.contiguous(), tensors, stride))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inference_with_float32_tensors(dtype):
    x, tensors = make_stem(STEMS["hcgnet b"], dtype, torch.float32)
    assert_exact(x, tensors, 2, run(x, tensors, 2))


@pytest.mark.parametrize("threads", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("name", ["hcgnet b", "hcgnet b, one image", "odd extents", "more rows than a band"])
def test_inference_on_any_number_of_threads(name, threads):
    """The same bits, whether images or rows are shared out."""
    x, tensors = make_stem(STEMS[name], torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run(x, tensors, STEMS[name].stride)
        torch.set_num_threads(threads)
        assert torch.equal(run(x, tensors, STEMS[name].stride), expected)
    finally:
        torch.set_num_threads(before)


def test_inference_of_infinite_numbers():
    """Where plain torch has an infinite number or none, so has the operator, and the same one."""
    x, tensors = make_stem(STEMS["hcgnet b"], torch.float32)
    x[0, 1, 30, 31], x[1, 2, 0, 63], x[1, 0, 63, 0] = float("inf"), float("-inf"), float("nan")
    found, expected = run(x, tensors, 2), reference(x, tensors, 2)
    for kind in (torch.isposinf, torch.isneginf, torch.isnan):
        assert torch.equal(kind(found), kind(expected))
    assert expected.isfinite().any()
    assert expected.isnan().any()


def test_the_operator_compiles_without_graph_break():
    x, tensors = make_stem(STEMS["odd extents"], torch.float64)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, tensors, 2), run(x, tensors, 2))


def test_wrong_number_of_tensors_is_named():
    x, tensors = make_stem(STEMS["odd extents"], torch.float32)
    for wrong in (tensors[:-1], [*tensors, x], []):
        with pytest.raises(ValueError, match=f"{len(wrong)} tensors, expected {len(TENSORS)} for each layer"):
            convolution_stem(x, wrong)


def test_layers_that_do_not_follow_one_another_are_refused():
    x, tensors = make_stem(STEMS["odd extents"], torch.float32)
    layer = tensors[: len(TENSORS)]
    with pytest.raises(ValueError, match=r"conv\.weight of layer 1, has shape"), torch.no_grad():
        convolution_stem(x, [*layer, *layer])


def test_the_kernel_refuses_gradients_and_auto_gives_them():
    x, tensors = make_stem(STEMS["odd extents"], torch.float64)
    x.requires_grad_()
    with pytest.raises(BackendError, match="gradients are asked for"):
        convolution_stem(x, tensors, backend="cpu")
    convolution_stem(x, tensors).sum().backward()
    assert x.grad.isfinite().all()


# --- modules ----------------------------------------------------------------------------------------------------------


def stem_modules(dtype=torch.float64):
    torch.manual_seed(0)
    layers = []
    for inputs, outputs, stride in ((3, 6, 2), (6, 5, 1), (5, 7, 1)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        layers[-2].running_mean.normal_()
        layers[-2].running_var.uniform_(0.5, 1.5)
    return [*layers, nn.MaxPool2d(3, 2, 1), nn.Conv2d(7, 2, 1)]


def stem_module():
    module = accelerate(nn.Sequential(*stem_modules())).double().eval()
    assert type(module) is BNReLUConvSequential
    return module


def image(dtype=torch.float64):
    return torch.randn(2, 3, 18, 22, dtype=dtype, generator=torch.Generator().manual_seed(1))


def is_whole(module, x):
    stem = stem_of(list(module))
    with torch.no_grad():
        return bool(stem) and infer_stem(stem, x) is not None


def plain(module, x):
    with torch.no_grad():
        for part in module:
            x = part(x)
    return x


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_stem_runs_whole(layout):
    module, x = stem_module(), image().contiguous(memory_format=layout)
    assert is_whole(module, x)
    with torch.no_grad():
        torch.testing.assert_close(module(x), plain(module, x), rtol=1e-12, atol=1e-12)
        module[3].weight.data.mul_(2)  # nothing is kept that could be stale
        torch.testing.assert_close(module(x), plain(module, x), rtol=1e-12, atol=1e-12)


def test_gradients_and_other_backends_run_module_by_module():
    module, x = stem_module(), image()
    assert infer_stem(stem_of(list(module)), x) is None
    with torch.no_grad(), backend("reference"):
        assert infer_stem(stem_of(list(module)), x) is None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert infer_stem(stem_of(list(module)), x) is None
    module(x.requires_grad_()).sum().backward()
    assert x.grad.isfinite().all()


def test_what_looks_at_operators_sees_modules():
    module, x = stem_module(), image()
    with torch.no_grad():
        traced = torch.jit.trace(module, x)
        assert "convolution_stem" not in str(traced.inlined_graph)
        compiled = torch.compile(module, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-12, atol=1e-12)


def with_hook(module):
    module[2].register_forward_hook(lambda *_: None)


def with_training_norm(module):
    module[1].train()


def with_other_eps(module):
    module[4].eps = 1e-3


def with_bias(module):
    module[3].bias = nn.Parameter(torch.ones(5, dtype=torch.float64))


def with_stride_in_the_middle(module):
    module[3].stride = (2, 2)


def with_other_padding(module):
    module[0].padding_mode = "reflect"


def with_other_activation(module):
    module[5] = nn.SiLU()


def with_class(module):
    module[1].__class__ = type("Norm", (nn.BatchNorm2d,), {})


def with_other_pool(module):
    module[9] = nn.MaxPool2d(3, 2, 1, ceil_mode=True)


def without_statistics(module):
    module[7] = nn.BatchNorm2d(7, track_running_stats=False).double().eval()


CHANGES = (
    with_hook,
    with_training_norm,
    with_other_eps,
    with_bias,
    with_stride_in_the_middle,
    with_other_padding,
    with_other_activation,
    with_class,
    with_other_pool,
    without_statistics,
)


@pytest.mark.parametrize("change", CHANGES)
def test_a_stem_that_is_no_longer_the_operator_runs_by_its_modules(change):
    module, x = stem_module(), image()
    assert is_whole(module, x)
    change(module)
    assert not is_whole(module, x)
    # A normalisation in training moves its statistics at every call.
    expected = plain(copy.deepcopy(module), x)
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)


def test_hcgnet_s_stem_is_one():
    network = models.HCGNet((4, 8), (1, 1), 5, stem="imagenet").double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert is_whole(network.features, x)
    with torch.no_grad():
        found = network(x)
        with backend("reference"):
            torch.testing.assert_close(found, network(x), rtol=1e-12, atol=1e-12)
