"""`hybrid_block` on the CPU against float64 and plain torch; modules that hand their tensors to it."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from block_inputs import Block, dense, make_block, transition
from exactness import inexact
from layouts import MAPS, in_layout

from pyext import backend
from pyext._backend import BackendError
from pyext.models.hcgnet import HCGNet
from pyext.nn import HybridBlock, Transition, hybrid_inference
from pyext.nn.hybrid_inference import run_block
from pyext.ops import gated_excitation, hybrid_block
from pyext.ops.hybrid_block import CONVOLUTIONS, TENSORS, is_packed, pack_hybrid_block, reference

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
    "groups of odd width": Block(2, 7, 6, 11, dense(2, 15, 6, 3)),
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


# --- packed weights ---------------------------------------------------------------------------------------------------


def autocast_reference(block, x, tensors):
    """Plain torch's products of bfloat16 numbers, for x in bfloat16 or, as autocast does, in float32."""
    with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.float32), torch.no_grad():
        return reference(x, tensors, block.extents)


def assert_as_exact_as_autocast(block, x, tensors, actual):
    def evaluations():
        generator = torch.Generator().manual_seed(0)
        near = x
        for _ in range(8):
            exact = reference(near.double(), [t.double() for t in tensors], block.extents)
            yield [autocast_reference(block, near, tensors)], [exact]
            near = (x * (1 + 0.01 * torch.randn(x.shape, generator=generator))).to(x.dtype)

    lines = inexact({"out": actual}, evaluations(), {})
    assert not lines, lines


@pytest.mark.parametrize("tensor_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", BLOCKS)
def test_inference_with_packed_weights(name, dtype, tensor_dtype):
    if dtype == torch.float32:
        tensor_dtype = torch.float32
    x, tensors = make_block(BLOCKS[name], dtype, tensor_dtype)
    out = run(BLOCKS[name], x, pack_hybrid_block(tensors))
    assert out.dtype == dtype
    assert_as_exact_as_autocast(BLOCKS[name], x, tensors, out)


def whole_numbers(block):
    """A block whose squeeze cells compute with small integers, which bfloat16 and float32 hold exactly."""
    x, tensors = make_block(block, torch.float32)
    generator = torch.Generator().manual_seed(5)
    for place, tensor in enumerate(tensors):
        name = TENSORS[place % len(TENSORS)]
        if name.endswith("conv.weight") and name.startswith(("conv1_1x1", "conv2_3x3")):
            tensor.copy_(torch.randint(-1, 2, tensor.shape, generator=generator))
        elif name.startswith(("conv1_1x1.norm", "conv2_3x3.norm")):
            tensor.fill_(1.0 if name.endswith(("weight", "var")) else 0.0)
    return torch.randint(-2, 3, x.shape, generator=generator).float(), tensors


@pytest.mark.parametrize("name", ["transition, odd extents", "channels that fill no tile", "groups of odd width"])
def test_inference_with_packed_weights_is_that_in_float32_where_nothing_is_rounded(name):
    """Every channel meets its own weight: the products are the very same ones, with eps 0 in one module."""
    block = BLOCKS[name]
    block = block._replace(extents=block.extents._replace(modules=1))
    x, tensors = whole_numbers(block)
    arguments = {"stride": block.extents.stride, "dense": block.extents.dense, "eps": 0.0}
    with torch.no_grad():
        expected = hybrid_block(x, tensors, **arguments)
        assert torch.equal(hybrid_block(x, pack_hybrid_block(tensors), **arguments), expected)


