"""`BNReLUConv2d` and hybrid blocks in training: their operators give what the submodules one by one do."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pyext import backend
from pyext.nn import BNReLUConv2d, HybridBlock, Transition
from pyext.nn.hybrid_training import train_block

LAYERS = {
    "1x1": lambda: BNReLUConv2d(6, 10, 1),
    "3x3": lambda: BNReLUConv2d(6, 10, 3, padding=1),
    "grouped": lambda: BNReLUConv2d(8, 6, 3, padding=1, groups=2),
    "strided": lambda: BNReLUConv2d(6, 10, 3, padding=1, stride=2),
}


def draw_parameters(module, seed=0):
    """Drawn parameters and running statistics, in float64, so that no product is trivial."""
    generator = torch.Generator().manual_seed(seed)
    for name, x in [*module.named_parameters(), *module.named_buffers()]:
        if x.is_floating_point():
            drawn = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            near_one = name.endswith("running_var") or (x.dim() == 1 and name.endswith("weight"))
            x.data.copy_(1 + 0.1 * drawn if near_one else 0.3 * drawn)
    return module


def trained(module, x, backend_name):
    """Output, gradients of the input and of every parameter, and the state, after one step on `backend_name`."""
    module, x = copy.deepcopy(module), x.clone().requires_grad_()
    with backend(backend_name):
        out = module(x)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    return {"out": out, "grad x": x.grad, **{n: p.grad for n, p in module.named_parameters()}, **module.state_dict()}


def assert_alike(module, x):
    actual, expected = trained(module, x, "auto"), trained(module, x, "reference")
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_layer_trains_as_its_submodules(name, training):
    module = draw_parameters(LAYERS[name]().double()).train(training)
    x = torch.randn(3, module.norm.num_features, 7, 5, dtype=torch.float64)
    assert_alike(module, x)
    assert "BNReluConv2d".lower() in type(module(x.requires_grad_()).grad_fn).__name__.lower().replace("_", "")


@pytest.mark.parametrize("channels_last", [False, True])
def test_transition_trains_as_its_submodules(channels_last):
    x = torch.randn(4, 12, 6, 7, dtype=torch.float64)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert_alike(draw_parameters(Transition(12, 8).double()), x.contiguous(memory_format=layout))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("modules", [1, 3])
def test_block_trains_as_its_modules(modules, channels_last):
    module, x = draw_parameters(HybridBlock(modules, 6, 4, 8).double()), torch.randn(4, 6, 5, 6, dtype=torch.float64)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert_alike(module, x.contiguous(memory_format=layout))
    assert train_block(list(module), x) is not None


@pytest.mark.parametrize("make", [lambda: HybridBlock(2, 6, 4, 8), lambda: Transition(6, 8)])
def test_two_forward_passes_before_the_backward_pass(make):
    module = draw_parameters(make().double())
    batches = [torch.randn(4, 6, 5, 6, dtype=torch.float64) for _ in range(2)]
    gradients = []
    for name in ("auto", "reference"):
        copied = copy.deepcopy(module)
        with backend(name):
            sum(copied(x).sin().sum() for x in batches).backward()
        gradients.append([p.grad for p in copied.parameters()] + list(copied.buffers()))
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def with_hook(block):
    block.SMG2.conv2_3x3.register_forward_hook(lambda *_: None)


def with_frozen_norm(block):
    block.SMG1.conv1_1x1.norm.eval()


def with_other_momentum(block):
    block.SMG2.conv1_1x1.norm.momentum = 0.5


def with_cumulative_average(block):
    block.SMG1.conv2_3x3.norm.momentum = None


def with_bias(block):
    conv = block.SMG1.conv2_3x3.conv
    conv.bias = nn.Parameter(torch.ones(conv.out_channels, dtype=torch.float64))


@pytest.mark.parametrize(
    "change", [with_hook, with_frozen_norm, with_other_momentum, with_cumulative_average, with_bias]
)
def test_a_block_that_is_no_longer_uniform_trains_by_its_parts(change):
    module, x = draw_parameters(HybridBlock(2, 6, 4, 8).double()), torch.randn(4, 6, 5, 6, dtype=torch.float64)
    change(module)
    assert train_block(list(module), x) is None
    assert_alike(module, x)


def test_what_training_asks_for_decides():
    module, x = HybridBlock(2, 6, 4, 8).double(), torch.randn(4, 6, 5, 6, dtype=torch.float64)
    assert train_block(list(module), x[:1]) is None  # one image: torch's own message
    assert train_block(list(module), x.float()) is None
    with torch.no_grad():
        assert train_block(list(module), x) is None
    with backend("reference"):
        assert train_block(list(module), x) is None
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        module(x[:1])


def test_training_is_the_cpu_kernels_alone():
    """Triton's interpreter could run the operators on CPU tensors; what trains there calls the CPU's kernels."""
    x = torch.randn(4, 6, 5, 6)
    block, layer = HybridBlock(2, 6, 4, 8), LAYERS["3x3"]()
    assert train_block(list(block), x) is not None
    assert "bn_relu_conv2d" in type(layer(x).grad_fn).__name__.lower()
    with backend("triton"):
        assert train_block(list(block), x) is None
        assert "convolution" in type(layer(x).grad_fn).__name__.lower()


def test_a_block_is_differentiated_once():
    module, x = HybridBlock(1, 6, 4, 8).double(), torch.randn(4, 6, 5, 6, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_parameters_that_are_frozen_get_no_gradient():
    module, x = draw_parameters(HybridBlock(2, 6, 4, 8).double()), torch.randn(4, 6, 5, 6, dtype=torch.float64)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("SMG2" in name)
    module(x).sum().backward()
    assert all((p.grad is not None) == ("SMG2" in name) for name, p in module.named_parameters())
