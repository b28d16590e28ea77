"""`hybrid_block` on the CPU against float64 and plain torch; modules that hand their tensors to it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from block_inputs import Block, dense, make_block, transition
from exactness import inexact
from layouts import MAPS, in_layout

from pyext import backend
from pyext._backend import BackendError
from pyext.nn import HybridBlock, Transition
from pyext.nn.hybrid_inference import run_block
from pyext.ops import gated_excitation, hybrid_block
from pyext.ops.hybrid_block import TENSORS, reference

BLOCKS = {
    "a1": Block(3, 24, 32, 32, dense(3, 48, 12, 4)),
    "a1, second block": Block(2, 60, 16, 16, dense(2, 96, 24, 4)),
    "a1, third block": Block(2, 20, 8, 8, dense(2, 144, 36, 4)),
    "rows of no whole vector": Block(3, 5, 7, 9, dense(2, 8, 4, 2)),
    "one position": Block(2, 3, 1, 1, dense(2, 4, 2, 1)),
    "one row": Block(2, 3, 1, 75, dense(1, 14, 7, 1)),
    "one column": Block(2, 3, 70, 1, dense(1, 10, 5, 5)),
    "channels that fill no tile": Block(1, 11, 14, 14, dense(2, 13, 11, 1)),
    "no image": Block(0, 3, 4, 4, dense(1, 4, 2, 1)),
    "transition": Block(3, 20, 16, 16, transition(15, 10)),
    "transition, odd extents": Block(2, 7, 9, 13, transition(6, 5)),
    "transition, wide rows": Block(1, 4, 5, 70, transition(7, 3)),
    "transition without stride": Block(2, 6, 6, 5, transition(4, 8, stride=1)),
    "one image, more rows than threads": Block(1, 9, 20, 20, transition(9, 7)),
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def run(block, x, tensors, name="cpu"):
    with torch.no_grad():
        return hybrid_block(x, tensors, stride=block.extents.stride, dense=block.extents.dense, backend=name)


def assert_exact(block, x, tensors, actual):
    def evaluations():
        generator = torch.Generator().manual_seed(0)
        near = x
        for _ in range(8):
            exact = reference(near.double(), [t.double() for t in tensors], block.extents)
            yield [run(block, near, [t.to(x.dtype) for t in tensors], "reference")], [exact]
            near = (x * (1 + 0.01 * torch.randn(x.shape, generator=generator))).to(x.dtype)

    lines = inexact({"out": actual}, evaluations(), {})
    assert not lines, lines


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BLOCKS)
def test_inference(name, dtype):
    x, tensors = make_block(BLOCKS[name], dtype)
    assert_exact(BLOCKS[name], x, tensors, run(BLOCKS[name], x, tensors))


@pytest.mark.parametrize("layout", MAPS)
@pytest.mark.parametrize("name", ["rows of no whole vector", "transition, odd extents"])
def test_inference_of_any_layout(name, layout):
    x, tensors = make_block(BLOCKS[name], torch.float64)
    x = in_layout(x, layout)
    torch.testing.assert_close(
        run(BLOCKS[name], x, tensors), run(BLOCKS[name], x.contiguous(), tensors), rtol=0, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inference_with_float32_tensors(dtype):
    block = BLOCKS["a1"]
    x, tensors = make_block(block, dtype, torch.float32)
    assert_exact(block, x, tensors, run(block, x, tensors))


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_inference_with_tensors_of_both_dtypes(name):
    """Also within one normalisation, which plain torch refuses."""
    block = BLOCKS["rows of no whole vector"]
    x, tensors = make_block(block, torch.bfloat16)
    tensors = [t.float() if i % 2 else t for i, t in enumerate(tensors)]
    assert_exact(block, x, tensors, run(block, x, tensors, name))


@pytest.mark.parametrize("threads", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("name", ["a1", "channels that fill no tile", "one image, more rows than threads"])
def test_inference_on_any_number_of_threads(name, threads):
    """The same bits, whether images, groups or rows are shared out."""
    x, tensors = make_block(BLOCKS[name], torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run(BLOCKS[name], x, tensors)
        torch.set_num_threads(threads)
        assert torch.equal(run(BLOCKS[name], x, tensors), expected)
    finally:
        torch.set_num_threads(before)


def test_wrong_number_of_tensors_is_named():
    x, tensors = make_block(BLOCKS["a1"], torch.float32)
    for wrong in ([], tensors[:-1], [*tensors, x]):
        with pytest.raises(ValueError, match=f"{len(wrong)} tensors, expected {len(TENSORS)} for each module"):
            hybrid_block(x, wrong)


def test_modules_that_do_not_follow_one_another_are_refused():
    x, tensors = make_block(BLOCKS["a1"], torch.float32)
    with pytest.raises(ValueError, match="of module 1, has shape"), torch.no_grad():
        hybrid_block(x, [*tensors[: len(TENSORS)], *tensors[: len(TENSORS)]])


def test_kernels_refuse_gradients_and_auto_gives_them():
    block = BLOCKS["rows of no whole vector"]
    x, tensors = make_block(block, torch.float64)
    x.requires_grad_()
    with pytest.raises(BackendError, match="gradients are asked for"):
        hybrid_block(x, tensors, backend="cpu")
    hybrid_block(x, tensors).sum().backward()
    assert x.grad.isfinite().all()


# --- modules ----------------------------------------------------------------------------------------------------------


def block_module():
    return HybridBlock(2, 6, 4, 8).double().eval()


def with_hook(module):
    module.SMG2.conv2_3x3.register_forward_hook(lambda *_: None)


def with_training_norm(module):
    module.SMG1.conv1_1x1.norm.train()


def with_other_eps(module):
    module.SMG2.conv1_1x1.norm.eps = 1e-3


def with_bias(module):
    conv = module.SMG1.conv2_3x3.conv
    conv.bias = torch.nn.Parameter(torch.ones(conv.out_channels, dtype=torch.float64))


def with_other_padding(module):
    module.SMG1.conv2_3x3.conv.padding_mode = "reflect"


def with_replaced_convolution(module):
    class Convolution(torch.nn.Conv2d):
        pass

    module.SMG1.conv1_1x1.conv = Convolution(6, 32, 1, bias=False, dtype=torch.float64)


CHANGES = (with_hook, with_training_norm, with_other_eps, with_bias, with_other_padding, with_replaced_convolution)


def test_a_block_runs_whole():
    module, x = block_module(), torch.randn(2, 6, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(run_block(module, x), module(x))
        with backend("reference"):
            assert run_block(module, x) is None
            torch.testing.assert_close(module(x), run_block_result(module, x), rtol=1e-12, atol=1e-12)
    assert run_block(module, x) is None  # gradients could be asked for


def run_block_result(module, x):
    with backend("auto"):
        return run_block(module, x)


@pytest.mark.parametrize("change", CHANGES)
def test_a_block_that_is_no_longer_the_operator_runs_by_its_parts(change):
    module, x = block_module(), torch.randn(3, 6, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        module(x)
    change(module)
    with torch.no_grad():
        assert run_block(module, x) is None
        out = module(x)
    module.eval()
    with torch.no_grad(), backend("reference"):
        if change is not with_training_norm:
            torch.testing.assert_close(out, module(x))


def with_class(module):
    module.SMG2.fc1.__class__ = type("Convolution", (torch.nn.Conv2d,), {})


def test_a_class_that_changes_is_seen():
    module, x = block_module(), torch.randn(3, 6, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        assert run_block(module, x) is not None
        with_class(module)
        assert run_block(module, x) is None


def with_parameter(module):
    module.SMG2.conv1_1x1.conv.weight = torch.nn.Parameter(2 * module.SMG2.conv1_1x1.conv.weight.detach())


def with_data(module):
    module.SMG2.conv1_1x1.conv.weight.data = 2 * module.SMG2.conv1_1x1.conv.weight.data


def with_values(module):
    module.SMG2.conv1_1x1.conv.weight.data.mul_(2)


def with_buffer(module):
    module.SMG1.bn_forget.running_mean = module.SMG1.bn_forget.running_mean + 1


def with_eps(module):
    for part in module.modules():
        if hasattr(part, "eps"):
            part.eps = 0.1


def with_layer(module):
    module.SMG2 = block_module().SMG2


def with_training(module):
    module.train()(torch.randn(4, 6, 5, 5, dtype=torch.float64))
    module.eval()


NEW_VALUES = (with_parameter, with_data, with_values, with_buffer, with_eps, with_layer, with_training)


@pytest.mark.parametrize("change", NEW_VALUES)
def test_what_changes_between_two_calls_counts_in_the_second(change):
    module, x = block_module(), torch.randn(3, 6, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        before = module(x)
        change(module)
        after = module(x)
        with backend("reference"):
            expected = module(x)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, expected, rtol=1e-12, atol=1e-12)


def test_a_block_that_ran_is_collected():
    module = block_module()
    with torch.no_grad():
        module(torch.randn(1, 6, 5, 5, dtype=torch.float64))
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None


def test_modules_of_different_widths_run_by_their_parts():
    module = block_module()
    module.SMG2 = HybridBlock(1, 14, 2, 8).double().eval().SMG1
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        assert run_block(module, x) is None
        assert module(x).shape == (2, 22, 5, 5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_transition_runs_whole(memory_format):
    module = Transition(12, 6).double().eval()
    x = torch.randn(3, 12, 7, 7, dtype=torch.float64).contiguous(memory_format=memory_format)
    with torch.no_grad():
        whole = run_block(module, x, stride=2, dense=False)
        assert torch.equal(whole, module(x))
        assert whole.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(whole, gated_excitation_parts(module, x), rtol=1e-12, atol=1e-12)


def gated_excitation_parts(module, x):
    u = module.conv2_3x3(module.conv1_1x1(x))
    return gated_excitation(u, *module.gate_tensors())
