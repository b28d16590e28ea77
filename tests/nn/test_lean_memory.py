"""Memory "lean": the same outputs, gradients and statistics from less that is kept."""

import copy

import pytest
import torch

from pyext import accelerate, models
from pyext.nn import DenseBlock, HybridBlock, set_memory

BLOCKS = {
    "hybrid": lambda **options: HybridBlock(3, 16, 4, 8, **options),
    "dense, bottlenecks": lambda **options: DenseBlock(3, 16, 8, **options),
    "dense": lambda **options: DenseBlock(3, 16, 8, 0, **options),
}


def kept_bytes(block, x):
    """What the graph of a forward pass holds on to."""
    held = {}

    def pack(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = block(x)
    out.sum().backward()
    return sum(held.values())


def step(block, x):
    x = x.clone().requires_grad_()
    out = block(x)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in block.parameters()), *block.buffers()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", BLOCKS)
def test_lean_gives_the_same_bits(name, dtype):
    torch.manual_seed(0)
    block = BLOCKS[name]().to(dtype)
    lean = set_memory(copy.deepcopy(block), "lean")
    x = torch.randn(4, 16, 9, 8, dtype=dtype)
    for found, expected in zip(step(lean, x), step(block, x), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("name", "share"), [("hybrid", 0.5), ("dense, bottlenecks", 0.6)])
def test_lean_keeps_less(name, share):
    x = torch.randn(8, 16, 16, 16, requires_grad=True)
    fast, lean = (kept_bytes(BLOCKS[name](memory=memory), x) for memory in ("fast", "lean"))
    assert lean < share * fast


def test_two_forward_passes_before_the_backward_pass():
    torch.manual_seed(0)
    block = BLOCKS["hybrid"]().double()
    lean = set_memory(copy.deepcopy(block), "lean")
    x = torch.randn(4, 16, 8, 8, dtype=torch.float64)
    gradients = []
    for module in (block, lean):
        y = x.clone().requires_grad_()
        (module(y).sum() + module(2 * y).square().sum()).backward()
        gradients.append(y.grad)
    assert torch.equal(*gradients)


def test_every_block_of_a_network_is_set():
    model = accelerate(models.hcgnet_a1(10))
    assert set_memory(model, "lean") is model
    blocks = [module for module in model.modules() if isinstance(module, HybridBlock)]
    assert [block.memory for block in blocks] == ["lean"] * 3
    assert {block.memory for block in set_memory(model, "fast").modules() if isinstance(block, HybridBlock)} == {"fast"}


@pytest.mark.parametrize("name", BLOCKS)
def test_other_words_are_refused(name):
    with pytest.raises(ValueError, match=r"Block: memory is 'small', expected one of fast, lean"):
        BLOCKS[name](memory="small")
    with pytest.raises(ValueError, match=r"set_memory: memory is 'small'"):
        set_memory(BLOCKS[name](), "small")