@pytest.mark.parametrize("threads", [1, 3, 8])
@pytest.mark.parametrize("name", ["a1", "one image, more rows than threads", "groups of odd width"])
def test_inference_with_packed_weights_on_any_number_of_threads(name, threads):
    x, tensors = make_block(BLOCKS[name], torch.bfloat16)
    packed, before = pack_hybrid_block(tensors), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run(BLOCKS[name], x, packed)
        torch.set_num_threads(threads)
        assert torch.equal(run(BLOCKS[name], x, packed), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("channel", [4, 7, 10])
def test_inference_with_packed_weights_keeps_what_is_no_number(channel):
    """In both halves of a lane, and in the last channel's, which holds no other."""
    block = BLOCKS["channels that fill no tile"]
    x, tensors = make_block(block, torch.bfloat16)
    x[0, channel, 3, 3] = float("nan")
    assert run(block, x, pack_hybrid_block(tensors))[:, block.channels :].isnan().all()


def test_packed_weights_hold_pairs_of_channels():
    weight = torch.arange(6.0).view(2, 3, 1, 1)
    _, tensors = make_block(Block(1, 3, 2, 2, dense(1, 2, 2, 2)), torch.float32)
    tensors[CONVOLUTIONS[0]] = weight
    packed = pack_hybrid_block(tensors)[CONVOLUTIONS[0]]
    assert packed.shape == (2, 2)
    assert packed.view(torch.bfloat16).tolist() == [[0, 1, 2, 0], [3, 4, 5, 0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["rows of no whole vector", "transition, odd extents", "groups of odd width"])
def test_reference_of_packed_weights(name, dtype):
    """What the operator says of packed weights; with gradients, which its kernel does not give."""
    block = BLOCKS[name]
    x, tensors = make_block(block, dtype)
    packed = pack_hybrid_block(tensors)
    assert_as_exact_as_autocast(block, x, tensors, run(block, x, packed, "reference"))
    x.requires_grad_()
    hybrid_block(x, packed, stride=block.extents.stride, dense=block.extents.dense).sum().backward()
    assert x.grad.isfinite().all()


def test_packed_weights_pass_opcheck():
    for block in (BLOCKS["rows of no whole vector"], BLOCKS["transition, odd extents"]):
        x, tensors = make_block(block, torch.bfloat16)
        arguments = (x, pack_hybrid_block(tensors), list(block.extents), 1e-5)
        torch.library.opcheck(torch.ops.pyext.hybrid_block.default, arguments)


def test_wrong_packed_weights_are_named():
    x, tensors = make_block(BLOCKS["rows of no whole vector"], torch.float32)
    packed = pack_hybrid_block(tensors)
    later = CONVOLUTIONS[1] + len(TENSORS)

    def refused(error, message, x=x, tensors=packed, backend="cpu"):
        with pytest.raises(error, match=message), torch.no_grad():
            hybrid_block(x, tensors, backend=backend)

    for dtype in (torch.float64, torch.float16):
        refused(TypeError, f"x has dtype {dtype}, expected float32 or bfloat16 with packed weights", x.to(dtype))
    message = rf"tensors\[{later}\].* has dtype torch.float32, expected int32"
    refused(TypeError, message, tensors=with_tensor(packed, later, packed[later].float()))
    message = rf"tensors\[{later}\].* has shape \(2, 2, 2, 3\), expected \(2, 2, 2, 9\)"
    refused(ValueError, message, tensors=with_tensor(packed, later, packed[later][..., :3]))
    refused(ValueError, "no packed weights", tensors=with_tensor(packed, CONVOLUTIONS[1], tensors[CONVOLUTIONS[1]][0]))
    refused(BackendError, "packed for the CPU's kernel", backend="triton")
    with pytest.raises(ValueError, match="packed already"):
        pack_hybrid_block(packed)


def with_tensor(tensors, place, tensor):
    return [*tensors[:place], tensor, *tensors[place + 1 :]]


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


# --- modules in bfloat16 ----------------------------------------------------------------------------------------------

WHOLE = {
    "block": (lambda: HybridBlock(2, 6, 4, 8), (2, 6, 9, 7), 1),
    "transition": (lambda: Transition(12, 6), (3, 12, 7, 7), 1),
    "network": (lambda: HCGNet((4, 8), (2, 2), 5), (2, 3, 16, 16), 3),
}
"""Modules with the shape of their input, and how many operators they run as."""


def evaluated(module, x, way, name="auto"):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"), backend(name):
        return module(x)


def drawn(name, way):
    torch.manual_seed(3)
    build, shape, _ = WHOLE[name]
    module, x = build().eval(), torch.randn(shape)
    return (module.bfloat16(), x.bfloat16()) if way == "cast" else (module, x)


@pytest.fixture(params=[False, True], ids=["multiplies float32", "multiplies bfloat16"])
def packs(request, monkeypatch):
    """Whether modules pack their weights, which by itself the processor decides."""
    monkeypatch.setattr(hybrid_inference, "multiplies_bfloat16", lambda: request.param)
    return request.param


@pytest.fixture
def calls(monkeypatch):
    """The tensors that modules hand to the operator, call by call."""
    seen = []

    def recorded(x, tensors, **options):
        seen.append(tensors)
        return hybrid_block(x, tensors, **options)

    monkeypatch.setattr(hybrid_inference, "hybrid_block", recorded)
    return seen


@pytest.mark.parametrize("way", ["cast", "autocast"])
@pytest.mark.parametrize("name", WHOLE)
def test_modules_in_bfloat16(name, way, packs, calls):
    module, x = drawn(name, way)
    out = evaluated(module, x, way)
    assert [is_packed(tensors) for tensors in calls] == [packs] * WHOLE[name][2]
    assert out.dtype == evaluated(module, x, way, "reference").dtype
    exact = copy.deepcopy(module).double()

    def evaluations():
        generator = torch.Generator().manual_seed(0)
        near = x
        for _ in range(8):
            yield [evaluated(module, near, way, "reference")], [evaluated(exact, near.double(), "", "reference")]
            near = (x * (1 + 0.01 * torch.randn(x.shape, generator=generator))).to(x.dtype)

    lines = inexact({"out": out}, evaluations(), {})
    assert not lines, lines


@pytest.mark.parametrize("way", ["cast", "autocast"])
def test_weights_are_converted_once(way, packs, calls):
    module, x = drawn("block", way)
    for _ in range(2):
        evaluated(module, x, way)
    first, second = ([tensors[i] for i in CONVOLUTIONS] for tensors in calls)
    assert all(a is b for a, b in zip(first, second, strict=True))
    assert all(weight.dtype == (torch.int32 if packs else torch.float32) for weight in first)
    with torch.no_grad():
        module.SMG2.conv1_1x1.conv.weight.mul_(2)
    evaluated(module, x, way)
    assert calls[2][CONVOLUTIONS[0]] is not first[0]


def with_values_in_place(module):
    with torch.no_grad():
        module.SMG2.conv1_1x1.conv.weight.mul_(2)


def with_new_data_twice(module):
    """The second one may come to the address of the first."""
    for _ in range(2):
        module.SMG2.conv1_1x1.conv.weight.data = 2 * module.SMG2.conv1_1x1.conv.weight.data


def with_gate_values(module):
    module.SMG2.fc1.weight.data.mul_(4)


def with_state(module):
    module.load_state_dict({name: 2 * value for name, value in module.state_dict().items()})


VERSIONED = (
    *(change for change in NEW_VALUES if change not in (with_values, with_layer, with_training)),
    with_values_in_place,
    with_new_data_twice,
    with_gate_values,
    with_state,
)


@pytest.mark.parametrize("change", VERSIONED)
@pytest.mark.parametrize("way", ["cast", "autocast"])
def test_what_changes_between_two_calls_in_bfloat16_counts_in_the_second(way, change, packs):
    module, x = drawn("block", way)
    evaluated(module, x, way)
    change(module)
    assert torch.equal(evaluated(module, x, way), evaluated(copy.deepcopy(module), x, way))


def test_a_module_that_is_cast_after_a_call_runs_in_its_new_dtype(packs, calls):
    module, x = drawn("block", "autocast")
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        out = evaluated(module.to(dtype), x.to(dtype), "cast")
        assert out.dtype == dtype
        assert torch.equal(out, evaluated(copy.deepcopy(module), x.to(dtype), "cast"))
    assert [is_packed(tensors) for tensors in calls[::2]] == [False, packs, False]


def test_weights_made_in_inference_mode_are_converted_in_every_call(packs, calls):
    with torch.inference_mode():
        module, x = drawn("block", "cast")
    out = evaluated(module, x, "cast")
    with torch.inference_mode():
        module.SMG1.conv1_1x1.conv.weight.mul_(2)
    assert not torch.equal(evaluated(module, x, "cast"), out)
    assert not any(is_packed(tensors) for tensors in calls)


def test_float16_and_float64_under_autocast_run_by_their_parts(packs, calls):
    module, x = drawn("block", "autocast")
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        module(x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert run_block(copy.deepcopy(module).double(), x.double()) is None
    assert not calls
