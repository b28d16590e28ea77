"""`dense_block` on the CPU against float64 and plain torch; the modules that run it."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import weakref

import pytest
import torch
from dense_inputs import Dense, make_dense
from exactness import inexact
from layouts import MAPS, in_layout
from torch import nn

from pyext import backend
from pyext._backend import BackendError
from pyext.nn import DenseBlock
from pyext.nn.dense_inference import infer_dense_block
from pyext.ops import dense_block, pack_dense_block
from pyext.ops.dense_block import TENSORS, Extents, extents_of, reference

BLOCKS = {
    "densenet 121, first": Dense(3, 16, 16, Extents(64, 3, 128, 32)),
    "densenet 121, last": Dense(5, 2, 2, Extents(500, 2, 128, 32)),
    "densenet 161": Dense(1, 14, 14, Extents(96, 2, 192, 48)),
    "densenet 40-12": Dense(2, 32, 32, Extents(200, 3, 0, 12)),
    "rows of no whole tile": Dense(3, 7, 9, Extents(5, 2, 8, 4)),
    "one position": Dense(2, 1, 1, Extents(3, 2, 4, 2)),
    "one row": Dense(2, 1, 75, Extents(3, 2, 14, 7)),
    "one column": Dense(2, 70, 1, Extents(3, 2, 0, 5)),
    "channels that fill no vector": Dense(1, 14, 14, Extents(11, 4, 13, 11)),
    "no image": Dense(0, 4, 4, Extents(3, 1, 4, 2)),
    "one of everything": Dense(1, 1, 1, Extents(1, 1, 1, 1)),
    "more images than are worked on at once": Dense(70, 3, 2, Extents(4, 2, 0, 3)),
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def run(x, tensors, name="cpu"):
    with torch.no_grad():
        return dense_block(x, tensors, backend=name)


def assert_exact(x, tensors, actual):
    def evaluations():
        generator = torch.Generator().manual_seed(0)
        near = x
        for _ in range(8):
            exact = reference(near.double(), [t.double() for t in tensors])
            yield [run(near, [t.to(x.dtype) for t in tensors], "reference")], [exact]
            near = (x * (1 + 0.01 * torch.randn(x.shape, generator=generator))).to(x.dtype)

    lines = inexact({"out": actual}, evaluations(), {})
    assert not lines, lines


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BLOCKS)
def test_inference(name, dtype):
    x, tensors = make_dense(BLOCKS[name], dtype)
    assert_exact(x, tensors, run(x, tensors))


@pytest.mark.parametrize("name", BLOCKS)
def test_inference_in_float64_is_the_plain_network_s(name):
    x, tensors = make_dense(BLOCKS[name], torch.float64)
    torch.testing.assert_close(run(x, tensors), reference(x, tensors), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", MAPS)
@pytest.mark.parametrize("name", ["rows of no whole tile", "one column"])
def test_inference_of_any_layout(name, layout):
    x, tensors = make_dense(BLOCKS[name], torch.float64)
    x = in_layout(x, layout)
    assert torch.equal(run(x, tensors), run(x.contiguous(), tensors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inference_with_float32_tensors(dtype):
    x, tensors = make_dense(BLOCKS["densenet 121, first"], dtype, torch.float32)
    assert_exact(x, tensors, run(x, tensors))


@pytest.mark.parametrize("threads", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("name", ["densenet 121, first", "densenet 121, last", "densenet 161", "densenet 40-12"])
def test_inference_on_any_number_of_threads(name, threads):
    """The same bits, whether images, positions, tiles or weights are shared out."""
    x, tensors = make_dense(BLOCKS[name], torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run(x, tensors)
        torch.set_num_threads(threads)
        assert torch.equal(run(x, tensors), expected)
    finally:
        torch.set_num_threads(before)


def test_inference_of_infinite_numbers():
    """Where plain torch has an infinite number or none, so has the operator, and the same one."""
    x, tensors = make_dense(BLOCKS["densenet 121, first"], torch.float32)
    x[0, 3, 4, 5], x[1, 2, 0, 15], x[2, 1, 15, 0] = float("inf"), float("-inf"), float("nan")
    found, expected = run(x, tensors), reference(x, tensors)
    for kind in (torch.isposinf, torch.isneginf, torch.isnan):
        assert torch.equal(kind(found), kind(expected))


def test_packed_constants_are_those_of_the_tensors():
    x, tensors = make_dense(BLOCKS["densenet 161"], torch.float32)
    packed = pack_dense_block(tensors, dtype=x.dtype)
    with torch.no_grad():
        assert torch.equal(dense_block(x, tensors, packed=packed), run(x, tensors))
        with pytest.raises(RuntimeError, match="packed is not of a block of these extents"):
            dense_block(x, tensors, packed=packed[1:])


def test_the_tensors_tell_the_extents():
    for block in BLOCKS.values():
        assert extents_of(make_dense(block, torch.float32)[1]) == block.extents


def test_wrong_number_of_tensors_is_named():
    x, tensors = make_dense(BLOCKS["densenet 121, first"], torch.float32)
    for wrong in (tensors[:-1], [*tensors, x]):
        with pytest.raises(ValueError, match=f"{len(wrong)} tensors, expected {len(TENSORS)} for each layer"):
            dense_block(x, wrong)
    with pytest.raises(ValueError, match="0 tensors, expected 5 for each cell"):
        dense_block(x, [])


def test_layers_that_do_not_follow_one_another_are_refused():
    x, tensors = make_dense(BLOCKS["densenet 121, first"], torch.float32)
    with pytest.raises(ValueError, match=r"norm1\.weight of layer 1, has shape"), torch.no_grad():
        dense_block(x, [*tensors[: len(TENSORS)], *tensors[: len(TENSORS)]])


def test_the_kernel_refuses_gradients_and_auto_gives_them():
    x, tensors = make_dense(BLOCKS["rows of no whole tile"], torch.float64)
    x.requires_grad_()
    with pytest.raises(BackendError, match="gradients are asked for"):
        dense_block(x, tensors, backend="cpu")
    dense_block(x, tensors).sum().backward()
    assert x.grad.isfinite().all()


# --- modules ----------------------------------------------------------------------------------------------------------

BOTTLENECKS = (4, 0)


def block_module(bn_size=4, dtype=torch.float64):
    module = DenseBlock(3, 6, 4, bn_size).to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.data = (0.3 * noise if tensor.dim() > 1 else 0.5 + noise.abs()).to(dtype)
    return module


def image(n=3, height=5, width=5, dtype=torch.float64):
    return torch.randn(n, 6, height, width, dtype=dtype, generator=torch.Generator().manual_seed(1))


def plain(module, x):
    with torch.no_grad(), backend("reference"):
        return module(x)


def is_whole(module, x):
    with torch.no_grad():
        return infer_dense_block(module, x) is not None


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bn_size", BOTTLENECKS)
@pytest.mark.parametrize("n", [1, 3])
def test_a_block_runs_whole(bn_size, layout, n):
    module, x = block_module(bn_size), image(n).contiguous(memory_format=layout)
    assert is_whole(module, x)
    with torch.no_grad():
        found = module(x)
        assert torch.equal(found, module(x))  # by the constants that were kept
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, plain(module, x), rtol=1e-12, atol=1e-12)


def test_gradients_and_other_backends_run_by_layers():
    module, x = block_module(), image()
    assert infer_dense_block(module, x) is None
    with torch.no_grad(), backend("reference"):
        assert infer_dense_block(module, x) is None
    module(x.requires_grad_()).sum().backward()
    assert x.grad.isfinite().all()


def test_what_looks_at_operators_sees_layers():
    module, x = block_module(), image()
    with torch.no_grad():
        traced = torch.jit.trace(module, x)
        assert "dense_block" not in str(traced.inlined_graph)
        compiled = torch.compile(module, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-12, atol=1e-12)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert infer_dense_block(module, x) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_torch_s(dtype):
    assert not is_whole(block_module(dtype=dtype), image(dtype=dtype))
    assert not is_whole(block_module(dtype=torch.float32), image(dtype=dtype))


def with_hook(module):
    module.denselayer2.register_forward_hook(lambda *_: None)


def with_hook_on_a_norm(module):
    module.denselayer2.norm1.register_forward_hook(lambda *_: None)


def with_training_norm(module):
    module.denselayer1.norm1.train()


def with_other_eps(module):
    module.denselayer2.norm2.eps = 1e-3


def with_bias(module):
    conv = module.denselayer1.conv2
    conv.bias = nn.Parameter(torch.ones(conv.out_channels, dtype=torch.float64))


def with_other_padding(module):
    module.denselayer1.conv2.padding_mode = "reflect"


def with_other_activation(module):
    module.denselayer3.relu2 = nn.SiLU()


def with_replaced_convolution(module):
    class Convolution(nn.Conv2d):
        pass

    module.denselayer1.conv1 = Convolution(6, 16, 1, bias=False, dtype=torch.float64)


def with_class(module):
    module.denselayer2.norm1.__class__ = type("Norm", (nn.BatchNorm2d,), {})


def with_dropout(module):
    module.denselayer1.drop_rate = 0.5


CHANGES = (
    with_hook,
    with_hook_on_a_norm,
    with_training_norm,
    with_other_eps,
    with_bias,
    with_other_padding,
    with_other_activation,
    with_replaced_convolution,
    with_class,
    with_dropout,
)


@pytest.mark.parametrize("change", CHANGES)
def test_a_block_that_is_no_longer_the_operator_runs_by_its_layers(change):
    module, x = block_module(), image()
    assert is_whole(module, x)
    change(module)
    assert not is_whole(module, x)
    # A normalisation in training moves its statistics at every call.
    expected = plain(copy.deepcopy(module), x)
    with torch.no_grad():
        assert torch.equal(module(x), expected)


def test_layers_of_different_widths_run_by_themselves():
    module = block_module()
    module.denselayer3 = DenseBlock(2, 10, 4, 3).double().eval().denselayer2
    assert not is_whole(module, image())
    with torch.no_grad():
        assert module(image()).shape == (3, 18, 5, 5)


def with_parameter(module):
    module.denselayer2.conv1.weight = nn.Parameter(2 * module.denselayer2.conv1.weight.detach())


def with_data(module):
    module.denselayer2.conv2.weight.data = 2 * module.denselayer2.conv2.weight.data


def with_values(module):
    with torch.no_grad():
        module.denselayer3.norm2.weight.mul_(2)


def with_values_through_data(module):
    module.denselayer2.conv1.weight.data.mul_(2)
    module.eval()


def with_buffer(module):
    module.denselayer1.norm1.running_mean = module.denselayer1.norm1.running_mean + 1


def with_eps(module):
    for part in module.modules():
        if hasattr(part, "eps"):
            part.eps = 0.1


def with_layer(module):
    module.denselayer2 = DenseBlock(2, 6, 4).double().eval().denselayer2


def with_state(module):
    module.load_state_dict({name: 2 * tensor for name, tensor in module.state_dict().items()})


def with_training(module):
    module.train()(torch.randn(4, 6, 8, 8, dtype=torch.float64))
    module.eval()


NEW_VALUES = (
    with_parameter,
    with_data,
    with_values,
    with_values_through_data,
    with_buffer,
    with_eps,
    with_layer,
    with_state,
    with_training,
)


@pytest.mark.parametrize("change", NEW_VALUES)
def test_what_changes_between_two_calls_counts_in_the_second(change):
    module, x = block_module(), image()
    with torch.no_grad():
        before = module(x)
        change(module)
        after = module(x)
    assert is_whole(module, x)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, plain(module, x), rtol=1e-12, atol=1e-12)


def test_copies_and_pickles_carry_no_constants():
    module, x = block_module(), image()
    names = list(module.state_dict())
    with torch.no_grad():
        expected = module(x)
    file = io.BytesIO()
    torch.save(module, file)
    size = file.tell()
    file.seek(0)
    fresh = io.BytesIO()
    torch.save(block_module(), fresh)
    assert size == fresh.tell()
    for other in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        with torch.no_grad():
            other.denselayer1.conv1.weight.mul_(2)
            assert not torch.allclose(other(x), expected)
            assert torch.equal(module(x), expected)
    assert list(module.state_dict()) == names


def test_a_block_that_ran_is_collected():
    module = block_module()
    with torch.no_grad():
        module(image())
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None


def test_weights_of_inference_mode_have_no_versions():
    with torch.inference_mode():
        module = block_module()
        before = module(image())
        module.denselayer1.conv1.weight.mul_(2)
        assert not torch.allclose(module(image()), before)
