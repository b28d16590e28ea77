"""DenseNet's blocks trained as a whole, against the same submodules run by plain torch."""

import copy
import gc
import itertools
import weakref

import pytest
import torch
from exactness import inexact
from torch import nn

from pyext import accelerate, backend, explain, models
from pyext.nn import BNReLUConvSequential, DenseBlock, DenseLayer
from pyext.nn.dense_inference import infer_folded

torchvision = pytest.importorskip("torchvision")
from torchvision.models.densenet import _DenseBlock, _Transition  # noqa: E402

BOTTLENECKS = (4, 0)


def draw(module):
    """`module` in float64 with statistics and parameters away from their initial values."""
    generator = torch.Generator().manual_seed(0)
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.data = (0.3 * noise if tensor.dim() > 1 else 0.5 + noise.abs()).double()
    return module


def block(bn_size=4, size=(3, 12, 8)):
    return draw(DenseBlock(*size, bn_size))


def image(n=4, channels=12, height=8, width=9):
    return torch.randn(n, channels, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def step(module, x):
    """Output, gradient of x, gradients of the parameters, buffers after one forward and backward pass."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = module(x)
    weights = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    out.backward(weights.to(out.dtype))
    return {
        "out": out.detach(),
        "x": x.grad,
        **{name: p.grad for name, p in module.named_parameters() if p.grad is not None},
        **{f"buffer {name}": b.clone() for name, b in module.named_buffers()},
    }


def plain_step(module, x):
    with backend("reference"):
        return step(copy.deepcopy(module), x)


def assert_alike(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-9, atol=1e-10), name


def is_whole(out):
    return nodes(out)[:2] == ["CloneBackward0", "_BlockBackward"]


def nodes(out):
    """Names of what autograd will run from `out` on, the nearest first."""
    found = [out.grad_fn]
    for node in found:
        found += [before for before, _ in node.next_functions if before is not None and before not in found]
    return [type(node).__name__ for node in found]


@pytest.mark.parametrize("bn_size", BOTTLENECKS)
def test_a_block_trains_as_its_layers(bn_size):
    module, x = block(bn_size), image()
    expected = plain_step(module, x)
    assert is_whole(module(x.clone().requires_grad_()))
    assert_alike(step(block(bn_size), x), expected)


@pytest.mark.parametrize("bn_size", BOTTLENECKS)
def test_a_block_is_as_exact_as_plain_torch(bn_size):
    """Gradients of all layers in one buffer, what batch statistics take from them taken at the end; more positions than
    are summed at once."""
    module, x = block(bn_size, (5, 21, 8)).float(), image(16, 21).float()

    def floats(results):
        return {name: value for name, value in results.items() if value.is_floating_point()}

    def evaluations():
        generator = torch.Generator().manual_seed(0)
        near = x
        for _ in range(8):
            exact = floats(plain_step(copy.deepcopy(module).double(), near.double()))
            yield list(floats(plain_step(module, near)).values()), list(exact.values())
            near = x * (1 + 0.01 * torch.randn(x.shape, generator=generator))

    assert is_whole(copy.deepcopy(module)(x))
    lines = inexact(floats(step(copy.deepcopy(module), x)), evaluations(), {})
    assert not lines, lines


WRONG_BLOCKS = {
    "two images": lambda a: (a[0][:1], *a[1:]),
    "three parameters for each": lambda a: (a[0], a[1][:-1], *a[2:]),
    r"parameters\[3\] does not fit": lambda a: (a[0], [*a[1][:3], a[1][3][:-1], *a[1][4:]], *a[2:]),
    "one or two cells": lambda a: (*a[:2], [3], a[3]),
    "the layers have 2": lambda a: (*a[:2], [2], a[3]),
}


@pytest.mark.parametrize("message", WRONG_BLOCKS)
def test_the_block_s_operators_refuse_what_they_cannot_read(message):
    cells = [cell for layer in block(size=(2, 12, 8)).layer_cells() for cell in layer]
    parameters = [p.detach() for norm, conv in cells for p in (norm.weight, norm.bias, conv.weight)]
    arguments = image(), parameters, [2, 2], [1e-5] * 4
    with pytest.raises(RuntimeError, match=message):
        torch.ops.pyext.bn_relu_conv2d_block(*WRONG_BLOCKS[message](arguments))
    buffer, moments, kept = torch.ops.pyext.bn_relu_conv2d_block(*arguments)
    backward = torch.ops.pyext.bn_relu_conv2d_block_backward
    with pytest.raises(RuntimeError, match="buffer is not one that the block's forward pass gives"):
        backward(buffer, buffer.contiguous(), moments, kept, *arguments[1:])
    with pytest.raises(RuntimeError, match="a kept map is not one"):
        backward(buffer, buffer, moments, [kept[0][:, 1:], *kept[1:]], *arguments[1:])
    with pytest.raises(RuntimeError, match="two for each bottleneck"):
        backward(buffer, buffer, moments, kept[1:], *arguments[1:])
    running = [torch.zeros(13, dtype=torch.float64)] * 2
    with pytest.raises(RuntimeError, match=r"running\[0\] does not fit"):
        torch.ops.pyext.bn_relu_conv2d_running(running, [moments[:, :12]], 8, 0.1)


def test_torchvision_s_block_is_swapped_and_computes_the_same():
    original = draw(_DenseBlock(3, 12, 4, 8, 0.0))
    fused = accelerate(copy.deepcopy(original))
    assert type(fused) is DenseBlock
    assert [type(layer) for layer in fused.children()] == [DenseLayer] * 3
    assert list(fused.state_dict()) == list(original.state_dict())
    x = image()
    assert is_whole(copy.deepcopy(fused)(x))
    for training in (True, False):
        original.train(training), fused.train(training)
        assert_alike(step(fused, x), step(original, x))
    assert "swapped, was torchvision.models.densenet._DenseBlock" in explain(fused)


def test_a_whole_torchvision_network():
    original = torchvision.models.DenseNet(8, (2, 2), 16, num_classes=5).double()
    fused = accelerate(copy.deepcopy(original))
    assert type(fused.features) is BNReLUConvSequential
    names = [type(module).__name__ for module in fused.features]
    assert names[4:] == ["DenseBlock", "BNReLUConvSequential", "DenseBlock", "BatchNorm2d"]
    assert list(fused.state_dict()) == list(original.state_dict())
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    assert_alike(step(fused, x), step(original, x))


def stages():
    """Stem after its convolution, blocks and transitions, as `accelerate` makes them of torchvision's."""
    model = accelerate(draw(torchvision.models.DenseNet(8, (2, 1, 2), 12, num_classes=5)))
    return model.features[1:-1]


def stage_maps():
    return image(3, 12, 15, 18)


STAGES = ["_BlockBackward", "_BlockBackward", "_BlockBackward"]


def fused_stages(out):
    """Of blocks and pools those that run as operators with images innermost, the last first, up to a copy or one of
    torch's convolutions."""
    copy, *names = nodes(out)
    inside = itertools.takewhile(lambda name: name not in ("CloneBackward0", "ConvolutionBackward0"), names)
    return [name for name in inside if "Block" in name or "pool" in name] if copy == "CloneBackward0" else []


def test_stages_hand_on_maps_with_images_innermost():
    """No copy between them, and the stem's max-pool with them."""
    out, expected = stages()(stage_maps().requires_grad_()), plain_step(stages(), stage_maps())
    pool = "GeneratedBackwardFor_pyext_bn_relu_conv2d_{}pool_defaultBackward"
    pools = pool.format(""), pool.format(""), pool.format("max_")
    assert fused_stages(out) == [name for pair in zip(STAGES, pools, strict=True) for name in pair]
    assert out.is_contiguous()
    assert_alike(step(stages(), stage_maps()), expected)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_stages_keep_the_memory_format(layout):
    x = stage_maps().contiguous(memory_format=layout)
    assert stages()(x).is_contiguous(memory_format=layout)
    assert_alike(step(stages(), x), plain_step(stages(), x))


class Doubled(DenseBlock):
    def forward(self, x):
        return 2 * super().forward(x)


def doubled(m):
    own = m.denseblock2
    m.denseblock2 = Doubled(1, 14, 8, 4, dtype=torch.float64)
    m.denseblock2.load_state_dict(own.state_dict())


SEEN = {
    "hook on a block": (lambda m: m.denseblock2.register_forward_hook(lambda *_: None), 1),
    "hook that writes": (lambda m: m.denseblock1.register_forward_hook(lambda _, __, out: out.mul_(2)), 3),
    "hook on a transition": (lambda m: m.transition1.register_forward_pre_hook(lambda *_: None), 3),
    "hook in a transition": (lambda m: m.transition1.conv.register_forward_hook(lambda *_: None), 3),
    "hook on a layer": (lambda m: m.denseblock2.denselayer1.register_forward_hook(lambda *_: None), 1),
    "hook on the stem's pool": (lambda m: m.pool0.register_forward_hook(lambda *_: None), 5),
    "another pool in the stem": (lambda m: setattr(m, "pool0", nn.MaxPool2d(3, 2, 0)), 5),
    "frozen statistics in the stem": (lambda m: m.norm0.eval(), 5),
    "frozen statistics in a transition": (lambda m: m.transition2.norm.eval(), 1),
    "a block's class derived": (doubled, 1),
}


@pytest.mark.parametrize("name", SEEN)
def test_stages_that_do_more_run_as_modules(name):
    """Beside the block or the pool that does, also the transition behind such a block."""
    change, count = SEEN[name]
    module, changed = stages(), stages()
    change(module), change(changed)
    expected = plain_step(module, stage_maps())
    assert len(fused_stages(copy.deepcopy(module)(stage_maps()))) == count
    assert_alike(step(changed, stage_maps()), expected)


def test_a_hook_sees_maps_as_without_the_operators():
    seen = []
    for kind in ("reference", "auto"):
        module = stages()
        for stage in (module.denseblock1, module.transition1, module.denseblock3):
            stage.register_forward_hook(lambda _, x, out: seen.extend((x[0].clone(), out.clone())))
        with backend(kind):
            module(stage_maps())
    for expected, found in zip(seen[:6], seen[6:], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        assert found.is_contiguous() or found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_whole_torchvision_network_at_inference(layout):
    """One normalisation is torch's, the last, which has no convolution beside it."""
    original = draw(torchvision.models.DenseNet(8, (2, 2), 16, num_classes=5)).eval()
    fused = accelerate(copy.deepcopy(original))
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64).contiguous(memory_format=layout)
    with torch.no_grad(), torch.profiler.profile() as profile:
        found = fused(x)
    calls = [event.name for event in profile.events() if event.name in ("aten::batch_norm", "pyext::dense_block")]
    assert sorted(calls) == ["aten::batch_norm", *["pyext::dense_block"] * 3]
    with torch.no_grad():
        torch.testing.assert_close(found, original(x), rtol=1e-11, atol=1e-11)


def test_a_normalisation_becomes_part_of_the_convolution_before_it():
    own = nn.Conv2d(3, 5, 3, 2, 1, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 1)
    module, x = draw(BNReLUConvSequential(*own)).eval(), torch.randn(2, 3, 9, 8, dtype=torch.float64)
    names = list(module.state_dict())

    def check():
        with torch.no_grad():
            found, folded = module(x), infer_folded(module, 0, list(module)[:2], x)
            with backend("reference"):
                torch.testing.assert_close(found, module(x), rtol=1e-12, atol=1e-12)
        return folded is not None

    assert check()
    module[1].running_mean.add_(1)
    assert check()
    module[0].weight.data = 2 * module[0].weight.data
    assert check()
    module[1].eps = 0.1
    assert check()
    assert list(module.state_dict()) == names
    module[1].register_forward_hook(lambda *_: None)
    with torch.no_grad():
        module(x)
    module[1].train()
    assert not check()
    assert infer_folded(module, 0, list(module)[:2], x) is None  # gradients could be asked for


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_memory_format_is_kept(layout):
    module, x = block(), image().contiguous(memory_format=layout)
    assert module(x).is_contiguous(memory_format=layout)
    assert_alike(step(block(), x), plain_step(block(), x))


def test_frozen_parameters_get_no_gradient():
    module = block()
    expected = plain_step(module, image())
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("conv" in name)
    found = step(module, image())
    assert not any("norm" in name for name in found if not name.startswith("buffer"))
    assert_alike(found, {name: expected[name] for name in found})


def test_two_forward_passes_before_the_backward_pass():
    module, x = block(), image().requires_grad_()
    (module(x).sum() + module(2 * x).sum()).backward()
    plain, y = block(), image().requires_grad_()
    with backend("reference"):
        (plain(y).sum() + plain(2 * y).sum()).backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-9)


