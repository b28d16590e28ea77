"""`pyext.accelerate` on a stand-in for the published classes: what is swapped, what not, and what must not change."""

import copy
import io
import itertools

import published_hcgnet as published
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyext import nn as pyext_nn
from pyext.accelerate import accelerate, explain_model


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    published.DropScheduler.global_epoch = 0


def perturbed(model):
    """`model` with statistics and biases away from their initial zeros and ones."""
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_floating_point():
            noise = 0.1 * torch.randn_like(tensor)
            tensor.data += noise.abs() if name.endswith("running_var") else noise
    return model


def cifar_net():
    return perturbed(published.CifarNet()).double()


def images(n=4, size=8, dtype=torch.float64):
    return torch.randn(n, 3, size, size, dtype=dtype)


def assert_same(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def kinds(model, package):
    return [type(m).__name__ for m in model.modules() if type(m).__module__.startswith(package)]


MODELS = {
    "cifar": (lambda: cifar_net(), (4, 3, 8, 8)),
    "imagenet": (lambda: perturbed(published.ImageNetNet()).double(), (4, 3, 32, 32)),
    "smg": (lambda: perturbed(published.SMG(24, 12)).double(), (3, 24, 5, 5)),
    "hybrid block": (lambda: perturbed(published.HybridBlock(3, 16, 4, 8)).double(), (3, 16, 5, 7)),
    "transition": (lambda: perturbed(published.Transition(40, 20)).double(), (3, 40, 7, 7)),
    "transition, stride 1": (lambda: perturbed(published.Transition(40, 20, 1, False)).double(), (3, 40, 7, 7)),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_gradients_and_running_statistics_are_the_original_s(name, inplace):
    build, shape = MODELS[name]
    original = build()
    fused = accelerate(copy.deepcopy(original), inplace)
    assert not any(isinstance(m, (published.GatedModule, published.HybridBlock)) for m in fused.modules())
    for training in (False, True):
        x = torch.randn(shape, dtype=torch.float64)
        xs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [m.train(training)(x) for m, x in zip((original, fused), xs, strict=True)]
        assert_same(outputs[1], outputs[0])
        for output in outputs:
            output.square().sum().backward()
        assert_same(xs[1].grad, xs[0].grad, 1e-8)
        with torch.no_grad():
            assert_same(fused.eval()(x), original.eval()(x))
    grads = [{n: p.grad for n, p in m.named_parameters()} for m in (fused, original)]
    assert_same(*grads, 1e-8)
    assert_same(dict(fused.named_buffers()), dict(original.named_buffers()))


def test_everything_published_is_swapped_and_keys_keep_their_order():
    original = cifar_net()
    fused = accelerate(original)
    assert kinds(fused, "published") == ["CifarNet", "DropScheduler", "DropBlock"]
    assert kinds(fused, "pyext").count("SMG") == 4
    assert list(fused.state_dict()) == list(original.state_dict())
    assert [n for n, _ in fused.named_parameters()] == [n for n, _ in original.named_parameters()]


def test_tensors_are_shared_and_the_original_stays_whole():
    original = cifar_net().eval()
    modules = list(original.modules())
    expected = original(images().fill_(0.5))
    fused = accelerate(original)
    ours, theirs = fused.state_dict(keep_vars=True), original.state_dict(keep_vars=True)
    assert all(ours[name] is theirs[name] for name in theirs)
    assert all(a is b for a, b in zip(modules, original.modules(), strict=True))
    assert torch.equal(original(images().fill_(0.5)), expected)


def test_inplace_keeps_the_model_and_its_tensors():
    model = cifar_net()
    tensors = model.state_dict(keep_vars=True)
    assert accelerate(model, inplace=True) is model
    assert all(tensor is tensors[name] for name, tensor in model.state_dict(keep_vars=True).items())
    assert type(model.features.HybridBlock1) is pyext_nn.HybridBlock


def test_flags_of_training_and_gradients_carry_over():
    model = cifar_net()
    model.features.HybridBlock1.eval()
    model.features.HybridBlock2.requires_grad_(False)
    fused = accelerate(model)
    expected = {name: module.training for name, module in model.named_modules()}
    assert all(module.training == expected[name] for name, module in fused.named_modules())
    assert [p.requires_grad for p in fused.parameters()] == [p.requires_grad for p in model.parameters()]
    assert_same(fused(images().fill_(0.25)), model(images().fill_(0.25)))


def test_a_module_that_stands_twice_in_the_tree_stays_one():
    smg = published.SMG(16, 8)
    model = nn.ModuleDict({"a": smg, "b": nn.ModuleList([smg])})
    fused = accelerate(model)
    assert fused["a"] is fused["b"][0]
    assert type(fused["a"]) is pyext_nn.SMG


def test_accelerating_twice_changes_nothing_more():
    fused = accelerate(cifar_net())
    again = accelerate(fused, inplace=True)
    assert again is fused
    assert type(fused.features.HybridBlock1) is pyext_nn.HybridBlock


def test_survey_leaves_random_state_counters_and_hooks_alone():
    model = cifar_net()
    calls = []
    model.features.HybridBlock1.SMG1.register_forward_hook(lambda *_: calls.append(1))
    state, tensors = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    explain_model(model)
    accelerate(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(dict(model.state_dict()), dict(tensors), 0)
    assert not calls
    assert model.features.Transition1.dropblock.dropblock.drop_prob == 0


def test_hooks_of_swapped_modules_are_called_and_removable():
    model = cifar_net()
    calls = []
    handle = model.features.HybridBlock1.SMG1.register_forward_hook(lambda m, *_: calls.append(type(m)))
    inner = model.features.Transition1.conv_3x3.register_forward_hook(lambda m, *_: calls.append("inner"))
    accelerate(model, inplace=True)
    assert_same(model(images().fill_(1.0)).isfinite().all(), torch.tensor(True))
    assert calls == [pyext_nn.SMG, "inner"]
    assert "hooks" in explain_model(model)
    handle.remove()
    inner.remove()
    with torch.no_grad():
        model(images())
    assert len(calls) == 2
    assert "hooks" not in explain_model(model)


def test_published_drop_block_steps_and_drops_as_before():
    original = cifar_net()
    fused = accelerate(copy.deepcopy(original))
    published.DropScheduler.global_epoch = 5
    x = images()
    outputs = []
    for model in (original, fused):
        torch.manual_seed(1)
        outputs.append(model(x))
        assert model.features.Transition1.dropblock.dropblock.drop_prob == pytest.approx(0.05)
    assert_same(*outputs)


class Trained:
    """Three steps of SGD on fixed data: the losses, and the weights afterwards."""

    def __init__(self, model):
        torch.manual_seed(3)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True)
        self.losses = []
        for _ in range(3):
            loss = F.cross_entropy(model.train()(images()), torch.arange(4))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            self.losses.append(loss.detach())
        self.state = model.state_dict()


def test_training_follows_the_original():
    original = cifar_net()
    a, b = Trained(accelerate(copy.deepcopy(original))), Trained(original)
    assert_same(a.losses, b.losses, 1e-7)
    assert_same(dict(a.state), dict(b.state), 1e-6)


def test_saving_loading_copying_and_pickling():
    original = cifar_net().eval()
    fused, x = accelerate(original), images()
    expected = original(x)
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    for copied in (copy.deepcopy(fused), torch.load(file, weights_only=False)):
        assert_same(copied(x), expected)
        assert next(copied.parameters()) is not next(fused.parameters())
    other = cifar_net()
    other.load_state_dict(fused.state_dict())
    assert_same(other.eval()(x), expected)
    fused.load_state_dict(perturbed(other).state_dict())
    assert_same(original(x), other(x))


@pytest.mark.parametrize("training", [False, True])
def test_compiles_whole_and_exports(training):
    model = accelerate(perturbed(published.CifarNet())).train(training)
    x = images(dtype=torch.float32)
    expected = copy.deepcopy(model)(x)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")(x)
    assert_same(compiled, expected, 1e-5)
    assert_same(torch.export.export(copy.deepcopy(model), (x,)).module()(x), expected, 1e-5)


def test_dtype_and_autocast():
    original = perturbed(published.CifarNet()).eval()
    fused, x = accelerate(original), images(dtype=torch.float32)
    truth = copy.deepcopy(original).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        ours, theirs = fused(x), original(x)
    limit = 2 * (theirs - truth).norm() + 4 * torch.finfo(torch.bfloat16).eps * truth.norm() / truth.numel() ** 0.5
    assert (ours - truth).norm() <= limit


# --- what must be left alone, and why ---------------------------------------------------------------------------------


class OtherGate(published.SMG):
    """Same structure, another formula."""

    def forward(self, x):
        return torch.cat([x, torch.relu(self.gate(self.conv2_3x3(self.conv1_1x1(x))))], 1)


class DropsOutInTraining(published.SMG):
    """Same structure, other behaviour in training mode alone."""

    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


class ReturnsPair(published.Transition):
    """As in the published detection backbone, which returns an intermediate map too."""

    def forward(self, x):
        return x, super().forward(x)


class WrongWidth(published.SMG):
    def forward(self, x):
        return super().forward(x)[:, 1:]


class Fails(published.SMG):
    def forward(self, x):
        raise RuntimeError("not today")


def changed(build, change):
    module = build()
    change(module)
    return module


def smg():
    return published.SMG(16, 8)


def set_child(path, child):
    def change(module):
        parent, _, name = path.rpartition(".")
        setattr(module.get_submodule(parent), name, child)

    return change


REFUSED = {
    "another formula": (lambda: OtherGate(16, 8), "outputs differ from those of SMG (eval mode)"),
    "other behaviour in training": (lambda: DropsOutInTraining(16, 8), "outputs differ from those of SMG (training"),
    "a pair": (lambda: ReturnsPair(16, 8), "its forward returns a tuple"),
    "other width": (lambda: WrongWidth(16, 8), "its output has 23 channels"),
    "a failing forward": (lambda: Fails(16, 8), "its forward fails on a (3, 16, 5, 5) input: not today"),
    "a missing submodule": (lambda: changed(smg, lambda m: delattr(m, "fc2")), "it has no submodule fc2"),
    "an unknown submodule": (lambda: changed(smg, set_child("extra", nn.Dropout())), "unknown submodules: extra"),
    "another padding": (
        lambda: changed(smg, set_child("conv_5x5.conv", nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False))),
        "conv_5x5.conv is Conv2d",
    ),
    "another activation": (lambda: changed(smg, set_child("conv_3x3.relu", nn.SiLU())), "relu is a SiLU"),
    "another pooling": (lambda: changed(smg, set_child("global_pool", nn.MaxPool2d(2))), "global_pool is a MaxPool2d"),
    "another normalisation": (
        lambda: changed(smg, set_child("conv_3x3.norm", nn.SyncBatchNorm(8))),
        "norm is a SyncBatchNorm, expected BatchNorm2d",
    ),
    "another layer": (lambda: changed(smg, set_child("fc1", nn.Linear(8, 4))), "fc1 is a Linear, expected Conv2d"),
    "a parametrization": (
        lambda: changed(smg, lambda m: nn.utils.parametrizations.weight_norm(m.fcall)),
        "fcall is a ParametrizedConv2d",
    ),
    "a parameter of its own": (
        lambda: changed(smg, lambda m: m.register_parameter("scale", nn.Parameter(torch.ones(1)))),
        "tensors of its own: scale",
    ),
    "a forward on the instance": (
        lambda: changed(smg, lambda m: setattr(m, "forward", lambda x: x)),
        "forward is replaced on the instance",
    ),
    "state-dict hooks": (
        lambda: changed(smg, lambda m: m.register_state_dict_post_hook(lambda *_: None)),
        "state-dict hooks",
    ),
    "a hook on a vanishing module": (
        lambda: changed(smg, lambda m: m.global_pool.register_forward_hook(lambda *_: None)),
        "global_pool is a AdaptiveAvgPool2d or has hooks",
    ),
    "no data": (lambda: smg().to("meta"), "it cannot be copied and tried out"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_relatives_are_left_alone_with_the_reason(name):
    build, reason = REFUSED[name]
    model = nn.Sequential(build(), nn.ReLU())
    before, state = list(model.modules()), torch.get_rng_state()
    text = explain_model(model)
    assert "not swapped" in text
    assert reason in text
    accelerate(model, inplace=True)
    assert all(a is b for a, b in zip(before, model.modules(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_block_with_a_forward_of_its_own_keeps_its_class():
    class Reversed(published.HybridBlock):
        def forward(self, x):
            return super().forward(x.flip(2)).flip(2)

    model = nn.Sequential(Reversed(2, 16, 4, 8)).double()
    x = torch.randn(3, 16, 4, 4, dtype=torch.float64)
    expected = copy.deepcopy(model)(x)
    assert "its class has a forward of its own" in explain_model(model)
    fused = accelerate(model)
    assert [type(m) for m in fused[0]] == [pyext_nn.SMG] * 2
    assert type(fused[0]) is Reversed
    assert_same(fused(x), expected)


def test_models_without_anything_to_swap_pass_through():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    fused = accelerate(model)
    x = images(dtype=torch.float32)
    assert torch.equal(fused(x), model(x))
    assert "no module that pyext has a fused form for" in explain_model(model)
    scripted = nn.Sequential(torch.jit.script(nn.Linear(2, 2)))
    assert accelerate(scripted, inplace=True) is scripted


def test_only_modules_are_accepted():
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got str"):
        accelerate("model")


def test_explain_before_and_after():
    model = cifar_net()
    before = explain_model(model)
    assert "features.HybridBlock1: HybridBlock, would be swapped for pyext.nn.HybridBlock" in before
    assert "features.Transition1: Transition, would be swapped for pyext.nn.Transition" in before
    assert "no fused form: 1 BatchNorm2d, 1 Conv2d, 1 Linear" in before
    after = explain_model(accelerate(model))
    assert "features.HybridBlock1.SMG2: SMG, swapped, was published_hcgnet.SMG" in after
    assert "would be" not in after
    frozen = accelerate(model)
    frozen.features.Transition1.bn_forget.eval()
    assert "runs submodule by submodule: the four normalisations differ" in explain_model(frozen)