def wide_ones(channels):
    return torch.ones(2 * channels, dtype=torch.float64)


CHANGED = {
    "hook on a layer": lambda m: m.denselayer2.register_forward_hook(lambda *_: None),
    "hook on a norm": lambda m: m.denselayer2.norm1.register_forward_hook(lambda *_: None),
    "hook on an activation": lambda m: m.denselayer1.relu2.register_forward_hook(lambda *_: None),
    "another activation": lambda m: setattr(m.denselayer1, "relu1", nn.SiLU()),
    "a frozen normalisation": lambda m: m.denselayer3.norm2.eval(),
    "another momentum": lambda m: setattr(m.denselayer3.norm2, "momentum", 0.3),
    "running statistics with gaps": lambda m: setattr(m.denselayer2.norm1, "running_var", wide_ones(20)[::2]),
    "a bias": lambda m: setattr(m.denselayer1.conv2, "bias", nn.Parameter(torch.ones(8, dtype=torch.float64))),
    "eval": lambda m: m.eval(),
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_the_operators_do_not_compute_runs_by_submodules(name):
    module = block()
    CHANGED[name](module)
    expected = plain_step(module, image())
    assert not is_whole(module(image().requires_grad_()))
    module = block()
    CHANGED[name](module)
    assert_alike(step(module, image()), expected)


@pytest.mark.parametrize("name", CHANGED)
def test_changes_after_a_step_are_seen(name):
    modules = block(), block()
    for module in modules:
        assert is_whole(module(image()))
        CHANGED[name](module)
    assert not is_whole(copy.deepcopy(modules[0])(image()))
    assert_alike(step(modules[0], image()), plain_step(modules[1], image()))


def test_other_tensors_after_a_step_are_seen():
    modules = block(), block()
    for module in modules:
        module(image())
        norm = module.denselayer2.norm1
        norm.weight, norm.bias = nn.Parameter(2 * norm.weight.detach()), nn.Parameter(1 + norm.bias.detach())
        norm.running_mean = torch.zeros_like(norm.running_mean)
    assert is_whole(copy.deepcopy(modules[0])(image()))
    assert_alike(step(modules[0], image()), plain_step(modules[1], image()))


def test_another_dtype_after_a_step_is_seen():
    module = block()
    module(image())
    assert is_whole(module.float()(image().float()))
    with pytest.raises(RuntimeError):
        module(image())


def test_parameters_that_were_computed_are_not_kept():
    module, x = block(), image()
    computed = {name: 2 * parameter for name, parameter in module.named_parameters()}
    seen = weakref.ref(computed["denselayer1.conv1.weight"])
    found = torch.func.functional_call(module, computed, (x,))
    plain = block()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(2)
    assert is_whole(found)
    torch.testing.assert_close(found, plain(x))
    del computed, found
    gc.collect()
    assert seen() is None


def test_dropout_runs_by_submodules_and_is_seeded_as_torchvision_s():
    original = draw(_DenseBlock(2, 12, 4, 8, 0.5))
    fused = accelerate(copy.deepcopy(original))
    outputs = []
    for module in (original, fused):
        torch.manual_seed(3)
        outputs.append(module(image()))
    assert type(fused) is DenseBlock
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(("n", "size"), [(2, 1), (3, 2), (16, 2), (8, 3), (5, 4), (2, 16)])
def test_maps_of_any_size_train_whole(n, size, layout):
    x = image(n=n, height=size, width=size).contiguous(memory_format=layout)
    assert is_whole(block()(x.clone(memory_format=torch.preserve_format).requires_grad_()))
    assert_alike(step(block(), x), plain_step(block(), x))


def test_one_image_and_no_gradients_run_by_submodules():
    module = block()
    assert not is_whole(module(image(n=1)))
    with torch.no_grad():
        assert module(image()).grad_fn is None


def test_a_block_compiles_without_graph_break():
    compiled = torch.compile(block(), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(image()), block()(image()))


class Other(_DenseBlock):
    def forward(self, x):
        return super().forward(x) + 1


class Wider(_DenseBlock):
    def __init__(self, *args):
        super().__init__(*args)
        self.denselayer1.extra = nn.Identity()


@pytest.mark.parametrize(("kind", "reason"), [(Other, "its outputs differ"), (Wider, "denselayer1 has submodules")])
def test_blocks_that_only_look_alike_stay(kind, reason):
    model = nn.Sequential(draw(kind(2, 12, 4, 8, 0.0)))
    assert type(accelerate(model)[0]) is kind
    assert reason in explain(model)


def test_a_sequence_of_normalisation_relu_and_convolution():
    original = draw(_Transition(12, 6))
    fused = accelerate(copy.deepcopy(original))
    assert type(fused) is BNReLUConvSequential
    assert list(fused.state_dict()) == list(original.state_dict())
    assert "bn_relu_conv2d" in type(copy.deepcopy(fused)[:3](image()).grad_fn).__name__.lower()
    assert_alike(step(fused, image()), step(original, image()))
    fused.relu.register_forward_hook(lambda *_: None)
    assert "convolution" in type(fused[:3](image()).grad_fn).__name__.lower()


def test_densenet40_trains_as_by_submodules():
    torch.manual_seed(0)
    model = models.DenseNet(10, 4, 5).double()
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    assert_alike(step(copy.deepcopy(model), x), plain_step(model, x))


def is_pooled_first(module, x, gradients=False):
    """Whether the convolution of a transition reads maps of a quarter of x's positions."""
    seen = []
    convolve = module.conv._conv_forward
    module.conv._conv_forward = lambda maps, *rest: seen.append(maps.shape) or convolve(maps, *rest)
    try:
        with torch.set_grad_enabled(gradients):
            module(x)
    finally:
        del module.conv._conv_forward
    return [shape[2:] for shape in seen] == [(x.shape[2] // 2, x.shape[3] // 2)]


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_transition_pools_before_it_convolves(layout):
    module = accelerate(draw(_Transition(12, 6))).eval()
    module.conv.bias = nn.Parameter(torch.randn(6, dtype=torch.float64))
    x = image().contiguous(memory_format=layout)
    assert is_pooled_first(module, x)
    expected = module(x)
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected.detach(), rtol=1e-12, atol=1e-12)
    assert is_pooled_first(module.train(), x)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_transition_pools_before_it_convolves_in_training(layout):
    original, x = draw(_Transition(12, 6)), image().contiguous(memory_format=layout)
    fused = accelerate(copy.deepcopy(original))
    assert fused(x).is_contiguous(memory_format=layout)
    fused = accelerate(copy.deepcopy(original))
    assert_alike(step(fused, x), step(original, x))
    assert is_pooled_first(fused, x, gradients=True)
    fused.norm.eval()
    assert not is_pooled_first(fused, x, gradients=True)


UNPOOLED = {
    "a hook on the convolution": lambda m: m.conv.register_forward_hook(lambda *_: None),
    "a hook on the pool": lambda m: m.pool.register_forward_hook(lambda *_: None),
    "another kernel": lambda m: setattr(m, "conv", nn.Conv2d(12, 6, 3, padding=1, dtype=torch.float64)),
    "padding": lambda m: setattr(m.conv, "padding", (1, 1)),
    "a padded pool": lambda m: setattr(m.pool, "padding", 1),
    "a sum for an average": lambda m: setattr(m.pool, "divisor_override", 1),
    "another pool": lambda m: setattr(m, "pool", nn.MaxPool2d(2)),
}


@pytest.mark.parametrize("name", UNPOOLED)
def test_what_may_not_be_pooled_first_is_not(name):
    module = accelerate(draw(_Transition(12, 6)))
    UNPOOLED[name](module)
    for training in (True, False):
        assert not is_pooled_first(module.train(training), image(), gradients=training)
